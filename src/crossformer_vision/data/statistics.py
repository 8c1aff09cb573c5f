"""Format, mean and standard deviation of the images of a data set."""

from collections.abc import Sequence

import torch
from rich.progress import track
from torch import Tensor

from crossformer_vision.data.rasters import (
    RGB,
    AnyImage,
    PixelFormat,
    as_raster,
    format_of,
)
from crossformer_vision.data.sampling import Source
from crossformer_vision.errors import MissingExtra, UserError, counted

MAX_TRIED = 20  # images that are tried if the first ones cannot be read
MAX_MEASURED = 1000  # images for mean and standard deviation


def find_pixel_format(source: Source, channels: int | None) -> PixelFormat:
    """Format of the first readable image.

    Args:
        source: Images of a split.
        channels: Number of channels that the user expects. ``None`` for that of the image.

    Raises:
        UserError: If the image has another number of channels.
    """
    for index in range(min(len(source), MAX_TRIED)):
        try:
            image, _ = source.read(index)
            raster = None if channels is None else as_raster(image)
        except MissingExtra:
            raise
        except Exception:  # reported when the image is used
            continue
        return _check_channels(image, raster, channels, source.name(index))
    return RGB


def _check_channels(image: AnyImage, raster: AnyImage | None, channels: int | None, name: str) -> PixelFormat:
    """Format of an image, or of its stored values if a number of channels is given that RGB does not have."""
    found = format_of(image)
    if channels is None or raster is None or (found.is_rgb and channels == 3):
        return found
    if (stored := format_of(raster)).channels != channels:
        raise UserError(f"{name}: has {counted(stored.channels, 'channel')}, not --data.channels {channels}")
    return stored


def check_display_channels(chosen: Sequence[int] | None, channels: int) -> None:
    """Check the channels that plots show.

    Raises:
        UserError: If there are not three, or one does not exist.
    """
    if chosen is not None and (len(chosen) != 3 or not all(0 <= channel < channels for channel in chosen)):
        raise UserError(
            f"--data.display_channels {list(chosen)}: must be three channels from 0 to {channels - 1}"
        )


def measure_images(source: Source, pixel_format: PixelFormat) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, over up to 1000 images that are spread over a split.

    Args:
        source: Images of the split.
        pixel_format: Their format.

    Raises:
        UserError: If no image can be read, or one has another format.
    """
    images = min(len(source), MAX_MEASURED)
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for n in track(range(images), "measuring mean and standard deviation", transient=True):
        index = n * len(source) // images
        try:
            image, _ = source.read(index)
            raster = as_raster(image)
        except Exception:  # reported when the image is used
            continue
        values = pixel_format.to_tensor(raster, source.name(index)).as_subclass(Tensor).double().flatten(1)
        count += values.shape[1]
        total = total + values.sum(1)
        squares = squares + (values**2).sum(1)
    if not count:
        raise UserError(f"{source.name(0)}: cannot be read, nor can any other image of this data set")
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    std[std == 0] = 1.0  # a constant channel
    return mean.tolist(), std.tolist()
