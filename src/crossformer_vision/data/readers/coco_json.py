"""Decoding of COCO JSON files: a fast path by msgspec, and a tolerant path that reports errors."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from crossformer_vision.errors import UserError
from crossformer_vision.types import CocoId, JsonObject


class ListedImage(msgspec.Struct):
    """An image of the file. Some tools omit its size."""

    id: Any
    file_name: Any
    width: Any = None
    height: Any = None


class CocoFile(msgspec.Struct):
    """Content of a COCO file, with undecoded annotations."""

    images: list[ListedImage]
    annotations: list[msgspec.Raw]
    categories: list[Any]


class PlainAnnotation(msgspec.Struct):
    """An annotation as COCO writes it. Others, such as those with ids as text, take the slow path."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int = -1
    area: float | None = None
    iscrowd: int = 0
    segmentation: msgspec.Raw = msgspec.Raw()
    attributes: msgspec.Raw = msgspec.Raw()


decode_annotation = msgspec.json.Decoder(PlainAnnotation).decode
decode_polygons = msgspec.json.Decoder(list[list[float]]).decode


def coco_id(value: Any) -> CocoId:
    """Normalize an id, so that ``1``, ``1.0`` and ``"1"`` are equal."""
    if isinstance(value, str):
        return int(value) if value.lstrip("-").isdecimal() and value.isascii() else value
    number = int(value)
    if number != value:
        raise ValueError(f"id {value}")
    return number


def first_duplicate(ids: Iterable[CocoId]) -> CocoId | None:
    """The first value that occurs a second time, or ``None``."""
    seen: set[CocoId] = set()
    for value in ids:
        if value in seen:
            return value
        seen.add(value)
    return None


def describe_missing(path: Path, error: Exception) -> str:
    """Message for a file whose images or categories lack an entry."""
    needed = "its images need id and file_name, its categories id and name"
    return f"{path}: not a COCO file: {needed} ({type(error).__name__}: {error})"


def read_coco_json(path: Path) -> JsonObject:
    """Read the lists of a COCO file.

    Args:
        path: The JSON file.

    Returns:
        ``images`` as ``ListedImage``, ``annotations`` not decoded where msgspec can read the file, and
        ``categories``.

    Raises:
        UserError: If the file is missing, is not JSON, or lacks a list or an image's id or name.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such annotation file")
    text = path.read_bytes()
    try:
        found = msgspec.json.decode(text, type=CocoFile)
        return {"images": found.images, "annotations": found.annotations, "categories": found.categories}
    except (msgspec.MsgspecError, RecursionError, ValueError):  # json accepts more and reports errors
        pass
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(f"{path}: not a COCO file: it needs the lists images, annotations and categories")
    try:
        images = [
            ListedImage(i["id"], i["file_name"], i.get("width"), i.get("height")) for i in content["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(describe_missing(path, error)) from error
    return {**content, "images": images}


def check_numbers(name: str, annotation: JsonObject) -> tuple[list[float], float, int]:
    """Box (x, y, width, height), area (0 if missing) and crowd flag of an annotation.

    Raises:
        UserError: If one of them is missing or not a finite number.
    """
    try:
        x, y, w, h = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{name}: its bbox is not [x, y, width, height]") from None
    area = annotation.get("area")
    try:
        area = 0.0 if area is None else float(area)
        crowd = int(int(annotation.get("iscrowd") or 0) != 0)
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{name}: its area or iscrowd is no number ({area!r}, {annotation.get('iscrowd')!r})"
        ) from None
    if not all(map(math.isfinite, (x, y, w, h, area))):
        raise UserError(f"{name}: its bbox or area has a number that is none: {annotation['bbox']}, {area}")
    return [x, y, w, h], area, crowd


def rotation_of(annotation: JsonObject) -> float:
    """Angle in degrees by which CVAT's box is rotated around its center; 0 for upright boxes."""
    attributes = annotation.get("attributes")
    angle = attributes.get("rotation") if isinstance(attributes, dict) else None
    try:
        return float(angle or 0) % 360
    except (TypeError, ValueError):
        return 0.0


def enclosing_box(xywh: list[float], angle: float) -> list[float]:
    """The upright box ``x, y, width, height`` around a box that is rotated by an angle in degrees."""
    x, y, w, h = xywh
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    width, height = w * cos + h * sin, w * sin + h * cos
    return [x + (w - width) / 2, y + (h - height) / 2, width, height]
