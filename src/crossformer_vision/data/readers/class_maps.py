"""Images with class maps: files with one class index per pixel."""

from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossformer_vision.data.class_lists import UNKNOWN, ClassList
from crossformer_vision.data.images import EXTENSIONS, error_summary, files_below, open_upright
from crossformer_vision.data.rasters import AnyImage, image_size
from crossformer_vision.errors import UserError
from crossformer_vision.models.grouping import ceil_div

MAP_EXTENSIONS = {".png", ".bmp", ".tif", ".tiff"}
CHECKED_MAPS = 50  # maximum number of class maps checked for values of 0 and 255

Integers = TypeVar("Integers", int, NDArray[np.int64])


class ClassMapImages:
    """Images with class maps: grayscale or palette PNG with class indices, or PNG in the classes' colors.

    Args:
        pairs: Files of image and class map.
        classes: Class names.
        table: Class index by value in the files, shape ``(256,)``; ``IGNORED``, or ``UNKNOWN`` for invalid
            values.
        colors: Value of each color, for class maps in colors.
    """

    def __init__(
        self,
        pairs: list[tuple[Path, Path]],
        classes: list[str],
        table: NDArray[np.uint8],
        colors: dict[tuple[int, ...], int] | None = None,
    ) -> None:
        self.pairs, self.classes, self.table = pairs, classes, table
        self.colors = sorted((_color_code(*color), value) for color, value in (colors or {}).items())

    def __len__(self) -> int:
        return len(self.pairs)

    def reorder_classes(self, classes: list[str]) -> list[int]:
        """Reorder the classes.

        Args:
            classes: The same names in the new order.

        Returns:
            Value of each class in the files.
        """
        is_class = self.table < len(self.classes)
        order = np.array([classes.index(name) for name in self.classes], np.uint8)
        self.table[is_class] = order[self.table[is_class]]
        self.classes = classes
        return [int(np.flatnonzero(self.table == k)[-1]) for k in range(len(classes))]

    def name(self, index: int) -> str:
        """Path of an image."""
        return str(self.pairs[index][0])

    def read(self, index: int) -> tuple[AnyImage, NDArray[np.uint8]]:
        """An upright image and its class map, shape ``(H, W)``.

        Raises:
            UserError: If the class map cannot be read, has another size or colors, or has an invalid value.
        """
        path, label = self.pairs[index]
        try:
            class_map = Image.open(label)
            values = self._values_of_colors(class_map, label) if self.colors else stored_values(class_map)
        except UserError:
            raise
        except Exception as error:  # decoders raise errors of any kind
            raise UserError(f"{label}: cannot read this class map ({error_summary(error)})") from None
        if values.ndim != 2:
            raise UserError(
                f"{label}: a class map has one class index per pixel (grayscale or palette), not "
                f"{class_map.mode}. For classes in colors, list colors in classes.json"
            )
        image = open_upright(path, label_size=class_map.size)
        if class_map.size != image_size(image):
            raise UserError(
                f"{label}: has {_format_size(class_map.size)} pixels, its image {path} "
                f"{_format_size(image_size(image))} "
                "(after EXIF orientation)"
            )
        is_wrong = ~((values >= 0) & (values <= 255) & (values == np.floor(values)))  # NaN too
        if not is_wrong.any():
            indices = self.table[values.astype(np.uint8)]
            is_wrong = indices == UNKNOWN
        if is_wrong.any():
            value = values[is_wrong][0]
            raise UserError(
                f"{label}: has the value {value}, which is none of the {len(self.classes)} classes"
            )
        return image, indices

    def _values_of_colors(self, class_map: Image.Image, label: Path) -> NDArray[np.int64]:
        """Values of the classes whose colors a class map shows."""
        codes, values = (np.array(column) for column in zip(*self.colors, strict=True))
        pixels = np.asarray(class_map.convert("RGB")).astype(np.int64)
        found = _color_code(*np.moveaxis(pixels, -1, 0))
        index = np.searchsorted(codes, found).clip(max=len(codes) - 1)
        is_unknown = codes[index] != found
        if is_unknown.any():
            y, x = np.argwhere(is_unknown)[0].tolist()
            color = tuple(pixels[y, x].tolist())
            raise UserError(f"{label}: has the color {color} at x {x}, y {y}, which is none of the classes")
        return values[index]


def _color_code(r: Integers, g: Integers, b: Integers) -> Integers:
    """One number for a color, of integers or arrays."""
    return (r << 16) + (g << 8) + b


def stored_values(class_map: Image.Image) -> NDArray[np.number]:
    """Values in the file of a class map. PIL scales grayscale of two or four bits to 0..255."""
    tiles = getattr(class_map, "tile", None)  # of a file that is not decoded yet
    raw_mode = tiles[0][3] if tiles else None
    raw_mode = raw_mode[0] if isinstance(raw_mode, tuple) else raw_mode
    values = np.asarray(class_map)
    factor = {"L;2": 85, "L;4": 17}.get(str(raw_mode))
    if factor and class_map.mode == "L":
        return values // factor
    return values.astype(np.uint8) if class_map.mode == "1" else values


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def uses_0_and_255(pairs: list[tuple[Path, Path]], classes: ClassList) -> bool:
    """Detect masks saved as 0 and 255 instead of 0 and 1, as drawing programs do.

    Args:
        pairs: Files of image and class map, of which up to 50 are checked.
        classes: Classes of the data. Only two classes without an explicit ignored value are checked.
    """
    if len(classes.names) != 2 or classes.has_ignore_index or classes.colors:
        return False
    values: set[int] = set()
    maps_with_both = 0
    for _, path in pairs[:: max(1, ceil_div(len(pairs), CHECKED_MAPS))]:
        try:
            with Image.open(path) as class_map:
                found = set(np.unique(stored_values(class_map)).tolist())
        except Exception:  # reported when the map is read
            return False
        values |= found
        maps_with_both += found != {0}
        if maps_with_both == 10:
            break
    return values == {0, 255}


def pair_files(images: Path, maps: Path) -> list[tuple[Path, Path]]:
    """Match images with class maps of the same name below the same folder.

    Args:
        images: Folder of images.
        maps: Folder of class maps.

    Raises:
        UserError: If an image has no class map, a class map has no image, or two files have the same name.
    """
    image_files, map_files = _files_by_name(images, EXTENSIONS), _files_by_name(maps, MAP_EXTENSIONS)
    if not image_files:
        raise UserError(f"{images}: no images in this folder")
    for files, others, missing in (
        (image_files, map_files, f"class map in {maps}"),
        (map_files, image_files, f"image in {images}"),
    ):
        if unmatched := sorted(str(files[name]) for name in files.keys() - others.keys()):
            more = f", nor do {len(unmatched) - 1} others" if len(unmatched) > 1 else ""
            raise UserError(f"{unmatched[0]}: has no {missing}{more}")
    return [(path, map_files[name]) for name, path in image_files.items()]


def _files_by_name(folder: Path, suffixes: set[str]) -> dict[Path, Path]:
    files: dict[Path, Path] = {}
    for path in files_below(folder):
        name = path.relative_to(folder).with_suffix("")
        if path.suffix.lower() not in suffixes:
            continue
        if name in files:
            raise UserError(
                f"{path}: has the name of {files[name].name}, but a class map belongs to one image"
            )
        files[name] = path
    return files
