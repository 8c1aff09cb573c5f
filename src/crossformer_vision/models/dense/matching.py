"""Match anchors with objects in memory that does not grow with the number of objects."""

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

CHUNK = 1 << 21  # overlaps that exist at a time: 8 MB in float32


def match_anchors(matcher: Matcher, boxes: Tensor, anchors: Tensor, least_claim: float = 0.0) -> Tensor:
    """Assign an object, the background or nothing to each anchor, as torchvision's ``Matcher`` does.

    An image of 800x1216 has 180,000 anchors for RetinaNet, so a matrix of all overlaps takes 0.7 MB for each
    object, and its temporaries several times that. Here anchors go in chunks, twice: the best object of each
    anchor and the best overlap of each object, then the anchors with that best overlap.

    Args:
        matcher: Thresholds, and whether an object claims its best anchors below them.
        boxes: Boxes of the objects, ``(objects, 4)`` as ``x1, y1, x2, y2``.
        anchors: Anchors, ``(anchors, 4)``.
        least_claim: Overlap below which an object claims no anchor.

    Returns:
        Index of the object of each anchor, ``(anchors,)``; -1 for background, -2 for anchors between the
        thresholds.
    """
    if not len(boxes):
        return torch.full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
    size = max(1, CHUNK // len(boxes))
    chunks = [slice(start, start + size) for start in range(0, len(anchors), size)]
    # Allocate results once: small tensors that outlive a chunk fragment the allocator's memory.
    dtype = torch.promote_types(boxes.dtype, torch.float32)  # of overlaps
    best = boxes.new_zeros(len(boxes), dtype=dtype)
    overlap = boxes.new_empty(len(anchors), dtype=dtype)
    matches = torch.empty(len(anchors), dtype=torch.int64, device=anchors.device)
    claimed = torch.empty(len(anchors), dtype=torch.bool, device=anchors.device)
    for chunk in chunks:
        iou = box_iou(boxes, anchors[chunk])
        overlap[chunk], matches[chunk] = iou.max(dim=0)
        best.copy_(torch.maximum(best, iou.amax(dim=1)))
    low, high = matcher.low_threshold, matcher.high_threshold
    found = torch.where(overlap < high, matcher.BETWEEN_THRESHOLDS, matches)
    found = torch.where(overlap < low, matcher.BELOW_LOW_THRESHOLD, found)
    if not matcher.allow_low_quality_matches:
        return found
    claim = best.where(best >= least_claim, 2.0)[:, None]  # an overlap of 2 is never reached
    for chunk in chunks:
        iou = iou if len(chunks) == 1 else box_iou(boxes, anchors[chunk])
        claimed[chunk] = (iou == claim).any(dim=0)
    return torch.where(claimed, matches, found)
