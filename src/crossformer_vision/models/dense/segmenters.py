"""Semantic FPN and UPerNet on any timm backbone.

Outputs are those of the OpenMMLab models that CrossFormer was published with. A segmenter maps normalized
images of any size to logits of the same size. ``windows.py`` adds sliding windows, scales and flips.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation
from typing_extensions import override

from crossformer_vision.models import find_model
from crossformer_vision.models.dense.backbones import (
    STRIDES,
    create_backbone,
    extract_feature_maps,
    feature_channels,
)
from crossformer_vision.models.dense.base import DenseModel, find_body_prefix
from crossformer_vision.models.dense.feature_pyramid import BackboneWithFPN
from crossformer_vision.models.dense.published_keys import NECK_KEYS, SEGMENTER_HEAD_KEYS
from crossformer_vision.types import Backbone, Kwargs

__all__ = ["SemanticFPN", "UPerNet", "create_segmenter"]


def pad_to_stride(images: Tensor) -> Tensor:
    """Zero-pad images ``(B, C, H, W)`` right and bottom to multiples of the coarsest stride.

    Otherwise resizing would squeeze coarse maps, whose last cells reach beyond the image.
    """
    H, W = images.shape[2:]
    return F.pad(images, (0, -W % STRIDES[-1], 0, -H % STRIDES[-1]))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resizing with half-pixel centers: ``(B, C, h, w)`` to ``(B, C, *size)``."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------------------------------------
# Heads: from maps at strides 4, 8, 16, 32 to logits at stride 4
# ------------------------------------------------------------------------------------------------------------


def pixel_classifier(width: int, num_classes: int) -> nn.Conv2d:
    """1x1 convolution from ``width`` to ``num_classes`` channels, with Xavier initialization.

    With torch's initialization, half as large, UPerNet learned more slowly with Muon
    (docs/results/camvid.md).
    """
    layer = nn.Conv2d(width, num_classes, 1)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


class SemanticFPNHead(nn.Module):
    """Head of Semantic FPN (arXiv 1901.02446): upsample each level to stride 4 in steps of two, then add.

    Args:
        in_channels: Channels of the maps.
        width: Channels of the head.
        num_classes: Number of classes.
        dropout: Dropout of channels before the classifier.
    """

    def __init__(self, in_channels: int, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        heads = []
        for doublings in range(len(STRIDES)):
            layers: list[nn.Module] = []
            for k in range(max(1, doublings)):
                layers.append(Conv2dNormActivation(width if k else in_channels, width))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            heads.append(nn.Sequential(*layers))
        self.scale_heads = nn.ModuleList(heads)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = pixel_classifier(width, num_classes)

    @override
    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.scale_heads[0](maps[0])
        for head, coarse in zip(list(self.scale_heads)[1:], maps[1:], strict=True):
            x = x + resize(head(coarse), x.shape[2:])  # at odd sizes the upsampled map is larger
        return self.conv_seg(self.dropout(x))


class UPerHead(nn.Module):
    """Head of UPerNet (arXiv 1807.10221): pyramid pooling of the last map, feature pyramid, fusion of levels.

    Args:
        in_channels: Channels of each map.
        width: Channels of the head.
        num_classes: Number of classes.
        dropout: Dropout of channels before the classifier.
    """

    POOLS = (1, 2, 3, 6)

    def __init__(self, in_channels: list[int], width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        *fine, last = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), Conv2dNormActivation(last, width, 1))
            for side in self.POOLS
        )
        self.bottleneck = Conv2dNormActivation(last + len(self.POOLS) * width, width)
        self.lateral_convs = nn.ModuleList(Conv2dNormActivation(channels, width, 1) for channels in fine)
        self.fpn_convs = nn.ModuleList(Conv2dNormActivation(width, width) for _ in fine)
        self.fpn_bottleneck = Conv2dNormActivation(len(in_channels) * width, width)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = pixel_classifier(width, num_classes)

    @override
    def forward(self, maps: list[Tensor]) -> Tensor:
        last = maps[-1]
        pooled = [resize(module(last), last.shape[2:]) for module in self.psp_modules]
        x = self.bottleneck(torch.cat([last, *pooled], dim=1))
        levels = [x]
        for k in reversed(range(len(self.lateral_convs))):
            lateral = self.lateral_convs[k](maps[k])
            x = lateral + resize(x, lateral.shape[2:])
            levels.append(self.fpn_convs[k](x))
        finest = levels[-1].shape[2:]
        fused = torch.cat([resize(level, finest) for level in reversed(levels)], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))


class FCNHead(nn.Module):
    """UPerNet's auxiliary head: a convolution and a classifier.

    Args:
        in_channels: Channels of the map.
        width: Channels of the head.
        num_classes: Number of classes.
        dropout: Dropout of channels before the classifier.
    """

    def __init__(self, in_channels: int, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.Sequential(Conv2dNormActivation(in_channels, width))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = pixel_classifier(width, num_classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


# ------------------------------------------------------------------------------------------------------------
# Segmenters
# ------------------------------------------------------------------------------------------------------------


class SemanticFPN(DenseModel):
    """Semantic FPN as published with CrossFormer. See `create_segmenter`.

    Args:
        body: A module from `create_backbone`.
        num_classes: Number of classes.
        width: Channels of the pyramid. The head has half as many.
        dropout: Dropout of channels before the classifier.
    """

    heads = ("backbone.fpn.", "backbone.body.scales.", "head.")
    has_fixed_size: bool
    class_layers = ("head.conv_seg.",)
    published_names = [*NECK_KEYS, *SEGMENTER_HEAD_KEYS]

    def __init__(self, body: Backbone, num_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.backbone = BackboneWithFPN(body, width)
        self.head = SemanticFPNHead(width, width // 2, num_classes, dropout)
        self.body_prefix = find_body_prefix("backbone.body.", body)

    @override
    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[2:]
        images = pad_to_stride(images)
        logits = self.head(list(self.backbone(images).values()))
        return resize(logits, images.shape[2:])[..., :H, :W]


class UPerNet(DenseModel):
    """UPerNet as published with CrossFormer. See `create_segmenter`.

    Args:
        body: A module from `create_backbone`.
        num_classes: Number of classes.
        width: Channels of the head. The auxiliary head has half as many.
        dropout: Dropout of channels before the classifier.
    """

    heads = ("backbone.scales.", "head.", "auxiliary_head.")
    has_fixed_size: bool
    class_layers = ("head.conv_seg.", "auxiliary_head.conv_seg.")
    published_names = SEGMENTER_HEAD_KEYS

    def __init__(self, body: Backbone, num_classes: int, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        channels = feature_channels(body)
        self.backbone = body
        self.head = UPerHead(channels, width, num_classes, dropout)
        self.auxiliary_head = FCNHead(channels[2], width // 2, num_classes, dropout)
        self.body_prefix = find_body_prefix("backbone.", body)

    @override
    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[2:]
        images = pad_to_stride(images)
        return resize(self.head(extract_feature_maps(self.backbone, images)), images.shape[2:])[..., :H, :W]

    def forward_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and those of the auxiliary head on the map at stride 16, both in the size of the images."""
        H, W = images.shape[2:]
        images = pad_to_stride(images)
        maps = extract_feature_maps(self.backbone, images)
        logits, auxiliary = self.head(maps), self.auxiliary_head(maps[2])
        whole = images.shape[2:]
        return resize(logits, whole)[..., :H, :W], resize(auxiliary, whole)[..., :H, :W]


