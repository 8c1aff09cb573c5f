"""Detecting in images much larger than a detector's own, in overlapping tiles."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import batched_nms

from crossformer_vision.models.segmenters import starts

OVERLAP = 0.2  # of a tile's side
SAME = 0.5  # IoU above which two boxes of a class are one object
EDGE = 2.0  # pixels from a tile's inner edge, within which a box is taken for one that it cuts


def detect_in_tiles(
    net: nn.Module, picture: Image.Image, side: int, score: float, device: torch.device
) -> dict[str, Tensor]:
    """What a detector finds in the tiles of an image, and in the whole of it made as small as a tile.

    A box that ends at an inner edge of its tile is left out, as the next tile has all of that object; and of
    the whole image's boxes those that are no larger than what tiles share, which a tile has in full size.
    What is left of several views is merged by `batched_nms`.

    Args:
        net: one of our detectors.
        picture: RGB.
        side: of the square tiles, in pixels.
        score: least score of an object.
        device: of the network.

    Returns:
        `boxes` (n, 4) in pixels of the picture, `labels`, `scores`, and of Mask R-CNN `masks` (n, H, W) of
        bools, on the CPU; the best score first.
    """
    W, H = picture.size
    step = round(side * (1 - OVERLAP))
    views = [(0, 0, W, H)]
    for y in starts(H, side, step):
        views += [(x, y, min(W, x + side), min(H, y + side)) for x in starts(W, side, step)]
    found: list[dict[str, Tensor]] = []
    where: list[tuple[int, int, int, int]] = []  # the view of each object
    for number, view in enumerate(views):
        part = picture.crop(view)
        part.thumbnail((side, side), Image.Resampling.BICUBIC)  # the whole; tiles are as large as that
        pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1).to(device) / 255
        one = {name: value.cpu() for name, value in net([pixels])[0].items()}
        boxes = one["boxes"].float() * ((view[2] - view[0]) / part.width)
        x1, y1, x2, y2 = boxes.unbind(1)
        if number:
            w, h = view[2] - view[0], view[3] - view[1]
            left_out = ((x1 < EDGE) & (view[0] > 0)) | ((x2 > w - EDGE) & (view[2] < W))
            left_out |= ((y1 < EDGE) & (view[1] > 0)) | ((y2 > h - EDGE) & (view[3] < H))
        else:
            left_out = torch.maximum(x2 - x1, y2 - y1) <= side - step
        kept = (one["scores"] >= score) & ~left_out
        one["boxes"] = boxes + torch.tensor([view[0], view[1], view[0], view[1]])
        one = {name: value[kept] for name, value in one.items()}
        if "masks" in one:
            one["masks"] = one["masks"].squeeze(1) > 0.5
        found.append(one)
        where += [view] * len(one["boxes"])
    merged: dict[str, Any] = {
        name: torch.cat([f[name] for f in found]) for name in ("boxes", "labels", "scores")
    }
    chosen = batched_nms(merged["boxes"], merged["scores"].float(), merged["labels"], SAME)
    merged = {name: value[chosen] for name, value in merged.items()}
    if "masks" in found[0]:
        small = [mask for one in found for mask in one["masks"]]
        merged["masks"] = torch.zeros(len(chosen), H, W, dtype=torch.bool)
        for n, k in enumerate(chosen.tolist()):
            left, top, right, bottom = where[k]
            mask = Image.fromarray(small[k].numpy()).resize((right - left, bottom - top))
            merged["masks"][n, top:bottom, left:right] = torch.from_numpy(np.array(mask))
    return merged
