"""Labels in YOLO's format: one text file per image, one object per row, coordinates from 0 to 1.

A row is ``class x y width height`` (center and size of a box) or ``class x1 y1 x2 y2 x3 y3 …`` (a polygon).
The label of ``images/train/1.jpg`` is ``labels/train/1.txt``. An image without a label file has no objects.
``data.yaml`` has the class names and the folders of the splits.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import yaml
from typing_extensions import override

from crossformer_vision.data.images import EXTENSIONS, StringArray, files_below
from crossformer_vision.data.readers.coco_masks import polygons_have_pixels
from crossformer_vision.data.readers.listed_images import header_size
from crossformer_vision.data.readers.objects import ObjectBuffer, ObjectImages
from crossformer_vision.errors import NoSuchSplit, UserError, check_names, counted, raise_or_collect

log = logging.getLogger("crossformer_vision")

NAME_FILES = ("data.yaml", "dataset.yaml", "data.yml", "classes.txt")
TOLERANCE = 1e-3  # by which rounded coordinates may exceed 0 to 1


@dataclass(frozen=True)
class YoloDataset:
    """Content of ``data.yaml``.

    Attributes:
        file: The file, or ``classes.txt`` with the class names alone.
        folders: Folders that paths may be relative to.
        splits: Images of each split: folders, or lists of images.
        names: Class names by index.
    """

    file: Path
    folders: list[Path]
    splits: dict[str, list[str]]
    names: list[str]


def find_names_file(root: Path) -> Path | None:
    """The file with the class names of a data set in YOLO's format: ``data.yaml`` or ``classes.txt``."""
    if root.is_file():
        return root if root.suffix in (".yaml", ".yml") else None
    return next((root / name for name in NAME_FILES if (root / name).is_file()), None)


