"""Find the image files that an annotation file lists, under the spellings that different tools write."""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from crossformer_vision.data.images import names_below, orientation_of
from crossformer_vision.data.rasters import raster_size


def find_listed_images(names: Sequence[str], folder: Path) -> list[str | None]:
    """Match listed file names with the files of a folder.

    Accepted spellings: Windows separators, a leading ``./``, names that start at the data root
    (``images/train/1.jpg`` for a file in ``images/train``), and decomposed Unicode on either side, as macOS
    writes it.

    Args:
        names: File names as an annotation file lists them.
        folder: Folder of the images.

    Returns:
        For each name the path below ``folder``, with forward slashes, or ``None`` if no file has it.
    """
    files = set(names_below(folder))
    composed: dict[str, str] = {}  # built at the first name that is not found as it is

    def find(name: str) -> str | None:
        if name in files:
            return name
        if not composed:
            composed.update((unicodedata.normalize("NFC", file), file) for file in files)
            composed.setdefault("", "")
        for candidate in spellings(name, folder):
            if file := composed.get(unicodedata.normalize("NFC", candidate)):
                return file
        hidden = name.replace("\\", "/")  # ``names_below`` omits hidden files
        return hidden if not is_outside(hidden) and Path(f"{folder}/{hidden}").is_file() else None

    return [find(name) for name in names]


def spellings(name: str, folder: Path) -> Iterator[str]:
    """Paths below a folder that a listed name may stand for."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    yield "/".join(parts)
    above = folder.absolute().parts
    for count in range(1, min(len(parts), len(above) + 1)):
        if tuple(parts[:count]) == above[-count:]:
            yield "/".join(parts[count:])


def is_outside(name: str) -> bool:
    """Whether a listed name may lead out of its folder: an absolute path, or one with ``..``."""
    path = Path(name)
    return path.is_absolute() or ".." in path.parts


def stored_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file as viewers show it, from its header.

    Raises:
        OSError: If the file is missing or is not an image.
    """
    if (size := raster_size(path)) is not None:
        return size
    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if orientation_of(image) >= 5 else (width, height)


def header_size(path: Path) -> tuple[int, int]:
    """``stored_size``, or 0 and 0 for a file that cannot be read, which is reported when it is used."""
    try:
        return stored_size(path)
    except Exception:  # decoders raise errors of any kind
        return 0, 0
