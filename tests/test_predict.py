"""Trained checkpoints on images and folders: results, pictures, JSON, errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from tasks.test_detection_run import TINY as DETECTION
from tasks.test_run import TINY as CLASSIFICATION

from crossformer_vision import UserError, load_predictor
from crossformer_vision.cli import main
from crossformer_vision.info import PUBLISHED, describe
from crossformer_vision.predict import Detected


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A classifier's and a Mask R-CNN's run of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    one = ["--trainer.max_epochs", "1", "--run.folder"]
    assert main(["train", *CLASSIFICATION, *one, str(folder / "classifier")]) == 0
    mask_rcnn = ["--model.detector", "mask_rcnn", "--model.detector_args", '{"box_score_thresh":0.0}']
    assert main(["train", *DETECTION, *mask_rcnn, *one, str(folder / "detector")]) == 0
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder with images of several sizes and kinds, one of them in a folder below."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 255, (64, 50), dtype=np.uint8)).save(folder / "b.jpg")
    Image.fromarray(rng.integers(0, 255, (40, 120, 4), dtype=np.uint8)).save(folder / "below/a.png")
    return folder


def test_classifier(runs, images, tmp_path, capsys):
    predictor = load_predictor(runs / "classifier/best.ckpt")
    result = predictor(images / "a.png")
    assert result.probabilities.sum() == pytest.approx(1, abs=1e-5) and len(result.classes) == 10
    assert str(result).startswith(f"{images / 'a.png'}: {result.top(1)[0][0]} ")
    assert predictor(Image.open(images / "a.png")).top() == result.top()
    assert main(["predict", str(runs / "classifier"), str(images), "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["image"] for entry in written] == [
        str(images / n) for n in ("a.png", "b.jpg", "below/a.png")
    ]
    assert written[0]["classes"][0]["probability"] == pytest.approx(result.top(1)[0][1], abs=1e-5)
    assert (tmp_path / "out/below/a.png").exists() and "3 pictures" in capsys.readouterr().out


def test_detector_writes_coco(runs, images, tmp_path):
    out = tmp_path / "out"
    options = ["--out", str(out), "--score", "0.05"]
    assert main(["predict", str(runs / "detector"), str(images), str(images / "a.png"), *options]) == 0
    for name, size in (
        ("a.png", (90, 70)),
        ("b.png", (50, 64)),
        ("below/a.png", (120, 40)),
        ("a-2.png", (90, 70)),
    ):
        assert Image.open(out / name).size == size
    found = COCO(str(out / "predictions.json"))
    assert [image["width"] for image in found.dataset["images"]] == [90, 50, 120, 90]
    assert [category["name"] for category in found.dataset["categories"]] == [str(i) for i in range(10)]
    result = load_predictor(runs / "detector/best.ckpt", score=0.05)(images / "a.png")
    annotations = found.loadAnns(found.getAnnIds(imgIds=[1]))
    assert len(annotations) == len(result.boxes) > 0 and (result.scores >= 0.05).all()
    for annotation, box, mask in zip(annotations, result.boxes, result.masks, strict=True):
        x, y, w, h = annotation["bbox"]
        assert [x, y, x + w, y + h] == pytest.approx(box.tolist(), abs=0.02)
        assert (found.annToMask(annotation) == mask).all() and annotation["area"] == mask.sum()


def test_a_drawn_result():
    image = Image.new("RGB", (200, 100), (40, 40, 40))
    mask = np.zeros((1, 100, 200), np.uint8)
    mask[0, 40:80, 50:90] = 1
    boxes = np.array([[50, 40, 90, 80]], np.float32)
    result = Detected(
        "x.png", image, ["cell", "nucleus"], boxes, np.array([2]), np.array([0.9], np.float32), mask
    )
    assert str(result) == "x.png: 1 nucleus"
    drawn = np.asarray(result.plot())
    assert drawn.shape == (100, 200, 3) and (np.asarray(image) == 40).all()  # the image itself is left alone
    assert (
        (drawn[60, 70] != 40).any()
        and (drawn[90:, 120:] == 40).all()
        and (drawn[80, 55:85] != 40).any(1).all()
    )


def test_one_that_cannot_be_read_stops_no_other(runs, images, tmp_path, capsys):
    (images / "a.png").write_bytes(b"rubbish")
    assert main(["predict", str(runs / "classifier"), str(images), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "a.png: cannot read this image" in error and "1 of 3 images were left out" in error
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())) == 2


def test_errors(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "bare.pth")
    for args, message in (
        ([str(runs / "classifier"), "nowhere.png"], "nowhere.png: no such file or folder"),
        ([str(runs / "classifier"), str(tmp_path / "empty")], "empty: no images in this folder"),
        ([str(tmp_path / "none.ckpt"), "x.png"], "none.ckpt: no such checkpoint file"),
        ([str(tmp_path / "bare.pth"), "x.png"], "bare.pth: not a checkpoint of a run"),
    ):
        assert main(["predict", *args]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1
    with pytest.raises(UserError, match="x.png: cannot read this image .no such file."):
        load_predictor(runs / "classifier/best.ckpt")("x.png")


def test_info_stands_beside_the_published_figures(capsys):
    assert main(["info", "crossformer_small", "--detector", "mask_rcnn"]) == 0
    printed = capsys.readouterr().out
    assert "parameters  50.2 M" in printed and "published   50.2 M, 301.0 G at 1280x800" in printed
    assert "MACs        4.906 G at 224x224" in describe("crossformer_small")
    assert ("crossformer_small", "retinanet") in PUBLISHED
    assert main(["info", "crossformer_smal"]) == 1
    assert "did you mean crossformer_small" in capsys.readouterr().err
