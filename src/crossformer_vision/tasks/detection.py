"""Object detection and instance segmentation: losses, COCO metrics and plots."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from typing_extensions import override

from crossformer_vision.data.detection import Batch
from crossformer_vision.files import write_csv
from crossformer_vision.models import drop_path_kwargs, in_chans_kwargs
from crossformer_vision.models.dense.detectors import MaskRCNN, create_detector, normalization_overrides
from crossformer_vision.models.dense.masks import paste_binary_masks
from crossformer_vision.models.dense.transform import return_mask_crops
from crossformer_vision.plotting import visualize
from crossformer_vision.tasks.base import Task
from crossformer_vision.tasks.class_weights import ClassWeights, check_class_weights, create_class_weights
from crossformer_vision.tasks.coco_metrics import CocoMetrics
from crossformer_vision.tasks.detection_matching import best_score_thresholds, confusion_matrix
from crossformer_vision.tasks.initial_weights import describe_initial_weights, use_published_weights
from crossformer_vision.types import Checkpoint, Kwargs
from crossformer_vision.weights.loading import load_checkpoint

PLOTTED = 8  # validation images in predictions.png
PLOT_SIZE = 1280  # maximum longer side of these images, in pixels

Objects = dict[str, Tensor]
"""Objects of an image: ``boxes``, ``labels``, and where present ``scores``, ``masks``, ``iscrowd``."""


class Detection(Task):
    """Train and validate RetinaNet or Mask R-CNN on any timm backbone.

    Args:
        detector: ``retinanet`` for boxes, ``mask_rcnn`` for boxes and masks.
        backbone: timm name of the backbone, with a tag (``crossformer_small.in1k``) to choose weights.
        num_classes: Number of classes. The command takes it from the data.
        pretrained: Start from the backbone's published weights; null to use them if they are cached or
            downloadable, with a notice if not.
        checkpoint: Start from this file instead: a detector or a backbone, published or own. Layers for
            another number of classes are initialized anew.
        model_args: Further arguments of the backbone, such as ``{group_size: [14, 14, 7, 7]}``.
        detector_args: Further arguments of torchvision's detector, such as ``{box_score_thresh: 0.01}``.
        in_chans: Number of channels of the images. The command takes it from the data.
        image_mean: Mean of each channel, by which images are normalized; null for the backbone's. The command
            takes it from the data.
        image_std: Standard deviation of each channel, as ``image_mean``.
        drop_path_rate: Stochastic depth rate of the backbone.
        width: Channels of the pyramid and the heads.
        anchor_scale: Side of a level's smallest anchor, in strides; null for 4 (RetinaNet) or 8 (Mask R-CNN).
        max_detections: Maximum number of objects per image, also in the metrics; 100 for COCO.
        min_size: Images are resized so that the shorter side has this many pixels. From a list, training
            chooses one at random and validation uses the last.
        max_size: Maximum longer side of resized images, in pixels.
        class_weights: Weight of each class in the loss of the classifier: ``none``; ``balanced``, in inverse
            proportion to its number of training objects, 1 on average over these; or a list.
        **optimization: See ``Task``.

    Raises:
        UserError: If an argument is invalid or the backbone does not accept it.
    """

    name = "detection"

    def __init__(
        self,
        detector: Literal["retinanet", "mask_rcnn"] = "retinanet",
        backbone: str = "crossformer_nano",
        num_classes: int = 10,
        pretrained: bool | None = False,
        checkpoint: str | None = None,
        model_args: Kwargs | None = None,
        detector_args: Kwargs | None = None,
        in_chans: int = 3,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        drop_path_rate: float = 0.0,
        width: int = 256,
        anchor_scale: float | None = None,
        max_detections: int = 100,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        class_weights: ClassWeights = "none",
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.save_hyperparameters()
        published = use_published_weights(backbone, pretrained, checkpoint)
        self.net = create_detector(
            detector,
            backbone,
            num_classes,
            pretrained=published,
            width=width,
            anchor_scale=anchor_scale,
            max_detections=max_detections,
            min_size=min_size,
            max_size=max_size,
            backbone_args={
                **drop_path_kwargs(backbone, drop_path_rate),
                **in_chans_kwargs(in_chans),
                **(model_args or {}),
            },
            skip_resize=True,  # in training, the data module resizes
            **{**normalization_overrides(image_mean, image_std), **(detector_args or {})},
        )
        report = load_checkpoint(self.net, checkpoint) if checkpoint else None
        self._set_up_finetuning()
        self.initial_weights = describe_initial_weights(backbone, num_classes, published, checkpoint, report)
        self.class_weights = check_class_weights(class_weights, num_classes)
        self.kinds = ["box", "mask"] if isinstance(self.net, MaskRCNN) else ["box"]
        self.monitor = f"val_{self.kinds[-1]}_ap"
        self.printed_metrics = (f"{self.monitor}50", *(f"val_{kind}_ap" for kind in self.kinds[:-1]))
        self.metric = CocoMetrics(self.kinds, max_detections)
        # Image, ground truth and predictions.
        self.plotted: list[tuple[Tensor, Objects, Objects]] = []
        # Precision by label and by kind (box or mask), from the last validation.
        self.precisions: dict[int, dict[str, np.ndarray]] = {}
        self.counts: dict[int, int] = {}  # of objects by label
        self.thresholds = [0.5] * num_classes  # scores at which F1 is best in the last validation
        self.keep_thresholds = False
        self.matrix = np.zeros(
            (num_classes + 1, num_classes + 1), np.int64
        )  # of objects, see confusion_matrix

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            weights = create_class_weights(self.class_weights, self._data_module)
            self.net.set_class_weights(None if weights is None else weights.to(self.device))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detect objects.

        Args:
            images: Images with values in 0..1, shape ``(C, H, W)`` each.

        Returns:
            Boxes, labels, scores and masks for each image, see ``create_detector``.
        """
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the losses of a batch."""
        images, targets = batch
        losses = self.compute_loss(images, targets)
        loss: Tensor = sum(losses.values())  # type: ignore[assignment]
        log: Kwargs = dict(on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        self.log("train_loss", loss, prog_bar=True, **log)
        for name, value in losses.items():
            self.log(f"train_{name.removeprefix('loss_')}_loss", value, **log)
        return loss

    def compute_loss(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of a training batch by name, whose sum is minimized. Override it for other losses.

        Args:
            images: Images with values in 0..1, shape ``(C, H, W)`` each.
            targets: Boxes, labels and masks of each image.
        """
        return self.net(images, targets)

    def predict_step(self, batch: Batch | list[Tensor] | None, batch_idx: int) -> list[Objects] | None:
        """Objects in each of a list of images, or of a batch with images first."""
        if batch is None:
            return None
        return self(batch[0] if isinstance(batch, tuple) else batch)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        self.metric.reset()
        self.plotted = []

    def validation_step(self, batch: Batch | None, batch_idx: int) -> None:
        """Update the metrics with a batch. ``None`` is a batch without readable images."""
        if batch is None:
            return
        images, targets = batch
        with return_mask_crops(self.net):
            predicted = self(images)
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        self.metric.update(predicted, targets, sizes)
        batches = self.evaluation_batches
        if batch_idx % max(1, batches // PLOTTED) == 0 and len(self.plotted) < PLOTTED:
            self.plotted += [shrink(*one) for one in zip(images, targets, predicted, strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all processes."""
        self.metric.gather()
        self.counts = self.metric.count_objects()
        images = self.metric.detections, self.metric.ground_truth
        if not self.keep_thresholds:
            self.thresholds = best_score_thresholds(*images, self.hparams["num_classes"])
        self.matrix = confusion_matrix(*images, self.thresholds)
        metrics, self.precisions = self.metric.compute()
        for name, value in metrics.items():
            if name.endswith("_ap") or value >= 0:  # -1 if there are no objects of this size
                self.log(
                    f"val_{name}",
                    torch.tensor(max(0.0, value), device=self.device),
                    prog_bar=f"val_{name}" == self.monitor,
                )

    @override
    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["thresholds"] = self.thresholds

    @override
    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        super().on_load_checkpoint(checkpoint)
        self.thresholds = checkpoint.get("thresholds", self.thresholds)

    @override
    def use_thresholds(self, thresholds: list[float]) -> None:
        self.thresholds, self.keep_thresholds = thresholds, True

    def class_table(self, classes: list[str]) -> list[dict[str, str | float]]:
        """Objects, score threshold, AP and AP50 of each class in the last validation, one row per class."""
        rows: list[dict[str, str | float]] = [
            {
                "class": name,
                "objects": self.counts.get(label, 0),
                "score_threshold": round(self.thresholds[label - 1], 4),
            }
            for label, name in enumerate(classes, start=1)
        ]
        for label, by_kind in self.precisions.items():
            for kind, precision in by_kind.items():
                for name, values in (("ap", precision), ("ap50", precision[:1])):
                    if (values >= 0).any():
                        rows[label - 1][f"{kind}_{name}"] = round(float(values[values >= 0].mean()), 4)
        return rows

    def plot(self, plot_dir: Path, classes: list[str]) -> None:
        """Write ``predictions.png``, ``precision_recall.png``, ``confusion_matrix.png``, ``classes.csv``."""
        write_csv(plot_dir / "classes.csv", self.class_table(classes))
        found = self.matrix.trace() / max(1, self.matrix[:-1].sum())  # without false detections
        title = f"{found:.1%} of the objects found"
        visualize.plot_confusion_matrix(
            self.matrix, [*classes, "background"], plot_dir / "confusion_matrix.png", title
        )
        visualize.plot_precision_recall(
            {
                kind: {classes[label - 1]: by_kind[kind][0] for label, by_kind in self.precisions.items()}
                for kind in self.kinds
            },
            plot_dir / "precision_recall.png",
        )
        rows = []
        for image, truth, predicted in self.plotted:
            pixels = self.to_display(image, is_normalized=False)
            rows.append((pixels, _arrays(truth), _arrays(predicted)))
        visualize.plot_detections(rows, classes, plot_dir / "predictions.png")


def shrink(image: Tensor, truth: Objects, predicted: Objects) -> tuple[Tensor, Objects, Objects]:
    """Resize an image and its objects for a plot, where full-size masks would take gigabytes.

    Args:
        image: Shape ``(C, H, W)``.
        truth: Objects with ``boxes``, ``labels`` and perhaps ``masks`` of shape ``(N, H, W)``.
        predicted: Predicted objects. Those with a score below 0.5 are dropped.

    Returns:
        The same three on the CPU with sides of at most ``PLOT_SIZE`` pixels and binary masks.
    """
    height, width = image.shape[1:]
    factor = min(1.0, PLOT_SIZE / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    is_confident = predicted["scores"] >= 0.5
    predicted = {name: value[is_confident] for name, value in predicted.items()}
    resized = v2.functional.resize_image(image.float().cpu(), list(size), antialias=True)
    return (
        resized,
        _shrink_objects(truth, (height, width), size),
        _shrink_objects(predicted, (height, width), size),
    )


def _shrink_objects(objects: Objects, old_size: tuple[int, int], size: tuple[int, int]) -> Objects:
    """Resize boxes and masks from an old height and width to a new one."""
    objects = {name: value.cpu() for name, value in objects.items()}
    result: Objects = {name: objects[name] for name in ("labels", "scores", "iscrowd") if name in objects}
    factors = torch.tensor([size[1] / old_size[1], size[0] / old_size[0]] * 2)
    result["boxes"] = objects["boxes"].float() * factors
    if "mask_crops" in objects:
        result["masks"] = paste_binary_masks(objects["mask_crops"], result["boxes"], size)
    elif "masks" in objects:
        masks = objects["masks"].reshape(-1, 1, *old_size)
        is_object = masks > 0.5 if masks.is_floating_point() else masks
        result["masks"] = v2.functional.resize_mask(is_object.to(torch.uint8), list(size))[:, 0]
    return result


def _arrays(objects: Objects) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in objects.items()}
