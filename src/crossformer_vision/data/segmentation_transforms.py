"""Transforms of images with class maps."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from crossformer_vision.data.augmentation import PhotometricDistortion, Steps, compose_checked
from crossformer_vision.data.class_lists import IGNORED
from crossformer_vision.data.rasters import Pixels, image_size
from crossformer_vision.models.grouping import ceil_div

CROP_ATTEMPTS = 10  # maximum attempts to find a crop with no class above ``max_share``


class ToInput:
    """Converts an image to the network's input.

    Args:
        mean: Mean of the backbone's inputs, per channel.
        std: Standard deviation of the backbone's inputs, per channel.
        short_side: Shorter side of resized images in pixels. ``None`` for the image's own size.
        long_side: Maximum longer side of resized images in pixels.
        size_divisor: In evaluation, each side is stretched up to a multiple of this.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        short_side: int | None,
        long_side: int | None = None,
        size_divisor: int = 1,
    ) -> None:
        self.mean, self.std = list(mean), list(std)
        self.short_side, self.long_side, self.size_divisor = short_side, long_side, size_divisor

    def __call__(self, image: Pixels, scale: float = 1.0) -> Tensor:
        """Normalized image for evaluation, shape ``(C, H, W)``, resized by a further factor."""
        return self.normalize(self.resize(image, scale, self.size_divisor))

    def resize(self, image: Pixels, scale: float, divisor: int = 1) -> Tensor:
        """Resize an image.

        Args:
            image: RGB image, or tensor.
            scale: Factor beside that of ``short_side``.
            divisor: Each side is stretched up to a multiple of this.

        Returns:
            Bytes of an RGB image, or floats, shape ``(C, H, W)``.
        """
        factor, (width, height) = scale, image_size(image)
        if self.short_side:
            short, long = sorted((width, height))
            factor *= min(self.short_side / short, (self.long_side or math.inf) / long)
        sides = (max(1, round(side * factor)) for side in (height, width))
        size = [ceil_div(side, divisor) * divisor for side in sides]
        pixels = VF.pil_to_tensor(image) if isinstance(image, Image.Image) else image.as_subclass(Tensor)
        return VF.resize(pixels, size, antialias=False)  # as in published training

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize bytes or floats of shape ``(C, H, W)``."""
        return VF.normalize(VF.to_dtype(pixels, torch.float32, scale=True), self.mean, self.std)


class ValidationTransform:
    """Converts an image and its class map to inputs at several scales, and the class map in its own size.

    Args:
        to_input: Conversion of images.
        scales: Image scales.
    """

    def __init__(self, to_input: ToInput, scales: Sequence[float]) -> None:
        self.to_input, self.scales = to_input, scales

    def __call__(self, image: Pixels, class_map: NDArray[np.uint8]) -> tuple[list[Tensor], Tensor]:
        """Convert a sample."""
        views = [self.to_input(image, scale) for scale in self.scales]
        return views, torch.from_numpy(class_map.astype(np.int64))


class TrainingTransform:
    """Resizes an image and its class map at random, crops, flips and distorts colors.

    Args:
        to_input: Conversion of images, whose ``short_side`` the scales refer to.
        crop_size: Side of the square crop. Smaller images are padded with the mean; padding is ignored.
        scales: Minimum and maximum scale.
        max_share: Maximum share of one class in a crop's labeled pixels, unless ten crops exceed it.
        hflip: Probability of a horizontal flip.
        photometric: Distort brightness, contrast, saturation and hue.
        augmentation: User-defined augmentation that replaces these steps. It takes and returns an image and
            a class map as ``tv_tensors``, uint8 for RGB.
        is_rgb: Whether the images are RGB.
    """

    def __init__(
        self,
        to_input: ToInput,
        crop_size: int,
        scales: tuple[float, float],
        max_share: float,
        hflip: float,
        photometric: bool,
        augmentation: Steps | None = None,
        is_rgb: bool = True,
    ) -> None:
        self.augmentation = None if augmentation is None else compose_checked(augmentation, is_rgb)
        self.to_input, self.crop_size, self.scales = to_input, crop_size, scales
        self.max_share = max_share
        self.steps: list[v2.Transform] = [v2.RandomHorizontalFlip(hflip)]
        if photometric and is_rgb:
            self.steps.append(PhotometricDistortion())

    def __call__(self, image: Pixels, class_map: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Augment a sample.

        Returns:
            Normalized image of shape ``(C, crop_size, crop_size)``, and class indices of shape
            ``(crop_size, crop_size)``.
        """
        if self.augmentation is not None:
            mask = tv_tensors.Mask(torch.from_numpy(class_map)[None])
            return self._pad_or_crop(*self.augmentation(VF.to_image(image), mask))
        pixels = self.to_input.resize(image, float(torch.empty(1).uniform_(*self.scales)))
        labels = VF.resize(
            torch.from_numpy(class_map)[None], list(pixels.shape[1:]), v2.InterpolationMode.NEAREST_EXACT
        )
        top, left = self._choose_corner(labels[0])
        area = (slice(None), slice(top, top + self.crop_size), slice(left, left + self.crop_size))
        pair = tv_tensors.Image(pixels[area]), tv_tensors.Mask(labels[area])
        for step in self.steps:
            pair = step(*pair)
        return self._pad_or_crop(*pair)

    def _pad_or_crop(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize, and bring both to ``crop_size``. Padding is ignored."""
        pixels = self.to_input.normalize(image.as_subclass(Tensor))
        labels = mask.as_subclass(Tensor)[0]
        padding = [0, self.crop_size - pixels.shape[2], 0, self.crop_size - pixels.shape[1]]
        pixels = torch.nn.functional.pad(pixels, padding)  # negative padding crops
        return pixels, torch.nn.functional.pad(labels, padding, value=IGNORED).long()

    def _choose_corner(self, labels: Tensor) -> tuple[int, int]:
        """Top and left of a random crop with no class above ``max_share``."""
        H, W = labels.shape
        for _ in range(CROP_ATTEMPTS):
            top = int(torch.randint(max(0, H - self.crop_size) + 1, ()))
            left = int(torch.randint(max(0, W - self.crop_size) + 1, ()))
            if self.max_share >= 1:
                break
            crop = labels[top : top + self.crop_size, left : left + self.crop_size]
            counts = torch.bincount(crop.flatten(), minlength=256)[:IGNORED]
            if counts.count_nonzero() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return top, left
