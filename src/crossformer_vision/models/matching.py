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
    chunks = anchors.split(max(1, CHUNK // len(boxes)))
    best, claimed = torch.zeros_like(boxes[:, 0]), []
    overlaps: list[Tensor] = []
    objects: list[Tensor] = []
    for chunk in chunks:
        iou = box_iou(boxes, chunk)
        overlap, index = iou.max(dim=0)
        overlaps.append(overlap)
        objects.append(index)
        best = torch.maximum(best, iou.amax(dim=1))
    overlap, matches = torch.cat(overlaps), torch.cat(objects)
    low, high = matcher.low_threshold, matcher.high_threshold
    found = torch.where(overlap < high, matcher.BETWEEN_THRESHOLDS, matches)
    found = torch.where(overlap < low, matcher.BELOW_LOW_THRESHOLD, found)
    if not matcher.allow_low_quality_matches:
        return found
    claim = best.where(best >= least_claim, 2.0)[:, None]  # an overlap of 2 is never reached
    for chunk in chunks:
        claimed.append(((iou if len(chunks) == 1 else box_iou(boxes, chunk)) == claim).any(dim=0))
    return torch.where(torch.cat(claimed), matches, found)
