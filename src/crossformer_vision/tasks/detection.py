"""Object detection and instance segmentation: losses, COCO's metrics, and what a validation shows."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from crossformer_vision.data.detection import Batch
from crossformer_vision.files import write_csv
from crossformer_vision.models import drop_path
from crossformer_vision.models.dense.detectors import MaskRCNN, create_detector
from crossformer_vision.models.dense.openmmlab import mask_crops, paste_binary_masks
from crossformer_vision.plotting import visualize
from crossformer_vision.tasks.base import Task, describe_initial_weights, starts_from_published
from crossformer_vision.tasks.coco_metrics import CocoMetrics
from crossformer_vision.weights.checkpoints import load_checkpoint

SHOWN = 8  # validation images in the picture of predictions
PICTURE = 1280  # largest side of such an image, in pixels


class Detection(Task):
    """Train and validate RetinaNet or Mask R-CNN on any timm backbone.

    Args:
        detector: `retinanet` for boxes, `mask_rcnn` for boxes and masks.
        model: timm name of the backbone, with a tag (`crossformer_small.in1k`) to choose weights.
        num_classes: classes of objects; the command takes them from the data.
        pretrained: start from the backbone's published weights; null where they are here or can be
            fetched, with a notice where not.
        checkpoint: start from these weights instead, of a detector or of a backbone, published or own; layers
            of another class count are trained anew.
        model_args: further keywords of the backbone, such as `{group_size: [14, 14, 7, 7]}`.
        detector_args: further keywords of torchvision's detector, such as `{box_score_thresh: 0.01}`.
        drop_path_rate: stochastic depth of the backbone.
        width: channels of the pyramid and the heads.
        anchor_scale: side of a level's smallest anchor, in strides; null for 4 (RetinaNet) or 8 (Mask R-CNN).
        max_detections: most objects that are found in an image, and that the metrics count; COCO's is 100.
        min_size: an image's shorter side is brought to this many pixels; of several, training takes one at
            random and validation the last,
        max_size: but its longer side to at most so many.
        **optimization: see `Task`.
    """

    name = "detection"

    def __init__(
        self,
        detector: Literal["retinanet", "mask_rcnn"] = "retinanet",
        model: str = "crossformer_nano",
        num_classes: int = 10,
        pretrained: bool | None = False,
        checkpoint: str | None = None,
        model_args: dict[str, Any] | None = None,
        detector_args: dict[str, Any] | None = None,
        drop_path_rate: float = 0.0,
        width: int = 256,
        anchor_scale: float | None = None,
        max_detections: int = 100,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.save_hyperparameters()
        published = starts_from_published(model, pretrained, checkpoint)
        self.net = create_detector(
            detector,
            model,
            num_classes,
            pretrained=published,
            width=width,
            anchor_scale=anchor_scale,
            max_detections=max_detections,
            min_size=min_size,
            max_size=max_size,
            backbone_args={**drop_path(model, drop_path_rate), **(model_args or {})},
            _skip_resize=True,  # in training: the data does it
            **(detector_args or {}),
        )
        report = load_checkpoint(self.net, checkpoint) if checkpoint else None
        self.initial_weights = describe_initial_weights(model, num_classes, published, checkpoint, report)
        self.kinds = ["box", "mask"] if isinstance(self.net, MaskRCNN) else ["box"]
        self.monitor = f"val_{self.kinds[-1]}_ap"
        self.in_line = (f"{self.monitor}50", *(f"val_{kind}_ap" for kind in self.kinds[:-1]))
        self.metric = CocoMetrics(self.kinds, max_detections)
        self.shown: list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]] = []  # image, truth, found
        self.precisions: dict[int, dict[str, np.ndarray]] = {}  # by label and kind, at the last validation

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Images (3, H, W) in 0..1 -> boxes, labels, scores and masks of each; see `create_detector`."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.compute_loss(images, targets)
        loss: Tensor = sum(losses.values())  # type: ignore[assignment]
        log: dict[str, Any] = dict(on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        self.log("train_loss", loss, prog_bar=True, **log)
        for name, value in losses.items():
            self.log(f"train_{name.removeprefix('loss_')}_loss", value, **log)
        return loss

    def compute_loss(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of a training batch by name, whose sum is the loss; to be overridden."""
        losses: dict[str, Tensor] = self.net(images, targets)
        return losses

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Tensor]] | None:
        """A list of images, or a pair of which it comes first -> what is found in each."""
        if batch is None:
            return None
        return self(batch[0] if isinstance(batch, tuple) else batch)

    def on_validation_epoch_start(self) -> None:
        self.metric.reset()
        self.shown = []

    def validation_step(self, batch: Batch | None, batch_idx: int) -> None:
        if batch is None:
            return
        images, targets = batch
        with mask_crops(self.net):
            found = self(images)
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        self.metric.update(found, targets, sizes)
        batches = self.batches_evaluated
        if batch_idx % max(1, batches // SHOWN) == 0 and len(self.shown) < SHOWN:
            self.shown += [shrink(*one) for one in zip(images, targets, found, strict=True)]

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            self.metric.gather()
        figures, self.precisions = self.metric.compute()
        for name, value in figures.items():
            if name.endswith("_ap") or value >= 0:  # -1: no such objects
                self.log(
                    f"val_{name}",
                    torch.tensor(max(0.0, value), device=self.device),
                    prog_bar=f"val_{name}" == self.monitor,
                )

    def class_table(self, classes: list[str]) -> list[dict[str, Any]]:
        """AP and AP50 of each class at the last validation, one row a class."""
        rows: list[dict[str, Any]] = [{"class": name} for name in classes]
        for label, of_kind in self.precisions.items():
            for kind, precision in of_kind.items():
                for name, values in (("ap", precision), ("ap50", precision[:1])):
                    if (values >= 0).any():
                        rows[label - 1][f"{kind}_{name}"] = round(float(values[values >= 0].mean()), 4)
        return rows

    def pictures(self, folder: Path, classes: list[str]) -> None:
        """Draw the last validation: `predictions.png`, `precision_recall.png`; its table: `classes.csv`."""
        write_csv(folder / "classes.csv", self.class_table(classes))
        visualize.precision_recall(
            {
                kind: {classes[label - 1]: of_kind[kind][0] for label, of_kind in self.precisions.items()}
                for kind in self.kinds
            },
            folder / "precision_recall.png",
        )
        rows = []
        for image, truth, found in self.shown:
            pixels = visualize.denormalised(
                image.float().cpu().numpy(), (0, 0, 0), (1, 1, 1), self.shown_channels
            )
            rows.append((pixels, _arrays(truth), _arrays(found)))
        visualize.detections(rows, classes, folder / "predictions.png")


def shrink(
    image: Tensor, truth: dict[str, Tensor], found: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """An image and its objects at a size for pictures: large photos would take gigabytes.

    Args:
        image: ``(3, H, W)``.
        truth: Objects in the image, with ``boxes``, ``labels`` and perhaps ``masks`` ``(n, H, W)``.
        found: Objects that a detector found; those of a score of one half or more are kept.

    Returns:
        The same three with sides of ``PICTURE`` pixels at most, masks as 0 and 1, on the CPU.
    """
    height, width = image.shape[1:]
    size = [max(1, round(side * min(1.0, PICTURE / max(height, width)))) for side in (height, width)]
    factors = torch.tensor([size[1] / width, size[0] / height] * 2)
    found = {k: v[found["scores"] >= 0.5].cpu() for k, v in found.items()}
    truth = {k: v.cpu() for k, v in truth.items()}
    smaller = [{k: v for k, v in o.items() if k in ("labels", "scores", "iscrowd")} for o in (truth, found)]
    for objects, kept in zip((truth, found), smaller):
        kept["boxes"] = objects["boxes"].float() * factors
        if "mask_crops" in objects:
            kept["masks"] = paste_binary_masks(objects["mask_crops"], kept["boxes"], (size[0], size[1]))
        elif "masks" in objects:
            masks = objects["masks"].reshape(-1, 1, height, width)
            binary = masks > 0.5 if masks.is_floating_point() else masks
            kept["masks"] = v2.functional.resize_mask(binary.to(torch.uint8), size)[:, 0]
    return v2.functional.resize_image(image.float().cpu(), size, antialias=True), *smaller


def _arrays(objects: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in objects.items()}
