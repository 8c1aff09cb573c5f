"""Detection in overlapping tiles, for images much larger than those of training."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as VF

from crossformer_vision.data.rasters import Pixels, image_size
from crossformer_vision.inference.inputs import crop
from crossformer_vision.models.dense.windows import window_starts

TILE_OVERLAP = 0.2  # overlap of adjacent tiles, relative to the side of a tile
MERGE_THRESHOLD = 0.5  # minimum intersection over the smaller box's area at which boxes are merged
CUT_MARGIN = 2.0  # maximum distance of a truncated object from a tile's inner edge, in pixels


@dataclass
class View:
    """Detections in a region of an image, in pixels of the image.

    Attributes:
        left: Left edge of the region.
        top: Top edge.
        right: Right edge.
        bottom: Bottom edge.
        boxes: Boxes, ``(n, 4)``.
        labels: Labels, ``(n,)``.
        scores: Scores, ``(n,)``.
        masks: Boolean masks at the detector's input size, ``(n, h, w)``. ``None`` without masks.
        is_cut: Whether an object ends at an inner edge of the region, ``(n,)``.
    """

    left: int
    top: int
    right: int
    bottom: int
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None
    is_cut: Tensor


def detect_in_tiles(
    net: nn.Module, image: Pixels, side: int, score_threshold: float, device: torch.device
) -> dict[str, Tensor]:
    """Detect objects in the tiles of an image, and in the whole image resized to a tile.

    Boxes of one class are merged if their intersection exceeds half of the smaller box. If tiles cut an
    object, the box from the whole image is used if there is one. Otherwise its fragments are merged.

    Args:
        net: Detector of this library.
        image: RGB image, or tensor.
        side: Side of the square tiles in pixels.
        score_threshold: Minimum score of objects.
        device: Device of the network.

    Returns:
        ``boxes`` ``(n, 4)`` in pixels of the image, ``labels``, ``scores`` and, from Mask R-CNN, boolean
        ``masks`` ``(n, H, W)``, on the CPU, highest score first.
    """
    W, H = image_size(image)
    step = round(side * (1 - TILE_OVERLAP))
    regions = [(0, 0, W, H)]
    for y in window_starts(H, side, step):
        regions += [(x, y, min(W, x + side), min(H, y + side)) for x in window_starts(W, side, step)]
    views = [detect_in_region(net, image, region, side, score_threshold, device) for region in regions]
    boxes, labels, scores, is_cut = (
        torch.cat([getattr(view, name) for view in views]) for name in ("boxes", "labels", "scores", "is_cut")
    )
    sources = [(view, n) for view in views for n in range(len(view.labels))]
    groups = group_boxes(boxes, labels, scores, is_cut)
    groups.sort(key=lambda group: -float(scores[group].max()))
    first = [group[0] for group in groups]
    objects = {"boxes": boxes[first], "labels": labels[first]}
    objects["scores"] = torch.stack([scores[group].max() for group in groups]) if groups else scores
    if any(view.masks is not None for view in views):
        objects["masks"] = torch.zeros(len(groups), H, W, dtype=torch.bool)
        for mask, group in zip(objects["masks"], groups, strict=True):
            for n in group:
                paste_mask(mask, *sources[n])
    return objects


def detector_input(image: Pixels) -> Tensor:
    """Input of a detector, shape ``(C, H, W)``, with values in 0..1 if RGB."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return image.as_subclass(Tensor)


def shrink(image: Pixels, side: int) -> Pixels:
    """Resize an image whose longer side exceeds a length, keeping its aspect ratio."""
    if isinstance(image, Image.Image):
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        return image
    width, height = image_size(image)
    factor = min(1.0, side / max(width, height))
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    return VF.resize(image, size, VF.InterpolationMode.BICUBIC, antialias=True)


