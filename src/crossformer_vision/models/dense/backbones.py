"""Any timm model as the backbone of a dense model: four feature maps of images of any size."""

import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Format
from timm.models import FeatureInfo
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.errors import UserError
from crossformer_vision.models import create_on_meta, find_model
from crossformer_vision.models.grouping import ceil_div
from crossformer_vision.types import Backbone, Kwargs

STRIDES = (4, 8, 16, 32)
# Keywords with which models of a fixed image size accept other sizes. Most models have no such keyword.
ANY_SIZE_KWARGS: tuple[Kwargs, ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})


def create_backbone(name: str, pretrained: bool = False, **backbone_args: Any) -> Backbone:
    """Create a timm model that returns feature maps of images of any size.

    Models without all of the strides 4, 8, 16 and 32 are wrapped in a `SimpleFeaturePyramid`.

    Args:
        name: Name of a timm model, with a tag to choose weights.
        pretrained: Load its published weights.
        **backbone_args: Further arguments of the model, such as ``drop_path_rate`` or ``group_size``.

    Returns:
        A ``features_only`` model: images ``(B, C, H, W)`` to a list of feature maps.

    Raises:
        UserError: If the model is unknown, has no suitable feature maps or needs one fixed image size.
    """
    find_model(name)
    model, size_kwargs = _create_features_only(name, pretrained, backbone_args)
    strides = model.feature_info.reduction()
    # timm's FeatureListNet drops the model's own no_weight_decay().
    if not hasattr(getattr(model, "model", model), "no_weight_decay"):
        original = create_on_meta(name, **size_kwargs, **backbone_args)
        names: set[str] = getattr(original, "no_weight_decay", set)()
        model.no_decay_names = {n for name in names for n in (name, name.replace(".", "_", 1))}
    if set(STRIDES) <= set(strides):
        _check_sizes(model, name, STRIDES, backbone_args)
        return model
    usable = sorted({*strides} & {*STRIDES})
    if not usable or usable[-1] == STRIDES[0]:
        raise UserError(f"model '{name}' has feature maps at strides {strides}. One of 8, 16 or 32 is needed")
    _check_sizes(model, name, usable, backbone_args)
    return SimpleFeaturePyramid(model)


def _create_features_only(name: str, pretrained: bool, backbone_args: Kwargs) -> tuple[Any, Kwargs]:
    """A ``features_only`` model and the arguments that let it take any image size."""
    for size_kwargs in ANY_SIZE_KWARGS:
        try:
            model = timm.create_model(
                name, features_only=True, pretrained=pretrained, **size_kwargs, **backbone_args
            )
            return model, size_kwargs
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        except (RuntimeError, AttributeError, NotImplementedError, AssertionError) as error:
            if pretrained:  # the weights may be the reason
                raise
            raise UserError(f"model '{name}' gives no feature maps ({str(error).splitlines()[0]})") from None
    raise UserError(f"model '{name}' has no argument img_size. Leave it out")


def _check_sizes(model: Backbone, name: str, strides: Sequence[int], backbone_args: Kwargs) -> None:
    """Check that feature maps of images of several sizes have the expected sizes.

    A model with an explicit ``img_size`` is checked at this size only, because segmenters use windows of it.

    Raises:
        UserError: If the model fails or returns another size.
    """
    sizes = [(64, 96), (96, 160)]
    if own := backbone_args.get("img_size"):
        sizes = [(own, own) if isinstance(own, int) else tuple(own)]
    weight = next(model.parameters())
    training = model.training
    model.eval()
    for height, width in sizes:
        size = f"{height}x{width}"
        try:
            with torch.no_grad():
                maps = model(weight.new_zeros(1, backbone_args.get("in_chans", 3), height, width))
        except Exception as error:  # models raise errors of any type
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"model '{name}' cannot process an image of {size} ({reason}). Dense models need any size; "
                "only a segmenter works with a fixed one: pass img_size to the model and use windows of it"
            ) from None
        is_channels_last = getattr(model, "output_fmt", Format.NCHW) == Format.NHWC
        for x, stride in zip(maps, model.feature_info.reduction(), strict=True):
            map_size = tuple(x.shape[1:3] if is_channels_last else x.shape[2:])
            if stride in strides and map_size != (ceil_div(height, stride), ceil_div(width, stride)):
                raise UserError(
                    f"model '{name}' has a feature map of {map_size} at stride {stride} of an image of {size}"
                )
    model.train(training)


