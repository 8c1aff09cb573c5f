"""Tests for sharing models with timm and transformers: weights, model card and file protection."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import classifier_checkpoint, segmenter_checkpoint
from small_runs import CLASSIFICATION

from crossformer_vision import load_predictor
from crossformer_vision.cli import main

ARGS = '{"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8]}'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("share") / "run"
    one = ["--trainer.max_epochs", "1", "--model.model_args", ARGS, "--run.dir", str(folder)]
    assert main(["train", *CLASSIFICATION, *one]) == 0
    return folder


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.filterwarnings("ignore")
def test_shared_model_loads_in_timm_and_transformers(run, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "below/model"
    assert main(["share", str(run), "--to", str(folder)]) == 0
    assert f'timm.create_model("local-dir:{folder}", pretrained=True)' in capsys.readouterr().out
    predictor = load_predictor(run, "cpu")
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, *predictor.info.image["input_size"])
    with torch.no_grad():
        assert torch.equal(net(images), predictor.net(images))
    prepared = timm.data.resolve_model_data_config(net)
    for key, value in predictor.info.image.items():
        assert prepared[key] == (list(value) if isinstance(value, tuple) else value), key
    from transformers import pipeline

    found = pipeline("image-classification", model=str(folder))(str(photo))
    expected = predictor(photo).top()
    assert [one["label"] for one in found] == [name for name, _ in expected]
    assert [one["score"] for one in found] == pytest.approx([p for _, p in expected], abs=1e-5)

    (folder / "new.txt").touch()
    usual = (folder / "new.txt").stat().st_mode
    (folder / "new.txt").unlink()
    assert {file.stat().st_mode for file in folder.iterdir()} == {usual}  # permissions follow the umask
    card = (folder / "README.md").read_text()
    accuracy = json.loads((run / "results.json").read_text())["val_accuracy"]
    assert f"{accuracy:.2%}" in card and "![curves](curves.png)" in card and card.startswith("---\ntags:")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "confusion_matrix.png", "curves.png", "model.safetensors",
    ]  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] is None
    assert not list(folder.parent.glob(".share-*"))


def test_model_card_omits_metrics_of_other_checkpoints(run, tmp_path):
    """``results.json`` contains the metrics of best.ckpt."""
    assert main(["share", str(run / "last.ckpt"), "--to", str(tmp_path / "last")]) == 0
    card = (tmp_path / "last/README.md").read_text()
    assert "Accuracy" not in card and "curves" not in card
    assert main(["share", str(run / "best.ckpt"), "--to", str(tmp_path / "best")]) == 0
    assert "Accuracy" in (tmp_path / "best/README.md").read_text()


def test_model_card_of_other_families(tmp_path):
    """The card of a model of timm neither imports this library nor cites CrossFormer."""
    torch.save(classifier_checkpoint("pvt_v2_b0", depths=(1, 1, 1, 1)), tmp_path / "x.ckpt")
    assert main(["share", str(tmp_path / "x.ckpt"), "--to", str(tmp_path / "pvt")]) == 0
    card = (tmp_path / "pvt/README.md").read_text()
    assert "import crossformer_vision" not in card and "Citation" not in card
    torch.save(classifier_checkpoint("crossformer_pp_small", depths=(1, 1, 1, 1)), tmp_path / "y.ckpt")
    assert main(["share", str(tmp_path / "y.ckpt"), "--to", str(tmp_path / "pp")]) == 0
    card = (tmp_path / "pp/README.md").read_text()
    assert "import crossformer_vision" in card and "CrossFormer++" in card


def test_share_published_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text('{"val_accuracy": 0.123}')  # unrelated results
    assert main(["share", "crossformer_nano.cifar10", "--to", str(tmp_path / "nano")]) == 0
    net = timm.create_model(f"local-dir:{tmp_path / 'nano'}", pretrained=True).eval()
    assert "12.3" not in (tmp_path / "nano/README.md").read_text()
    theirs = timm.create_model("crossformer_nano.cifar10", pretrained=True).eval()
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        assert torch.equal(net(images), theirs(images))


def test_invalid_arguments(run, tmp_path, capsys):
    def said(*args):
        assert main(["share", *args]) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    assert "already exists. Choose a new folder" in said(str(run), "--to", str(tmp_path / "mine"))
    assert "already exists" in said(str(run), "--to", str(tmp_path / "mine/README.md"))
    assert (tmp_path / "mine/README.md").read_text() == "mine"
    assert "not a repository, such as hf:owner/name" in said(str(run), "--to", "hf:mine")
    torch.save(segmenter_checkpoint("crossformer_nano"), tmp_path / "best.ckpt")
    assert "not segmentation models" in said(str(tmp_path / "best.ckpt"), "--to", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