def detect_in_region(
    net: nn.Module,
    image: Pixels,
    region: tuple[int, int, int, int],
    side: int,
    score_threshold: float,
    device: torch.device,
) -> View:
    """Detect objects in a region of an image, resized to at most the size of a tile.

    Args:
        net: Detector of this library.
        image: RGB image, or tensor.
        region: Left, top, right and bottom.
        side: Maximum length of the longer side of the detector's input, in pixels.
        score_threshold: Minimum score of objects.
        device: Device of the network.
    """
    (W, H), (left, top, right, bottom) = image_size(image), region
    width, height = right - left, bottom - top
    pixels = detector_input(shrink(crop(image, region), side)).to(device)
    objects = {name: value.cpu() for name, value in net([pixels])[0].items()}
    objects = {name: value[objects["scores"] >= score_threshold] for name, value in objects.items()}
    scale = torch.tensor([width / pixels.shape[2], height / pixels.shape[1]] * 2)
    boxes = objects["boxes"].float() * scale
    x1, y1, x2, y2 = boxes.unbind(1)
    is_cut = ((x1 < CUT_MARGIN) & (left > 0)) | ((x2 > width - CUT_MARGIN) & (right < W))
    is_cut |= ((y1 < CUT_MARGIN) & (top > 0)) | ((y2 > height - CUT_MARGIN) & (bottom < H))
    boxes = boxes + torch.tensor([left, top, left, top])
    masks = objects["masks"].squeeze(1) > 0.5 if "masks" in objects else None
    return View(*region, boxes, objects["labels"], objects["scores"].float(), masks, is_cut)


def group_boxes(boxes: Tensor, labels: Tensor, scores: Tensor, is_cut: Tensor) -> list[list[int]]:
    """Group boxes of one object or of its fragments.

    Args:
        boxes: Boxes, ``(n, 4)``. The first box of a group of fragments is enlarged in place to enclose all.
        labels: Labels, ``(n,)``.
        scores: Scores, ``(n,)``.
        is_cut: Whether a box ends at an inner edge of its region, ``(n,)``.

    Returns:
        Indices of the boxes of each object, its representative first. Duplicates of a box that is not cut
        are in no group.
    """
    groups: list[list[int]] = []
    # Complete objects come first, so that a fragment never represents one.
    order = sorted(range(len(boxes)), key=lambda n: (bool(is_cut[n]), -float(scores[n])))
    # Box, label and is_cut of each group's representative.
    heads, classes, fragments = boxes.numpy().copy(), labels.numpy().copy(), is_cut.numpy().copy()
    for n in order:
        box, count = boxes[n].numpy(), len(groups)
        others = heads[:count]
        sides = np.minimum(others[:, 2:], box[2:]) - np.maximum(others[:, :2], box[:2])
        overlap = sides.clip(min=0).prod(1)
        own, theirs = box[2:] - box[:2], others[:, 2:] - others[:, :2]
        same = overlap > MERGE_THRESHOLD * np.minimum(own.prod(), theirs.prod(1))
        if is_cut[n]:  # fragments of an object overlap and share most of a side
            same |= (
                fragments[:count] & (overlap > 0) & (sides > MERGE_THRESHOLD * np.minimum(own, theirs)).any(1)
            )
        matches = np.flatnonzero(same & (classes[:count] == int(labels[n])))
        if not len(matches):
            heads[count], classes[count], fragments[count] = box, int(labels[n]), bool(is_cut[n])
            groups.append([n])
        elif fragments[matches[0]]:
            groups[matches[0]].append(n)
            heads[matches[0], :2] = np.minimum(heads[matches[0], :2], box[:2])
            heads[matches[0], 2:] = np.maximum(heads[matches[0], 2:], box[2:])
    for group, head in zip(groups, heads):
        boxes[group[0]] = torch.from_numpy(head)
    return groups


def paste_mask(mask: Tensor, view: View, n: int) -> None:
    """Add the mask of object ``n`` of a view to a mask of the whole image, in place.

    Args:
        mask: Mask of the whole image, ``(H, W)``.
        view: Detections in a region.
        n: Index of the object.
    """
    assert view.masks is not None
    size = (view.right - view.left, view.bottom - view.top)
    resized = np.array(Image.fromarray(view.masks[n].numpy()).resize(size))
    mask[view.top : view.bottom, view.left : view.right] |= torch.from_numpy(resized)