SEGMENTERS: dict[str, type[SemanticFPN] | type[UPerNet]] = {"semantic_fpn": SemanticFPN, "upernet": UPerNet}


def create_segmenter(
    name: Literal["semantic_fpn", "upernet"],
    backbone: str = "crossformer_small",
    num_classes: int = 150,
    pretrained: bool = False,
    width: int | None = None,
    dropout: float = 0.1,
    backbone_args: Kwargs | None = None,
) -> nn.Module:
    """Create Semantic FPN or UPerNet on a timm backbone.

    Args:
        name: ``"semantic_fpn"`` or ``"upernet"``.
        backbone: timm name of the backbone.
        num_classes: Number of classes.
        pretrained: Start from the backbone's published weights.
        width: Channels of the pyramid. ``None`` for 256 (Semantic FPN) or 512 (UPerNet).
        dropout: Dropout of channels before the classifier.
        backbone_args: Further arguments of the backbone, such as ``drop_path_rate``. The published
            segmenters, including those on CrossFormer++, have ``lda_span="map"`` and groups that their files
            do not contain. UPerNet and Semantic FPN on ++B: ``group_size=(7, 7, 7, 7)`` and
            ``interval=(8, 4, 2, 1)``. Other Semantic FPNs: ``group_size=(14, 14, 7, 7)`` and
            ``interval=(16, 8, 2, 1)``.

    Returns:
        Module from normalized images of shape ``(B, C, H, W)``, of any size, to logits of shape
        ``(B, num_classes, H, W)``. UPerNet also has ``forward_auxiliary`` for training.

    Raises:
        ValueError: If the segmenter or backbone is unknown, or the backbone has no suitable maps.
    """
    if name not in SEGMENTERS:
        raise ValueError(f"unknown segmenter '{name}'. Choose from {', '.join(SEGMENTERS)}")
    body = create_backbone(backbone, pretrained, **(backbone_args or {}))
    net = SEGMENTERS[name](body, num_classes, dropout=dropout, **({"width": width} if width else {}))
    net.has_fixed_size = bool(find_model(backbone).fixed_input_size)
    return net
