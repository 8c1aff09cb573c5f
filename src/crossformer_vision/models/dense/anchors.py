"""Anchors, and their assignment to objects in memory that does not grow with the number of objects."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import anchor_utils
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou
from typing_extensions import override

BACKGROUND = -1
IGNORED = -2  # between the thresholds
CHUNK_SIZE = 1 << 21  # overlaps computed at a time: 8 MB in float32


class AnchorGenerator(anchor_utils.AnchorGenerator):
    """Anchors of three aspect ratios at each position of each level, as in OpenMMLab.

    Unlike torchvision's, their sizes and positions are not rounded, and positions are multiples of the
    level's stride.

    Args:
        strides: Strides of the levels.
        scale: Side of a level's smallest anchor, in strides.
        scales_per_octave: Number of anchor sizes between one level and the next.
    """

    def __init__(self, strides: tuple[int, ...], scale: float, scales_per_octave: int) -> None:
        steps = [2 ** (k / scales_per_octave) for k in range(scales_per_octave)]
        sizes = tuple(tuple(stride * scale * step for step in steps) for stride in strides)
        super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(strides))
        self.strides = strides

    @override
    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        w, h = (sides / heights).flatten(), (sides * heights).flatten()
        return torch.stack([-w, -h, w, h], dim=1) / 2

    @override
    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return [torch.cat(self.generate_per_level(feature_maps))] * len(image_list.image_sizes)

    def generate_per_level(self, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each feature map, ``(h * w * anchors per position, 4)`` as ``x1, y1, x2, y2``."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)  # half precision cannot represent large coordinates
        strides = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        return self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides)


def match_anchors(
    boxes: Tensor,
    anchors: Tensor,
    low_threshold: float,
    high_threshold: float,
    allow_low_quality: bool = True,
    min_claim_iou: float = 0.0,
) -> Tensor:
    """Assign an object, the background or nothing to each anchor, as torchvision's ``Matcher`` does.

    An image of 800x1216 has 180,000 anchors for RetinaNet, so a matrix of all overlaps takes 0.7 MB for each
    object. This function processes anchors in chunks, in two passes: the best object of each anchor and the
    best overlap of each object, then the anchors that reach this best overlap.

    Args:
        boxes: Boxes of the objects, ``(objects, 4)`` as ``x1, y1, x2, y2``.
        anchors: Anchors, ``(anchors, 4)``.
        low_threshold: IoU below which an anchor is background.
        high_threshold: Minimum IoU at which an anchor is assigned to its best object.
        allow_low_quality: Assign to each object its best anchors, even below the thresholds.
        min_claim_iou: IoU below which an object gets no anchor by ``allow_low_quality``.

    Returns:
        Index of the object of each anchor, ``(anchors,)``, or ``BACKGROUND`` or ``IGNORED``.
    """
    if not len(boxes):
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    size = max(1, CHUNK_SIZE // len(boxes))
    chunks = [slice(start, start + size) for start in range(0, len(anchors), size)]
    # Results are allocated once: small tensors that outlive a chunk fragment the heap.
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    best_iou = boxes.new_zeros(len(boxes), dtype=dtype)
    anchor_iou = boxes.new_empty(len(anchors), dtype=dtype)
    matches = torch.empty(len(anchors), dtype=torch.int64, device=anchors.device)
    is_claimed = torch.empty(len(anchors), dtype=torch.bool, device=anchors.device)
    for chunk in chunks:
        iou = box_iou(boxes, anchors[chunk])
        anchor_iou[chunk], matches[chunk] = iou.max(dim=0)
        best_iou.copy_(torch.maximum(best_iou, iou.amax(dim=1)))
    assigned = torch.where(anchor_iou < high_threshold, IGNORED, matches)
    assigned = torch.where(anchor_iou < low_threshold, BACKGROUND, assigned)
    if not allow_low_quality:
        return assigned
    claimed_iou = best_iou.where(best_iou >= min_claim_iou, 2.0)[:, None]  # an IoU of 2 never occurs
    for chunk in chunks:
        iou = iou if len(chunks) == 1 else box_iou(boxes, anchors[chunk])
        is_claimed[chunk] = (iou == claimed_iou).any(dim=0)
    return torch.where(is_claimed, matches, assigned)
