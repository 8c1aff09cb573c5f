"""Augmentation that torchvision lacks, and checks of user-defined augmentation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF
from typing_extensions import override

from crossformer_vision.data.albumentations_adapter import AlbumentationsPipeline, is_albumentations
from crossformer_vision.errors import UserError
from crossformer_vision.types import Kwargs

Augmentation = Callable[..., Any]
Steps = Augmentation | list[Augmentation]


def compose_checked(steps: Steps, is_rgb: bool = True) -> Augmentation:
    """Compose a user-defined augmentation, a callable or a list of them, and check images that are RGB."""
    listed = [steps] if callable(steps) else list(steps)
    if any(is_albumentations(step) for step in listed):
        if not all(is_albumentations(step) for step in listed):
            raise UserError("data.augmentation mixes Albumentations with other steps. Use one of them")
        composed: Augmentation = AlbumentationsPipeline(listed)
    else:
        composed = steps if callable(steps) else v2.Compose(steps)
    return CheckedAugmentation(composed) if is_rgb else composed


class CheckedAugmentation:
    """A user-defined augmentation that must not normalize images.

    Args:
        augmentation: Callable from an image, or an image and its target, to the same.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation

    def __call__(self, *inputs: object) -> Any:
        """Augment, and check the image.

        Raises:
            UserError: If a tensor of floats has values outside 0..1.
        """
        found = self.augmentation(*inputs)
        image = found[0] if isinstance(found, tuple) else found
        if isinstance(image, Tensor) and image.is_floating_point() and image.numel():
            low, high = (float(value) for value in image.aminmax())
            if not -0.01 <= low <= high <= 1.01:
                raise UserError(
                    f"data.augmentation returned an image with values from {low:.2g} to {high:.2g}. Return "
                    "bytes, or floats in 0..1 without normalization, which comes afterwards"
                )
        return found


class PhotometricDistortion(v2.Transform):
    """Changes brightness, contrast, saturation and hue of bytes ``(3, H, W)``, each with probability 1/2.

    Follows mmsegmentation's ``PhotoMetricDistortion`` (from SSD, arXiv 1512.02325), with which the published
    segmenters were trained. torchvision's ``RandomPhotometricDistort`` differs: it scales the brightness,
    blends with gray, and permutes channels.

    Args:
        brightness: Maximum change, of 255.
        contrast: Minimum and maximum factor of all values.
        saturation: Minimum and maximum factor of the saturation in HSV.
        hue: Maximum hue shift, as a fraction of the full circle.
    """

    _transformed_types = (tv_tensors.Image,)

    def __init__(
        self,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 0.1,
    ) -> None:
        super().__init__()
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    @override
    def make_params(self, flat_inputs: list[object]) -> Kwargs:
        def draw(low: float, high: float) -> float | None:
            return float(torch.empty(1).uniform_(low, high)) if torch.rand(()) < 0.5 else None

        return {
            "brightness": draw(-self.brightness, self.brightness),
            "contrast": draw(*self.contrast),
            "saturation": draw(*self.saturation),
            "hue": draw(-self.hue, self.hue),
            "contrast_first": bool(torch.rand(()) < 0.5),
        }

    @override
    def transform(self, inpt: tv_tensors.Image, params: Kwargs) -> tv_tensors.Image:
        x = inpt.as_subclass(Tensor)
        if params["brightness"] is not None:
            x = _bytes(x.float() + params["brightness"])
        if params["contrast"] is not None and params["contrast_first"]:
            x = _bytes(x.float() * params["contrast"])
        if params["saturation"] is not None:
            x = saturate(x, params["saturation"])
        if params["hue"] is not None:
            x = VF.adjust_hue(x, params["hue"])
        if params["contrast"] is not None and not params["contrast_first"]:
            x = _bytes(x.float() * params["contrast"])
        return tv_tensors.wrap(x, like=inpt)


def saturate(x: Tensor, factor: float) -> Tensor:
    """Multiply the saturation in HSV of bytes ``(3, H, W)`` by a factor. Hue and value stay."""
    values = x.float()
    brightest = values.amax(0, keepdim=True)
    below = brightest - values
    max_factor = brightest / below.amax(0, keepdim=True).clamp(min=1)  # brings the darkest channel to zero
    return _bytes(brightest - below * max_factor.clamp(max=factor))


def _bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)
