"""End-to-end tests of small detection runs on the command line, and COCO metrics."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data.test_detection import coco
from faster_coco_eval.core import mask as rle
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_runs import DETECTION, read_metrics

from crossformer_vision.cli import main
from crossformer_vision.tasks.detection import Detection
from crossformer_vision.weights.reading import read_checkpoint

CROSSFORMER = str(Path(sys.executable).with_name("crossformer"))


def read_weights(path):
    return read_checkpoint(path)["state_dict"]


@pytest.mark.parametrize("detector, kinds", [("retinanet", ["box"]), ("mask_rcnn", ["box", "mask"])])
def test_run_outputs(detector, kinds, tmp_path, capsys):
    """Trains on image files of various sizes, including a crowd and an image without objects."""
    for split, images in (("train", 8), ("val", 5)):
        coco(tmp_path / "coco", split, images)
    folder = tmp_path / "run"
    options = [
        "--model.detector",
        detector,
        "--data.root",
        str(tmp_path / "coco"),
        "--run.dir",
        str(folder),
    ]
    options += "--run.ema 0.9 --data.scale_jitter [0.5,1.5] --model.grad_checkpointing true".split()
    assert main(["train", *DETECTION, *options]) == 0
    printed = capsys.readouterr().out
    assert f"training {detector} on crossformer_nano" in printed and f"{kinds[-1]} AP" in printed
    for name in ("curves.png", "predictions.png", "precision_recall.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("L").resize((50, 50)).getcolors()) > 5  # not blank
    results = json.loads((folder / "results.json").read_text())
    assert results["detector"] == detector and results["model"] == "crossformer_nano.cifar10"
    for kind in kinds:
        assert 0 <= results[f"val_{kind}_ap"] <= results[f"val_{kind}_ap50"] <= 1
    assert ("val_mask_ap" in results) == ("mask" in kinds)
    with open(folder / "classes.csv") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["a", "b"]
    assert main(["validate", str(folder)]) == 0
    assert f"val_{kinds[-1]}_ap {results[f'val_{kinds[-1]}_ap']:.4f}" in capsys.readouterr().out

    # The checkpoint initializes a run with other classes; validation on other classes is rejected.
    other = [
        *DETECTION,
        "--model.detector",
        detector,
        "--run.dir",
        str(tmp_path / "other"),
        "--trainer.max_epochs",
        "1",
    ]
    assert main(["train", *other, "--model.checkpoint", str(folder / "best.ckpt")]) == 0
    assert (
        main(
            ["validate", *DETECTION, "--model.detector", detector, "--checkpoint", str(folder / "best.ckpt")]
        )
        == 1
    )
    assert "the digits have other classes than the run" in capsys.readouterr().err


@pytest.mark.slow  # test_run.py covers classification
def test_killed_run_matches_uninterrupted_run(tmp_path):
    """After SIGKILL within an epoch, the resumed run ends with bitwise identical weights."""
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = [
        *DETECTION,
        "--model.detector",
        "mask_rcnn",
        "--run.save_every",
        "1",
        "--model.drop_path_rate",
        "0.1",
    ]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    subprocess.run([CROSSFORMER, "train", *options, "--run.dir", str(alone)], check=True, env=threads)
    process = subprocess.Popen(
        [CROSSFORMER, "train", *options, "--run.dir", str(killed)], env=threads, start_new_session=True
    )
    step = 0
    while step < 3:  # 8 steps per epoch
        assert process.poll() is None
        time.sleep(0.05)
        step = read_checkpoint(killed / "last.ckpt")["global_step"] if (killed / "last.ckpt").exists() else 0
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert read_checkpoint(killed / "last.ckpt")["global_step"] < 16
    subprocess.run([CROSSFORMER, "train", "--resume", str(killed)], check=True, env=threads)
    for name in ("last.ckpt", "best.ckpt"):
        a, b = read_weights(alone / name), read_weights(killed / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


@pytest.mark.slow
def test_two_processes_match_gradient_accumulation(tmp_path):
    """RetinaNet, which uses no random sampling, with an uneven split of seven validation images.

    The losses are normalized by the positives of each process's batch, so two processes match two batches with
    accumulated gradients.
    """
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    for folder, devices in (("one", 1), ("two", 2)):
        options = f"--trainer.devices {devices} --trainer.strategy {'ddp' if devices > 1 else 'auto'}"
        options += f" --trainer.accumulate_grad_batches {2 // devices} --data.batch_size 1"
        options += f" --data.train_images 16 --run.dir {tmp_path / folder}"
        options += " --model.optimizer sgd --model.lr 0.01"  # Adam amplifies rounding errors
        subprocess.run([CROSSFORMER, "train", *DETECTION, *options.split()], check=True, env=threads)
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if name != "images_per_second":
                assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3, abs=1e-4), name
    a, b = read_weights(tmp_path / "one/last.ckpt"), read_weights(tmp_path / "two/last.ckpt")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)


def test_metrics_match_pycocotools(tmp_path):
    """Compares crowds, several classes, all object sizes, boxes and masks."""
    rng = np.random.default_rng(0)
    images, truth, found, batches = [], [], [], []
    for image_id in range(12):
        objects, guesses = [], []
        images.append(dict(id=image_id, width=300, height=200))
        for _ in range(rng.integers(0, 12)):
            w, h = np.exp(rng.uniform(2, 5, 2)).clip(4, 190)
            x, y = rng.uniform(0, 300 - w), rng.uniform(0, 200 - h)
            objects.append(((x, y, w, h), int(rng.integers(1, 4)), int(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 3)):
                near = np.array([x, y, w, h]) + rng.normal(0, 0.1, 4) * [w, h, w, h]
                label = objects[-1][1] if rng.random() < 0.8 else int(rng.integers(1, 4))
                guesses.append((near.clip(0), label, float(rng.random())))

        def masked(items):
            masks = np.zeros((len(items), 200, 300), np.uint8)
            for mask, ((x, y, w, h), *_) in zip(masks, items, strict=True):
                mask[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1] = 1
            return masks

        for store, items, masks in ((truth, objects, masked(objects)), (found, guesses, masked(guesses))):
            for (box, label, extra), mask in zip(items, masks, strict=True):
                shape = rle.encode(np.asfortranarray(mask))
                box = [float(np.float32(v)) for v in box]
                entry = dict(
                    id=len(store) + 1, image_id=image_id, category_id=label, bbox=box, segmentation=shape
                )
                entry |= (
                    dict(iscrowd=extra, area=int(mask.sum()))
                    if store is truth
                    else dict(score=np.float32(extra))
                )
                store.append(entry)

        def tensors(items, masks):
            boxes = torch.tensor(np.array([box for box, *_ in items], np.float32).reshape(-1, 4))
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor([label for _, label, _ in items], dtype=torch.int64)
            return dict(boxes=boxes, labels=labels, masks=torch.from_numpy(masks).bool())

        extras = torch.tensor([extra for *_, extra in objects], dtype=torch.int64)
        area = torch.from_numpy(masked(objects).sum((1, 2)).astype(np.float32))
        scores = torch.tensor([score for *_, score in guesses])
        batches.append(
            (
                [{**tensors(guesses, masked(guesses)), "scores": scores}],
                [{**tensors(objects, masked(objects)), "iscrowd": extras, "area": area}],
            )
        )

    task = Detection("mask_rcnn", "crossformer_nano", 3, width=16, min_size=64)
    for batch in batches:
        task.metric.update(*batch, [batch[1][0]["masks"].shape[1:]])
    figures, task.precisions = task.metric.compute()
    assert not task.metric.detections and not task.metric.ground_truth
    reference = COCO()
    reference.dataset = {
        "images": images,
        "annotations": truth,
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
    }
    reference.createIndex()
    for kind, ours in (("bbox", "box"), ("segm", "mask")):
        # Mask results omit boxes; otherwise pycocotools would use the box area.
        results = [{k: v for k, v in entry.items() if kind == "bbox" or k != "bbox"} for entry in found]
        evaluation = COCOeval(reference, reference.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", None, None, "recall")
        for name, expected in zip(names, evaluation.stats, strict=False):
            if name:
                assert figures[f"{ours}_{name}"] == pytest.approx(expected, abs=1e-6), (kind, name)
        per_class = [row[f"{ours}_ap"] for row in task.class_table(["1", "2", "3"])]
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        assert per_class == pytest.approx([precision[:, :, k].mean() for k in range(3)], abs=1e-4)


@pytest.mark.parametrize(
    "options, code, message",
    [
        ("--data.root nowhere", 1, "nowhere: no such folder"),
        ("--model.detector yolo", 2, "yolo"),
        ("--model.backbone vit_small_patch14_dinov2", 1, "One of 8, 16 or 32 is needed"),
        ("--model.checkpoint wrong.pth", 1, "wrong.pth: none of its weights fits this model"),
        ("--task fly", 1, "unknown task 'fly'. Choose from classification, detection"),
    ],
)
def test_errors_are_one_line(options, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(3)}, "wrong.pth")
    words = DETECTION[2:] if "--task" in options else DETECTION
    if "--model.backbone" in options:
        words = [w for w in words if "model_args" not in w and "depths" not in w]
    assert main(["train", *words, *options.split(), "--run.dir", "run"]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, metric, least", [("detection", "box", 0.8), ("instance_segmentation", "mask", 0.75)]
)
def test_quickstart(name, metric, least, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(
        [CROSSFORMER, "train", "--config", f"quickstart/{name}.yaml", "--run.dir", str(folder)], check=True
    )
    assert json.loads((folder / "results.json").read_text())[f"val_{metric}_ap50"] >= least
