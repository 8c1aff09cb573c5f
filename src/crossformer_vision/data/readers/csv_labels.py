"""Images and classes listed in a CSV file.

The columns are ``path``, perhaps ``split``, and the classes: either ``label``, with several separated by
``;``, or one column of 0 and 1 per class.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from crossformer_vision.data.images import StringArray, open_upright
from crossformer_vision.data.rasters import AnyImage
from crossformer_vision.data.readers.folders import LabeledImages, class_indices
from crossformer_vision.data.readers.listed_images import is_outside
from crossformer_vision.errors import NoSuchSplit, UserError, counted

Row = dict[str, str | None]
IS_PRESENT = {"": False, "0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


class MultiLabelImages(LabeledImages):
    """Image files below a folder, with any number of classes each.

    Args:
        folder: Folder of the images.
        names: Their paths below it.
        presence: Whether each image has each class, ``(images, classes)``.
        classes: Class names.
    """

    def __init__(
        self, folder: Path, names: StringArray, presence: NDArray[np.bool_], classes: list[str]
    ) -> None:
        super().__init__(folder, names, np.zeros(len(names), np.int32), classes)
        self.presence = presence

    @override
    def read(self, index: int) -> tuple[AnyImage, NDArray[np.float32]]:  # type: ignore[override]
        """An upright image, and 1 for each of its classes."""
        return open_upright(self.name(index)), self.presence[index].astype(np.float32)

    @override
    def select(self, names: set[str]) -> "MultiLabelImages":
        indices, chosen = self.find(names)
        return MultiLabelImages(self.folder, chosen, self.presence[indices], self.classes)


def read_csv(path: Path, classes: Sequence[str], multi_label: bool) -> tuple[LabeledImages, list[str]]:
    """Read the images that a CSV file lists. Their paths are relative to its folder.

    Args:
        path: The CSV file.
        classes: Names of the training classes; empty for those of the file, sorted.
        multi_label: Read any number of classes per image, even if each has one. It is also the case if a row
            has several classes, or classes have columns of their own.

    Returns:
        The images, and the value of the column ``split`` of each; an empty list if there is no such column.

    Raises:
        UserError: If the file is empty or lacks a column, or a row has no image, an unknown class or no class
            where one is needed, or the path of another row.
    """
    lines, rows = _read_rows(path)
    names = _check_paths(path, lines, rows)
    own_columns = [name for name in rows[0] if name and name not in ("path", "label", "split")]
    if "label" in rows[0]:
        labels = [_split_labels(row["label"]) for row in rows]
        multi_label |= any(len(classes_of_image) > 1 for classes_of_image in labels)
    else:
        multi_label = True
        labels = [_present_classes(path, n, row, own_columns) for n, row in zip(lines, rows, strict=True)]
    if not multi_label and [] in labels:
        raise UserError(f"{path}: line {lines[labels.index([])]} has no label")
    names_in_file = sorted({label for row in labels for label in row}) if "label" in rows[0] else own_columns
    indices = class_indices(path, names_in_file, classes)
    images = StringArray(names)
    splits = [(row.get("split") or "").strip() for row in rows] if "split" in rows[0] else []
    if not multi_label:
        single = np.array([indices[row[0]] for row in labels])
        return LabeledImages(path.parent, images, single, list(indices)), splits
    presence = np.zeros((len(rows), len(indices)), bool)
    for image, found in enumerate(labels):
        presence[image, [indices[label] for label in found]] = True
    return MultiLabelImages(path.parent, images, presence, list(indices)), splits


def select_split(
    path: Path, images: LabeledImages, splits: Sequence[str], names: Sequence[str]
) -> LabeledImages:
    """Images of a split.

    Args:
        path: The CSV file, for messages.
        images: All images.
        splits: Split of each image.
        names: Names that the split may have.

    Raises:
        NoSuchSplit: If there are none.
    """
    name = next((name for name in names if name in splits), None)
    if name is None:
        raise NoSuchSplit(f"{path}: column split has no '{names[0]}'")
    return images.select({image for image, split in zip(images.names, splits, strict=True) if split == name})


def _check_paths(path: Path, lines: Sequence[int], rows: Sequence[Row]) -> list[str]:
    """Paths of the images."""
    names = [(row["path"] or "").strip() for row in rows]
    first_line: dict[str, int] = {}
    for n, name, row in zip(lines, names, rows, strict=True):
        if not name:
            raise UserError(f"{path}: line {n} has no path")
        if is_outside(name):
            raise UserError(f"{path}: line {n}: {name} lies outside {path.parent}")
        if (first := first_line.setdefault(name, n)) != n:
            other = rows[lines.index(first)]
            is_in_two = (row.get("split") or "") != (other.get("split") or "")
            suffix = ", in another split" if is_in_two else ""
            raise UserError(f"{path}: line {n} repeats {name} of line {first}{suffix}. Remove one of them")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        others = f", nor do {counted(len(missing) - 1, 'other')}" if len(missing) > 1 else ""
        raise UserError(f"{path}: line {first_line[missing[0]]}: {missing[0]} does not exist{others}")
    return names


def _split_labels(text: str | None) -> list[str]:
    """Class names separated by semicolons."""
    return [name.strip() for name in (text or "").split(";") if name.strip()]


def _present_classes(path: Path, line: int, row: Row, columns: Sequence[str]) -> list[str]:
    """Class names whose column has a 1."""
    marks = {name: (row[name] or "").strip().lower() for name in columns}
    if wrong := [name for name, mark in marks.items() if mark not in IS_PRESENT]:
        raise UserError(f"{path}: line {line}: column {wrong[0]} is '{row[wrong[0]]}', not 0 or 1")
    return [name for name, mark in marks.items() if IS_PRESENT[mark]]


def _read_rows(path: Path) -> tuple[list[int], list[Row]]:
    """Number of the line, and values by column, of each row of a file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            numbered = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None
    has_classes = "label" in columns or bool(set(columns) - {"path", "split", ""})
    if missing := [name for name in ("path",) if name not in columns] or ([] if has_classes else ["label"]):
        raise UserError(f"{path}: has no column '{missing[0]}', but {', '.join(columns) or 'no columns'}")
    if not numbered:
        raise UserError(f"{path}: lists no images")
    return [number for number, _ in numbered], [row for _, row in numbered]
