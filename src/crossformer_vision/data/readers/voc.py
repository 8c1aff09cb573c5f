"""Labels in Pascal VOC's format: one XML file per image, with one-based inclusive coordinates of boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from typing_extensions import override

from crossformer_vision.data.class_lists import read_class_names
from crossformer_vision.data.images import EXTENSIONS, StringArray, names_below
from crossformer_vision.data.readers.listed_images import header_size
from crossformer_vision.data.readers.objects import ObjectBuffer, ObjectImages
from crossformer_vision.errors import NoSuchSplit, UserError, raise_or_collect

CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocSplit:
    """Files of a split.

    Attributes:
        source: File or folder that defines the split, for messages.
        folder: Folder of the images.
        files: XML file and image, below the folder, of each image.
    """

    source: Path
    folder: Path
    files: list[tuple[Path, str]]


@dataclass(frozen=True)
class VocObject:
    """An object of an XML file.

    Attributes:
        name: Class name.
        xywh: Box in pixels, from 0.
        is_difficult: Whether the object is marked as difficult, which metrics ignore.
    """

    name: str
    xywh: list[float]
    is_difficult: bool


def voc_root(root: Path) -> Path:
    """Folder with ``Annotations`` and ``JPEGImages``: the root, or the latest year in ``VOCdevkit``."""
    years = sorted((root / "VOCdevkit").glob("VOC*"), reverse=True) or [root]
    return next((year for year in years if (year / "Annotations").is_dir()), root)


def find_voc_split(root: Path, split_names: Sequence[str]) -> VocSplit:
    """Find the files of a split.

    Layouts: ``Annotations/``, ``JPEGImages/`` (or ``images/``) and ``ImageSets/Main/<split>.txt``; or
    ``<split>/`` with images and XML files side by side.

    Args:
        root: Data root.
        split_names: Names that the split may have.

    Raises:
        NoSuchSplit: If there is no such split.
        UserError: If an image or XML file is missing.
    """
    base = voc_root(root)
    for name in split_names:
        listed = base / "ImageSets/Main" / f"{name}.txt"
        if listed.is_file():
            folder = next((base / f for f in ("JPEGImages", "images") if (base / f).is_dir()), base)
            lines = listed.read_text(encoding="utf-8").splitlines()
            stems = [line.split()[0] for line in lines if line.strip()]
            return VocSplit(listed, folder, _pair(listed, base / "Annotations", folder, stems))
        folder = base / name
        if folder.is_dir() and (xml := sorted(file.stem for file in folder.glob("*.xml"))):
            return VocSplit(folder, folder, _pair(folder, folder, folder, xml))
    raise NoSuchSplit(
        f"{base / 'ImageSets/Main' / split_names[0]}.txt: no such file, nor a folder {split_names[0]} with "
        "XML files. Name the split with --data.train_split or --data.val_split"
    )


def _pair(source: Path, labels: Path, folder: Path, stems: Sequence[str]) -> list[tuple[Path, str]]:
    """XML file and image of each name."""
    images = {}
    for name in names_below(folder):
        if Path(name).suffix.lower() in EXTENSIONS:
            images[str(Path(name).with_suffix(""))] = name
    for stem in stems:
        if not (labels / f"{stem}.xml").is_file():
            raise UserError(f"{labels / stem}.xml: no such file, which {source} names")
        if stem not in images:
            raise UserError(f"{folder / stem}.jpg: no such image, which {source} names")
    return [(labels / f"{stem}.xml", images[stem]) for stem in stems]


def read_voc_file(path: Path) -> tuple[tuple[int, int], list[VocObject]]:
    """Read an XML file.

    Returns:
        Width and height of the image, 0 if missing, and its objects.

    Raises:
        UserError: If it is not XML, or an object has no name or no valid box.
    """
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as XML ({error})") from None
    if tree.tag != "annotation":
        raise UserError(f"{path}: not a label file of Pascal VOC, whose root is <annotation>")
    objects = []
    for number, element in enumerate(tree.iter("object"), start=1):
        place = f"{path}: object {number}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{place} has no name")
        try:
            x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{corner}") or "") for corner in CORNERS)
        except ValueError:
            raise UserError(f"{place} has no bndbox with {', '.join(CORNERS)}") from None
        if not np.isfinite([x1, y1, x2, y2]).all():
            raise UserError(f"{place} has a box with a value that is not finite")
        is_difficult = (element.findtext("difficult") or "0").strip() == "1"
        objects.append(VocObject(name, [x1 - 1, y1 - 1, x2 - (x1 - 1), y2 - (y1 - 1)], is_difficult))
    try:
        size = int(tree.findtext("size/width") or 0), int(tree.findtext("size/height") or 0)
    except ValueError:
        size = 0, 0
    return size, objects


def _read_or_collect(path: Path) -> tuple[tuple[int, int], list[VocObject]]:
    """``read_voc_file``, without objects for an invalid file whose error is collected."""
    try:
        return read_voc_file(path)
    except UserError as error:
        raise_or_collect(error)
        return (0, 0), []


class VocImages(ObjectImages):
    """Images and objects of labels in Pascal VOC's format.

    Classes are sorted by name, unless ``classes.json`` in the data root lists them. Objects marked as
    difficult are not trained on and are ignored by metrics, like COCO's crowds.

    Args:
        root: Data root.
        split: Files of the split.
        classes: Names of the training classes, in the order of their labels. ``None`` for those of the files.
        train: Skip difficult objects and those that are outside their image or have no area.
        skip_empty: Skip images without objects other than difficult ones.

    Raises:
        UserError: If a file is invalid, a class is unknown, or no object can be trained on.
    """

    crowds = "difficult objects"

    def __init__(
        self,
        root: Path,
        split: VocSplit,
        classes: list[str] | None = None,
        train: bool = False,
        skip_empty: bool = False,
    ) -> None:
        super().__init__(split.source, split.folder, masks=False, as_outlines=False)
        self._files = [file for file, _ in split.files]
        contents = [_read_or_collect(file) for file in self._files]
        found = sorted({voc_object.name for _, objects in contents for voc_object in objects})
        names = classes or read_class_names(root) or found
        self.categories = dict(enumerate(names, start=1))
        self.names = StringArray(image for _, image in split.files)
        sizes = [
            size if min(size) > 0 else header_size(split.folder / image)
            for (size, _), (_, image) in zip(contents, split.files, strict=True)
        ]
        self.sizes, self.ids = np.array(sizes, np.int64).reshape(-1, 2), np.arange(len(sizes))
        buffer = ObjectBuffer()
        for index, (_, objects) in enumerate(contents):
            for number, voc_object in enumerate(objects, start=1):
                if voc_object.name not in names:
                    raise_or_collect(self._unknown_class(index, number, voc_object.name, names))
                    continue
                label = names.index(voc_object.name) + 1
                buffer.append(index, label, number, voc_object.xywh, iscrowd=voc_object.is_difficult)
        self.store(buffer)
        self.skip_unusable(train, skip_empty)

    def _unknown_class(self, index: int, number: int, name: str, names: list[str]) -> UserError:
        """Error about an object of an unknown class."""
        return UserError(
            f"{self._files[index]}: object {number} is of class '{name}', which is not among the classes "
            f"{', '.join(names[:5])}"
        )

    @override
    def label_file(self, index: int) -> Path:
        return self._files[index]

    @override
    def _describe(self, k: int) -> str:
        return f"object {self.numbers[k]} of {self._files[int(self.image[k])]}"
