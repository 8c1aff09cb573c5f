"""CrossFormer and CrossFormer++, next to the papers.

CrossFormer:   A Versatile Vision Transformer Hinging on Cross-scale Attention, arXiv 2108.00154 (ICLR 2022).
CrossFormer++: the same with progressive group sizes and amplitude cooling, arXiv 2303.06908 (TPAMI 2023).

Read from top to bottom: cross-scale embedding (CEL), dynamic position bias (DPB), long/short distance
attention (LDA/SDA), amplitude cooling (ACL), block, stage, model. How a map is cut into groups, with a small
example that tells SDA from LDA, is in `grouping.py`; by which kernels attention is computed, in
`attention.py`; the named models are in `variants.py`.

Shapes in comments: B images, H x W positions, C channels; a group is `gh x gw` members, L = gh * gw of them;
N groups in a batch; h heads of d channels. Maps are channels last, (B, H, W, C), from the model's door on.

There are two published definitions of LDA, `lda_span`. Where G * I is the map's side, as in every published
T/S/B/L classifier at 224, they are one:

- `"map"`, of the paper and of all published T/S/B/L weights: members lie `interval` apart over the whole map,
  so a group grows with the image;
- `"region"`, of the code that trained the CrossFormer++ classifiers: members lie `interval` apart inside
  regions of (G * I) x (G * I), so groups stay G x G.

Where this file differs from the published code, and why:

- Any image from 32 x 32 up. The published classifier fixes its size; here every decision is made from the
  input at hand, padded keys are masked and padded outputs dropped.
- With `"region"`, a map whose shorter side is at most G becomes one group of its own H x W. The published
  code pads it to max(H, W) squared and masks the rest, which computes the same for more work.
- DPB's hidden width is D // 16, as in the published code and weights (the paper writes D / 4). Nothing that
  follows from weights is kept between calls: training wrappers, adapters, optimizers and functional
  transforms change or hide weights without a sign.
- The attention is `scaled_dot_product_attention` with DPB as an additive bias. Its kernels keep no
  (N, h, L, L) matrix. A CPU that trains makes it again in pieces, as its fused kernel has no gradient for a
  bias. Queries of large groups go in blocks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, use_fused_attn
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn

from crossformer_vision.models.attention import (
    blocked_attention,
    group_attention,
    join_heads,
    masked,
    pair_biases,
    split_heads,
    takes_blocks,
)
from crossformer_vision.models.cpu.chunking import gelu_linear, in_pieces
from crossformer_vision.models.cpu.large_kernels import LargeKernelConv2d
from crossformer_vision.models.grouping import (
    Layout,
    across_map,
    across_regions,
    ceil_div,
    group,
    kept,
    longer,
    neighbours,
    pad_to_multiple,
    real_keys,
    relative_offsets,
    shorter,
    ungroup,
)
from crossformer_vision.models.timm_interface import StagedClassifier, check_size

__all__ = ["CrossFormer"]


# ------------------------------------------------------------------------------------------------------------
# Cross-scale embedding layer
# ------------------------------------------------------------------------------------------------------------


def cel_widths(dim: int, count: int, split: str = "halving") -> list[int]:
    """Channels of `count` kernels, small to large, `dim` in all: halving, the last one repeated; or equal.

    Large kernels get few channels, since their cost grows with the square of their size (section 3.1).

    >>> cel_widths(96, 4), cel_widths(96, 4, "equal")
    ([48, 24, 12, 12], [24, 24, 24, 24])
    """
    widths = [dim >> (i + 1) if split == "halving" else dim // count for i in range(count - 1)]
    return [*widths, dim - sum(widths)]


@register_notrace_module
class CrossScaleEmbedding(nn.Module):
    """Cross-scale embedding layer, CEL (section 3.1 of CrossFormer, figure 2).

    Convolutions of several kernel sizes share one stride and sit on the same centres; their outputs are
    concatenated, so each embedding mixes patches of several scales. The first CEL normalises its output, the
    later ones their input. Sizes that the stride does not divide are padded right and bottom.

    Args:
        in_dim: channels of the input.
        dim: channels of the output.
        kernel_sizes: kernels, small to large.
        stride: of all kernels; 4 in the first CEL, 2 in the later ones.
        norm_first: normalise the input (later CELs) instead of the output (first CEL).
        split: widths of the kernels, see `cel_widths`.

    A kernel that differs from the stride by an odd number reaches one position further right and down.

    Shape: (B, H, W, in_dim) -> (B, ceil(H / stride), ceil(W / stride), dim).
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_sizes: Sequence[int],
        stride: int,
        norm_first: bool,
        split: str = "halving",
    ) -> None:
        super().__init__()
        if any(k < stride for k in kernel_sizes):
            raise ValueError(f"kernels {tuple(kernel_sizes)} are smaller than their stride {stride}")
        self.stride = stride
        self.norm_first = norm_first
        self.many_channels = in_dim >= 8
        self.convs: Any = nn.ModuleList(
            LargeKernelConv2d(in_dim, width, k, stride)
            for k, width in zip(kernel_sizes, cel_widths(dim, len(kernel_sizes), split), strict=True)
        )
        self.norm = nn.LayerNorm(in_dim if norm_first else dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = self.norm(x)
        # From 8 channels on, large kernels are three times faster channels last; but the gradient of a single
        # image oneDNN then computes 20 times slower.
        if self.many_channels and (not torch.is_grad_enabled() or x.shape[0] > 1):
            x = x.contiguous()
        x = x.permute(0, 3, 1, 2)  # a view: NCHW as the convolutions index it, channels last in memory
        x = pad_to_multiple(x, self.stride)
        scales: list[Tensor] = []
        for conv in self.convs:
            odd = (conv.kernel_size[0] - self.stride) % 2
            y = F.pad(x, (0, 1, 0, 1)) if odd else x
            scales.append(conv(y).permute(0, 2, 3, 1))
        x = torch.cat(scales, dim=-1)
        return x if self.norm_first else self.norm(x)


# ------------------------------------------------------------------------------------------------------------
# Dynamic position bias
# ------------------------------------------------------------------------------------------------------------


class DynamicPositionBias(nn.Module):
    """Dynamic position bias, DPB (section 3.3 of CrossFormer, figure 3b).

    A small MLP maps the offset between two embeddings to one bias a head, so the same weights serve groups of
    any size. It is evaluated once on the distinct offsets of a group; `pair_biases` hands them to all pairs.

    Args:
        dim: channels of the stage; the MLP is `dim // 16` wide.
        num_heads: attention heads, h.

    Shape: for groups of gh x gw -> (h, (2gh-1) * (2gw-1)), a row a head, in the order of `relative_offsets`.
    """

    frozen: Tensor | None

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        width = dim // 16
        self.proj = nn.Linear(2, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out))
            for out in (width, width, num_heads)
        )
        self.register_buffer("frozen", None, persistent=False)

    def forward(self, gh: int, gw: int, like: Tensor) -> Tensor:
        """`like` gives device and type: the MLP's own weights may be quantized, sharded or elsewhere."""
        frozen = self.frozen  # (h, 2Gh-1, 2Gw-1), see `freeze_position_bias`
        if frozen is not None and 2 * gh - 1 <= frozen.shape[1] and 2 * gw - 1 <= frozen.shape[2]:
            top, left = (frozen.shape[1] + 1) // 2 - gh, (frozen.shape[2] + 1) // 2 - gw
            return frozen[:, top : top + 2 * gh - 1, left : left + 2 * gw - 1].flatten(1)
        return self.compute(gh, gw, like)

    def compute(self, gh: int, gw: int, like: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            offsets = relative_offsets(gh, gw, like.device)
        else:
            offsets = kept(relative_offsets, gh, gw, like.device)
        biases = self.proj(offsets.to(like.dtype))
        for layer in self.layers:
            biases = layer(biases)
        return biases.t().contiguous()

    @torch.jit.unused
    def train(self, mode: bool = True) -> "DynamicPositionBias":
        if mode:  # its weights are about to change
            self.frozen = None
        return nn.Module.train(self, mode)  # not `super()`: of a scripted model, `self` is of another class


# Made from channels, heads and group size; `ablations.py` adds what the papers compare.
POSITION_BIASES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "dynamic": lambda dim, num_heads, group_size: DynamicPositionBias(dim, num_heads)
}


