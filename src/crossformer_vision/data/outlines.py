"""Transform polygons, then rasterize them once in the final size of the image.

Rasterizing in the original size and resizing masks would cost several times as much and be coarser.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from crossformer_vision.data.readers.coco_masks import decode_mask
from crossformer_vision.types import Polygons


class Outlines(tv_tensors.KeyPoints):
    """Corners of all polygons of an image as x, y, shape ``(N, 2)``.

    torchvision flips key points as pixel centers, which end at ``width - 1``. Corners lie on pixel edges,
    from 0 to ``width``, as those of boxes.
    """


@functional.register_kernel(functional.horizontal_flip, Outlines)  # type: ignore[untyped-decorator]
def _flip_horizontally(corners: Outlines) -> Outlines:
    x, y = corners.as_subclass(Tensor).unbind(1)
    return tv_tensors.wrap(torch.stack([corners.canvas_size[1] - x, y], 1), like=corners)


@functional.register_kernel(functional.vertical_flip, Outlines)  # type: ignore[untyped-decorator]
def _flip_vertically(corners: Outlines) -> Outlines:
    x, y = corners.as_subclass(Tensor).unbind(1)
    return tv_tensors.wrap(torch.stack([x, corners.canvas_size[0] - y], 1), like=corners)


def create_outlines(shapes: list[Polygons], canvas: tuple[int, int]) -> Outlines:
    """Corners of the polygons of objects.

    Args:
        shapes: Polygons of each object, as in COCO files.
        canvas: Height and width of the image.
    """
    corners = np.concatenate([np.zeros(0), *(np.asarray(polygon) for shape in shapes for polygon in shape)])
    return Outlines(torch.from_numpy(corners.astype(np.float32)).view(-1, 2), canvas_size=canvas)


def clip_polygon(polygon: list[float], width: int, height: int) -> list[float]:
    """Cut off what lies outside an image (Sutherland and Hodgman).

    Args:
        polygon: ``x1, y1, x2, y2, ...`` in pixels.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        The part inside, in the same form; empty if there is none.
    """
    x, y = polygon[0::2], polygon[1::2]
    if min(x) >= 0 and min(y) >= 0 and max(x) <= width and max(y) <= height:
        return polygon
    points = list(zip(x, y))
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        inside: list[tuple[float, float]] = []
        for start, end in zip(points[-1:] + points[:-1], points):
            from_start, from_end = sign * (start[axis] - limit), sign * (end[axis] - limit)
            if (from_start >= 0) != (from_end >= 0):
                t = from_start / (from_start - from_end)
                inside.append((start[0] + t * (end[0] - start[0]), start[1] + t * (end[1] - start[1])))
            if from_end >= 0:
                inside.append(end)
        points = inside
    return [value for point in points for value in point]


def clip_shape(shape: list[list[float]], width: int, height: int) -> list[list[float]]:
    """Parts of an object's polygons inside the image; the polygons themselves if no part is inside.

    Args:
        shape: Polygons as ``[x1, y1, x2, y2, ...]`` in pixels.
        width: Width of the image.
        height: Height of the image.
    """
    clipped = [clip_polygon(polygon, width, height) for polygon in shape]
    return [polygon for polygon in clipped if len(polygon) >= 6] or shape


def rasterize(corners: Tensor, shapes: list[Polygons], objects: list[int], size: tuple[int, int]) -> Tensor:
    """Rasterize the polygons of objects.

    Args:
        corners: Transformed corners of ``create_outlines``.
        shapes: Polygons before the transform, for their numbers of corners.
        objects: Indices of the objects to rasterize.
        size: Height and width of the image.

    Returns:
        Masks of 0 and 1, shape ``(len(objects), H, W)``.
    """
    counts = [sum(len(polygon) for polygon in shape) // 2 for shape in shapes]
    first = np.cumsum([0, *counts])
    points = corners.numpy()
    H, W = size
    masks = np.zeros((len(objects), H, W), np.uint8)
    for mask, n in zip(masks, objects, strict=True):
        own = points[first[n] : first[n + 1]]
        # Only within its box, since most objects are small.
        left, top = np.floor(own.min(0)).astype(int).clip(0, (W, H)).tolist()
        right, bottom = (np.ceil(own.max(0)).astype(int) + 1).clip(0, (W, H)).tolist()
        if right <= left or bottom <= top:
            continue
        rest = (own - np.array((left, top), np.float32)).ravel().tolist()
        polygons = []
        for polygon in shapes[n]:
            polygons.append(rest[: len(polygon)])
            rest = rest[len(polygon) :]
        mask[top:bottom, left:right] = decode_mask(polygons, right - left, bottom - top)
    return torch.from_numpy(masks)
