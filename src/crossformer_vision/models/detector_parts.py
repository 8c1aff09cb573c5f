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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from crossformer_vision.models.backbones import STRIDES

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
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


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


class RPNMatcher(Matcher):
    """An object takes its best anchors, however little they overlap, only if that is by 0.3 at least."""

    def set_low_quality_matches_(
        self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor
    ) -> None:
        found = match_quality_matrix.max(dim=1).values >= self.low_threshold
        super().set_low_quality_matches_(matches, all_matches, match_quality_matrix[found])


class RPN(RegionProposalNetwork):
    """torchvision's, with L1 for boxes."""

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


def mask_targets(masks: Tensor, boxes: Tensor, index: Tensor, side: int) -> Tensor:
    """Masks (objects, H, W) of 0 and 1, as boxes (n, 4) of objects `index` see them: (n, side, side)."""
    rois = torch.cat([index[:, None].to(boxes), boxes], dim=1)
    covered = roi_align(masks[:, None].to(boxes), rois, (side, side), 1.0, sampling_ratio=0, aligned=True)
    return (covered[:, 0] >= 0.5).to(boxes)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of boxes, sampled at the centres of an image's pixels: (n, 1, side, side) -> (n, 1, H, W).

    Args:
        masks: probabilities.
        boxes: (n, 4), in pixels.
        size: H, W of the image.
    """
    H, W = size
    pasted = masks.new_zeros(len(masks), 1, H, W)
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
        pasted[n, :, top : top + len(y), left : left + len(x)] = sampled[0]
    return pasted


class Transform(GeneralizedRCNNTransform):
    """torchvision's, with masks that are pasted aligned, for images however thin."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        H, W = image.shape[-2:]
        least = -(-max(H, W) // self.max_size)  # becomes one pixel
        image = F.pad(image, (0, max(0, least - W), 0, max(0, least - H)))
        return super().resize(image, target)

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        masks = [found.pop("masks", None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, probabilities, size in zip(result, masks, original_image_sizes):
            if probabilities is not None:
                found["masks"] = paste_masks(probabilities, found["boxes"], size)
        return result
