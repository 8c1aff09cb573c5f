"""What the published detectors, which are OpenMMLab's, do otherwise than torchvision's.

- anchors are not rounded to whole pixels, and lie at multiples of a level's stride whatever its map's size;
- RetinaNet's P6 comes from C5, and nothing (torchvision: a ReLU) stands between P6 and P7;
- RoIAlign aligns half pixels, and samples a bin as densely as the RoI's size asks for;
- at most 100 detections an image, and 1000 proposals in training too;
- a mask's targets, and its way back into the image, are sampled at pixels' centres from unrounded boxes: the
  best IoU that a 28x28 mask of a shape of 10 to 32 pixels can reach is then 1.00 instead of 0.83;
- boxes are learned with L1, not smooth L1; RetinaNet's losses are divided by the positives of the batch, not
  of each image; an object that no anchor overlaps by 0.3 claims none in the RPN;
- P6, P7 and the box head start as there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from crossformer_vision.models.dense.backbones import STRIDES
from crossformer_vision.models.dense.matching import match_anchors

# ------------------------------------------------------------------------------------------------------------
# Levels, anchors, RoIAlign
# ------------------------------------------------------------------------------------------------------------


class P6P7(ExtraFPNBlock):
    """RetinaNet's two coarsest levels, at strides 64 and 128, from the backbone's last map."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        xavier(self)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        p6 = stable_conv(self.p6, x[-1])
        return [*results, p6, stable_conv(self.p7, p6)], [*names, "p6", "p7"]


def stable_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution, computed in float32 where a CPU would train it in bfloat16.

    The bfloat16 weight gradient of a 3x3 convolution with stride 2 reads uninitialized memory where the map
    is one pixel wide (torch 2.15 with oneDNN on AVX-512), as P6 of an image of 64 pixels is.
    """
    low = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if not (x.device.type == "cpu" and torch.is_grad_enabled() and low):
        return conv(x)
    assert conv.bias is not None
    with torch.autocast("cpu", enabled=False):
        out = F.conv2d(x.float(), conv.weight.float(), conv.bias.float(), conv.stride, conv.padding)
    return out.to(x.dtype)


class Anchors(AnchorGenerator):
    """Anchors of three aspect ratios at each position of each level, sizes and places unrounded.

    Args:
        strides: of the levels.
        scale: side of a level's smallest anchor, in strides.
        octave: anchors of different sizes between a level and the next.
    """

    def __init__(self, strides: tuple[int, ...], scale: float, octave: int) -> None:
        sizes = tuple(tuple(stride * scale * 2 ** (k / octave) for k in range(octave)) for stride in strides)
        super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(strides))
        self.strides = strides

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        w, h = (sides / heights).flatten(), (sides * heights).flatten()
        return torch.stack([-w, -h, w, h], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return [torch.cat(self.of_levels(feature_maps))] * len(image_list.image_sizes)

    def of_levels(self, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each map, (h * w * anchors of a position, 4) x1, y1, x2, y2."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)  # in half precision a map's far end has no fine places
        strides = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        anchors: list[Tensor] = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides)
        return anchors


class RoIAlign(MultiScaleRoIAlign):
    """RoIAlign with half-pixel alignment and adaptive sampling, from the level that suits each RoI's size.

    Shape: maps by name at strides 4, 8, 16, 32, and boxes (n_i, 4) of each image -> (sum n_i, C, size, size).
    """

    def __init__(self, size: int) -> None:
        super().__init__(["0", "1", "2", "3"], size, sampling_ratio=0)

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        return self.pool(
            [x[name] for name in self.featmap_names], torch.cat([image, torch.cat(boxes)], dim=1)
        )

    def pool(self, maps: list[Tensor], rois: Tensor) -> Tensor:
        """Maps at strides 4, 8, 16, 32, and RoIs (n, 5) image, x1, y1, x2, y2 -> (n, C, size, size)."""
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        levels = torch.floor(torch.log2(sides / 56 + 1e-6)).clamp(0, len(maps) - 1)  # 112 to 224: stride 8
        rows = [torch.where(levels == level)[0] for level in range(len(maps))]
        pooled = [
            roi_align(features.float(), rois[chosen], self.output_size, 1 / stride, aligned=True)
            for features, chosen, stride in zip(maps, rows, STRIDES, strict=True)
        ]
        found = torch.cat(pooled)
        return found.new_zeros(rois.shape[0], *found.shape[1:]).index_put((torch.cat(rows),), found)


def xavier(module: nn.Module) -> None:
    """Convolutions and linear layers: Xavier, uniform; no biases."""
    layers: Any = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


# ------------------------------------------------------------------------------------------------------------
# Targets, losses and masks as published. torchvision builds its modules itself, from our keywords; these are
# the same modules with one or two methods of their own, so a detector's parts only change their class.
# ------------------------------------------------------------------------------------------------------------


class RPN(RegionProposalNetwork):
    """torchvision's, with L1 for boxes; an object that no anchor overlaps by 0.3 claims none."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label of each anchor (1 object, 0 background, -1 neither) and the box it is matched with."""
        labels, matched = [], []
        for own, target in zip(anchors, targets, strict=True):
            boxes, matcher = target["boxes"], self.proposal_matcher
            match = match_anchors(matcher, boxes, own, least_claim=matcher.low_threshold)
            label = (match >= 0).to(torch.float32)
            labels.append(torch.where(match == matcher.BETWEEN_THRESHOLDS, -1.0, label))
            matched.append(boxes[match.clamp(min=0)] if len(boxes) else torch.zeros_like(own))
        return labels, matched

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        sampled = [torch.cat(masks) > 0 for masks in self.fg_bg_sampler(labels)]
        positive, chosen = sampled[0], sampled[0] | sampled[1]
        targets = torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(pred_bbox_deltas[positive], targets, reduction="sum") / chosen.sum().clamp(min=1)
        truth = torch.cat(labels)[chosen]
        return F.binary_cross_entropy_with_logits(objectness.flatten()[chosen], truth), box_loss


