"""AugmentationOptions and preprocessing of images for classification.

RGB images take timm's transforms. Images with other channels or values take the same steps from torchvision,
without color augmentation.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.data import create_transform, str_to_interp_mode
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from crossformer_vision.data.augmentation import Steps, compose_checked
from crossformer_vision.data.rasters import Pixels
from crossformer_vision.types import Kwargs

log = logging.getLogger("crossformer_vision")

Transform = Callable[[Pixels], Tensor]


@dataclass(frozen=True)
class AugmentationOptions:
    """Options of the training augmentation, see ``ClassificationData``."""

    crop: str
    hflip: float
    auto_augment: str | None
    color_jitter: float | None
    erasing: float
    custom: Steps | None


def training_transform(image: Kwargs, augmentation: AugmentationOptions, is_rgb: bool) -> Transform:
    """Create the augmentation of training images.

    Args:
        image: Size and normalization, as arguments of timm's ``create_transform``.
        augmentation: Options.
        is_rgb: Whether the images are RGB.
    """
    if augmentation.custom is not None:
        resize = _resize(image, squash=True)
        to_pixels = [v2.ToImage(), resize, v2.ToDtype(torch.float32, scale=True)]
        finish = [*to_pixels, v2.Normalize(image["mean"], image["std"]), v2.ToPureTensor()]
        return v2.Compose([compose_checked(augmentation.custom, is_rgb), *finish])
    return _rgb_training(image, augmentation) if is_rgb else _raster_training(image, augmentation)


def evaluation_transform(image: Kwargs, is_rgb: bool) -> Transform:
    """Create the preprocessing of validation and prediction.

    Args:
        image: Size, normalization and crop, as arguments of timm's ``create_transform``.
        is_rgb: Whether the images are RGB.
    """
    if is_rgb:
        return create_transform(**image)
    steps: list[Callable[..., object]] = []
    if image.get("crop_mode") == "squash":
        steps.append(_resize(image, squash=True))
    else:
        steps += [_resize(image, image.get("crop_pct") or 1.0), v2.CenterCrop(_size(image))]
    return v2.Compose([*steps, v2.Normalize(image["mean"], image["std"]), v2.ToPureTensor()])


def _rgb_training(image: Kwargs, augmentation: AugmentationOptions) -> Transform:
    """Crop, flip, changes of colors and erasing, by timm."""
    crop_and_flip, recolor, finish = create_transform(
        **image,
        is_training=True,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter or 0.0,
        auto_augment=augmentation.auto_augment,
        re_prob=augmentation.erasing,
        re_mode="pixel",
        separate=True,
    )
    if augmentation.crop != "resized":
        size, interpolation = _size(image), str_to_interp_mode(image["interpolation"])
        crop_and_flip = transforms.Compose([transforms.Resize(size, interpolation)])
        if augmentation.crop == "padded":
            crop_and_flip.transforms.append(transforms.RandomCrop(size, padding=size[0] // 8))
        crop_and_flip.transforms.append(transforms.RandomHorizontalFlip(augmentation.hflip))
    return transforms.Compose([crop_and_flip, recolor, finish])


def _raster_training(image: Kwargs, augmentation: AugmentationOptions) -> Transform:
    """Crop, flip and erasing, without color augmentation."""
    if augmentation.auto_augment or augmentation.color_jitter:
        log.warning("auto_augment and color_jitter change colors of RGB images only; they are ignored")

    size = _size(image)
    steps: list[Callable[..., object]] = []
    if augmentation.crop == "resized":
        steps.append(v2.RandomResizedCrop(size, interpolation=_tensor_interpolation(image), antialias=True))
    else:
        steps.append(_resize(image, squash=True))
    if augmentation.crop == "padded":
        steps.append(v2.RandomCrop(size, padding=size[0] // 8))
    steps += [v2.RandomHorizontalFlip(augmentation.hflip), v2.Normalize(image["mean"], image["std"])]
    steps.append(v2.ToPureTensor())
    if augmentation.erasing:
        steps.append(RandomErasing(augmentation.erasing, mode="pixel", device="cpu"))
    return v2.Compose(steps)


def _size(image: Kwargs) -> list[int]:
    """Height and width of the inputs."""
    return list(image["input_size"][1:])


def _resize(image: Kwargs, crop_pct: float = 1.0, squash: bool = False) -> v2.Resize:
    """Resize to the input size, or so that a crop takes ``crop_pct`` of the shorter side."""
    height, width = _size(image)
    size = [height, width] if squash else [math.floor(min(height, width) / crop_pct)]
    return v2.Resize(size, _tensor_interpolation(image), antialias=True)


def _tensor_interpolation(image: Kwargs) -> v2.InterpolationMode:
    """Interpolation that torchvision has for tensors: the chosen one, or else bicubic."""
    name = image["interpolation"]
    known = ("nearest", "bilinear", "bicubic")
    return v2.InterpolationMode(name if name in known else "bicubic")
