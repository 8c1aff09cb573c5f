"""Semantic segmentation: losses, intersection over union and plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix
from typing_extensions import override

from crossformer_vision.data.class_lists import IGNORED
from crossformer_vision.errors import UserError
from crossformer_vision.files import write_csv
from crossformer_vision.models import drop_path_kwargs, in_chans_kwargs
from crossformer_vision.models.dense.segmenters import UPerNet, create_segmenter
from crossformer_vision.models.dense.windows import class_map, log_prob_at, segment, view_logits
from crossformer_vision.plotting import visualize
from crossformer_vision.tasks.base import Task
from crossformer_vision.tasks.class_weights import ClassWeights, check_class_weights, create_class_weights
from crossformer_vision.tasks.initial_weights import describe_initial_weights, use_published_weights
from crossformer_vision.types import JsonObject, Kwargs
from crossformer_vision.weights.loading import load_checkpoint

PLOTTED = 6  # validation images in predictions.png
MIN_LOG_PROBABILITY = math.log(1e-8)

Batch = tuple[Tensor | list[Tensor], Tensor]


class Segmentation(Task):
    """Train and validate Semantic FPN or UPerNet on any timm backbone.

    Args:
        segmenter: ``semantic_fpn`` or ``upernet``.
        backbone: timm name of the backbone, with a tag (``crossformer_small.in1k``) to choose weights.
        num_classes: Number of classes. The command takes it from the data.
        pretrained: Start from the backbone's published weights; null to use them if they are cached or
            downloadable, with a notice if not.
        checkpoint: Start from this file instead: a segmenter or a backbone, published or own. Layers for
            another number of classes are initialized anew.
        model_args: Further arguments of the backbone, such as ``{group_size: [14, 14, 7, 7]}``.
        in_chans: Number of channels of the images. The command takes it from the data.
        image_mean: Mean of each channel, by which images are normalized; null for the backbone's. The command
            takes it from the data.
        image_std: Standard deviation of each channel, as ``image_mean``.
        drop_path_rate: Stochastic depth rate of the backbone.
        width: Channels of the pyramid; null for 256 (Semantic FPN) or 512 (UPerNet).
        dropout: Dropout before the classifier.
        auxiliary_weight: Weight of the loss of UPerNet's auxiliary head.
        avg_non_ignore: Divide the loss by the number of labeled pixels. False divides by the number of all
            pixels, as in the training of the published segmenters.
        class_weights: Weight of each class in the loss: ``none``; ``balanced``, in inverse proportion to
            its number of training pixels, 1 on average over these; or a list.
        dice: Weight of a Dice loss beside the cross-entropy.
        test_scales: Image scales whose probabilities validation and prediction average.
        test_flip: Also average with the mirrored image.
        window: Side of sliding windows in validation and prediction, in pixels; null for whole images of up
            to 2048x2048 pixels and windows of 1024 beyond.
        window_stride: Stride of the windows; null for two thirds of ``window``.
        **optimization: See ``Task``.

    Raises:
        UserError: If an argument is invalid or the backbone does not accept it.
    """

    name = "segmentation"
    monitor = "val_miou"
    printed_metrics = ("val_pixel_accuracy", "val_loss")

    def __init__(
        self,
        segmenter: Literal["semantic_fpn", "upernet"] = "semantic_fpn",
        backbone: str = "crossformer_nano",
        num_classes: int = 11,
        pretrained: bool | None = False,
        checkpoint: str | None = None,
        model_args: Kwargs | None = None,
        in_chans: int = 3,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        drop_path_rate: float = 0.0,
        width: int | None = None,
        dropout: float = 0.1,
        auxiliary_weight: float = 0.4,
        avg_non_ignore: bool = True,
        class_weights: ClassWeights = "none",
        dice: float = 0.0,
        test_scales: tuple[float, ...] = (1.0,),
        test_flip: bool = False,
        window: int | None = None,
        window_stride: int | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.save_hyperparameters()
        published = use_published_weights(backbone, pretrained, checkpoint)
        self.net = create_segmenter(
            segmenter,
            backbone,
            num_classes,
            pretrained=published,
            width=width,
            dropout=dropout,
            backbone_args={
                **drop_path_kwargs(backbone, drop_path_rate),
                **in_chans_kwargs(in_chans),
                **(model_args or {}),
            },
        )
        report = load_checkpoint(self.net, checkpoint) if checkpoint else None
        self._set_up_finetuning()
        self.initial_weights = describe_initial_weights(backbone, num_classes, published, checkpoint, report)
        if isinstance(self.net, UPerNet) and not auxiliary_weight:
            # Otherwise DDP waits for gradients of these unused parameters.
            self.net.auxiliary_head.requires_grad_(False)
        self.class_weights = check_class_weights(class_weights, num_classes)
        self.loss_weights: Tensor | None
        self.register_buffer("loss_weights", None, persistent=False)
        self.auxiliary_weight, self.dice, self.avg_non_ignore = auxiliary_weight, dice, avg_non_ignore
        self.test_scales = test_scales
        self.test: Kwargs = dict(flip=test_flip, window=window, stride=window_stride)
        self.loss = MeanMetric()
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)
        # Confusion matrix of the last validation: true class, predicted class.
        self.matrix = torch.zeros(num_classes, num_classes)
        self.plotted: list[tuple[Tensor, Tensor, Tensor]] = []  # image, true and predicted class map

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            weights = create_class_weights(self.class_weights, self._data_module)
            self.loss_weights = None if weights is None else weights.to(self.device)

    def configure_model(self) -> None:
        """Synchronize batch norms of several GPUs. torch has no synchronized batch norm on CPUs."""
        if self.trainer.world_size > 1 and self.trainer.strategy.root_device.type == "cuda":
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    def forward(self, views: Tensor | Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Class probabilities of each pixel.

        Args:
            views: Normalized images, shape ``(B, C, H, W)``, or one such tensor per scale.
            size: Height and width of the output. ``None`` for those of the first view.

        Returns:
            Probabilities, shape ``(B, num_classes, *size)``.
        """
        return segment(self.net, [views] if isinstance(views, Tensor) else views, size=size, **self.test)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch: main head, auxiliary head and Dice.

        Raises:
            UserError: If UPerNet's batch norms have a single image.
        """
        images, labels = batch
        log: Kwargs = dict(on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        is_single = isinstance(self.net, UPerNet) and len(images) == 1
        if is_single and not any(isinstance(m, nn.SyncBatchNorm) for m in self.net.modules()):
            raise UserError("upernet has batch norms, which need --data.batch_size 2 or more")
        if isinstance(self.net, UPerNet) and self.auxiliary_weight:
            logits, auxiliary = self.net.forward_auxiliary(images)
            auxiliary_loss = cross_entropy(auxiliary, labels, self.avg_non_ignore, self.loss_weights)
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
        """Loss of the main head. Override it for another loss; ``val_loss`` stays the cross-entropy.

        The losses of the auxiliary head and Dice are added to it.

        Args:
            logits: Shape ``(B, num_classes, H, W)``.
            labels: Class indices, shape ``(B, H, W)``, 255 for ignored pixels.
        """
        return cross_entropy(logits, labels, self.avg_non_ignore, self.loss_weights)

    def predict_step(self, batch: Tensor | Batch | None, batch_idx: int) -> Tensor | None:
        """Class maps, shape ``(B, H, W)``, of normalized images or of a validation batch."""
        if batch is None:
            return None
        if isinstance(batch, Tensor):
            return class_map(self([batch]))
        views, labels = batch
        return class_map(self([views] if isinstance(views, Tensor) else views, labels.shape[1:]))

    def describe(self) -> JsonObject:
        """Classes and preprocessing for a checkpoint."""
        sizes = dict(short_side=None, long_side=None, size_divisor=1)
        mean, std = self.normalization
        return {**super().describe(), "image": dict(mean=mean, std=std, **sizes)}

    def on_validation_epoch_start(self) -> None:
        """Clear the images of the last validation."""
        self.plotted = []

    def validation_step(self, batch: Batch | None, batch_idx: int) -> None:
        """Update the metrics with a batch. ``None`` is a batch without readable images."""
        if batch is None:
            return
        views, labels = batch
        views = [views] if isinstance(views, Tensor) else views
        is_labeled = labels != IGNORED
        true = torch.where(is_labeled, labels, 0)
        if len(views) == 1 and not self.test["flip"]:  # without probabilities of all classes in memory
            windows = self.test["window"], self.test["stride"]
            size = (labels.shape[1], labels.shape[2])
            logits = view_logits(self.net, views[0], size, *windows)
            predicted, log_probabilities = class_map(logits), log_prob_at(logits, true)
        else:
            probabilities = self(views, labels.shape[1:])
            predicted = class_map(probabilities)
            log_probabilities = probabilities.gather(1, true[:, None])[:, 0].log()
        if count := is_labeled.sum():
            losses = -log_probabilities.clamp(min=MIN_LOG_PROBABILITY)[is_labeled]
            self.loss.update(losses.mean(), count)
            self.confusion.update(predicted, labels)
        batches = self.evaluation_batches
        if batch_idx % max(1, batches // PLOTTED) == 0 and len(self.plotted) < PLOTTED:
            self.plotted.append((views[0][0].float().cpu(), labels[0].cpu(), predicted[0].cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all processes."""
        self.matrix = self.confusion.compute().double().cpu()
        iou, accuracy = class_scores(self.matrix)
        metrics = {
            "loss": self.loss.compute(),
            "miou": iou.nanmean(),
            "pixel_accuracy": self.matrix.trace() / self.matrix.sum(),
            "mean_accuracy": accuracy.nanmean(),
        }
        for name, value in metrics.items():
            value = value.to(self.device, torch.float32).nan_to_num(0)  # NaN without labeled pixels
            self.log(f"val_{name}", value, prog_bar=f"val_{name}" == self.monitor)
        self.loss.reset()
        self.confusion.reset()

    def plot(self, plot_dir: Path, classes: list[str]) -> None:
        """Write ``predictions.png``, ``class_iou.png`` and ``classes.csv``."""
        iou, accuracy = class_scores(self.matrix)
        pixels = self.matrix.sum(1)
        columns = {"iou": iou, "accuracy": accuracy, "share": pixels / pixels.sum().clamp(min=1)}
        rows: list[dict[str, str | float]] = [
            {
                "class": name,
                "pixels": int(pixels[k]),
                **{key: round(float(values[k]), 4) for key, values in columns.items()},
            }
            for k, name in enumerate(classes)
        ]
        write_csv(plot_dir / "classes.csv", rows)
        visualize.plot_class_bars(classes, iou.numpy(), "IoU", plot_dir / "class_iou.png")
        rows_plotted = [
            (self.to_display(image), true.numpy(), predicted.numpy())
            for image, true, predicted in self.plotted
        ]
        visualize.plot_segmentations(rows_plotted, classes, plot_dir / "predictions.png")


