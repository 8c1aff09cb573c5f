"""Tests for class weights, balanced sampling and the focal loss."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from label_formats import write_yolo
from PIL import Image
from small_runs import CLASSIFICATION
from spectral_images import write_detection, write_segmentation

from crossformer_vision import (
    Classification,
    ClassificationData,
    DetectionData,
    Segmentation,
    SegmentationData,
    UserError,
    create_detector,
)
from crossformer_vision.cli import main
from crossformer_vision.data.sampling import EpochBatches, sampling_weights
from crossformer_vision.tasks.class_weights import create_class_weights
from crossformer_vision.tasks.classification_losses import focal_loss

OWN_DATA = [o for o in CLASSIFICATION if o not in ("--data.train_images", "--data.val_images", "64", "20")]
COUNTS = {"cat": 24, "dog": 6, "owl": 2}


@pytest.fixture
def root(tmp_path):
    for split, factor in (("train", 1), ("val", 0.5)):
        for k, (name, count) in enumerate(COUNTS.items()):
            (tmp_path / f"{split}/{name}").mkdir(parents=True)
            for n in range(int(count * factor)):
                Image.new("RGB", (32, 32), (80 * k, 3 * n, 0)).save(tmp_path / f"{split}/{name}/{n}.png")
    return tmp_path


def drawn(root, **options):
    """Class of each image of an epoch."""
    data = ClassificationData(root=str(root), batch_size=4, num_workers=0, image_size=32, **options)
    loader = data.train_dataloader()
    labels = data.open("train").source.labels
    return [int(labels[index]) for batch in loader.batches for _, index in batch]


def test_balanced_sampling_draws_classes_equally(root):
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    for power, shares in ((1.0, [1 / 3] * 3), (0.5, [0.699, 0.221, 0.0737])):
        batches = EpochBatches(
            1000, 10, 0, True, weights=sampling_weights(labels[:, None] == np.arange(3), power)
        )
        chosen = np.bincount([labels[i] for batch in batches for _, i in batch]) / 1000
        np.testing.assert_allclose(chosen, shares, atol=0.05)
    assert drawn(root).count(0) == 24
    assert 4 < drawn(root, sampling="balanced").count(2) < 20


def test_balanced_sampling_is_the_same_for_two_processes():
    weights = sampling_weights(np.arange(40)[:, None] % 3 == np.arange(3), 1.0)
    one = EpochBatches(40, 8, 5, True, weights=weights)
    both = [EpochBatches(40, 4, 5, True, rank, 2, weights=weights) for rank in range(2)]
    for batches in (one, *both):
        batches.set_epoch(3)
    for whole, first, second in zip(one, *both, strict=True):
        assert sorted(whole) == sorted(first + second)


def test_class_weights_follow_the_counts(root):
    task = Classification(
        "crossformer_nano", 3, model_args={"depths": (1, 1, 1, 1)}, class_weights="balanced"
    )
    data = ClassificationData(root=str(root), image_size=32, batch_size=4, num_workers=0)
    assert data.class_counts().tolist() == list(COUNTS.values())
    counts = torch.tensor(list(COUNTS.values()), dtype=torch.float32)
    task.loss_weights = counts.sum() / (3 * counts)
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    losses = F.cross_entropy(logits, targets, label_smoothing=0.1, weight=task.loss_weights, reduction="none")
    torch.testing.assert_close(task.compute_loss(logits, targets), losses.mean())


def test_focal_loss():
    logits, targets = torch.randn(6, 4, requires_grad=True), torch.randint(0, 4, (6,))
    one_hot = F.one_hot(targets, 4).float()
    torch.testing.assert_close(focal_loss(logits, one_hot, 0.0), F.cross_entropy(logits, targets))
    p = logits.softmax(1)[torch.arange(6), targets]
    torch.testing.assert_close(focal_loss(logits, one_hot, 2.0), (-((1 - p) ** 2) * p.log()).mean())
    weights = torch.tensor([1.0, 2, 3, 4])
    expected = (-((1 - p) ** 2) * p.log() * weights[targets]).mean()
    torch.testing.assert_close(focal_loss(logits, one_hot, 2.0, weights), expected)


def test_run_with_all_options(root, tmp_path):
    run = tmp_path / "run"
    options = ["--data.sampling", "sqrt", "--model.class_weights", "balanced", "--model.loss", "focal"]
    options += ["--model.mixup", "0.2", "--data.batch_size", "4", "--trainer.max_epochs", "1"]
    assert main(["train", str(root), *OWN_DATA, *options, "--run.dir", str(run)]) == 0
    with (run / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["images"]) for row in rows] == [("cat", "12"), ("dog", "3"), ("owl", "1")]
    assert {"precision", "recall", "f1"} <= set(rows[0])
    assert main(["validate", str(run)]) == 0
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 values, but there are 3 classes"),
        ({"class_weights": "balancd"}, "class_weights='balancd': must be one of .*Did you mean 'balanced'"),
        ({"class_weights": [1.0, -2.0, 1.0]}, "class_weights=-2.0: must be a number at least 0"),
        ({"loss": "focall"}, "loss='focall': must be one of"),
        ({"focal_gamma": -1}, "focal_gamma=-1: must be a number at least 0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        Classification("crossformer_nano", 3, model_args={"depths": (1, 1, 1, 1)}, **options)


def test_digits_cannot_be_balanced(capsys):
    assert main(["train", *CLASSIFICATION, "--data.sampling", "balanced"]) == 1
    assert "the bundled digits: balancing classes needs class folders" in capsys.readouterr().err


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_class_weights_of_detectors(detector, tmp_path):
    torch.manual_seed(0)
    net = create_detector(detector, "crossformer_nano", 2, width=16, min_size=64, max_size=64).train()
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}
    targets = [{**target, "labels": torch.tensor([label])} for label in (1, 2)]

    def losses(weights):
        net.set_class_weights(None if weights is None else torch.tensor(weights))
        torch.manual_seed(0)
        return net(images, targets)

    name = "classification" if detector == "retinanet" else "loss_classifier"
    plain, ones, doubled = losses(None), losses([1.0, 1.0]), losses([1.0, 9.0])
    for key, value in plain.items():
        torch.testing.assert_close(ones[key], value)
        assert (doubled[key] > value) == (key == name)


def test_balancing_of_objects_and_pixels(tmp_path):
    write_yolo(tmp_path / "yolo")
    data = DetectionData(root=str(tmp_path / "yolo"), sampling="balanced", num_workers=0, batch_size=2)
    counts = data.class_counts()
    source = data.open("train").source
    assert counts.sum() == len(source.labels) and counts[source.labels[0] - 1] > 0
    data.train_dataloader()
    root = write_segmentation(tmp_path / "maps")
    maps = SegmentationData(root=str(root), sampling="sqrt", num_workers=0, crop_size=32)
    assert maps.class_counts().tolist() == [4 * (40 * 48 - 600), 4 * 600]
    maps.train_dataloader()
    task = Segmentation(num_classes=2, class_weights="balanced", in_chans=4)
    weights = create_class_weights(task.class_weights, maps)
    assert float(weights @ torch.tensor([1320.0, 600]) / 1920) == pytest.approx(1)
    task.loss_weights = weights
    logits, labels = torch.randn(1, 2, 4, 4), torch.randint(0, 2, (1, 4, 4))
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights[labels]).mean()
    torch.testing.assert_close(task.compute_loss(logits, labels), expected)
    with pytest.raises(UserError, match="bundled digits"):
        DetectionData(sampling="balanced").train_dataloader()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_runs_of_dense_tasks_with_balanced_classes(task, tmp_path):
    root = {"detection": write_detection, "segmentation": write_segmentation}[task](tmp_path / "data")
    sizes = {"detection": "--model.min_size 64 --model.max_size 64", "segmentation": "--data.crop_size 48"}
    options = f"""--trainer.max_epochs 1 --data.num_workers 0 --data.batch_size 2 {sizes[task]}
      --model.width 16 --model.class_weights balanced --data.sampling sqrt --run.dir {tmp_path}/run""".split()
    assert main(["train", str(root), *options]) == 0
    columns = next(csv.reader((tmp_path / "run/classes.csv").open()))
    assert ("objects" if task == "detection" else "pixels") in columns
