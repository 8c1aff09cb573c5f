"""Segmentations of COCO files: polygons and run-length encodings, checked and decoded."""

import math

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from crossformer_vision.errors import UserError
from crossformer_vision.types import JsonObject, Polygons


def decode_mask(segmentation: Polygons | JsonObject, width: int, height: int) -> NDArray[np.uint8]:
    """Decode polygons or a run-length encoding, as COCO writes them.

    Args:
        segmentation: List of polygons ``[x1, y1, x2, y2, ...]``, or a dict with ``size`` and ``counts``.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        Mask of 0 and 1, shape ``(height, width)``.
    """
    return rle.decode(encode_mask(segmentation, width, height))


def encode_mask(segmentation: Polygons | JsonObject, width: int, height: int) -> JsonObject:
    """Compressed run lengths of polygons or a run-length encoding; see ``decode_mask``.

    Args:
        segmentation: Polygons or run-length encoding.
        width: Width of the image.
        height: Height of the image.
    """
    if isinstance(segmentation, list) or not isinstance(segmentation["counts"], (str, bytes)):
        return rle.segmToRle(segmentation, width, height)
    return {**segmentation, "size": [int(side) for side in segmentation["size"]]}


def check_segmentation(name: str, segmentation: object, width: int, height: int) -> bool:
    """Check a segmentation of any kind.

    Args:
        name: File and annotation, for errors.
        segmentation: Value of ``segmentation`` in the annotation.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        Whether any pixel of the image belongs to it.

    Raises:
        UserError: If it is missing, malformed or of another image size.
    """
    if isinstance(segmentation, dict):
        return _check_run_lengths(name, segmentation, width, height)
    if not isinstance(segmentation, list) or not segmentation:
        raise UserError(f"{name}: has no segmentation; without masks there is --model.detector retinanet")
    if not all(isinstance(polygon, list) for polygon in segmentation):
        raise UserError(f"{name}: its segmentation is not a list of polygons, [[x1, y1, x2, y2, …], …]")
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        raise UserError(f"{name}: a polygon of fewer than three points in its segmentation")
    values = [value for polygon in segmentation for value in polygon]
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise UserError(f"{name}: its segmentation has a value that is no number")
    if max(map(abs, values)) > farthest_corner(width, height):
        farthest = max(values, key=abs)
        raise UserError(f"{name}: its segmentation reaches to {farthest:.3g}, far outside the image")
    return bool(polygons_have_pixels(segmentation, width, height))


def _check_run_lengths(name: str, encoding: JsonObject, width: int, height: int) -> bool:
    size, counts = encoding.get("size"), encoding.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise UserError(f"{name}: its mask is of size {size}, the image of [{height}, {width}]")
    if not counts:
        raise UserError(f"{name}: its mask has no run lengths ('counts' is empty). Remove the annotation")
    if isinstance(counts, (str, bytes)):
        try:
            return bool(rle.area(encode_mask(encoding, width, height)))
        except Exception as error:  # the C++ decoder raises errors of several types
            raise UserError(f"{name}: its run lengths cannot be decoded ({error})") from None
    if not isinstance(counts, list) or not all(isinstance(c, int) and c >= 0 for c in counts):
        raise UserError(f"{name}: the run lengths of its mask are not whole numbers")
    if sum(counts) != width * height:
        raise UserError(
            f"{name}: the run lengths of its mask are of {sum(counts)} pixels, the image has {width * height}"
        )
    return any(counts[1::2])


def farthest_corner(width: int, height: int) -> float:
    """Largest accepted coordinate of a polygon, since the memory for drawing grows with it."""
    return 10 * max(width, height) + 10_000


def polygons_have_pixels(polygons: Polygons, width: int, height: int) -> bool | None:
    """Whether polygons cover any pixel of their image.

    Args:
        polygons: Lists of ``x1, y1, x2, y2, ...`` in pixels.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        Whether they do; ``None`` if they are invalid, which ``check_segmentation`` reports.
    """
    limit = farthest_corner(width, height)
    found = False
    for p in polygons:
        if len(p) < 6 or len(p) % 2 or min(p) < -limit or max(p) > limit:
            return None
        found = found or _is_clearly_inside(p, width, height)
    if not polygons:
        return None
    return found or bool(rle.area(rle.segmToRle(polygons, width, height)))


def _is_clearly_inside(polygon: list[float], width: int, height: int) -> bool:
    """Whether a polygon lies in its image and is thick enough to cover a pixel for certain."""
    x, y = polygon[0::2], polygon[1::2]
    left, right, top, bottom = min(x), max(x), min(y), max(y)
    if left < 0 or top < 0 or right > width or bottom > height:
        return False
    twice_area = abs(sum(a * d - b * c for a, b, c, d in zip(x, y, x[1:] + x[:1], y[1:] + y[:1])))
    return twice_area > 4 * (right - left + bottom - top)  # thicker than two pixels on average
