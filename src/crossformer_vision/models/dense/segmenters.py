"""Semantic FPN and UPerNet on any timm backbone, from torchvision's blocks.

In structure and numbers they are the OpenMMLab models that CrossFormer was published with. A segmenter takes
normalised images of any size and returns logits at that size; `segment` averages those of windows, scales and
flips, as the papers test.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from crossformer_vision.models import find_model
from crossformer_vision.models.dense.backbones import (
    PUBLISHED_NECK,
    STRIDES,
    DenseModel,
    Pyramid,
    body_name,
    create_backbone,
    feature_maps,
    map_channels,
)

__all__ = ["SemanticFPN", "UPerNet", "create_segmenter", "segment"]


def padded(images: Tensor) -> Tensor:
    """Images (B, C, H, W) with zeros at the right and below, up to sides that the coarsest stride divides.

    Otherwise a coarse map, whose last cells reach beyond the image, would be squeezed into it.
    """
    H, W = images.shape[2:]
    return F.pad(images, (0, -W % STRIDES[-1], 0, -H % STRIDES[-1]))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, with half-pixel centres: (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------------------------------------
# Heads: maps at strides 4, 8, 16, 32 -> logits at stride 4
# ------------------------------------------------------------------------------------------------------------


def class_layer(width: int, num_classes: int) -> nn.Conv2d:
    """A classifier of pixels: (B, width, h, w) -> (B, num_classes, h, w).

    Its weights start as Xavier's, twice torch's own, with which UPerNet was eight points of mIoU behind after
    four epochs on CamVid with Muon (docs/results/camvid.md).
    """
    layer = nn.Conv2d(width, num_classes, 1)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


class SemanticFPNHead(nn.Module):
    """Head of Semantic FPN (arXiv 1901.02446): each level brought to stride 4 in steps of two, then summed.

    Shape: 4 x (B, in_channels, h, w) -> (B, num_classes, H / 4, W / 4).
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
        self.conv_seg = class_layer(width, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.scale_heads[0](maps[0])
        for head, coarse in zip(list(self.scale_heads)[1:], maps[1:], strict=True):
            x = x + resize(head(coarse), x.shape[2:])  # at odd sizes twice a map is larger than the finer one
        return self.conv_seg(self.dropout(x))


class UPerHead(nn.Module):
    """Head of UPerNet (arXiv 1807.10221): pyramid pooling of the last map, a pyramid, all levels fused.

    Shape: 4 x (B, in_channels[i], h, w) -> (B, num_classes, H / 4, W / 4).
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
        self.conv_seg = class_layer(width, num_classes)

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
    """UPerNet's auxiliary head: a convolution and a classifier. (B, C, h, w) -> (B, num_classes, h, w)."""

    def __init__(self, in_channels: int, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.Sequential(Conv2dNormActivation(in_channels, width))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = class_layer(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


# ------------------------------------------------------------------------------------------------------------
# Segmenters
# ------------------------------------------------------------------------------------------------------------

# OpenMMLab's names of the layers of the heads; those of the modules are ours, too.
PUBLISHED_HEADS = [
    (r"^decode_head\.conv_seg\.", "head.conv_seg."),
    (r"^decode_head\.(.+)\.conv\.", r"head.\1.0."),
    (r"^decode_head\.(.+)\.bn\.", r"head.\1.1."),
    (r"^auxiliary_head\.(.+)\.conv\.", r"auxiliary_head.\1.0."),
    (r"^auxiliary_head\.(.+)\.bn\.", r"auxiliary_head.\1.1."),
]


class SemanticFPN(DenseModel):
    """Semantic FPN as published with CrossFormer; see `create_segmenter`."""

    heads = ("backbone.fpn.", "backbone.body.scales.", "head.")
    class_layers = ("head.conv_seg.",)
    published_names = [*PUBLISHED_NECK, *PUBLISHED_HEADS]

    def __init__(self, body: nn.Module, num_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.backbone = Pyramid(body, width)
        self.head = SemanticFPNHead(width, width // 2, num_classes, dropout)
        self.body_name = body_name("backbone.body.", body)

    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[2:]
        images = padded(images)
        logits = self.head(list(self.backbone(images).values()))
        return resize(logits, images.shape[2:])[..., :H, :W]


class UPerNet(DenseModel):
    """UPerNet as published with CrossFormer; see `create_segmenter`."""

    heads = ("backbone.scales.", "head.", "auxiliary_head.")
    class_layers = ("head.conv_seg.", "auxiliary_head.conv_seg.")
    published_names = PUBLISHED_HEADS

    def __init__(self, body: nn.Module, num_classes: int, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        channels = map_channels(body)
        self.backbone = body
        self.head = UPerHead(channels, width, num_classes, dropout)
        self.auxiliary_head = FCNHead(channels[2], width // 2, num_classes, dropout)
        self.body_name = body_name("backbone.", body)

    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[2:]
        images = padded(images)
        return resize(self.head(feature_maps(self.backbone, images)), images.shape[2:])[..., :H, :W]

    def forward_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """For training: the logits, and those of the auxiliary head on the map at stride 16, at full size."""
        H, W = images.shape[2:]
        images = padded(images)
        maps = feature_maps(self.backbone, images)
        logits, auxiliary = self.head(maps), self.auxiliary_head(maps[2])
        whole = images.shape[2:]
        return resize(logits, whole)[..., :H, :W], resize(auxiliary, whole)[..., :H, :W]


SEGMENTERS: dict[str, Any] = {"semantic_fpn": SemanticFPN, "upernet": UPerNet}


def create_segmenter(
    name: Literal["semantic_fpn", "upernet"],
    backbone: str = "crossformer_small",
    num_classes: int = 150,
    pretrained: bool = False,
    width: int | None = None,
    dropout: float = 0.1,
    backbone_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Semantic FPN or UPerNet on a timm backbone.

    Args:
        name: `"semantic_fpn"` or `"upernet"`.
        backbone: timm name of a model with maps at strides 4, 8, 16 and 32.
        num_classes: classes of pixels.
        pretrained: start from the backbone's published weights.
        width: channels of the pyramid; 256 (Semantic FPN, whose head has half as many) or 512 (UPerNet, whose
            auxiliary head has half as many) if None.
        dropout: of whole channels, before the classifier.
        backbone_args: further keywords of the backbone, such as `drop_path_rate`. The published segmenters,
            CrossFormer++'s too, have `lda_span="map"`, in training and test, and these groups, of which their
            files do not say anything: UPerNet, and Semantic FPN on ++B, `group_size=(7, 7, 7, 7)` and
            `interval=(8, 4, 2, 1)`, the defaults of CrossFormer-T/S/B/L; any other Semantic FPN
            `group_size=(14, 14, 7, 7)` and `interval=(16, 8, 2, 1)`.

    Returns:
        A module that takes normalised images (B, 3, H, W) of any size and returns logits (B, num_classes, H,
        W). UPerNet has `forward_auxiliary` for training, too, which returns those of its auxiliary head
        beside them.

    Raises:
        ValueError: unknown segmenter or backbone, or a backbone without such maps.
    """
    if name not in SEGMENTERS:
        raise ValueError(f"unknown segmenter '{name}'; there are: {', '.join(SEGMENTERS)}")
    body = create_backbone(backbone, pretrained, **(backbone_args or {}))
    net: Any = SEGMENTERS[name](body, num_classes, dropout=dropout, **({"width": width} if width else {}))
    net.has_fixed_size = bool(find_model(backbone).fixed_input_size)
    return net


# ------------------------------------------------------------------------------------------------------------
# Testing with windows, scales and flips
# ------------------------------------------------------------------------------------------------------------

Net = Callable[[Tensor], Tensor]
WHOLE = 2048 * 2048  # pixels of an image that is segmented at once; larger ones go by windows of
LARGE_WINDOW = 1024


def sliding_window(net: Net, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits of images, the mean of those of overlapping windows.

    Args:
        net: normalised images (B, 3, h, w) -> logits (B, classes, h, w).
        images: (B, 3, H, W).
        window: side of the square windows, in pixels; cut to the image.
        stride: from a window to the next; the last ones end at the image's edge.

    Returns:
        (B, classes, H, W).

    Raises:
        ValueError: a stride that leaves pixels out.
    """
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} of windows of {window} pixels: it is 1 to {window}")
    size = images.shape[2:]
    images = pad_to_window(net, images, window)
    H, W = images.shape[2:]
    if max(H, W) <= window:
        return net(images)[..., : size[0], : size[1]]
    total: Any = None
    count = images.new_zeros(1, 1, H, W)
    for y in starts(H, window, stride):
        for x in starts(W, window, stride):
            area = (..., slice(y, y + window), slice(x, x + window))
            logits = net(images[area])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], H, W)
            total[area] += logits
            count[area] += 1
    return total.div_(count)[..., : size[0], : size[1]]


def pad_to_window(net: Net, images: Tensor, window: int) -> Tensor:
    """Pad images to at least the window size, right and bottom, if the backbone has a fixed input size."""
    missing = (0, max(0, window - images.shape[3]), 0, max(0, window - images.shape[2]))
    return F.pad(images, missing) if getattr(net, "has_fixed_size", False) and any(missing) else images


def class_map_in_windows(net: Net, images: Tensor, window: int, stride: int) -> Tensor:
    """Class map of images by overlapping windows, as ``sliding_window`` and ``class_map`` compute it.

    Only a row of windows is held at a time, so memory does not grow with the height of the images.

    Args:
        net: Normalized images ``(B, 3, h, w)`` -> logits ``(B, classes, h, w)``.
        images: ``(B, 3, H, W)``, larger than a window.
        window: Side of the square windows in pixels.
        stride: From a window to the next.

    Returns:
        Indices of the best classes, ``(B, H, W)``.
    """
    size = images.shape[2:]
    images = pad_to_window(net, images, window)
    H, W = images.shape[2:]
    rows = starts(H, window, stride)
    found, band = [], None
    count = images.new_zeros(1, 1, min(window, H), W)
    for y, following in zip(rows, [*rows[1:], H], strict=True):
        for x in starts(W, window, stride):
            logits = net(images[..., y : y + window, x : x + window]).float()
            if band is None:
                band = logits.new_zeros(*logits.shape[:3], W)
            band[..., x : x + window] += logits
            count[..., x : x + window] += 1
            del logits
        assert band is not None
        done, kept = following - y, band.shape[2] - (following - y)
        best = band[:, :, :done]
        found.append(class_map(best.div_(count[:, :, :done])))
        for channel in range(band.shape[1]):  # one by one: a copy of all would double the memory
            band[:, channel, :kept] = band[:, channel, done:].clone()
        band[:, :, kept:] = 0
        count[:, :, :kept] = count[:, :, done:].clone()
        count[:, :, kept:] = 0
    return torch.cat(found, dim=1)[:, : size[0], : size[1]]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side; the last one ends with it."""
    last = max(0, length - window)
    return [min(start, last) for start in range(0, last + stride, stride)]


def segment(
    net: Net,
    views: Sequence[Tensor],
    size: tuple[int, int] | None = None,
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Probabilities of the classes, averaged over scales and flips.

    Args:
        net: normalised images (B, 3, h, w) -> logits (B, classes, h, w).
        views: (B, 3, H, W), the same images at each scale, made from the originals.
        size: of the result; the first view's if None.
        flip: each view mirrored, too.
        window: side of sliding windows, in pixels; None for the whole image at once, up to `WHOLE` pixels,
            and windows of `LARGE_WINDOW` beyond.
        stride: of the windows; two thirds of `window` if None, as published.

    Returns:
        (B, classes, *size), which sum to one over the classes; where there is one view, and no gradient, in
        the memory of the network's logits.
    """
    size = size or (views[0].shape[2], views[0].shape[3])
    total: Any = None
    for images in views:
        for mirrored in (False, True)[: 1 + flip]:
            view = images.flip(3) if mirrored else images
            logits = logits_of(net, view, size, window, stride)
            probabilities = softmax_(logits.flip(3) if mirrored else logits)
            if total is None:
                total = probabilities
            else:  # in place, unless a gradient wants what was there
                total = total + probabilities if probabilities.requires_grad else total.add_(probabilities)
    count = len(views) * (1 + flip)
    return total if count == 1 else total.div_(count)


def predict_class_map(
    net: Net,
    views: Sequence[Tensor],
    size: tuple[int, int],
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Class map of images; arguments as of ``segment``, whose best classes it returns.

    Returns:
        Indices of the best classes, ``(B, *size)``.
    """
    images = views[0]
    side = window_side(images, window)
    alone = len(views) == 1 and not flip and (images.shape[2], images.shape[3]) == size
    if alone and side and max(size) > side:
        return class_map_in_windows(net, images, side, stride or 2 * side // 3)
    if len(views) == 1 and not flip:  # the softmax keeps the order of the classes
        return class_map(logits_of(net, images, size, window, stride))
    return class_map(segment(net, views, size, flip, window, stride))


def window_side(images: Tensor, window: int | None) -> int | None:
    """Side of the windows: as given, or ``LARGE_WINDOW`` for images of more than ``WHOLE`` pixels."""
    return window or (LARGE_WINDOW if images.shape[2] * images.shape[3] > WHOLE else None)


def logits_of(
    net: Net, images: Tensor, size: tuple[int, int], window: int | None, stride: int | None
) -> Tensor:
    """Logits of one view, (B, classes, *size), in float32; arguments as of `segment`."""
    side = window_side(images, window)
    logits = sliding_window(net, images, side, stride or 2 * side // 3) if side else net(images)
    logits = logits.float()
    return logits if logits.shape[2:] == size else resize(logits, size)


# A map of all classes is hundreds of MB on a large photo: what follows makes no second one, and works on
# strips of rows that stay in a CPU's cache.


def strips(x: Tensor, channels: int) -> Iterator[slice]:
    """Rows of (B, C, H, W) that make a strip of so many channels: 1 MB on a CPU, 256 elsewhere."""
    values = 1 << (18 if x.device.type == "cpu" else 26)
    step = max(1, values // max(1, x.shape[0] * channels * x.shape[3]))
    return (slice(y, y + step) for y in range(0, x.shape[2], step))


def softmax_(logits: Tensor) -> Tensor:
    """The softmax over the classes of (B, C, H, W), in place, unless there is a gradient."""
    if logits.requires_grad:
        return logits.softmax(1)
    for rows in strips(logits, logits.shape[1]):
        logits[:, :, rows] = logits[:, :, rows].softmax(1)
    return logits


def class_map(scores: Tensor) -> Tensor:
    """The best class of each pixel, the first of equals: (B, C, H, W) -> (B, H, W) of integers.

    On a CPU class by class in strips, a third of `argmax`'s time there.
    """
    if scores.device.type != "cpu":
        return scores.argmax(1)
    found = torch.zeros(scores.shape[0], *scores.shape[2:], dtype=torch.int64)
    for rows in strips(scores, 1):
        best = scores[:, 0, rows].clone()
        for k in range(1, scores.shape[1]):
            one = scores[:, k, rows]
            found[:, rows].masked_fill_(one > best, k)
            torch.maximum(best, one, out=best)
    return found


def logs_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Logarithm of the softmax at each pixel's class: (B, C, H, W), (B, H, W) -> (B, H, W)."""
    logs = logits.gather(1, labels[:, None])[:, 0]
    for rows in strips(logits, logits.shape[1]):
        logs[:, rows] -= logits[:, :, rows].logsumexp(1)
    return logs
