"""Images that users pass to a predictor: paths, bytes, open files, PIL images, arrays and tensors."""

import io
import os
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from crossformer_vision.data.images import error_summary, load_image, open_upright, to_pixels
from crossformer_vision.data.rasters import RGB, AnyImage, PixelFormat, Pixels, image_size
from crossformer_vision.errors import UserError
from crossformer_vision.models.grouping import ceil_div

ImageInput = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[np.generic] | Tensor
MAX_CROPS = 8  # maximum number of crops of an elongated image


def open_image(image: ImageInput, pixel_format: PixelFormat = RGB) -> tuple[Pixels, str]:
    """Read an image.

    Args:
        image: Path, bytes of a file, open file, PIL image, array of shape ``(H, W, 3)`` or ``(H, W)``, or
            tensor of shape ``(3, H, W)``, with integers in 0..255 or floats in 0..1.
        pixel_format: Format that the image must have, unless it is RGB: then any image is converted.

    Returns:
        The image upright, and its name or ``image``.

    Raises:
        UserError: If it cannot be read.
    """
    path = image if isinstance(image, (str, os.PathLike)) else getattr(image, "name", None)
    name = str(path or "image")
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if not pixel_format.is_rgb:
        return _open_raster(image, pixel_format, name), name
    if isinstance(image, (np.ndarray, Tensor)):
        image = _from_array(image)
    if isinstance(image, (str, os.PathLike)) and str(image).endswith(".npy"):
        return _open_raster(image, pixel_format, name), name
    return load_image(image, name), name


def _open_raster(
    image: str | os.PathLike[str] | BinaryIO | Image.Image | NDArray[np.generic] | Tensor,
    pixel_format: PixelFormat,
    name: str,
) -> Pixels:
    """Read an image of a network whose inputs are not RGB."""
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        opened: AnyImage = image[..., None] if image.ndim == 2 else image
    elif isinstance(image, Image.Image):
        opened = image
    else:
        try:
            opened = open_upright(image)
        except Exception as error:
            raise UserError(f"{name}: cannot read this image ({error_summary(error)})") from error
    return to_pixels(opened, pixel_format, name)


def _from_array(pixels: NDArray[np.generic] | Tensor) -> Image.Image:
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu().float().numpy() if pixels.is_floating_point() else pixels.cpu().numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise UserError(
            f"an image of shape {tuple(pixels.shape)}: arrays must be (H, W, 3) or (H, W), tensors (3, H, W)"
        )
    if not pixels.size:
        raise UserError(f"an image of shape {tuple(pixels.shape)} has no pixels")
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind in "fb":
        if not -0.5 <= low <= high <= 1.5:  # resampling overshoots a little
            raise UserError(f"an image with values from {low:g} to {high:g}: floats must be in 0..1")
        pixels = np.multiply(pixels, 255.0).round().clip(0, 255)
    elif not 0 <= low <= high <= 255:
        raise UserError(f"an image with values from {low:g} to {high:g}: integers must be in 0..255")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))


def square_crops(image: Pixels) -> list[Pixels]:
    """Up to eight square crops along an image that is at least twice as long as wide; else the image."""
    width, height = image_size(image)
    short, long = sorted((width, height))
    if long < 2 * short:
        return [image]
    count = min(MAX_CROPS, ceil_div(long, short))
    starts = [round(n * (long - short) / (count - 1)) for n in range(count)]
    if width > height:
        return [crop(image, (start, 0, start + short, short)) for start in starts]
    return [crop(image, (0, start, short, start + short)) for start in starts]


def crop(image: Pixels, region: tuple[int, int, int, int]) -> Pixels:
    """A region of an image.

    Args:
        image: PIL image, or tensor ``(C, H, W)``.
        region: Left, top, right and bottom in pixels.
    """
    if isinstance(image, Image.Image):
        return image.crop(region)
    left, top, right, bottom = region
    return tv_tensors.wrap(image[:, top:bottom, left:right], like=image)
