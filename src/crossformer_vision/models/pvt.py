"""Pyramid Vision Transformer (PVT, arXiv 2102.12122), version 1: what CrossFormer is measured against.

Four stages, each of them an embedding of patches, learned positions, and blocks that attend over the map with
reduced keys and values. A class token joins the last stage of a classifier; dense models, and so
`features_only`, go without. As in `crossformer.py`, maps are channels last, (B, H, W, C).

Where this differs from the published code: whether positions are resized follows from a stage's own grid;
the published code compares with that of the first stage.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crossformer_vision.errors import check_choice
from crossformer_vision.models.ablations import SpatialReductionAttention
from crossformer_vision.models.crossformer import FeedForward
from crossformer_vision.models.timm_interface import FeatureMaps, StagedClassifier, check_size
from crossformer_vision.models.variants import model_cfg

__all__ = ["PyramidVisionTransformer"]

POOLS = ("token", "avg", "")


class PatchEmbedding(nn.Module):
    """Patches that do not overlap, each one an embedding; what a patch does not fill is left out.

    Shape: (B, H, W, in_dim) -> (B, H // patch, W // patch, dim).
    """

    def __init__(self, in_dim: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PVTBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Shape: (B, H, W, dim) -> (B, H, W, dim).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, num_heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module
class PVTStage(nn.Module):
    """Patches, positions and blocks.

    Args:
        embed: of the patches.
        blocks: of the stage.
        dim: channels.
        side: of the map that positions are learned for.
        tokens: rows of positions before those of the map, for a class token.

    Shape: (B, H, W, in_dim) -> (B, h, w, dim); with a token (1, 1, dim) -> (B, 1, 1 + h * w, dim).
    """

    def __init__(
        self, embed: PatchEmbedding, blocks: Sequence[PVTBlock], dim: int, side: int, tokens: int
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.embed = embed
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(1, tokens + side * side, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(blocks)

    def positions(self, H: int, W: int) -> Tensor:
        """Of a map: (1, H, W, dim)."""
        side = self.side
        grid = self.pos_embed[:, -side * side :].unflatten(1, (side, side))
        if side == H and side == W:
            return grid
        grid = F.interpolate(grid.permute(0, 3, 1, 2), size=(H, W), mode="bilinear", align_corners=False)
        return grid.permute(0, 2, 3, 1)

    def forward(self, x: Tensor, token: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        x = x + self.positions(x.shape[1], x.shape[2])
        if token is not None:  # a row of tokens: the last stage reduces nothing, so its shape does not matter
            token = (token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
            x = torch.cat([token, x.flatten(1, 2)], dim=1).unsqueeze(1)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


class PyramidVisionTransformer(StagedClassifier):
    """PVT version 1, a timm model.

    Args:
        in_chans: channels of the images.
        num_classes: of the head; 0 for no head.
        global_pool: `"token"` for the class token, `"avg"` for the mean over positions, `""` for all tokens.
        embed_dims: channels a stage.
        depths: blocks a stage.
        num_heads: attention heads a stage.
        mlp_ratios: hidden width of the MLPs, in channels of the stage.
        reductions: of the keys' and values' map, a stage.
        img_size: of the images that positions are learned for, in pixels; they are resized for others.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 over all blocks.

    Shape: (B, in_chans, H, W) -> (B, num_classes), for any H and W from 32 up; `forward_features` returns
    (B, 1 + H // 32 * W // 32, embed_dims[-1]), the class token first.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        img_size: int = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if reductions[-1] != 1:
            raise ValueError(f"the class token's stage, the last one, reduces nothing: {tuple(reductions)}")
        check_choice("global_pool", global_pool, POOLS)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.output_fmt = "NHWC"
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            embed = PatchEmbedding(embed_dims[i - 1] if i else in_chans, dim, 2 if i else 4)
            sizes = dim, num_heads[i], mlp_ratios[i], reductions[i]
            blocks = [PVTBlock(*sizes, rate) for rate in rates[i]]
            last = i == len(embed_dims) - 1
            self.stages.append(PVTStage(embed, blocks, dim, img_size // (4 << i), int(last)))
        self.feature_info = [
            dict(num_chs=dim, reduction=4 << i, module=f"stages.{i}") for i, dim in enumerate(embed_dims)
        ]
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.empty(1, 1, self.num_features))
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            check_choice("global_pool", global_pool, POOLS)
            self.global_pool = global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = check_size(x).permute(0, 2, 3, 1)
        for i, stage in enumerate(self.stages):
            x = stage(x, self.cls_token if i == len(self.stages) - 1 else None)
        return self.norm(x.flatten(1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 0 if self.cls_token is None else 1 :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As in CrossFormer; the last stage's map is without its class token."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, not {output_fmt}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        H, W = x.shape[2:]
        x = check_size(x).permute(0, 2, 3, 1)
        if torch.jit.is_scripting() or not stop_early:
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        last = len(self.stages) - 1
        intermediates: list[Tensor] = []
        for i, stage in enumerate(stages):
            token = self.cls_token if i == last else None
            x = stage(x, token)
            if i in take_indices:
                y = self.norm(x) if norm and i == last else x
                if token is not None:
                    y = y[:, 0, 1:].unflatten(1, (H // 32, W // 32))
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return self.norm(x.flatten(1, 2)) if len(stages) == last + 1 else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that `indices` do not need, and with the head the class token."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.cls_token = None
            self.reset_classifier(0, "")
        return take_indices


PUBLISHED_NAMES: list[tuple[str, Any]] = [
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed"),
    (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.embed."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """A published state dict under our names."""
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    renamed = {}
    for name, value in state_dict.items():
        for pattern, ours in PUBLISHED_NAMES:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    return renamed


def _cfg(variant: str) -> dict[str, Any]:
    return model_cfg(
        url=f"https://github.com/whai362/PVT/releases/download/v2/{variant}.pth",
        crop_pct=0.9,
        pool_size=None,  # `forward_features` returns tokens
        first_conv="stages.0.embed.proj",
        classifier="head",
        paper_ids="arXiv:2102.12122",
        license="apache-2.0",
    )


default_cfgs = generate_default_cfgs(
    {f"pvt_{size}.in1k": _cfg(f"pvt_{size}") for size in ("tiny", "small", "medium", "large")}
)


def _create_pvt(variant: str, pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    return build_model_with_cfg(
        PyramidVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls=FeatureMaps),
        **kwargs,
    )


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Tiny: 13.2 M parameters, 1.9 GMACs at 224, 75.1 % on ImageNet."""
    return _create_pvt("pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2), **kwargs})


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Small: 24.5 M parameters, 3.8 GMACs at 224, 79.8 % on ImageNet."""
    return _create_pvt("pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Medium: 44.2 M parameters, 6.7 GMACs at 224, 81.2 % on ImageNet."""
    return _create_pvt("pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Large: 61.4 M parameters, 9.8 GMACs at 224, 81.7 % on ImageNet."""
    return _create_pvt("pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})