class RoIHeads(detection.roi_heads.RoIHeads):
    """torchvision's, with L1 for boxes and masks that are aligned."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if targets is not None and self.training:
            proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
            logits, deltas = self._boxes(features, proposals, image_shapes)
            losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(regression))
            positive = [label > 0 for label in labels]
            rois = [boxes[chosen] for boxes, chosen in zip(proposals, positive, strict=True)]
            objects = [m[chosen] for m, chosen in zip(matched, positive, strict=True)]
            mask_logits = self._masks(features, rois, image_shapes)
            losses["loss_mask"] = mask_loss(mask_logits, rois, objects, targets)
            return [], losses
        logits, deltas = self._boxes(features, proposals, image_shapes)
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        results = [
            dict(zip(("boxes", "scores", "labels"), one, strict=True)) for one in zip(*found, strict=True)
        ]
        mask_logits = self._masks(features, [result["boxes"] for result in results], image_shapes)
        of_all = maskrcnn_inference(mask_logits, [result["labels"] for result in results])
        for result, probabilities in zip(results, of_all, strict=True):
            result["masks"] = probabilities  # (n, 1, 28, 28); `Transform` puts them into the image
        return results, {}

    def _boxes(self, features: Any, rois: list[Tensor], image_shapes: Any) -> tuple[Tensor, Tensor]:
        pooled = self._pooled(self.box_roi_pool, features, rois, image_shapes)
        return self.box_predictor(self.box_head(pooled))

    def _masks(self, features: Any, rois: list[Tensor], image_shapes: Any) -> Tensor:
        pooled = self._pooled(self.mask_roi_pool, features, rois, image_shapes)
        return self.mask_predictor(self.mask_head(pooled))

    def _pooled(self, pool: nn.Module, features: Any, rois: list[Tensor], image_shapes: Any) -> Tensor:
        """In the weights' type; RoIAlign computes in float32."""
        return pool(features, rois, image_shapes).to(next(self.parameters()).dtype)


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of all RoIs, L1 of those with an object; both over the number of RoIs.

    Args:
        logits: (n, classes).
        deltas: (n, 4 * classes).
        labels: (n,), 0 for none.
        targets: (n, 4), deltas of the objects.
    """
    positive = torch.where(labels > 0)[0]
    own = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    box_loss = F.l1_loss(own, targets[positive], reduction="sum") / max(1, len(labels))
    return {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": box_loss}


def mask_loss(
    logits: Tensor, rois: list[Tensor], objects: list[Tensor], targets: list[dict[str, Tensor]]
) -> Tensor:
    """Binary cross-entropy of the masks of RoIs; 0 where there are none.

    Args:
        logits: (n, classes, side, side).
        rois: (n_i, 4), of each image.
        objects: (n_i,), which object of its image each is of.
        targets: `masks` (objects, H, W) of 0 and 1, and `labels`, of each image.
    """
    if not len(logits):
        return logits.sum() * 0
    wanted = [
        mask_targets(target["masks"], boxes, index, logits.shape[-1])
        for target, boxes, index in zip(targets, rois, objects, strict=True)
    ]
    labels = torch.cat([t["labels"][index] for t, index in zip(targets, objects, strict=True)])
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, torch.cat(wanted))


MASKS_AT_A_TIME = 16  # whose float32 copies exist together


def mask_targets(masks: Tensor, boxes: Tensor, index: Tensor, side: int) -> Tensor:
    """Crop the masks of objects to boxes.

    Args:
        masks: Masks of 0 and 1, ``(objects, H, W)``, of any dtype.
        boxes: Boxes, ``(n, 4)`` in pixels.
        index: Object of each box, ``(n,)``.
        side: Rows and columns of the result.

    Returns:
        Masks of 0 and 1, ``(n, side, side)``, in the dtype of ``boxes``.
    """
    targets = boxes.new_zeros(len(boxes), side, side)
    used = index.unique()
    for chunk in used.split(MASKS_AT_A_TIME):
        chosen = torch.where(torch.isin(index, chunk))[0]
        place = torch.searchsorted(chunk, index[chosen])
        rois = torch.cat([place[:, None].to(boxes), boxes[chosen]], dim=1)
        some = masks[chunk][:, None].to(boxes)
        covered = roi_align(some, rois, (side, side), 1.0, sampling_ratio=0, aligned=True)
        targets[chosen] = (covered[:, 0] >= 0.5).to(boxes)
    return targets


def pasted_regions(
    masks: Tensor, boxes: Tensor, size: tuple[int, int]
) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Sample masks of boxes at the centers of an image's pixels.

    Args:
        masks: Probabilities, ``(n, 1, side, side)``.
        boxes: Boxes, ``(n, 4)`` in pixels.
        size: Height and width of the image.

    Yields:
        Index of a mask, rows and columns of the image that it covers, and its probabilities there. Masks
        that cover no pixel are left out.
    """
    H, W = size
    # A mask reaches half a cell beyond its box's border, where its outermost values fade.
    reach = (boxes[:, 2:] - boxes[:, :2]) / (2 * masks.shape[-1])
    low = (boxes[:, :2] - reach).floor().clamp(min=0).long().tolist()
    high = (boxes[:, 2:] + reach).ceil().long().tolist()
    for n, (box, (left, top), (right, bottom)) in enumerate(zip(boxes.float(), low, high, strict=True)):
        x = torch.arange(left, min(W, right), device=box.device) + 0.5
        y = torch.arange(top, min(H, bottom), device=box.device) + 0.5
        if not len(x) or not len(y):
            continue
        x = (x - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (y - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        sampled = F.grid_sample(masks[n : n + 1].float(), grid[None], align_corners=False)
        yield n, slice(top, top + len(y)), slice(left, left + len(x)), sampled[0, 0]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks of boxes into an image; see ``pasted_regions``.

    Returns:
        Probabilities, ``(n, 1, H, W)``: four bytes for each object and pixel.
    """
    pasted = masks.new_zeros(len(masks), 1, *size)
    for n, rows, columns, probabilities in pasted_regions(masks, boxes, size):
        pasted[n, 0, rows, columns] = probabilities
    return pasted


def paste_binary_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks of boxes into an image; see ``pasted_regions``.

    Returns:
        1 where the probability is above one half, else 0, uint8, ``(n, H, W)``.
    """
    pasted = torch.zeros(len(masks), *size, dtype=torch.uint8, device=masks.device)
    for n, rows, columns, probabilities in pasted_regions(masks, boxes, size):
        pasted[n, rows, columns] = probabilities > 0.5
    return pasted


class Transform(GeneralizedRCNNTransform):
    """torchvision's, with masks that are pasted aligned, for images however thin.

    Attributes:
        paste: Return masks of whole images. ``False`` returns ``mask_crops`` of the boxes instead, shape
            ``(n, 1, side, side)``, whose memory does not grow with the image.
    """

    paste = True

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        H, W = image.shape[-2:]
        least = -(-max(H, W) // self.max_size)  # becomes one pixel
        image = F.pad(image, (0, max(0, least - W), 0, max(0, least - H)))
        masks = target.pop("masks", None) if target is not None else None
        image, target = super().resize(image, target)
        if target is not None and masks is not None:
            target["masks"] = self._resize_masks(masks, image)
        return image, target

    def _resize_masks(self, masks: Tensor, image: Tensor) -> Tensor:
        """Masks at the size of a resized image, by nearest neighbor as torchvision; a few at a time."""
        if (self.training and self._skip_resize) or masks.shape[1:] == image.shape[1:]:
            return masks
        resized = masks.new_zeros(len(masks), *image.shape[1:])
        for n in range(0, len(masks), MASKS_AT_A_TIME):
            some = masks[n : n + MASKS_AT_A_TIME, None].float()
            resized[n : n + MASKS_AT_A_TIME] = F.interpolate(some, size=image.shape[1:])[:, 0].to(masks.dtype)
        return resized

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        masks = [found.pop("masks", None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, probabilities, size in zip(result, masks, original_image_sizes):
            if probabilities is not None and self.paste:
                found["masks"] = paste_masks(probabilities, found["boxes"], size)
            elif probabilities is not None:
                found["mask_crops"] = probabilities
        return result


@contextmanager
def mask_crops(net: nn.Module) -> Iterator[None]:
    """Let a detector return ``mask_crops`` in place of masks of whole images; see ``Transform``.

    Args:
        net: A detector. Modules without a ``Transform``, such as exported ones, are left as they are.
    """
    transform: Any = getattr(net, "transform", None)
    if isinstance(transform, Transform):
        transform.paste = False
    try:
        yield
    finally:
        if isinstance(transform, Transform):
            transform.paste = True
