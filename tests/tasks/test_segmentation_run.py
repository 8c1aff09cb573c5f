"""End-to-end tests of small segmentation runs on the command line, and mean IoU."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data.test_segmentation import maps
from PIL import Image
from small_runs import SEGMENTATION, read_metrics

from crossformer_vision import load_predictor
from crossformer_vision.cli import main
from crossformer_vision.tasks.segmentation import class_scores, cross_entropy, dice_loss

CROSSFORMER = str(Path(sys.executable).with_name("crossformer"))


@pytest.mark.parametrize("segmenter", ["semantic_fpn", pytest.param("upernet", marks=pytest.mark.slow)])
def test_run_outputs(segmenter, tmp_path, capsys):
    """Trains on image files of several sizes; the checkpoint reproduces the metrics and initializes another run."""
    root, folder = tmp_path / "maps", tmp_path / "run"
    maps(root, images=8)
    maps(root, "validation", images=5)
    options = ["--model.segmenter", segmenter, "--data.root", str(root), "--run.dir", str(folder)]
    options += "--run.ema 0.9 --model.dice 0.5 --model.grad_checkpointing true".split()
    assert main(["train", *SEGMENTATION, *options]) == 0
    printed = capsys.readouterr().out
    assert f"training {segmenter} on crossformer_nano" in printed and "mIoU" in printed
    for name in ("curves.png", "predictions.png", "class_iou.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("L").resize((50, 50)).getcolors()) > 5  # not blank
    results = json.loads((folder / "results.json").read_text())
    assert results["segmenter"] == segmenter and 0 <= results["val_miou"] <= 1
    assert ("train_auxiliary_loss" in read_metrics(folder)[0]) == (segmenter == "upernet")
    with open(folder / "classes.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == ["a", "b", "c"]
    mean = np.mean([float(row["iou"]) for row in table])
    assert mean == pytest.approx(results["val_miou"], abs=1e-4)
    assert main(["validate", str(folder)]) == 0
    assert f"val_miou {results['val_miou']:.4f}" in capsys.readouterr().out
    tested = "--model.test_scales [1.0,1.5] --model.test_flip true --model.window 160".split()
    assert main(["validate", str(folder), *tested, "--run.dir", str(tmp_path / "tested")]) == 0
    assert f"loss {results['val_loss']:.4f}" not in capsys.readouterr().out
    assert (tmp_path / "tested/predictions.png").exists()

    other = [*SEGMENTATION, "--model.segmenter", segmenter, "--run.dir", str(tmp_path / "other")]
    start = ["--model.checkpoint", str(folder / "best.ckpt")]
    assert main(["train", *other, "--trainer.max_epochs", "1", *start]) == 0
    assert main(["validate", *SEGMENTATION, "--model.segmenter", segmenter, "--checkpoint", start[1]]) == 1
    assert "is not among the run's ['a', 'b', 'c']" in capsys.readouterr().err
    if segmenter == "upernet":
        alone = [*SEGMENTATION, "--model.segmenter", segmenter, "--data.batch_size", "1"]
        assert main(["train", *alone, "--run.dir", str(tmp_path / "alone")]) == 1
        assert "upernet normalises over a batch: take --data.batch_size 2 or more" in capsys.readouterr().err


def test_run_with_max_steps(tmp_path, capsys, monkeypatch):
    """Trains by steps with the poly schedule; the last step is within an epoch and is validated."""
    options = f"--run.dir {tmp_path} --trainer.max_epochs -1 --trainer.max_steps 6 --model.schedule poly"
    options += " --trainer.val_check_interval 3 --trainer.check_val_every_n_epoch null --model.min_lr 0"
    options += " --model.warmup_steps 0 --model.lr 0.01 --model.power 0.5"
    by_epochs = options.replace("--model.warmup_steps 0", "--model.warmup_epochs 1").replace(
        str(tmp_path), "other"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SEGMENTATION, *by_epochs.split()]) == 0  # requires the length of an epoch
    assert main(["train", *SEGMENTATION, *options.split()]) == 0
    assert "step 6/6" in capsys.readouterr().out
    first, last = read_metrics(tmp_path)  # four steps per epoch
    assert [int(row["step"]) for row in (first, last)] == [4, 6]
    assert float(first["lr"]) == pytest.approx(0.01 * (1 - 4 / 6) ** 0.5)
    assert float(last["val_miou"]) > 0 and (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_iou_is_computed_over_all_pixels(processes, tmp_path):
    """Compares with pixel counts over all files; five images are split unevenly across two processes."""
    root, folder = tmp_path / "maps", tmp_path / "run"
    maps(root, images=8)
    maps(root, "validation", images=5)
    options = f"--data.root {root} --run.dir {folder} --trainer.max_epochs 1 --trainer.devices {processes}"
    options += f" --trainer.strategy {'ddp' if processes > 1 else 'auto'}"
    options += " --trainer.precision 32"  # same precision as the predictor
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([CROSSFORMER, "train", *SEGMENTATION, *options.split()], check=True, env=threads)
    predictor = load_predictor(folder / "best.ckpt")
    truth, found = [], []
    for file in sorted((root / "images/validation").rglob("*.png")):
        found.append(predictor(file).class_map.ravel())
        truth.append(np.asarray(Image.open(str(file).replace("images", "annotations"))).ravel())
    truth, found = np.concatenate(truth), np.concatenate(found)
    found, truth = found[truth != 255], truth[truth != 255]
    ious = [((truth == k) & (found == k)).sum() / ((truth == k) | (found == k)).sum() for k in range(3)]
    results = json.loads((folder / "results.json").read_text())
    for name, figure in {
        "val_miou": np.mean(ious),
        "val_mean_accuracy": np.mean([(found[truth == k] == k).mean() for k in range(3)]),
        "val_pixel_accuracy": (found == truth).mean(),
    }.items():
        assert results[name] == pytest.approx(figure, abs=1e-6)


def test_ignored_pixels_have_no_gradient():
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    labels = torch.randint(0, 3, (2, 8, 8))
    nothing = torch.full_like(labels, 255)
    for loss in (cross_entropy, dice_loss):
        assert loss(logits, nothing).item() == 0
        (gradient,) = torch.autograd.grad(loss(logits, nothing), logits)
        assert (gradient == 0).all()
        half = labels.clone()
        half[:, :4] = 255
        assert torch.isclose(loss(logits, half), loss(logits[:, :, 4:], labels[:, 4:]))
        (gradient,) = torch.autograd.grad(loss(logits, half), logits)
        assert (gradient[:, :, :4] == 0).all() and (gradient[:, :, 4:] != 0).any()
    # As in the paper: the sum over labeled pixels divided by the number of all pixels.
    assert torch.isclose(cross_entropy(logits, half, avg_non_ignore=False), cross_entropy(logits, half) / 2)
    right = torch.nn.functional.one_hot(labels, 3).movedim(3, 1) * 50.0
    assert float(dice_loss(right, labels)) == pytest.approx(0, abs=1e-5)
    assert float(dice_loss(right.roll(1, 1), labels)) == pytest.approx(1, abs=1e-5)


def test_class_scores():
    matrix = torch.tensor([[6.0, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    matrix[0, 3] = 4  # predicted class without ground truth
    iou, accuracy = class_scores(matrix)
    assert iou[:2].tolist() == pytest.approx([6 / 13, 3 / 6]) and iou[3] == 0 and iou[2].isnan()
    assert accuracy[:2].tolist() == pytest.approx([0.5, 0.75]) and accuracy[2:].isnan().all()


@pytest.mark.parametrize("decoder", ["UPerNet", "FPN", "Unet", "PAN", "DeepLabV3", "DeepLabV3Plus"])
def test_segmentation_models_pytorch_backbone(decoder):
    """Covers each decoder in docs/libraries.md; the last three require an output stride of 8 or 16."""
    import segmentation_models_pytorch as smp

    net = getattr(smp, decoder)("tu-crossformer_nano.cifar10", encoder_weights=True, classes=5).eval()
    size = (128, 160) if decoder == "PAN" else (96, 64)  # pooling in PAN requires 128 pixels
    with torch.no_grad():
        assert net(torch.zeros(1, 3, *size)).shape == (1, 5, *size)


@pytest.mark.slow
def test_quickstart(tmp_path):
    folder = tmp_path / "run"
    config = "quickstart/semantic_segmentation.yaml"
    subprocess.run([CROSSFORMER, "train", "--config", config, "--run.dir", str(folder)], check=True)
    assert json.loads((folder / "results.json").read_text())["val_miou"] >= 0.8
