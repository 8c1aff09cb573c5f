"""One image on disk, or in memory, as a person sees it: upright, in RGB, 8 bits."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

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


def files_below(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, sorted; linked folders too, each once."""
    found: list[Path] = []
    seen = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        below = Path(at).relative_to(folder)
        folders[:] = [name for name in folders if not is_hidden(Path(name))]
        found += [folder / below / name for name in files if not is_hidden(Path(name))]
    return sorted(found)


def upright(image: Image.Image, labelled: tuple[int, int] | None = None) -> Image.Image:
    """The image turned as its EXIF orientation says, as viewers show it.

    Args:
        image: as PIL has opened it.
        labelled: width and height that its labels refer to. An image whose stored size alone fits them stays
            as it is stored.
    """
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF does not hide the picture
        return image
    if orientation not in range(2, 9):
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