# ------------------------------------------------------------------------------------------------------------
# Long and short distance attention
# ------------------------------------------------------------------------------------------------------------


@register_notrace_module
class LongShortAttention(nn.Module):
    """Multi-head self-attention inside groups with DPB: SDA or LDA (sections 3.2 and 3.3 of CrossFormer).

    Args:
        dim: channels.
        num_heads: attention heads.
        group_size: G, positions along a side of a group.
        interval: I of LDA, the distance between the members of a group; 0 for SDA; None for
            `ceil(max(H, W) / G)`.
        lda_span: `"map"` or `"region"`, see the head of this file.
        position_bias: a name in `POSITION_BIASES`.

    Shape: (B, H, W, dim) -> (B, H, W, dim).
    """

    interval: int | None
    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: int,
        interval: int | None,
        lda_span: str = "map",
        position_bias: str = "dynamic",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide dim {dim}")
        self.num_heads = num_heads
        self.group_size = group_size
        self.interval = interval
        self.lda_span = lda_span
        self.fused_attn = use_fused_attn()  # timm's switch: without, each step of the attention can be hooked
        self.attn_drop = nn.Identity()  # where timm's tools look for the attention itself
        self.qkv = nn.Linear(dim, 3 * dim)
        self.position_bias = POSITION_BIASES[position_bias](dim, num_heads, group_size)
        self.proj = nn.Linear(dim, dim)

    def layout(self, H: int, W: int) -> Layout:
        """How this block cuts an H x W map."""
        return self.small_layout(H, W) if min(H, W) <= self.group_size else self.large_layout(H, W)

    def small_layout(self, H: int, W: int) -> Layout:
        """Of a map no wider or no higher than a group: SDA in squares of the shorter side, or one group."""
        if self.lda_span == "map":
            return neighbours(H, W, shorter(H, W))
        return across_map(H, W, 1)

    def large_layout(self, H: int, W: int) -> Layout:
        """Of any other map."""
        G, interval = self.group_size, self.interval
        if interval is None:
            interval = ceil_div(longer(H, W), G)
        if interval == 0:
            return neighbours(H, W, G)
        return across_map(H, W, interval) if self.lda_span == "map" else across_regions(H, W, G, interval)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(x, self.layout(x.shape[1], x.shape[2]))

    def grouped(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention in the groups of a layout."""
        B, H, W, _ = x.shape
        x = group(x, layout)
        biases = self.position_bias(layout.gh, layout.gw, x)
        if torch.jit.is_scripting():
            x = self.attend(x, pair_biases(biases, layout), real_keys(B, H, W, layout, x.device))
        elif takes_blocks(layout):
            q, k, v = split_heads(self.qkv(x), self.num_heads)
            x = self.proj(join_heads(blocked_attention(q, k, v, biases.to(q.dtype), layout, H, W)))
        else:
            real = real_keys(B, H, W, layout, x.device)
            bias = pair_biases(biases, layout)
            x = (
                in_pieces(x.shape[1], self.attend, x, bias, real)
                if self.fused_attn
                else self.attend(x, bias, real)
            )
        return ungroup(x, layout, B, H, W)

    def attend(self, x: Tensor, bias: Tensor, real: Tensor | None) -> Tensor:
        """Attention in each group: x (N, L, C), bias (1, h, L, L), `real_keys` -> (N, L, C)."""
        qkv = self.qkv(x)
        bias = bias.to(qkv.dtype)
        if self.fused_attn:
            return self.proj(group_attention(qkv, self.num_heads, bias, real))
        q, k, v = split_heads(qkv, self.num_heads)
        scale = q.shape[-1] ** -0.5
        attention = self.attn_drop((q * scale @ k.transpose(-2, -1) + masked(bias, real)).softmax(-1))
        return self.proj(join_heads(attention @ v))


class Place(NamedTuple):
    """Of an attention: which block of which stage it is in, and the sizes there."""

    stage: int
    block: int
    dim: int
    num_heads: int
    group_size: int
    interval: int | None
    lda_span: str
    position_bias: str


def long_short(at: Place) -> nn.Module:
    """SDA in even blocks, LDA in odd ones."""
    interval = at.interval if at.block % 2 else 0
    return LongShortAttention(at.dim, at.num_heads, at.group_size, interval, at.lda_span, at.position_bias)


# `ablations.py` adds what the papers compare.
ATTENTIONS: dict[str, Callable[[Place], nn.Module]] = {"long_short": long_short}


# ------------------------------------------------------------------------------------------------------------
# Block, stage, model
# ------------------------------------------------------------------------------------------------------------


class AmplitudeCooling(nn.Module):
    """Amplitude cooling layer, ACL (CrossFormer++, section 3.4): depth-wise 3x3 convolution, LayerNorm, no
    residual.

    Without a residual it cuts the growth of the activations' amplitude with depth.

    Shape: (B, H, W, dim) -> (B, H, W, dim).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2))
        return self.norm(x.permute(0, 2, 3, 1))