def read_yolo_dataset(root: Path) -> YoloDataset:
    """Read the class names and splits of a data set.

    Args:
        root: Folder with ``data.yaml`` or ``classes.txt``, or a file like ``data.yaml``.

    Raises:
        UserError: If there is no such file, or it has no class names.
    """
    file = find_names_file(root)
    if file is None:
        raise UserError(
            f"{root}: has no data.yaml, which lists the classes of labels in YOLO's format: "
            "{train: images/train, val: images/val, names: [cat, dog]}"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
        is_yaml = file.suffix in (".yaml", ".yml")
        content = yaml.safe_load(text) if is_yaml else {"names": text.rstrip().splitlines()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from None
    if isinstance(content, dict) and "kpt_shape" in content:
        raise UserError(f"{file}: keypoint labels (kpt_shape) are not supported")
    if not isinstance(content, dict) or not content.get("names"):
        raise UserError(f"{file}: has no class names. Add them: names: [cat, dog]")
    names = _read_names(file, content["names"])
    base = Path(str(content.get("path") or "."))
    splits = {
        str(key): [str(entry) for entry in (value if isinstance(value, list) else [value])]
        for key, value in content.items()
        if key not in ("names", "path") and isinstance(value, (str, list))
    }
    return YoloDataset(file, [file.parent / base, file.parent], splits, names)


def _read_names(file: Path, names: object) -> list[str]:
    """Class names from a list, or from a mapping of indices to names."""
    if isinstance(names, dict):
        try:
            by_index = {int(index): str(name) for index, name in names.items()}
        except (TypeError, ValueError):
            raise UserError(f"{file}: names must map class indices to names: {{0: cat, 1: dog}}") from None
        if sorted(by_index) != list(range(len(by_index))):
            raise UserError(f"{file}: names must have the indices 0 to {len(by_index) - 1} without gaps")
        names = [by_index[index] for index in range(len(by_index))]
    if not isinstance(names, list):
        raise UserError(f"{file}: names must be a list of class names: [cat, dog]")
    listed = [str(name).strip() for name in names]
    check_names(file, listed)
    return listed


def find_yolo_images(dataset: YoloDataset, split_names: Sequence[str]) -> tuple[str, list[Path]]:
    """Images of a split, sorted within each folder.

    Args:
        dataset: The data set.
        split_names: Names that the split may have.

    Returns:
        Name of the split, and its images.

    Raises:
        NoSuchSplit: If there is no such split.
        UserError: If its folder or list is missing or has no images.
    """
    for name in split_names:
        folders = [f for f in (f"images/{name}", f"{name}/images") if (dataset.file.parent / f).is_dir()]
        if entries := dataset.splits.get(name) or folders[:1]:
            images = [image for entry in entries for image in _expand(dataset, entry)]
            if not images:
                raise UserError(f"{dataset.file}: split '{name}' has no images in {', '.join(entries)}")
            return name, images
    raise NoSuchSplit(
        f"{dataset.file}: no split '{split_names[0]}', and no folder images/{split_names[0]} or "
        f"{split_names[0]}/images. Set --data.train_split or --data.val_split"
    )


def _expand(dataset: YoloDataset, entry: str) -> Iterator[Path]:
    """Images of a folder, or in a list of images."""
    relative = entry
    while relative.startswith("../"):  # Roboflow writes ../train/images for a folder beside data.yaml
        relative = relative.removeprefix("../")
    candidates = [*(folder / entry for folder in dataset.folders), dataset.file.parent / relative]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise UserError(f"{dataset.file}: {entry} not found in {dataset.folders[0]}")
    if path.is_dir():
        yield from (file for file in files_below(path) if file.suffix.lower() in EXTENSIONS)
        return
    for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines():
        if line.strip():
            folders = (path.parent, *dataset.folders)
            found = next((f / line.strip() for f in folders if (f / line.strip()).is_file()), None)
            if found is None:
                raise UserError(f"{path}: lists {line.strip()}, which does not exist")
            yield found


def label_path(image: Path) -> Path:
    """Label file of an image: in ``labels`` instead of the last folder called ``images``, or beside it."""
    parts = list(image.parts)
    folders = [n for n, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


class YoloImages(ObjectImages):
    """Images and objects of labels in YOLO's format.

    Args:
        dataset: Class names and folders.
        images: Images of the split.
        classes: Names of the training classes, in the order of their labels. ``None`` for those of the data
            set.
        masks: Read polygons.
        train: Skip objects that are outside their image or have no area.
        skip_empty: Skip images without objects.
        as_outlines: Return polygons instead of masks.

    Raises:
        UserError: If a row is invalid, a class is unknown, or no object can be trained on.
    """

    def __init__(
        self,
        dataset: YoloDataset,
        images: Sequence[Path],
        classes: list[str] | None = None,
        masks: bool = False,
        train: bool = False,
        skip_empty: bool = False,
        as_outlines: bool = False,
    ) -> None:
        folder = Path(os.path.commonpath([image.parent for image in images]))
        super().__init__(dataset.file, folder, masks, as_outlines)
        self.categories = dict(enumerate(dataset.names))
        self.names = StringArray(image.relative_to(folder).as_posix() for image in images)
        self.sizes = np.array([header_size(image) for image in images], np.int64)
        self.ids = np.arange(len(images))
        names = classes or dataset.names
        self._label_of = {i: names.index(name) + 1 for i, name in self.categories.items() if name in names}
        objects = ObjectBuffer()
        self._first_triangle: str | None = None  # file and row
        self._has_larger_polygons = False
        missing = [n for n, image in enumerate(images) if not self._read_labels(n, image, objects)]
        if len(missing) == len(images):
            raise UserError(
                f"{dataset.file}: none of {counted(len(images), 'image')} has a label file. For example, "
                f"{label_path(images[0])} is missing"
            )
        if missing:
            count = counted(len(missing), "image")
            example = images[missing[0]]
            log.warning(
                "%s: %s without a label file, such as %s, count as empty", dataset.file, count, example
            )
        if self._first_triangle and not self._has_larger_polygons:
            raise UserError(
                f"{self._first_triangle} has 7 numbers, but its split has no polygon with four corners. "
                "Remove further columns, such as confidence and track id"
            )
        self.store(objects)
        self.skip_unusable(train, skip_empty)

    def _read_labels(self, index: int, image: Path, objects: ObjectBuffer) -> bool:
        """Read the label file of an image; returns whether it has one."""
        path = label_path(image)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            return False
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as labels in YOLO's format ({error})") from None
        width, height = self.sizes[index].tolist()
        for row, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    self._read_row(f"{path}: row {row}", row, line, index, (width, height), objects)
                except UserError as error:
                    raise_or_collect(error)
        return True

    def _read_row(
        self, place: str, row: int, line: str, index: int, size: tuple[int, int], objects: ObjectBuffer
    ) -> None:
        """Read an object.

        Args:
            place: File and row, for messages.
            row: Row, from 1.
            line: Its text.
            index: Index of the image.
            size: Width and height of the image.
            objects: Objects that it is added to.
        """
        try:
            number, *values = (float(value) for value in line.split())
        except ValueError:
            raise UserError(f"{place} must contain only numbers: '{line.strip()[:60]}'") from None
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise UserError(
                f"{place} has {1 + len(values)} numbers. A box has 5 (class x y width height), a polygon a "
                "class and the coordinates of three or more corners"
            )
        if number not in self.categories:
            raise UserError(
                f"{place} has class {number:g}. {self.annotations.name} has the classes 0 to "
                f"{len(self.categories) - 1}"
            )
        if int(number) not in self._label_of:
            name = self.categories[int(number)]
            raise UserError(f"{place} has class '{name}', which is not among the training classes")
        if not all(math.isfinite(v) and -TOLERANCE <= v <= 1 + TOLERANCE for v in values):
            wrong = next(v for v in values if not -TOLERANCE <= v <= 1 + TOLERANCE)
            raise UserError(f"{place} has the coordinate {wrong:g}. Coordinates must be from 0 to 1")
        width, height = size
        label = self._label_of[int(number)]
        if len(values) == 4:
            x, y, w, h = values
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            if self.masks:
                raise UserError(f"{place} is a box, but masks need polygons. RetinaNet needs boxes only")
            objects.append(index, label, row, box)
            return
        self._first_triangle = self._first_triangle or (place if len(values) == 6 else None)
        self._has_larger_polygons |= len(values) > 6
        polygon = [v * (height if k % 2 else width) for k, v in enumerate(values)]
        left, top = min(polygon[0::2]), min(polygon[1::2])
        box = [left, top, max(polygon[0::2]) - left, max(polygon[1::2]) - top]
        objects.append(index, label, row, box)
        if self.masks:
            objects.append_polygons([polygon], polygons_have_pixels([polygon], width, height))

    @override
    def _describe(self, k: int) -> str:
        image = self.folder / PurePosixPath(self.names[int(self.image[k])])
        return f"row {self.numbers[k]} of {label_path(image)}"
