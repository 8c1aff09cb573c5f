"""Reading of images upright, in RGB of 8 bits or as they are stored. Listing of image files."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from crossformer_vision.data.rasters import (
    AnyImage,
    PixelFormat,
    Pixels,
    as_raster,
    format_of,
    read_raster,
)
from crossformer_vision.errors import UserError

EXIF_ORIENTATION = 0x0112
# fmt: off
EXTENSIONS = {
    ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2", ".ppm", ".pgm",
    ".pbm", ".npy",
}
# fmt: on


def is_hidden(path: Path) -> bool:
    """Whether a path has a hidden component, such as ``.ipynb_checkpoints`` or ``._x.jpg``."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def names_below(folder: Path) -> Iterator[str]:
    """Relative paths of all files below a folder that are not hidden, sorted. Linked folders occur once.

    A ``.npy`` beside a file of the same name is skipped: Ultralytics caches decoded images in it.
    """
    visited: set[str] = set()

    def walk(directory: str, prefix: str) -> Iterator[str]:
        real = os.path.realpath(directory)
        if real in visited:  # a link to a parent folder
            return
        visited.add(real)
        with os.scandir(directory) as entries:
            children = sorted((entry.name, entry.is_dir()) for entry in entries)
        stems = {name.rpartition(".")[0] for name, _ in children if not name.endswith(".npy")}
        for name, is_folder in children:
            if name.startswith(".") or name == "__MACOSX":
                continue
            if name.endswith(".npy") and name.removesuffix(".npy") in stems:  # a cache of another tool
                continue
            if is_folder:
                yield from walk(f"{directory}/{name}", f"{prefix}{name}/")
            else:
                yield prefix + name

    yield from walk(str(folder), "")


def files_below(folder: Path) -> list[Path]:
    """Paths of all files below a folder that are not hidden, sorted."""
    return [folder / name for name in names_below(folder)]


class StringArray(Sequence[str]):
    """Immutable sequence of strings in one array.

    Worker processes share its memory. A list of Python strings would be copied into each of them, because
    reading a string changes its reference count.

    Args:
        names: Strings.
    """

    def __init__(self, names: Iterable[str]) -> None:
        joined, ends = bytearray(), array("q")
        for name in names:
            joined += os.fsencode(name)
            ends.append(len(joined))
        self.bytes = np.frombuffer(bytes(joined), np.uint8)
        self.ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.bytes[start : self.ends[index]].tobytes())


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8. 1 (upright) if it is missing or damaged."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # an image with damaged EXIF is still readable
        return 1
    return orientation if orientation in range(1, 9) else 1


def apply_orientation(image: Image.Image, label_size: tuple[int, int] | None = None) -> Image.Image:
    """Rotate and flip an image by its EXIF orientation, as image viewers do.

    Args:
        image: Opened image.
        label_size: Width and height that its labels refer to. If only the stored size matches, the image is
            returned unchanged.
    """
    orientation = orientation_of(image)
    if orientation == 1:
        return image
    upright_size = (image.height, image.width) if orientation >= 5 else image.size
    if label_size is not None and upright_size != label_size and image.size == label_size:
        return image
    return ImageOps.exif_transpose(image)


def open_upright(
    file: str | os.PathLike[str] | IO[bytes], label_size: tuple[int, int] | None = None
) -> AnyImage:
    """Open an image file. The EXIF orientation is applied except to rasters, see ``apply_orientation``.

    Args:
        file: Path, or open file.
        label_size: See ``apply_orientation``.
    """
    raster = read_raster(file)
    return apply_orientation(Image.open(file), label_size) if raster is None else raster


def to_pixels(image: AnyImage, pixel_format: PixelFormat, name: str) -> Pixels:
    """Convert an opened image to what transforms take.

    Args:
        image: Opened image.
        pixel_format: Format of the data set. RGB accepts PIL images of any mode.
        name: Name for error messages.

    Raises:
        UserError: If the image has another format.
    """
    if not pixel_format.is_rgb:
        return pixel_format.to_tensor(as_raster(image), name)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not (found := format_of(image)).is_rgb:
        raise UserError(
            f"{name}: has {found}, expected an RGB image. Convert the image, or remove it from the data"
        )
    return Image.fromarray(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB. Transparency is dropped.

    16- and 32-bit values are scaled, whereas PIL clips them at 255. The range of 32-bit integers and floats
    is guessed from their maximum: 1 (floats only), 255, 65535 or the full range.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        largest = values.max(initial=0)
        ranges = (1, 255, 65535, 2**32 - 1) if image.mode == "F" else (255, 65535, 2**31 - 1)
        maximum = next((maximum for maximum in ranges if largest <= maximum), largest)
        image = Image.fromarray((values * (255 / maximum)).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def error_summary(error: Exception) -> str:
    """Short reason why an image cannot be read. Decoders raise errors of any type."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):  # its message would repeat the path
        return "unknown format, or damaged"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def load_image(image: str | os.PathLike[str] | IO[bytes] | Image.Image, name: str) -> Image.Image:
    """Load an image upright and in RGB.

    Args:
        image: Path or file, or an opened image.
        name: Name for error messages.

    Raises:
        UserError: If the file is missing or is not an image.
    """
    try:
        return to_rgb(apply_orientation(image if isinstance(image, Image.Image) else Image.open(image)))
    except Exception as error:
        raise UserError(f"{name}: cannot read this image ({error_summary(error)})") from error
