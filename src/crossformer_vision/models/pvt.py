"""Pyramid Vision Transformer (PVT, arXiv 2102.12122), version 1, a baseline in the CrossFormer papers.

Four stages with patch embedding, learned positions, and blocks whose attention reduces keys and values. A
class token joins the last stage of classifiers; dense models and ``features_only`` have none. Maps are
channels last.

Deviation from the published code: position embeddings are resized if the grid of their stage differs; the
published code compares with the grid of the first stage.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

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
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.errors import check_choice
from crossformer_vision.models.ablations import SpatialReductionAttention
from crossformer_vision.models.crossformer import FeedForward
from crossformer_vision.models.timm_interface import FeatureMaps, StagedClassifier, check_size
from crossformer_vision.models.variants import Renamings, model_cfg
from crossformer_vision.types import Kwargs

__all__ = ["PyramidVisionTransformer"]

POOLS = ("token", "avg", "")


class PatchEmbedding(nn.Module):
    """Embed non-overlapping patches. Pixels beyond a multiple of the patch size are ignored.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        patch: Side of a patch.
    """

    def __init__(self, in_dim: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_dim)`` to ``(B, H // patch, W // patch, dim)``."""
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PVTBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        dim: Channels.
        num_heads: Number of attention heads.
        mlp_ratio: Hidden channels of the MLP relative to ``dim``.
        reduction: Reduction of keys and values.
        drop_path: Stochastic depth rate.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, num_heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map of shape ``(B, H, W, C)`` to a map of the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module
class PVTStage(nn.Module):
    """Patch embedding, positions and blocks.

    Args:
        embed: Patch embedding.
        blocks: Blocks.
        dim: Channels.
        side: Side of the map that position embeddings are learned for.
        tokens: Number of class tokens, 0 or 1.
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
        """Positions of an ``H x W`` map, shape ``(1, H, W, dim)``."""
        side = self.side
        grid = self.pos_embed[:, -side * side :].unflatten(1, (side, side))
        if side == H and side == W:
            return grid
        grid = F.interpolate(grid.permute(0, 3, 1, 2), size=(H, W), mode="bilinear", align_corners=False)
        return grid.permute(0, 2, 3, 1)

    @override
    def forward(self, x: Tensor, token: Tensor | None = None) -> Tensor:
        """``(B, H, W, in_dim)`` to ``(B, h, w, dim)``; with a token to ``(B, 1, 1 + h * w, dim)``.

        Args:
            x: Map.
            token: Class token, shape ``(1, 1, dim)``.
        """
        x = self.embed(x)
        x = x + self.positions(x.shape[1], x.shape[2])
        if token is not None:  # one row of tokens: without reduction, the shape does not matter
            token = (token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
            x = torch.cat([token, x.flatten(1, 2)], dim=1).unsqueeze(1)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x


class PyramidVisionTransformer(StagedClassifier):
    """PVT version 1, a timm model.

    Maps images of shape ``(B, in_chans, H, W)``, with H and W of at least 32, to logits of shape
    ``(B, num_classes)``.

    Args:
        in_chans: Channels of the images.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: ``"token"`` for the class token, ``"avg"`` for the mean over positions, ``""`` for all
            tokens.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratios: Hidden channels of the MLPs relative to those of the stage.
        reductions: Reduction of keys and values per stage.
        img_size: Side of the images that position embeddings are learned for, in pixels. Embeddings are
            resized for other sizes.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block. It rises linearly from 0 over all blocks.

    Raises:
        ValueError: If an option is invalid.
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
            raise ValueError(
                f"the last stage, with the class token, needs a reduction of 1: {tuple(reductions)}"
            )
        check_choice("global_pool", global_pool, POOLS)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.output_fmt = "NHWC"
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, [*depths], stagewise=True))
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

    @override
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    @override
    def get_classifier(self) -> nn.Module:
        return self.head

    @override
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            check_choice("global_pool", global_pool, POOLS)
            self.global_pool = global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    @override
    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        token = self.cls_token if index == len(self.stages) - 1 else None
        return self.stages[index](x, token)

    @override
    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(1, 2))

    @override
    def stage_map(self, index: int, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        if index < len(self.stages) - 1 or self.cls_token is None:
            return x
        return x[:, 0, 1:].unflatten(1, (image_size[0] // 32, image_size[1] // 32))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images of shape ``(B, in_chans, H, W)`` to tokens of shape ``(B, 1 + H // 32 * W // 32, C)``."""
        x = check_size(x).permute(0, 2, 3, 1)
        for index in range(len(self.stages)):
            x = self.forward_stage(index, x)
        return self.final_norm(x)

    @override
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 0 if self.cls_token is None else 1 :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @override
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.num_classes == 0:  # only the head uses the class token
            self.cls_token = None
        return take_indices


PUBLISHED_NAMES: Renamings = [
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed"),
    (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.embed."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Rename the keys of a published state dict to those of this module."""
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in PUBLISHED_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _cfg(variant: str) -> Kwargs:
    return model_cfg(
        url=f"https://github.com/whai362/PVT/releases/download/v2/{variant}.pth",
        crop_pct=0.9,
        pool_size=None,  # forward_features returns tokens
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
