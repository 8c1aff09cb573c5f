"""Any timm model as the backbone of a dense model: four maps, at any image size."""

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from timm.layers import Format
from timm.models import FeatureInfo, FeatureListNet
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from crossformer_vision.errors import UserError
from crossformer_vision.models import find_model, made, pvt, variants

STRIDES = (4, 8, 16, 32)


def create_backbone(name: str, pretrained: bool = False, **backbone_args: Any) -> nn.Module:
    """A timm model from images (B, 3, H, W) of any size to a list of maps.

    Args:
        name: timm's, with a tag to choose weights.
        pretrained: start from its published weights.
        **backbone_args: further keywords of the model, such as `drop_path_rate` or `group_size`.

    Raises:
        ValueError: unknown model, or one that gives no maps of which a pyramid at strides 4 to 32 can be
            made, or that takes one size of image alone.
    """
    find_model(name)
    model: Any = None
    # The keyword for any size, of those models that have a fixed one; the others do not know it.
    keywords: list[dict[str, Any]] = [{"strict_img_size": False}, {"dynamic_img_size": True}, {}]
    for any_size in keywords:
        try:
            model = timm.create_model(
                name, features_only=True, pretrained=pretrained, **any_size, **backbone_args
            )
            break
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        except (RuntimeError, AttributeError, NotImplementedError, AssertionError) as error:
            if pretrained:  # of its weights, or of what follows
                raise
            # What timm says of a model without maps: of its wrapper, its stages or its patches.
            raise UserError(f"model '{name}' gives no maps ({str(error).splitlines()[0]})") from None
    else:
        raise UserError(f"model '{name}' takes no img_size: it has none of its own; leave it out")
    strides = model.feature_info.reduction()
    # A list of a model's stages forgets what the model keeps from weight decay.
    if not hasattr(getattr(model, "model", model), "no_weight_decay"):
        whole = made(name, **any_size, **backbone_args)
        named = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else set()
        model.spared = {n for name in named for n in (name, name.replace(".", "_", 1))}
    if set(STRIDES) <= set(strides):
        _check_sizes(model, name, STRIDES, backbone_args)
        return model
    found = sorted({*strides} & {*STRIDES})
    if not found or found[-1] == STRIDES[0]:
        raise UserError(f"model '{name}' has maps at strides {strides}; of 8, 16 or 32 one is needed")
    _check_sizes(model, name, found, backbone_args)
    return SimplePyramid(model)