def cross_entropy(
    logits: Tensor, labels: Tensor, avg_non_ignore: bool = True, weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of labeled pixels; 0 if there are none.

    Args:
        logits: Shape ``(B, num_classes, H, W)``.
        labels: Class indices, shape ``(B, H, W)``, 255 for ignored pixels.
        avg_non_ignore: Divide the sum over labeled pixels by their number; if false, by the number of all
            pixels.
        weights: Weight of each class, shape ``(num_classes,)``.
    """
    total = F.cross_entropy(logits.float(), labels, weights, ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum().clamp(min=1) if avg_non_ignore else labels.numel())


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """One minus the soft Dice coefficient (arXiv 1606.04797), averaged over the classes in the batch.

    Args:
        logits: Shape ``(B, num_classes, H, W)``.
        labels: Class indices, shape ``(B, H, W)``, 255 for ignored pixels.
    """
    is_labeled = (labels != IGNORED)[:, None]
    true = F.one_hot(labels.where(is_labeled[:, 0], 0), logits.shape[1]).movedim(3, 1) * is_labeled
    probabilities = logits.float().softmax(1) * is_labeled
    overlap, size = (probabilities * true).sum((0, 2, 3)), (probabilities + true).sum((0, 2, 3))
    is_present = true.sum((0, 2, 3)) > 0
    losses = (1 - 2 * overlap / size.clamp(min=1e-6)) * is_present
    return losses.sum() / is_present.sum().clamp(min=1)


def class_scores(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union and accuracy of each class, NaN for classes that do not occur.

    Args:
        matrix: Confusion matrix in pixels, shape ``(num_classes, num_classes)``: true class, predicted class.
    """
    correct, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return correct / (true + predicted - correct), correct / true
