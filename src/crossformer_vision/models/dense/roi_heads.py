"""Box and mask heads of Mask R-CNN with the pooling and losses of OpenMMLab."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.ops import MultiScaleRoIAlign, roi_align
from typing_extensions import override

from crossformer_vision.models.dense.backbones import STRIDES
from crossformer_vision.models.dense.masks import crop_mask_targets

Maps = dict[str, Tensor]
Sizes = list[tuple[int, int]]


class RoIAlign(MultiScaleRoIAlign):
    """RoIAlign with half-pixel alignment and adaptive sampling, from the level that fits each RoI's size.

    Shape: maps by name at strides 4, 8, 16, 32 and boxes ``(n_i, 4)`` of each image to
    ``(sum n_i, C, size, size)``.

    Args:
        size: Height and width of the output.
    """

    def __init__(self, size: int) -> None:
        super().__init__(["0", "1", "2", "3"], size, sampling_ratio=0)

    @override
    def forward(self, x: Maps, boxes: list[Tensor], image_shapes: Sizes) -> Tensor:
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        return self.pool(
            [x[name] for name in self.featmap_names], torch.cat([image, torch.cat(boxes)], dim=1)
        )

    def pool(self, maps: list[Tensor], rois: Tensor) -> Tensor:
        """Pool RoIs of a batch.

        Args:
            maps: Feature maps at strides 4, 8, 16 and 32.
            rois: Image index and box of each RoI, ``(n, 5)``.

        Returns:
            Features, ``(n, C, size, size)``, in float32.
        """
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        levels = torch.floor(torch.log2(sides / 56 + 1e-6)).clamp(0, len(maps) - 1)  # 112 to 224: stride 8
        rows = [torch.where(levels == level)[0] for level in range(len(maps))]
        pooled = torch.cat(
            [
                roi_align(features.float(), rois[chosen], self.output_size, 1 / stride, aligned=True)
                for features, chosen, stride in zip(maps, rows, STRIDES, strict=True)
            ]
        )
        return pooled.new_zeros(rois.shape[0], *pooled.shape[1:]).index_put((torch.cat(rows),), pooled)


class RoIHeads(roi_heads.RoIHeads):
    """torchvision's RoI heads with L1 loss and with masks sampled at pixel centers.

    Args:
        *args: Arguments of torchvision's ``RoIHeads``.

    Attributes:
        class_weights: Weight of each class in the loss, from the background on. ``None`` for 1.
    """

    class_weights: Tensor | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("class_weights", None, persistent=False)

    @override
    def forward(
        self,
        features: Maps,
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if targets is not None and self.training:
            return [], self._compute_losses(features, proposals, image_shapes, targets)
        logits, deltas = self._predict_boxes(features, proposals, image_shapes)
        detections = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        results = [
            {"boxes": boxes, "scores": scores, "labels": labels}
            for boxes, scores, labels in zip(*detections, strict=True)
        ]
        mask_logits = self._predict_masks(features, [result["boxes"] for result in results], image_shapes)
        probabilities = maskrcnn_inference(mask_logits, [result["labels"] for result in results])
        for result, masks in zip(results, probabilities, strict=True):
            result["masks"] = masks  # (n, 1, 28, 28); DetectorTransform pastes them into the image
        return results, {}

    def _compute_losses(
        self, features: Maps, proposals: list[Tensor], image_shapes: Sizes, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        logits, deltas = self._predict_boxes(features, proposals, image_shapes)
        losses = compute_box_losses(
            logits, deltas, torch.cat(labels), torch.cat(regression), self.class_weights
        )
        is_positive = [label > 0 for label in labels]
        rois = [boxes[chosen] for boxes, chosen in zip(proposals, is_positive, strict=True)]
        objects = [index[chosen] for index, chosen in zip(matched, is_positive, strict=True)]
        mask_logits = self._predict_masks(features, rois, image_shapes)
        losses["loss_mask"] = compute_mask_loss(mask_logits, rois, objects, targets)
        return losses

    def _predict_boxes(
        self, features: Maps, rois: list[Tensor], image_shapes: Sizes
    ) -> tuple[Tensor, Tensor]:
        pooled = self._pool(self.box_roi_pool, features, rois, image_shapes)
        return self.box_predictor(self.box_head(pooled))

    def _predict_masks(self, features: Maps, rois: list[Tensor], image_shapes: Sizes) -> Tensor:
        pooled = self._pool(self.mask_roi_pool, features, rois, image_shapes)
        return self.mask_predictor(self.mask_head(pooled))

    def _pool(self, pool: nn.Module, features: Maps, rois: list[Tensor], image_shapes: Sizes) -> Tensor:
        """Pool in float32 and convert to the dtype of the weights."""
        return pool(features, rois, image_shapes).to(next(self.parameters()).dtype)


def compute_box_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Cross-entropy of all RoIs and L1 loss of positive ones, both divided by the number of RoIs.

    Args:
        logits: Class logits, ``(n, classes)``.
        deltas: Box deltas of each class, ``(n, 4 * classes)``.
        labels: Label of each RoI, ``(n,)``; 0 is the background.
        targets: Deltas of the matched objects, ``(n, 4)``.
        class_weights: Weight of each class in the cross-entropy, ``(classes,)``.

    Returns:
        ``loss_classifier`` and ``loss_box_reg``.
    """
    positive = torch.where(labels > 0)[0]
    class_deltas = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    box_loss = F.l1_loss(class_deltas, targets[positive], reduction="sum") / max(1, len(labels))
    class_loss = F.cross_entropy(logits, labels, class_weights, reduction="sum") / max(1, len(labels))
    return {"loss_classifier": class_loss, "loss_box_reg": box_loss}


def compute_mask_loss(
    logits: Tensor, rois: list[Tensor], objects: list[Tensor], targets: list[dict[str, Tensor]]
) -> Tensor:
    """Binary cross-entropy of the masks of RoIs, or 0 if there are none.

    Args:
        logits: Mask logits of each class, ``(n, classes, side, side)``.
        rois: Boxes of each image, ``(n_i, 4)``.
        objects: Index of the object of each box, ``(n_i,)`` per image.
        targets: ``masks`` ``(objects, H, W)`` of 0 and 1, and ``labels``, of each image.
    """
    if not len(logits):
        return logits.sum() * 0
    target_masks = [
        crop_mask_targets(target["masks"], boxes, index, logits.shape[-1])
        for target, boxes, index in zip(targets, rois, objects, strict=True)
    ]
    labels = torch.cat([t["labels"][index] for t, index in zip(targets, objects, strict=True)])
    class_logits = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(class_logits, torch.cat(target_masks))