@register_notrace_module
class FeedForward(nn.Module):
    """The block's MLP: Linear, GELU, Linear.

    Its hidden map is the largest tensor of the network: CPU inference computes it in pieces that stay in the
    cache, and CPU training keeps it once, before GELU.

    Shape: (..., dim) -> (..., dim).
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.fc2(F.gelu(self.fc1(x)))
        else:
            return in_pieces(1, self.mlp, x.flatten(0, -2)).view_as(x)

    @torch.jit.unused
    def mlp(self, x: Tensor) -> Tensor:
        return gelu_linear(self.fc1(x), self.fc2)


class CrossFormerBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, then ACL where there is one (figure 2 of
    CrossFormer).

    Shape: (B, H, W, dim) -> (B, H, W, dim).
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, amplitude_cooling: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.acl = AmplitudeCooling(dim) if amplitude_cooling else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return self.acl(x)


class CrossFormerStage(nn.Module):
    """A CEL, then a block for each of `attentions`, which alternate SDA (even ones) and LDA (odd ones).

    An ACL follows every `amplitude_cooling`-th block, except the last one; 0 for none.

    Shape: (B, H, W, in_dim) -> (B, ceil(H / stride), ceil(W / stride), dim).
    """

    def __init__(
        self,
        embed: nn.Module,
        dim: int,
        attentions: Sequence[nn.Module],
        mlp_ratio: float,
        drop_path: Sequence[float],
        amplitude_cooling: int,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.embed = embed
        self.blocks = nn.ModuleList()
        for i, attn in enumerate(attentions, 1):
            cooled = amplitude_cooling > 0 and i % amplitude_cooling == 0 and i != len(attentions)
            self.blocks.append(CrossFormerBlock(dim, attn, mlp_ratio, drop_path[i - 1], cooled))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


# Positions that are added to the first embedding, and group sizes by name: `ablations.py` has them.
EMBEDDED_POSITIONS: dict[str, Callable[[nn.Module, int], nn.Module]] = {}
GROUP_MODES: dict[str, Callable[[Sequence[int]], list[list[int]]]] = {}


def per_block(values: Sequence[Any], depths: Sequence[int], name: str) -> list[list[Any]]:
    """One list a stage with one entry a block, from an entry a stage or a list a stage."""
    if len(values) != len(depths):
        raise ValueError(f"{name} needs one entry for each of the {len(depths)} stages, got {len(values)}")
    lists = [
        list(v) if isinstance(v, Sequence) else [v] * depth for v, depth in zip(values, depths, strict=True)
    ]
    for stage, (blocks, depth) in enumerate(zip(lists, depths, strict=True)):
        if len(blocks) != depth:
            raise ValueError(f"{name} of stage {stage} needs {depth} entries, one a block, got {len(blocks)}")
    return lists


class CrossFormer(StagedClassifier):
    """CrossFormer and CrossFormer++, a timm model.

    Args:
        in_chans: channels of the images.
        num_classes: of the head; 0 for no head.
        global_pool: `"avg"`, or `""` for the head's features unpooled.
        embed_dim: D, channels of the first stage; they double in each later one.
        depths: blocks a stage.
        num_heads: attention heads a stage.
        group_size: G, an int a stage, or a list a stage with an int a block; or a name in `GROUP_MODES`.
        interval: I of the LDA blocks, likewise; 0 makes a block SDA, None stands for `ceil(max(H, W) / G)`.
        lda_span: what LDA reaches over, `"map"` or `"region"`: see the head of this file.
        patch_sizes: kernels of the first CEL, stride 4.
        merge_sizes: kernels of the later CELs, stride 2.
        embed_split: widths of a CEL's kernels, `"halving"` or `"equal"`.
        output_stride: 8, 16 or 32. Stages beyond it keep the resolution (stride 1), for decoders such as
            DeepLabV3. The weights are the same.
        amplitude_cooling: blocks from one ACL of CrossFormer++ to the next, 3 as published; 0 for none.
        attention: a name in `ATTENTIONS`.
        position_bias: a name in `POSITION_BIASES`.
        mlp_ratio: hidden width of the MLPs, in channels of the stage.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 over all blocks.
        weight_init: `""` as published; `"xavier_mlp"` for MLPs of narrow stages, see `init_weights`.

    Shape: (B, in_chans, H, W) -> (B, num_classes), for any H and W from 32 up; `forward_features` returns
    (B, ceil(H / 32), ceil(W / 32), 8 * embed_dim), channels last.

    Raises:
        ValueError: for options that do not fit the depths, and for images smaller than 32 pixels.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        group_size: Sequence[int | Sequence[int]] | str = (7, 7, 7, 7),
        interval: Sequence[int | Sequence[int | None] | None] = (8, 4, 2, 1),
        lda_span: Literal["map", "region"] = "map",
        patch_sizes: Sequence[int] = (4, 8, 16, 32),
        merge_sizes: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        embed_split: Literal["halving", "equal"] = "halving",
        output_stride: Literal[8, 16, 32] = 32,
        amplitude_cooling: int = 0,
        attention: str = "long_short",
        position_bias: str = "dynamic",
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal["", "xavier_mlp"] = "",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("lda_span", lda_span, ("map", "region")),
            ("weight_init", weight_init, ("", "xavier_mlp")),
            ("embed_split", embed_split, ("halving", "equal")),
            ("output_stride", output_stride, (8, 16, 32)),
            ("attention", attention, ATTENTIONS),
            ("position_bias", position_bias, POSITION_BIASES),
            ("group_size", group_size, GROUP_MODES if isinstance(group_size, str) else (group_size,)),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, not {value!r}")
        if isinstance(group_size, str):
            group_size = GROUP_MODES[group_size](depths)
        cooling = 3 if amplitude_cooling is True else int(amplitude_cooling)  # True is version 0.1's
        group_sizes = per_block(group_size, depths, "group_size")
        intervals = per_block(interval, depths, "interval")
        dims = [embed_dim * 2**i for i in range(len(depths))]
        reductions = [min(4 * 2**i, output_stride) for i in range(len(depths))]
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.num_classes = num_classes
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            if i == 0:
                embed: nn.Module = CrossScaleEmbedding(in_chans, dim, patch_sizes, 4, False, embed_split)
                if position_bias in EMBEDDED_POSITIONS:
                    embed = EMBEDDED_POSITIONS[position_bias](embed, dim)
            else:
                stride = reductions[i] // reductions[i - 1]
                embed = CrossScaleEmbedding(dims[i - 1], dim, merge_sizes[i - 1], stride, True, embed_split)
            places = [
                Place(i, k, dim, num_heads[i], size, steps, lda_span, position_bias)
                for k, (size, steps) in enumerate(zip(group_sizes[i], intervals[i], strict=True))
            ]
            attentions = [ATTENTIONS[attention](place) for place in places]
            self.stages.append(CrossFormerStage(embed, dim, attentions, mlp_ratio, drop_paths[i], cooling))
        self.feature_info = [
            dict(num_chs=dim, reduction=reduction, module=f"stages.{i}")
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC"
        )
        self.apply(partial(init_weights, xavier_mlp=weight_init == "xavier_mlp"))

    def forward_features(self, x: Tensor) -> Tensor:
        x = check_size(x).permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def init_weights(module: nn.Module, xavier_mlp: bool) -> None:
    """Linear layers truncated normal with std 0.02, zero biases, as published.

    Xavier is that too at ViT-B's width; narrow stages need its larger scale: with 0.02 throughout,
    crossformer_nano learns a third slower.
    """
    if isinstance(module, nn.Linear):
        # torch's: timm's draws a weight of ±2, a hundred deviations, once in some ten million.
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, FeedForward) and xavier_mlp:  # visited after its linear layers
        nn.init.xavier_normal_(module.fc1.weight)
        nn.init.xavier_normal_(module.fc2.weight)