def _check_sizes(model: Any, name: str, strides: Sequence[int], backbone_args: dict[str, Any]) -> None:
    """A UserError unless the model maps images of several sizes, which 32 divides, by its strides.

    A model that is given an `img_size` need not take others: a segmenter works in windows of it.
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
        except Exception as error:  # whatever a model stumbles over
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"model '{name}' takes no image of {size} ({said}), and dense models meet any size; only a "
                "segmenter does with one: give the model an img_size, and windows of it"
            ) from None
        channels_last = getattr(model, "output_fmt", Format.NCHW) == Format.NHWC
        for x, stride in zip(maps, model.feature_info.reduction(), strict=True):
            found = tuple(x.shape[1:3] if channels_last else x.shape[2:])
            if stride in strides and found != (-(-height // stride), -(-width // stride)):
                raise UserError(
                    f"model '{name}' has a map of {found} at stride {stride} of an image of {size}"
                )
    model.train(training)


class SimplePyramid(nn.Module):
    """Maps at strides 4, 8, 16 and 32 of a model that lacks some; from one as in ViTDet (2203.16527).

    A stride that lacks comes from the nearest that is there, a finer one by pooling, a coarser one by
    transposed convolutions, each doubling of the size halving the channels.

    Shape: (B, 3, H, W) -> 4 x (B, C, h, w).
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        channels = dict(zip(body.feature_info.reduction(), body.feature_info.channels(), strict=True))
        there = [stride for stride in channels if stride in STRIDES]
        self.sources: list[int] = []  # the stride of which each map is made
        scales: list[nn.Module] = []
        info = []
        for wanted in STRIDES:
            at = min(there, key=lambda stride: (abs(math.log2(stride / wanted)), stride))
            self.sources.append(at)
            width = channels[at]
            layers: list[nn.Module] = []
            while at > wanted:
                if layers:
                    layers += [nn.GroupNorm(1, width), nn.GELU()]
                layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
                width, at = width // 2, at // 2
            if at < wanted:
                layers.append(nn.MaxPool2d(wanted // at, ceil_mode=True))
            scales.append(nn.Sequential(*layers))
            info.append(dict(num_chs=width, reduction=wanted, module=""))
        self.scales = nn.ModuleList(scales)
        self.feature_info = FeatureInfo(info, (0, 1, 2, 3))
        self.output_fmt = Format.NCHW

    def forward(self, images: Tensor) -> list[Tensor]:
        # Of several maps of one stride, the last.
        maps = dict(zip(self.body.feature_info.reduction(), self.body(images), strict=True))
        if getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC:
            maps = {stride: x.permute(0, 3, 1, 2) for stride, x in maps.items()}
        return [scale(maps[at]) for scale, at in zip(self.scales, self.sources, strict=True)]


def map_channels(model: Any) -> list[int]:
    """Channels of the maps at strides 4, 8, 16 and 32."""
    channels = dict(zip(model.feature_info.reduction(), model.feature_info.channels(), strict=True))
    return [channels[stride] for stride in STRIDES]


def feature_maps(model: Any, images: Tensor) -> list[Tensor]:
    """The maps at strides 4, 8, 16 and 32: (B, 3, H, W) -> 4 x (B, C, ceil(H / stride), ceil(W / stride)).

    Images of less than 32 pixels, which networks of that stride refuse, are padded up to it.
    """
    H, W = images.shape[2:]
    padded_H, padded_W = (max(STRIDES[-1], -(-side // STRIDES[0]) * STRIDES[0]) for side in (H, W))
    if (padded_H, padded_W) != (H, W):  # CrossFormer pads to 4 itself; others, such as Swin, refuse
        images = F.pad(images, (0, padded_W - W, 0, padded_H - H))
    by_stride = dict(zip(model.feature_info.reduction(), model(images), strict=True))
    maps = [by_stride[stride] for stride in STRIDES]
    if getattr(model, "output_fmt", Format.NCHW) == Format.NHWC:
        maps = [x.permute(0, 3, 1, 2) for x in maps]
    if min(H, W) < STRIDES[-1]:
        maps = [x[..., : -(-H // s), : -(-W // s)] for x, s in zip(maps, STRIDES, strict=True)]
    return maps


class Pyramid(nn.Module):
    """A timm backbone and its feature pyramid (FPN, arXiv 1612.03144).

    Shape: (B, 3, H, W) -> maps of `width` channels, named "0", "1", …, of the levels from `first` (0 is the
    one at stride 4) to the backbone's last, then those of `extra`.
    """

    def __init__(
        self, body: nn.Module, width: int, first: int = 0, extra: ExtraFPNBlock | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.first = first
        self.out_channels = width
        self.fpn = FeaturePyramidNetwork(map_channels(body)[first:], width, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = feature_maps(self.body, images)[self.first :]
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


# OpenMMLab's names of a `Pyramid` called "backbone".
PUBLISHED_NECK = [
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
]


class DenseModel(nn.Module):
    """Base of dense models, beside torchvision's: which of its weights are which, for `load_checkpoint`.

    Attributes:
        body_name: where the names of the timm model's weights begin.
        heads: where all others begin; a file of a backbone lacks them.
        class_layers: the heads' weights whose shape follows from the number of classes.
        published_names: OpenMMLab's names of the heads' weights, as (pattern, ours).
    """

    body_name: str
    heads: ClassVar[tuple[str, ...]]
    class_layers: ClassVar[tuple[str, ...]]
    published_names: ClassVar[list[tuple[str, str]]]

    @property
    def body(self) -> Any:
        """The `features_only` model."""
        return self.get_submodule(self.body_name.removesuffix("model.").removesuffix("."))

    def no_weight_decay(self) -> set[str]:
        """What the timm model keeps from weight decay, as position tables, under this model's names."""
        body = getattr(self.body, "model", self.body)
        named = body.no_weight_decay() if hasattr(body, "no_weight_decay") else getattr(body, "spared", ())
        return {self.body_name + name for name in named}

    def rename_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a published dense model, or of a backbone alone, under this model's names.

        Own names come back unchanged. What no pattern knows is taken for a weight of the backbone.
        """
        own = self.state_dict().keys()
        renamed, others = {}, {}
        for name, value in state.items():
            ours = name
            if name not in own:
                for pattern, replacement in self.published_names:
                    ours = re.sub(pattern, replacement, ours)
                if ours == name:
                    others[name.removeprefix("backbone.")] = value
                    continue
            renamed[ours] = value
        body = under_own_names(self.body, others)
        return {**renamed, **{self.body_name + name: value for name, value in body.items()}}


def under_own_names(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a classifier under the names that a backbone here has for them.

    Published ones get this library's names; and timm's list of a model's stages calls `layers.0` `layers_0`.
    """
    if isinstance(model, SimplePyramid):
        model = model.body
    if isinstance(model, FeatureListNet):
        own = model.state_dict().keys()
        flat = {name: re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", name) for name in state}
        return {flat[name] if flat[name] in own else name: value for name, value in state.items()}
    model = getattr(model, "model", model)  # in a features_only wrapper
    if isinstance(model, pvt.PyramidVisionTransformer):
        return pvt.checkpoint_filter_fn(state)
    return variants.checkpoint_filter_fn(state)


def body_name(prefix: str, body: nn.Module) -> str:
    """Where the names of a timm model's weights begin, in a dense model that has it under `prefix`."""
    if isinstance(body, SimplePyramid):
        return body_name(f"{prefix}body.", body.body)
    return f"{prefix}model." if hasattr(body, "model") else prefix
