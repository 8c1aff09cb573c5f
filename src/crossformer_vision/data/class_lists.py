"""Class names of segmentation data, and their values in class maps."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossformer_vision.errors import UserError, check_names, counted
from crossformer_vision.types import JsonObject

IGNORED = 255  # ignore index of class maps: excluded from loss and metrics
UNKNOWN = 254  # in lookup tables: marks values that are invalid in class maps
KEYS = ("classes", "first_index", "ignore_index", "colors")
EXAMPLE = '{"classes": ["sky", "road"], "ignore_index": 255}'


@dataclass
class ClassList:
    """Classes of a data set.

    Attributes:
        names: Class names by index.
        values: Index by value in the files, ``(256,)``; ``IGNORED`` or ``UNKNOWN`` for others.
        has_ignore_index: Whether the list sets ``ignore_index`` explicitly.
        colors: Value of each color, for class maps in colors; empty for class maps with values.
    """

    names: list[str]
    values: NDArray[np.uint8]
    has_ignore_index: bool = False
    colors: dict[tuple[int, ...], int] = field(default_factory=dict)


def value_table(classes: int, first: int = 0, ignored: int = IGNORED) -> NDArray[np.uint8]:
    """Index by value of class maps that number classes from ``first``; 255 and ``ignored`` are ignored.

    Args:
        classes: Number of classes.
        first: Value of the first class.
        ignored: Further value that is ignored, besides 255.
    """
    values = np.full(256, UNKNOWN, np.uint8)
    values[first : first + classes] = np.arange(classes)
    values[[IGNORED, ignored]] = IGNORED
    return values


def read_classes(root: Path) -> ClassList:
    """Read the classes of a folder in ADE20K's layout.

    ADE20K's own ``objectInfo150.txt`` numbers them from 1, and 0 is ignored. ``classes.json`` lists names by
    index (``["sky", "road"]``), or names with their values (``{"sky": 0}``, ``{"0": "sky"}`` or
    ``[{"id": 0, "name": "sky"}]``). A class whose value is ``ignore_index`` is no class. With ``colors``, one
    ``[r, g, b]`` per class, the class maps show classes in these colors.

    Args:
        root: Folder with one of these files.

    Raises:
        UserError: If there is no such file, or it cannot be read as one.
    """
    info, listed = root / "objectInfo150.txt", root / "classes.json"
    if info.is_file() and not listed.is_file():
        return _read_ade20k(info)
    found = _read_json(listed)
    content: JsonObject = found if isinstance(found, dict) and "classes" in found else {"classes": found}
    if unknown := sorted(set(content) - set(KEYS)):
        raise UserError(f"{listed}: unknown key '{unknown[0]}'. Valid keys: {', '.join(KEYS)}")
    first, ignored = content.get("first_index", 0), content.get("ignore_index", IGNORED)
    for key, value in (("first_index", first), ("ignore_index", ignored)):
        if not isinstance(value, int) or not 0 <= value <= 255:
            raise UserError(f"{listed}: {key} must be an integer from 0 to 255, not {value!r}")
    try:
        names = _names_by_value(content["classes"], first)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{listed}: not a list of classes like {EXAMPLE} ({error})") from None
    colors = _read_colors(listed, content["colors"], list(names)) if "colors" in content else {}
    return _class_list(listed, names, ignored, "ignore_index" in content, colors)


def _read_colors(listed: Path, colors: object, values: list[int]) -> dict[tuple[int, ...], int]:
    """Value by color."""
    if not isinstance(colors, list) or len(colors) != len(values):
        raise UserError(f"{listed}: colors must list one [r, g, b] for each of the {len(values)} classes")
    for color in colors:
        is_rgb = isinstance(color, list) and len(color) == 3
        if not is_rgb or not all(isinstance(v, int) and 0 <= v <= 255 for v in color):
            raise UserError(f"{listed}: the color {color} is not [r, g, b] with values from 0 to 255")
    by_color = {tuple(color): value for color, value in zip(colors, values, strict=True)}
    if len(by_color) < len(values):
        raise UserError(f"{listed}: two classes have the same color")
    return by_color


def read_class_names(root: Path) -> list[str] | None:
    """Class names in their order from ``classes.json``; ``None`` if there is no such file.

    Raises:
        UserError: If it is not a list of names.
    """
    listed = root / "classes.json"
    if not listed.is_file():
        return None
    content = _read_json(listed)
    names = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{listed}: must list the class names: ["cat", "dog"]')
    check_names(listed, names)
    return names


def _read_json(listed: Path) -> object:
    """Content of ``classes.json``."""
    try:
        return json.loads(listed.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{listed}: no such file; it lists the classes: {EXAMPLE}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{listed}: not a list of classes like {EXAMPLE} ({error})") from None


def _class_list(
    listed: Path,
    names: dict[int, str],
    ignored: int,
    has_ignore_index: bool,
    colors: dict[tuple[int, ...], int],
) -> ClassList:
    check_names(listed, list(names.values()))
    if not 0 <= ignored <= 255 or min(names, default=0) < 0 or max(names, default=0) > UNKNOWN - 1:
        raise UserError(
            f"{listed}: values of classes are from 0 to {UNKNOWN - 1}, ignore_index from 0 to 255; it has "
            f"{min(names, default=0)} to {max(names, default=0)} and {ignored}"
        )
    names.pop(ignored, None)
    if len(names) < 2:
        left = counted(len(names), "class", "classes")
        raise UserError(f"{listed}: lists {left} without the ignored one; two or more are needed")
    values = np.full(256, UNKNOWN, np.uint8)
    values[list(names)] = np.arange(len(names))
    values[[IGNORED, ignored]] = IGNORED
    return ClassList(list(names.values()), values, has_ignore_index, colors)


def _names_by_value(classes: object, first: int) -> dict[int, str]:
    """Names by value in the files, sorted by value."""
    if isinstance(classes, dict):
        if all(str(key).lstrip("-").isdecimal() for key in classes):
            pairs = [(int(key), name) for key, name in classes.items()]
        else:
            pairs = [(_whole(value), name) for name, value in classes.items()]
    elif isinstance(classes, list) and classes and all(isinstance(entry, dict) for entry in classes):
        pairs = [(_whole(entry["id"]), entry["name"]) for entry in classes]
    elif isinstance(classes, list):
        pairs = list(enumerate(classes, start=first))
    else:
        raise TypeError(f"classes is {classes!r}")
    if len({value for value, _ in pairs}) < len(pairs):
        raise ValueError("two classes have the same value")
    return {value: str(name) for value, name in sorted(pairs, key=lambda pair: pair[0])}


def _whole(value: float | str) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _read_ade20k(info: Path) -> ClassList:
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    rows = [line.split("\t") for line in lines if line.strip()]
    if len(rows) != 150:
        raise UserError(f"{info}: lists {len(rows)} classes; ADE20K's has 150, after a line of titles")
    names = [row[-1].split(",")[0].strip() for row in rows]
    return ClassList(names, value_table(150, first=1, ignored=0), True)
