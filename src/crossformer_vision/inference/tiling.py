"""Detecting in images much larger than a detector's own, in overlapping tiles."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crossformer_vision.models.dense.segmenters import starts

OVERLAP = 0.2  # of a tile's side
SAME = 0.5  # overlap of two boxes of a class, over the smaller one's area, above which they are one object
EDGE = 2.0  # pixels from a tile's inner edge within which an object is taken for cut


@dataclass
class View:
    """What a detector found in a part of an image, in pixels of the image.

    Attributes:
        left, top, right, bottom: The part.
        boxes: ``(n, 4)``.
        labels: ``(n,)``.
        scores: ``(n,)``.
        masks: ``(n, h, w)`` of bools at the size that the detector saw; ``None`` without masks.
        cut: Whether an object ends at an inner edge of the part, ``(n,)``.
    """

    left: int
    top: int
    right: int
    bottom: int
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None
    cut: Tensor


def detect_in_tiles(
    net: nn.Module, picture: Image.Image, side: int, score: float, device: torch.device
) -> dict[str, Tensor]:
    """Find objects in the tiles of an image, and in the whole image at the size of a tile.

    Boxes of one class that overlap by more than half of the smaller one are one object. Where tiles cut an
    object, the whole image's box of it is kept if there is one; else the parts are joined.

    Args:
        net: A detector of this library.
        picture: RGB image.
        side: Side of the square tiles in pixels.
        score: Score threshold.
        device: Device of the network.

    Returns:
        ``boxes`` ``(n, 4)`` in pixels of the picture, ``labels``, ``scores`` and, of Mask R-CNN, ``masks``
        ``(n, H, W)`` of bools, on the CPU; the best score first.
    """
    W, H = picture.size
    step = round(side * (1 - OVERLAP))
    areas = [(0, 0, W, H)]
    for y in starts(H, side, step):
        areas += [(x, y, min(W, x + side), min(H, y + side)) for x in starts(W, side, step)]
    views = [detect_in_view(net, picture, area, side, score, device) for area in areas]
    boxes, labels, scores, cut = (
        torch.cat([getattr(view, name) for view in views]) for name in ("boxes", "labels", "scores", "cut")
    )
    places = [(view, n) for view in views for n in range(len(view.labels))]
    groups = group_boxes(boxes, labels, scores, cut)
    groups.sort(key=lambda group: -float(scores[group].max()))
    first = [group[0] for group in groups]
    found: dict[str, Any] = {"boxes": boxes[first], "labels": labels[first]}
    found["scores"] = torch.stack([scores[group].max() for group in groups]) if groups else scores
    if any(view.masks is not None for view in views):
        found["masks"] = torch.zeros(len(groups), H, W, dtype=torch.bool)
        for mask, group in zip(found["masks"], groups, strict=True):
            for n in group:
                paste_mask(mask, *places[n])
    return found


def detect_in_view(
    net: nn.Module,
    picture: Image.Image,
    area: tuple[int, int, int, int],
    side: int,
    score: float,
    device: torch.device,
) -> View:
    """Find objects in a part of an image, which is made as small as a tile.

    Args:
        net: A detector of this library.
        picture: RGB image.
        area: Left, top, right and bottom of the part.
        side: Largest side that the detector is given, in pixels.
        score: Score threshold.
        device: Device of the network.
    """
    part = picture.crop(area)
    width, height = part.size
    part.thumbnail((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1).to(device) / 255
    found = {name: value.cpu() for name, value in net([pixels])[0].items()}
    found = {name: value[found["scores"] >= score] for name, value in found.items()}
    scale = torch.tensor([width / part.width, height / part.height] * 2)
    boxes = found["boxes"].float() * scale
    x1, y1, x2, y2 = boxes.unbind(1)
    cut = ((x1 < EDGE) & (area[0] > 0)) | ((x2 > width - EDGE) & (area[2] < picture.width))
    cut |= ((y1 < EDGE) & (area[1] > 0)) | ((y2 > height - EDGE) & (area[3] < picture.height))
    boxes = boxes + torch.tensor([area[0], area[1], area[0], area[1]])
    masks = found["masks"].squeeze(1) > 0.5 if "masks" in found else None
    return View(*area, boxes, found["labels"], found["scores"].float(), masks, cut)


def group_boxes(boxes: Tensor, labels: Tensor, scores: Tensor, cut: Tensor) -> list[list[int]]:
    """Group boxes that are of one object, or of parts of one.

    Args:
        boxes: ``(n, 4)``; the first box of a group of parts is changed to the box around them.
        labels: ``(n,)``.
        scores: ``(n,)``.
        cut: Whether a box ends at an inner edge of its view, ``(n,)``.

    Returns:
        Indices of the boxes of each object, the one that stands for it first. Boxes that lie on one which is
        not cut are left out.
    """
    groups: list[list[int]] = []
    # Whole objects first: a part of one then never stands for it.
    order = sorted(range(len(boxes)), key=lambda n: (bool(cut[n]), -float(scores[n])))
    heads, classes, parts = boxes.numpy().copy(), labels.numpy().copy(), cut.numpy().copy()  # of the groups
    for n in order:
        box, count = boxes[n].numpy(), len(groups)
        others = heads[:count]
        sides = np.minimum(others[:, 2:], box[2:]) - np.maximum(others[:, :2], box[:2])
        shared = sides.clip(min=0).prod(1)
        own, theirs = box[2:] - box[:2], others[:, 2:] - others[:, :2]
        same = shared > SAME * np.minimum(own.prod(), theirs.prod(1))
        if cut[n]:  # two parts of an object overlap, and share most of a side
            same |= parts[:count] & (shared > 0) & (sides > SAME * np.minimum(own, theirs)).any(1)
        matches = np.flatnonzero(same & (classes[:count] == int(labels[n])))
        if not len(matches):
            heads[count], classes[count], parts[count] = box, int(labels[n]), bool(cut[n])
            groups.append([n])
        elif parts[matches[0]]:
            groups[matches[0]].append(n)
            heads[matches[0], :2] = np.minimum(heads[matches[0], :2], box[:2])
            heads[matches[0], 2:] = np.maximum(heads[matches[0], 2:], box[2:])
    for group, head in zip(groups, heads):
        boxes[group[0]] = torch.from_numpy(head)
    return groups


def paste_mask(mask: Tensor, view: View, n: int) -> None:
    """Add the mask of an object of a view to a mask of the whole image, in place."""
    assert view.masks is not None
    size = (view.right - view.left, view.bottom - view.top)
    part = np.array(Image.fromarray(view.masks[n].numpy()).resize(size))
    mask[view.top : view.bottom, view.left : view.right] |= torch.from_numpy(part)
