"""Images and classes listed in a CSV file with the columns ``path`` and ``label``, and perhaps ``split``."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crossformer_vision.data.images import StringArray
from crossformer_vision.data.readers.folders import LabeledImages, class_indices
from crossformer_vision.data.readers.listed_images import is_outside
from crossformer_vision.errors import NoSuchSplit, UserError, counted


class CsvImages(LabeledImages):
    """Images that a CSV file lists, with one class each.

    Paths are relative to the folder of the file.

    Args:
        path: The CSV file.
        classes: Names of the training classes; empty for those of the file, sorted.

    Attributes:
        splits: Value of the column ``split`` of each image; empty if there is no such column.

    Raises:
        UserError: If the file is empty or lacks a column, or a row has no image, not one known class, or the
            path of another row.
    """

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        lines, rows = _read_rows(path)
        paths = [(row["path"] or "").strip() for row in rows]
        labels = [(row["label"] or "").strip() for row in rows]
        first_line: dict[str, int] = {}
        for number, name, label in zip(lines, paths, labels, strict=True):
            if not name or not label:
                raise UserError(f"{path}: line {number} has no {'label' if name else 'path'}")
            if ";" in label:
                raise UserError(f"{path}: line {number} has several classes ({label}). Each image needs one")
            if is_outside(name):
                raise UserError(f"{path}: line {number}: {name} lies outside {path.parent}")
            if first_line.setdefault(name, number) != number:
                raise UserError(f"{path}: line {number} repeats {name} of line {first_line[name]}")
        if missing := [name for name in paths if not (path.parent / name).is_file()]:
            others = f", nor do {counted(len(missing) - 1, 'other')}" if len(missing) > 1 else ""
            raise UserError(f"{path}: line {first_line[missing[0]]}: {missing[0]} does not exist{others}")
        indices = class_indices(path, sorted(set(labels)), classes)
        super().__init__(
            path.parent, StringArray(paths), np.array([indices[n] for n in labels]), list(indices)
        )
        self.source = path
        self.splits = [(row.get("split") or "").strip() for row in rows] if "split" in rows[0] else []

    def select_split(self, names: Sequence[str]) -> LabeledImages:
        """Images of a split.

        Args:
            names: Names that the split may have.

        Raises:
            NoSuchSplit: If there are none.
        """
        name = next((name for name in names if name in self.splits), None)
        if name is None:
            raise NoSuchSplit(f"{self.source}: column split has no '{names[0]}'")
        return self.select(
            {path for path, split in zip(self.names, self.splits, strict=True) if split == name}
        )


def _read_rows(path: Path) -> tuple[list[int], list[dict[str, str | None]]]:
    """Number of the line, and values by column, of each row of a file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            numbered = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None
    if missing := [name for name in ("path", "label") if name not in columns]:
        raise UserError(f"{path}: has no column '{missing[0]}', but {', '.join(columns) or 'no columns'}")
    if not numbered:
        raise UserError(f"{path}: lists no images")
    return [number for number, _ in numbered], [row for _, row in numbered]
