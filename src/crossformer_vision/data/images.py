"""One image on disk, or in memory, as a person sees it: upright, in RGB, 8 bits."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from crossformer_vision.errors import UserError

ORIENTATION = 0x0112  # EXIF's tag
# fmt: off
EXTENSIONS = {
    ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2", ".ppm", ".pgm",
    ".pbm",
}
# fmt: on


def is_hidden(path: Path) -> bool:
    """Whether it, or a folder on its way, is what tools leave behind: `.ipynb_checkpoints`, `._x.jpg`, …"""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def names_below(folder: Path) -> Iterator[str]:
    """Names below a folder, with slashes, of all files that are not hidden, sorted; linked folders once."""
    seen: set[str] = set()

    def walk(at: str, before: str) -> Iterator[str]:
        real = os.path.realpath(at)
        if real in seen:  # a link to a folder above
            return
        seen.add(real)
        with os.scandir(at) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
        for name, is_folder in found:
            if name.startswith(".") or name == "__MACOSX":
                continue
            if is_folder:
                yield from walk(f"{at}/{name}", f"{before}{name}/")
            else:
                yield before + name

    yield from walk(str(folder), "")


def files_below(folder: Path) -> list[Path]:
    """The files of `names_below`."""
    return [folder / name for name in names_below(folder)]


class Names(Sequence[str]):
    """Many strings in one array: a Python object each would be copied into every worker, as it is touched."""

    def __init__(self, names: Iterable[str]) -> None:
        joined, ends = bytearray(), array("q")
        for name in names:
            joined += os.fsencode(name)
            ends.append(len(joined))
        self.bytes = np.frombuffer(bytes(joined), np.uint8)
        self.ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.bytes[start : self.ends[index]].tobytes())


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8; 1, upright, where it has none or its EXIF is damaged."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF does not hide the picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright(image: Image.Image, labelled: tuple[int, int] | None = None) -> Image.Image:
    """The image turned as its EXIF orientation says, as viewers show it.

    Args:
        image: as PIL has opened it.
        labelled: width and height that its labels refer to. An image whose stored size alone fits them stays
            as it is stored.
    """
    orientation = orientation_of(image)
    if orientation == 1:
        return image
    turned = (image.height, image.width) if orientation >= 5 else image.size
    if labelled is not None and turned != labelled and image.size == labelled:
        return image
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """The decoded image in RGB: greyscale, palettes, transparency (dropped), 16 and 32 bits, floats too.

    Values of more than 8 bits are scaled to 8; PIL would clip them at 255. 32-bit integers and floats have no
    fixed range: those up to 1 (floats), 255 or 65535 are taken for parts of these.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        largest = values.max(initial=0)
        ranges = (1, 255, 65535, 2**32 - 1) if image.mode == "F" else (255, 65535, 2**31 - 1)
        top = next((top for top in ranges if largest <= top), largest)
        image = Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """Why an image cannot be read, in some words. Decoders raise errors of any kind."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):  # whose own words repeat the path
        return "it is of no kind that is known, or damaged"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read(image: Any, name: str) -> Image.Image:
    """An image, upright and in RGB.

    Args:
        image: a path, or an image that PIL has opened.
        name: for errors.

    Raises:
        UserError: a file that is missing or no image.
    """
    try:
        return to_rgb(upright(image if isinstance(image, Image.Image) else Image.open(image)))
    except Exception as error:
        raise UserError(f"{name}: cannot read this image ({reason(error)})") from error
