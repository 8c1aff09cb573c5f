"""Augmentation that torchvision does not have, and that of users."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from crossformer_vision.errors import UserError

Steps = Callable[..., Any] | list[Callable[..., Any]]


def composed(steps: Steps) -> Callable[..., Any]:
    """One callable of a user's augmentation, or of a list of them, whose images are checked."""
    return CheckedAugmentation(steps if callable(steps) else v2.Compose(steps))


class CheckedAugmentation:
    """A user's augmentation; images that it has normalized already are refused.

    Args:
        augmentation: Callable from an image, or an image and its target, to the same.
    """

    def __init__(self, augmentation: Callable[..., Any]) -> None:
        self.augmentation = augmentation

    def __call__(self, *inputs: Any) -> Any:
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
                    f"data.augmentation returned an image of values from {low:.2g} to {high:.2g}. Return "
                    "bytes, or floats in 0..1 without normalization, which comes afterwards"
                )
        return found


class PhotometricDistortion(v2.Transform):
    """Brightness, contrast, saturation and hue, each changed with probability one half.

    As the published segmenters were trained (OpenMMLab's distortion, after SSD, arXiv 1512.02325).
    torchvision's own scales the brightness, blends with grey, and shuffles the channels.

    Args:
        brightness: most that is added, of 255.
        contrast: least and greatest factor of all values.
        saturation: least and greatest factor of it, in HSV.
        hue: greatest turn, of a whole one.

    Shape: bytes (3, H, W) -> the same.
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

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        def drawn(low: float, high: float) -> float | None:
            return float(torch.empty(1).uniform_(low, high)) if torch.rand(()) < 0.5 else None

        return {
            "brightness": drawn(-self.brightness, self.brightness),
            "contrast": drawn(*self.contrast),
            "saturation": drawn(*self.saturation),
            "hue": drawn(-self.hue, self.hue),
            "contrast_first": bool(torch.rand(()) < 0.5),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
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
    """The saturation of HSV times `factor`, at most one; hue and value stay. Bytes (3, H, W) -> the same."""
    values = x.float()
    brightest = values.amax(0, keepdim=True)
    below = brightest - values
    most = brightest / below.amax(0, keepdim=True).clamp(min=1)  # brings the least channel to zero
    return _bytes(brightest - below * most.clamp(max=factor))


def _bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)
