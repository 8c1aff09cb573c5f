"""Images that users pass to a predictor: paths, bytes, open files, PIL images, arrays and tensors."""

import io
import os
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crossformer_vision.data.images import load_image
from crossformer_vision.errors import UserError
from crossformer_vision.models.grouping import ceil_div

ImageInput = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[np.generic] | Tensor
MAX_CROPS = 8  # maximum number of crops of an elongated image


def open_image(image: ImageInput) -> tuple[Image.Image, str]:
    """Read an image.

    Args:
        image: Path, bytes of a file, open file, PIL image, array of shape ``(H, W, 3)`` or ``(H, W)``, or
            tensor of shape ``(3, H, W)``, with integers in 0..255 or floats in 0..1.

    Returns:
        The image upright in RGB, and its name or ``image``.

    Raises:
        UserError: If it cannot be read.
    """
    path = image if isinstance(image, (str, os.PathLike)) else getattr(image, "name", None)
    name = str(path or "image")
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if isinstance(image, (np.ndarray, Tensor)):
        image = _from_array(image)
    return load_image(image, name), name


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


def square_crops(image: Image.Image) -> list[Image.Image]:
    """Up to eight square crops along an image that is at least twice as long as wide; else the image."""
    short, long = sorted(image.size)
    if long < 2 * short:
        return [image]
    count = min(MAX_CROPS, ceil_div(long, short))
    starts = [round(n * (long - short) / (count - 1)) for n in range(count)]
    if image.width > image.height:
        return [image.crop((start, 0, start + short, short)) for start in starts]
    return [image.crop((0, start, short, start + short)) for start in starts]
