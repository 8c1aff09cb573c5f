"""Padding at the boundary of fields on a sphere, panoramas and other periodic images."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

PaddingMode = Literal["circular", "sphere", "mirror", "reflect"]
Sides = tuple[int, int, int, int]
"""Pixels of padding: top, bottom, left, right."""


class BoundaryPadding(nn.Module):
    """Pads the input of a network and removes the padding from its output.

    Shape: the network's. Outputs may be a map as large as the input, smaller maps whose stride divides the
    padding, or a list of such maps.

    Args:
        net: Backbone or dense model that takes ``(B, C, H, W)``.
        mode: How values beyond the boundary are found, see ``pad``.
        top: Rows above.
        bottom: Rows below.
        left: Columns on the left.
        right: Columns on the right.

    Raises:
        ValueError: If the mode is unknown or a side is negative.
    """

    def __init__(
        self, net: nn.Module, mode: PaddingMode, top: int = 0, bottom: int = 0, left: int = 0, right: int = 0
    ) -> None:
        super().__init__()
        check_padding(mode, (top, bottom, left, right))
        self.net, self.mode, self.sides = net, mode, (top, bottom, left, right)

    @override
    def forward(self, images: Tensor) -> Any:
        padded = pad(images, self.mode, self.sides)
        outputs = self.net(padded)
        if isinstance(outputs, Tensor):
            return self._crop(outputs, padded)
        return [self._crop(output, padded) for output in outputs]

    def _crop(self, output: Tensor, padded: Tensor) -> Tensor:
        """Remove the padding from a map, which may have a stride."""
        stride = padded.shape[-2] // output.shape[-2] if output.ndim == padded.ndim else 0
        if not stride or padded.shape[-1] // output.shape[-1] != stride:
            raise ValueError(
                f"output {tuple(output.shape)} does not match the padded input {tuple(padded.shape)}"
            )
        if any(side % stride for side in self.sides):
            raise ValueError(
                f"padding of {self.sides} pixels: a map has the stride {stride}, no divisor of these"
            )
        top, bottom, left, right = (side // stride for side in self.sides)
        return crop(output, (top, bottom, left, right))


def check_padding(mode: str, sides: Sides) -> None:
    """Check the mode and the number of pixels.

    Raises:
        ValueError: If the mode is unknown or a side is negative.
    """
    if mode not in get_args(PaddingMode):
        raise ValueError(f"unknown padding '{mode}'. Choose from {', '.join(get_args(PaddingMode))}")
    if min(sides) < 0:
        raise ValueError(f"padding of {sides} pixels: no side may be negative")


def pad(x: Tensor, mode: PaddingMode, sides: Sides) -> Tensor:
    """Pad maps at their boundary.

    ``circular``: columns continue on the other side, rows are repeated at the edge. ``sphere``: columns
    continue on the other side; rows beyond a pole are those on its other side: shifted by half of the width
    and in reverse order. ``mirror``: columns continue on the other side, then rows are mirrored. ``reflect``:
    both are mirrored.

    Args:
        x: Maps, shape ``(..., H, W)``, rows from pole to pole for ``sphere``.
        mode: The mode.
        sides: Pixels of padding.

    Raises:
        ValueError: If the maps are smaller than the padding.
    """
    top, bottom, left, right = sides
    height, width = x.shape[-2:]
    if max(top, bottom) >= height or max(left, right) >= width:
        raise ValueError(f"padding of {sides} pixels needs maps larger than {height}x{width}")
    if mode == "reflect":
        return _pad_planes(x, (left, right, top, bottom), "reflect")
    if mode == "sphere":
        above = x[..., :top, :].roll(width // 2, -1).flip(-2)
        below = x[..., height - bottom :, :].roll(width // 2, -1).flip(-2)
        x = torch.cat([above, x, below], -2)
    x = torch.cat([x[..., width - left :], x, x[..., :right]], -1)
    if mode == "sphere":
        return x
    return _pad_planes(x, (0, 0, top, bottom), "reflect" if mode == "mirror" else "replicate")


def crop(x: Tensor, sides: Sides) -> Tensor:
    """Remove padding from maps.

    Args:
        x: Maps, shape ``(..., H, W)``.
        sides: Pixels of padding.
    """
    top, bottom, left, right = sides
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def _pad_planes(x: Tensor, sides: Sides, mode: str) -> Tensor:
    """``torch.nn.functional.pad`` of the last two dimensions of maps of any rank."""
    planes = x.reshape(1, -1, *x.shape[-2:])
    padded = F.pad(planes, sides, mode=mode)
    return padded.reshape(*x.shape[:-2], *padded.shape[-2:])
