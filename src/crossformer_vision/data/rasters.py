"""Images with any number of channels and 8-bit, 16-bit or float values: TIFF, NumPy files and 16-bit PNG.

8-bit grayscale, palette, RGB and RGBA files are read by Pillow, see ``images.py``.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors

from crossformer_vision.errors import UserError, counted, missing_extra

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

Raster = NDArray[np.generic]
"""Values of an image as stored, shape ``(H, W, C)``."""
AnyImage = Image.Image | Raster
"""An image opened by Pillow, or a raster."""
Pixels = Image.Image | tv_tensors.Image
"""An image as transforms take it: an RGB image, or a float tensor of shape ``(C, H, W)``."""

ALPHA = (1, 2)  # TIFF's ExtraSamples: associated and unassociated alpha
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_BIT_DEPTH = 24  # position of the byte in the file
SCALES = {"uint8": 255.0, "uint16": 65535.0}
"""Values by which integers are divided. Other types keep their values."""
TYPE_NAMES = {"uint8": "8 bits", "uint16": "16 bits", "float": "another type"}


@dataclass(frozen=True)
class PixelFormat:
    """Channels and type of the values of all images of a data set.

    Attributes:
        channels: Number of channels.
        dtype: ``"uint8"``, ``"uint16"``, or ``"float"`` for all other types.
    """

    channels: int = 3
    dtype: str = "uint8"

    @property
    def is_rgb(self) -> bool:
        """Whether images have three channels of 8 bits."""
        return self == RGB

    def __str__(self) -> str:
        return f"{counted(self.channels, 'channel')} of {TYPE_NAMES[self.dtype]}"

    def to_tensor(self, raster: Raster, name: str) -> tv_tensors.Image:
        """Convert a raster to float values, in which the full range of integers becomes 0..1.

        Args:
            raster: Values, shape ``(H, W, C)``.
            name: Name for error messages.

        Returns:
            Shape ``(C, H, W)``.

        Raises:
            UserError: If the raster has another format, or values that are not finite.
        """
        if (found := format_of(raster)) != self:
            raise UserError(
                f"{name}: has {found}, expected {self}. Convert the image, or remove it from the data"
            )
        values = np.array(raster.transpose(2, 0, 1), np.float32, order="C")
        if self.dtype in SCALES:
            values /= SCALES[self.dtype]
        elif not np.isfinite(values).all():
            raise UserError(f"{name}: has values that are not finite (NaN or infinity). Replace them")
        return tv_tensors.Image(torch.from_numpy(values))


RGB = PixelFormat()


def format_of(image: AnyImage) -> PixelFormat:
    """Format of an image. PIL images of any mode are RGB."""
    if isinstance(image, Image.Image):
        return RGB
    kind = image.dtype.name
    return PixelFormat(image.shape[2], kind if kind in SCALES else "float")


def as_raster(image: AnyImage) -> Raster:
    """Values of an image as stored. Palettes become RGB."""
    if isinstance(image, Image.Image):
        image = image.convert("RGB") if image.mode in ("P", "CMYK", "YCbCr") else image
        image = image.convert("L") if image.mode == "1" else image
        values = np.asarray(image)
        return values if values.ndim == 3 else values[..., None]
    return image


def image_size(image: AnyImage | tv_tensors.Image) -> tuple[int, int]:
    """Width and height of an image."""
    if isinstance(image, Image.Image):
        return image.size
    if isinstance(image, torch.Tensor):
        return int(image.shape[2]), int(image.shape[1])
    return image.shape[1], image.shape[0]


def read_raster(file: str | os.PathLike[str] | IO[bytes]) -> Raster | None:
    """Read a file if it is a raster.

    Args:
        file: Path, or open file.

    Returns:
        Its values, shape ``(H, W, C)``; ``None`` for a file that Pillow reads.

    Raises:
        UserError: If the library for a compressed TIFF is not installed.
        Exception: Of any type, if the file is damaged.
    """
    if not isinstance(file, (str, os.PathLike)):
        content = file.read()
        file.seek(0)
        return _read(io.BytesIO(content), content[: PNG_BIT_DEPTH + 1])
    if Path(file).suffix.lower() not in (".npy", ".png", ".tif", ".tiff"):
        return None
    with Path(file).open("rb") as stream:
        start = stream.read(PNG_BIT_DEPTH + 1)
        stream.seek(0)
        return _read(stream, start)


def raster_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a raster from its header; ``None`` for a file that Pillow reads.

    Args:
        path: Path of the file.
    """
    if path.suffix.lower() == ".npy":
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        return shape[1], shape[0]
    if path.suffix.lower() in (".tif", ".tiff"):
        from tifffile import TiffFile

        with TiffFile(path) as tiff:
            pages = _image_pages(tiff)
            if not _is_pillow_image(pages):
                return pages[0].imagewidth, pages[0].imagelength
    return None


def _read(stream: IO[bytes], start: bytes) -> Raster | None:
    """Decode an open file by its signature, the first bytes."""
    if start.startswith(b"\x93NUMPY"):
        return _with_channels(np.load(stream, allow_pickle=False))
    if start.startswith(PNG_SIGNATURE) and start[PNG_BIT_DEPTH] == 16:
        return _read_png(stream.read())
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _read_tiff(stream)
    return None


def _with_channels(values: Raster) -> Raster:
    """An array of shape ``(H, W)`` or ``(H, W, C)`` with channels."""
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or not values.size or values.dtype.kind not in "uifb":
        raise ValueError(f"expected numbers of shape (H, W, channels), not {values.shape} of {values.dtype}")
    return values


def _read_png(content: bytes) -> Raster:
    """Values of a PNG of 16 bits. Pillow reads those with one channel, and reduces others to 8 bits."""
    image = Image.open(io.BytesIO(content))
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.uint16)[..., None]
    try:
        from imagecodecs import png_decode
    except ModuleNotFoundError as error:
        raise missing_extra(error, "rasters") from None
    return _with_channels(png_decode(content))


def _read_tiff(stream: IO[bytes]) -> Raster | None:
    from tifffile import TiffFile

    with TiffFile(stream) as tiff:
        pages = _image_pages(tiff)
        if _is_pillow_image(pages):
            stream.seek(0)
            return None
        try:
            values = [page.asarray() for page in pages]
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise missing_extra(ModuleNotFoundError(name="imagecodecs"), "rasters") from None
            raise
        if len(values) == 1:
            is_planar = pages[0].axes.startswith("S")
            return _with_channels(values[0].transpose(1, 2, 0) if is_planar else values[0])
    if values[0].ndim != 2 or len({(page.shape, page.dtype) for page in values}) > 1:
        raise ValueError("its pages differ in size or type, or have several channels each")
    return np.stack(values, 2)


def _image_pages(tiff: "TiffFile") -> "list[TiffPage]":
    """Pages of a TIFF except overviews and masks."""
    pages = [page.aspage() for page in tiff.pages]
    return [page for page in pages if not page.subfiletype & 5] or pages[:1]


def _is_pillow_image(pages: "list[TiffPage]") -> bool:
    """Whether a TIFF is a grayscale, palette or RGB image of 8 bits or less, perhaps with alpha.

    Of several RGB pages, Pillow reads the first.
    """
    page = pages[0]
    if page.dtype is None or page.dtype.itemsize > 1 or page.dtype.kind not in "ub":
        return False
    alpha = [kind for kind in page.extrasamples if kind in ALPHA]
    colors = page.samplesperpixel - len(alpha)
    if len(page.extrasamples) > len(alpha):
        return False
    return colors == 3 or (colors in (1, 4) and len(pages) == 1)
