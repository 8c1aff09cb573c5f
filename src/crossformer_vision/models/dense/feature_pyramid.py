"""Feature pyramid networks (FPN, arXiv 1612.03144) on timm backbones."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from typing_extensions import override

from crossformer_vision.models.dense.backbones import extract_feature_maps, feature_channels
from crossformer_vision.types import Backbone


class BackboneWithFPN(nn.Module):
    """A timm backbone with a feature pyramid, as torchvision's ``BackboneWithFPN``.

    Shape: ``(B, 3, H, W)`` to a dictionary of maps with ``width`` channels, named ``"0"``, ``"1"``, …, and
    those of ``extra``.

    Args:
        body: A module from `create_backbone`.
        width: Channels of the pyramid.
        first: First level of the pyramid: 0 is stride 4, 1 is stride 8.
        extra: Block that computes coarser levels.
    """

    def __init__(
        self, body: Backbone, width: int, first: int = 0, extra: ExtraFPNBlock | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.first = first
        self.out_channels = width
        self.fpn = FeaturePyramidNetwork(feature_channels(body)[first:], width, extra)

    @override
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = extract_feature_maps(self.body, images)[self.first :]
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


class LastLevelP6P7(ExtraFPNBlock):
    """RetinaNet's levels at strides 64 and 128, from the last map of the backbone (C5).

    Unlike torchvision's block of this name, P7 is computed from P6 without a ReLU, as in OpenMMLab.

    Args:
        in_channels: Channels of C5.
        width: Channels of the pyramid.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        init_xavier(self)

    @override
    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        p6 = _stable_conv(self.p6, x[-1])
        return [*results, p6, _stable_conv(self.p7, p6)], [*names, "p6", "p7"]


def _stable_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution, in float32 if a CPU trains in bfloat16.

    The bfloat16 weight gradient of a 3x3 convolution with stride 2 reads uninitialized memory if the map is
    one pixel wide (torch 2.15 with oneDNN on AVX-512), as P6 of an image of 64 pixels is.
    """
    is_low_precision = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if not (x.device.type == "cpu" and torch.is_grad_enabled() and is_low_precision):
        return conv(x)
    assert conv.bias is not None
    with torch.autocast("cpu", enabled=False):
        out = F.conv2d(x.float(), conv.weight.float(), conv.bias.float(), conv.stride, conv.padding)
    return out.to(x.dtype)


def init_xavier(module: nn.Module) -> None:
    """Initialize convolutions and linear layers with Xavier's uniform distribution and zero biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert layer.bias is not None
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
