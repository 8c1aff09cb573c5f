"""Object detection and instance segmentation: losses, COCO's metrics, and what a validation shows."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from crossformer_vision import visualize
from crossformer_vision.checkpoints import load_checkpoint
from crossformer_vision.data.detection import Batch
from crossformer_vision.models import drop_path
from crossformer_vision.models.detectors import MaskRCNN, create_detector
from crossformer_vision.tasks.base import Task, starts_from_published
from crossformer_vision.tasks.run.files import write_csv

SHOWN = 8  # validation images in the picture of predictions
METRICS = {  # ours: torchmetrics'
    "ap": "map",
    "ap50": "map_50",
    "ap75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
}


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
        self.net = create_detector(
            detector,
            model,
            num_classes,
            pretrained=starts_from_published(model, pretrained, checkpoint),
            width=width,
            anchor_scale=anchor_scale,
            max_detections=max_detections,
            min_size=min_size,
            max_size=max_size,
            backbone_args={**drop_path(model, drop_path_rate), **(model_args or {})},
            _skip_resize=True,  # in training: the data does it
            **(detector_args or {}),
        )
        if checkpoint:
            load_checkpoint(self.net, checkpoint)
        self.kinds = {"box": "bbox", "mask": "segm"} if isinstance(self.net, MaskRCNN) else {"box": "bbox"}
        self.monitor = f"val_{list(self.kinds)[-1]}_ap"
        self.in_line = (f"{self.monitor}50", *(f"val_{kind}_ap" for kind in list(self.kinds)[:-1]))
        self.metric = MeanAveragePrecision(
            iou_type=tuple(self.kinds.values()),  # type: ignore[arg-type]
            # COCO's, in float64: torchmetrics' own are rounded to float32, on the other side of some IoUs.
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            max_detection_thresholds=[1, 10, max_detections],
            extended_summary=True,
            backend="faster_coco_eval",
            sync_on_compute=False,  # its own wants as many images of each process; see `_gather`
        )
        self.metrics = {**METRICS, "recall": f"mar_{max_detections}"}
        self.shown: list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]] = []  # image, truth, found
        self.summary: dict[str, Tensor] = {}

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
        found = self(images)
        for result in found:
            if "masks" in result:
                result["masks"] = result["masks"].squeeze(1) > 0.5
        self.metric.update(
            *([{k: v.cpu() for k, v in one.items()} for one in many] for many in (found, targets))
        )
        batches = self.batches_evaluated
        if batch_idx % max(1, batches // SHOWN) == 0 and len(self.shown) < SHOWN:
            self.shown += zip(images, targets, found, strict=True)

    def on_validation_epoch_end(self) -> None:
        self._gather()
        self.summary = self.metric.compute()
        self.metric.reset()
        for kind, theirs in self.kinds.items():
            for name, key in self.metrics.items():
                value = self.summary[f"{theirs}_{key}" if len(self.kinds) > 1 else key]
                if name == "ap" or value >= 0:  # -1: no such objects
                    self.log(
                        f"val_{kind}_{name}",
                        value.to(self.device, torch.float32).clamp(min=0),
                        prog_bar=f"val_{kind}_{name}" == self.monitor,
                    )

    def _gather(self) -> None:
        """Give the metric of each process what all processes have seen."""
        if self.trainer.world_size > 1:
            for name, values in self.metric.metric_state.items():
                everyone: list[Any] = [None] * self.trainer.world_size
                torch.distributed.all_gather_object(everyone, values)
                setattr(self.metric, name, [value for one in everyone for value in one])

    def class_table(self, classes: list[str]) -> list[dict[str, Any]]:
        """AP and AP50 of each class at the last validation, one row a class."""
        rows: list[dict[str, Any]] = [{"class": name} for name in classes]
        for kind in self.kinds:
            precision = self._precision(kind)
            for k, label in enumerate(self._labels()):
                for name, values in (("ap", precision[..., k]), ("ap50", precision[:1, :, k])):
                    if (values >= 0).any():
                        rows[label - 1][f"{kind}_{name}"] = round(float(values[values >= 0].mean()), 4)
        return rows

    def _labels(self) -> list[int]:
        return [int(label) for label in self.summary["classes"].flatten()]

    def _precision(self, kind: str) -> Tensor:
        """By IoU threshold, recall and class, over all sizes of object."""
        key = f"{self.kinds[kind]}_precision" if len(self.kinds) > 1 else "precision"
        return self.summary[key][:, :, :, 0, -1]

    def pictures(self, folder: Path, classes: list[str]) -> None:
        """Draw the last validation: `predictions.png`, `precision_recall.png`; its table: `classes.csv`."""
        write_csv(folder / "classes.csv", self.class_table(classes))
        visualize.precision_recall(
            {
                kind: {
                    classes[label - 1]: self._precision(kind)[0, :, k].numpy()
                    for k, label in enumerate(self._labels())
                }
                for kind in self.kinds
            },
            folder / "precision_recall.png",
        )
        rows = []
        for image, truth, found in self.shown:
            kept = found["scores"] >= 0.5
            pixels = visualize.denormalised(
                image.float().cpu().numpy(), (0, 0, 0), (1, 1, 1), self.shown_channels
            )
            rows.append((pixels, _arrays(truth), _arrays({k: v[kept] for k, v in found.items()})))
        visualize.detections(rows, classes, folder / "predictions.png")


def _arrays(objects: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in objects.items()}
