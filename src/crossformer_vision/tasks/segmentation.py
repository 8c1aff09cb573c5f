"""Semantic segmentation: losses, intersection over union, and what a validation shows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from crossformer_vision.data.segmentation import IGNORED
from crossformer_vision.errors import UserError
from crossformer_vision.files import write_csv
from crossformer_vision.models import drop_path, find_model
from crossformer_vision.models.dense.segmenters import (
    UPerNet,
    class_map,
    create_segmenter,
    logits_of,
    logs_of,
    segment,
)
from crossformer_vision.plotting import visualize
from crossformer_vision.tasks.base import Task, describe_initial_weights, starts_from_published
from crossformer_vision.weights.checkpoints import load_checkpoint

SHOWN = 6  # validation images in the picture of predictions
LEAST_LOG = math.log(1e-8)  # of a probability


class Segmentation(Task):
    """Train and validate Semantic FPN or UPerNet on any timm backbone.

    Args:
        segmenter: `semantic_fpn` or `upernet`.
        model: timm name of the backbone, with a tag (`crossformer_small.in1k`) to choose weights.
        num_classes: classes of pixels; the command takes them from the data.
        pretrained: start from the backbone's published weights; null where they are here or can be
            fetched, with a notice where not.
        checkpoint: start from these weights instead, of a segmenter or of a backbone, published or own;
            layers of another class count are trained anew.
        model_args: further keywords of the backbone, such as `{group_size: [14, 14, 7, 7]}`.
        drop_path_rate: stochastic depth of the backbone.
        width: channels of the pyramid; null for 256 (Semantic FPN) or 512 (UPerNet).
        dropout: before the classifier.
        auxiliary_weight: of the loss of UPerNet's auxiliary head.
        avg_non_ignore: divide the loss by the labelled pixels; false divides by all of them, as the published
            segmenters were trained.
        dice: weight of a Dice loss beside the cross-entropy.
        test_scales: factors of the image's size, whose probabilities validation and prediction average.
        test_flip: average with those of the mirrored image, too.
        window: side of sliding windows in validation and prediction, in pixels; null for the whole image, up
            to 2048x2048 pixels, and windows of 1024 beyond.
        window_stride: of the windows; null for two thirds of `window`.
        **optimization: see `Task`.
    """

    name = "segmentation"
    monitor = "val_miou"
    in_line = ("val_pixel_accuracy", "val_loss")

    def __init__(
        self,
        segmenter: Literal["semantic_fpn", "upernet"] = "semantic_fpn",
        model: str = "crossformer_nano",
        num_classes: int = 11,
        pretrained: bool | None = False,
        checkpoint: str | None = None,
        model_args: dict[str, Any] | None = None,
        drop_path_rate: float = 0.0,
        width: int | None = None,
        dropout: float = 0.1,
        auxiliary_weight: float = 0.4,
        avg_non_ignore: bool = True,
        dice: float = 0.0,
        test_scales: tuple[float, ...] = (1.0,),
        test_flip: bool = False,
        window: int | None = None,
        window_stride: int | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.save_hyperparameters()
        published = starts_from_published(model, pretrained, checkpoint)
        self.net = create_segmenter(
            segmenter,
            model,
            num_classes,
            pretrained=published,
            width=width,
            dropout=dropout,
            backbone_args={**drop_path(model, drop_path_rate), **(model_args or {})},
        )
        report = load_checkpoint(self.net, checkpoint) if checkpoint else None
        self.initial_weights = describe_initial_weights(model, num_classes, published, checkpoint, report)
        if isinstance(self.net, UPerNet) and not auxiliary_weight:  # or several processes would wait for it
            self.net.auxiliary_head.requires_grad_(False)
        self.auxiliary_weight, self.dice, self.avg_non_ignore = auxiliary_weight, dice, avg_non_ignore
        self.test_scales = test_scales
        self.test: dict[str, Any] = dict(flip=test_flip, window=window, stride=window_stride)
        self.loss = MeanMetric()
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)
        self.matrix = torch.zeros(num_classes, num_classes)  # of the last validation: true class, predicted
        self.shown: list[tuple[Tensor, Tensor, Tensor]] = []  # image, true and predicted class map

    def configure_model(self) -> None:
        if self.trainer.world_size > 1 and self.trainer.strategy.root_device.type == "cuda":  # not for CPUs
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    def forward(self, views: Tensor | Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Normalised images (B, 3, H, W), or one such a scale -> probabilities (B, num_classes, *size)."""
        return segment(self.net, [views] if isinstance(views, Tensor) else views, size=size, **self.test)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        log: dict[str, Any] = dict(on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        alone = isinstance(self.net, UPerNet) and len(images) == 1
        if alone and not any(isinstance(m, nn.SyncBatchNorm) for m in self.net.modules()):
            raise UserError("upernet normalises over a batch: take --data.batch_size 2 or more")
        if isinstance(self.net, UPerNet) and self.auxiliary_weight:
            logits, auxiliary = self.net.forward_auxiliary(images)
            auxiliary_loss = cross_entropy(auxiliary, labels, self.avg_non_ignore)
            self.log("train_auxiliary_loss", auxiliary_loss, **log)
            loss = self.compute_loss(logits, labels) + self.auxiliary_weight * auxiliary_loss
        else:
            logits = self.net(images)
            loss = self.compute_loss(logits, labels)
        if self.dice:
            dice = dice_loss(logits, labels)
            self.log("train_dice_loss", dice, **log)
            loss = loss + self.dice * dice
        self.log("train_loss", loss, prog_bar=True, **log)
        return loss

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a training batch's head, to be overridden; `val_loss` is the cross-entropy in any case.

        Auxiliary head and Dice come beside it, by their options.

        Args:
            logits: (B, classes, H, W).
            labels: (B, H, W), 255 for ignored pixels.
        """
        return cross_entropy(logits, labels, self.avg_non_ignore)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Normalised images (B, 3, H, W), or a validation batch -> class maps (B, H, W)."""
        if batch is None:
            return None
        if isinstance(batch, Tensor):
            return class_map(self([batch]))
        views, labels = batch
        return class_map(self([views] if isinstance(views, Tensor) else views, labels.shape[1:]))

    def describe(self) -> dict[str, Any]:
        cfg = find_model(self.hparams["model"])
        sizes = dict(short_side=None, long_side=None, size_divisor=1)
        return {**super().describe(), "image": dict(mean=list(cfg.mean), std=list(cfg.std), **sizes)}

    def on_validation_epoch_start(self) -> None:
        self.shown = []

    def validation_step(self, batch: tuple[Tensor | list[Tensor], Tensor] | None, batch_idx: int) -> None:
        if batch is None:
            return
        views, labels = batch
        views = [views] if isinstance(views, Tensor) else views
        known = labels != IGNORED
        true = torch.where(known, labels, 0)
        if len(views) == 1 and not self.test["flip"]:  # the probabilities of all classes are not needed
            windows = self.test["window"], self.test["stride"]
            size = (labels.shape[1], labels.shape[2])
            logits = logits_of(self.net, views[0], size, *windows)
            predicted, logs = class_map(logits), logs_of(logits, true)
        else:
            probabilities = self(views, labels.shape[1:])
            predicted, logs = class_map(probabilities), probabilities.gather(1, true[:, None])[:, 0].log()
        if counted := known.sum():
            self.loss.update(-logs.clamp(min=LEAST_LOG)[known].mean(), counted)
            self.confusion.update(predicted, labels)
        batches = self.batches_evaluated
        if batch_idx % max(1, batches // SHOWN) == 0 and len(self.shown) < SHOWN:
            self.shown.append((views[0][0].float().cpu(), labels[0].cpu(), predicted[0].cpu()))

    def on_validation_epoch_end(self) -> None:
        self.matrix = self.confusion.compute().double().cpu()
        iou, accuracy = class_scores(self.matrix)
        metrics = {
            "loss": self.loss.compute(),
            "miou": iou.nanmean(),
            "pixel_accuracy": self.matrix.trace() / self.matrix.sum(),
            "mean_accuracy": accuracy.nanmean(),
        }
        for name, value in metrics.items():
            value = value.to(self.device, torch.float32).nan_to_num(0)  # nothing is labelled
            self.log(f"val_{name}", value, prog_bar=f"val_{name}" == self.monitor)
        self.loss.reset()
        self.confusion.reset()

    def pictures(self, folder: Path, classes: list[str]) -> None:
        """Draw the last validation: `predictions.png`, `class_iou.png`; its table: `classes.csv`."""
        iou, accuracy = class_scores(self.matrix)
        share = self.matrix.sum(1) / self.matrix.sum().clamp(min=1)
        columns = {"iou": iou, "accuracy": accuracy, "share": share}
        rows: list[dict[str, Any]] = [
            {"class": name, **{key: round(float(values[k]), 4) for key, values in columns.items()}}
            for k, name in enumerate(classes)
        ]
        write_csv(folder / "classes.csv", rows)
        visualize.class_bars(classes, iou.numpy(), "IoU", folder / "class_iou.png")
        cfg = find_model(self.hparams["model"])
        shown = [
            (
                visualize.denormalised(image.numpy(), cfg.mean, cfg.std, self.shown_channels),
                true.numpy(),
                predicted.numpy(),
            )
            for image, true, predicted in self.shown
        ]
        visualize.segmentations(shown, classes, folder / "predictions.png")


def cross_entropy(logits: Tensor, labels: Tensor, avg_non_ignore: bool = True) -> Tensor:
    """Mean over labelled pixels; 0 where there are none.

    Args:
        logits: (B, classes, H, W).
        labels: (B, H, W), 255 for ignored pixels.
        avg_non_ignore: false for the sum over labelled pixels divided by the number of all.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum().clamp(min=1) if avg_non_ignore else labels.numel())


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """One less the soft Dice coefficient (arXiv 1606.04797), mean over the classes that the batch has.

    Args:
        logits: (B, classes, H, W).
        labels: (B, H, W), 255 for ignored pixels.
    """
    counted = (labels != IGNORED)[:, None]
    true = F.one_hot(labels.where(counted[:, 0], 0), logits.shape[1]).movedim(3, 1) * counted
    probabilities = logits.float().softmax(1) * counted
    overlap, size = (probabilities * true).sum((0, 2, 3)), (probabilities + true).sum((0, 2, 3))
    present = true.sum((0, 2, 3)) > 0
    losses = (1 - 2 * overlap / size.clamp(min=1e-6)) * present
    return losses.sum() / present.sum().clamp(min=1)


def class_scores(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and accuracy, of each class; NaN for classes that do not occur.

    Args:
        matrix: (classes, classes) of pixels, by true and predicted class.
    """
    right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return right / (true + predicted - right), right / true