class SimpleFeaturePyramid(nn.Module):
    """Feature maps at strides 4, 8, 16 and 32 of a model that lacks some of them.

    From a single map this is the simple feature pyramid of ViTDet (arXiv 2203.16527). A missing map is
    computed from the nearest one: coarser ones by max pooling, finer ones by transposed convolutions, each of
    which doubles the resolution and halves the channels.

    Shape: ``(B, 3, H, W)`` to four maps ``(B, C, h, w)``.

    Args:
        body: A ``features_only`` model.
    """

    def __init__(self, body: Backbone) -> None:
        super().__init__()
        self.body = body
        channels = dict(zip(body.feature_info.reduction(), body.feature_info.channels(), strict=True))
        available = [stride for stride in channels if stride in STRIDES]
        self.sources: list[int] = []  # stride of the map that each output is computed from
        scales: list[nn.Module] = []
        info = []
        for wanted in STRIDES:
            stride = min(available, key=lambda stride: (abs(math.log2(stride / wanted)), stride))
            self.sources.append(stride)
            layers, width = _rescaling_layers(stride, wanted, channels[stride])
            scales.append(nn.Sequential(*layers))
            info.append(dict(num_chs=width, reduction=wanted, module=""))
        self.scales = nn.ModuleList(scales)
        self.feature_info = FeatureInfo(info, (0, 1, 2, 3))
        self.output_fmt = Format.NCHW

    @override
    def forward(self, images: Tensor) -> list[Tensor]:
        # If several maps share a stride, the last one is used.
        maps = dict(zip(self.body.feature_info.reduction(), self.body(images), strict=True))
        if getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC:
            maps = {stride: x.permute(0, 3, 1, 2) for stride, x in maps.items()}
        return [scale(maps[stride]) for scale, stride in zip(self.scales, self.sources, strict=True)]


def _rescaling_layers(stride: int, wanted: int, width: int) -> tuple[list[nn.Module], int]:
    """Layers from a map at ``stride`` to one at ``wanted``, and the channels of their output."""
    if stride < wanted:
        return [nn.MaxPool2d(wanted // stride, ceil_mode=True)], width
    layers: list[nn.Module] = []
    while stride > wanted:
        if layers:
            layers += [nn.GroupNorm(1, width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width, stride = width // 2, stride // 2
    return layers, width


def feature_channels(model: Backbone) -> list[int]:
    """Channels of the feature maps at strides 4, 8, 16 and 32."""
    channels = dict(zip(model.feature_info.reduction(), model.feature_info.channels(), strict=True))
    return [channels[stride] for stride in STRIDES]


def extract_feature_maps(model: Backbone, images: Tensor) -> list[Tensor]:
    """Compute the feature maps at strides 4, 8, 16 and 32.

    Images are zero-padded to at least 32 pixels and to multiples of 4, which many backbones require.

    Args:
        model: A module from `create_backbone`.
        images: Images of any size, ``(B, C, H, W)``.

    Returns:
        Four maps, ``(B, C, ceil(H / stride), ceil(W / stride))``.
    """
    H, W = images.shape[2:]
    padded_H, padded_W = (max(STRIDES[-1], ceil_div(side, STRIDES[0]) * STRIDES[0]) for side in (H, W))
    if (padded_H, padded_W) != (H, W):
        images = F.pad(images, (0, padded_W - W, 0, padded_H - H))
    by_stride = dict(zip(model.feature_info.reduction(), model(images), strict=True))
    maps = [by_stride[stride] for stride in STRIDES]
    if getattr(model, "output_fmt", Format.NCHW) == Format.NHWC:
        maps = [x.permute(0, 3, 1, 2) for x in maps]
    if min(H, W) < STRIDES[-1]:
        maps = [x[..., : ceil_div(H, s), : ceil_div(W, s)] for x, s in zip(maps, STRIDES, strict=True)]
    return maps
