"""CrossFormer and CrossFormer++, in the order of the papers.

CrossFormer:   A Versatile Vision Transformer Hinging on Cross-scale Attention, arXiv 2108.00154 (ICLR 2022).
CrossFormer++: progressive group sizes and amplitude cooling, arXiv 2303.06908 (TPAMI 2023).

Read from top to bottom: cross-scale embedding (CEL), dynamic position bias (DPB), short- and long-distance
attention (SDA, LDA), amplitude cooling (ACL), block, stage, model. ``grouping.py`` shows by an example how
SDA and LDA partition a map, ``attention.py`` computes attention within groups, and ``variants.py`` has the
named models.

Shapes: batch size B, map H x W, C channels; N groups of L = gh * gw members; h heads of d channels. Maps are
channels last, ``(B, H, W, C)``, throughout the model.

``lda_span`` selects a published definition of LDA. The first two are equal where ``G * I`` is the side of the
map, as in all published T/S/B/L classifiers at 224 pixels:

- ``"map"``, of the paper and all published T/S/B/L weights: members are ``interval`` apart over the whole
  map, so groups grow with the image;
- ``"region"``, of the code that trained the CrossFormer++ classifiers: members are ``interval`` apart within
  regions of ``(G * I) x (G * I)``, so groups have ``G x G`` members;
- ``"count"``, of the weather models: ``G x G`` members are spread over the whole map, ``H / G`` and ``W / G``
  positions apart.

Deviations from the published code:

- Images of any size from 32 x 32. The layout of groups follows from each input; padded keys are masked and
  padded outputs dropped. The published classifier has a fixed size.
- With ``"region"``, a map whose shorter side is at most G is one group of its own ``H x W``. The published
  code pads it to a square and masks the padding, with the same result.
- DPB's hidden width is ``D // 16``, as in the published code and weights. The paper writes ``D / 4``.
- Nothing derived from weights is cached, because wrappers, adapters and functional transforms may modify
  weights silently.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, use_fused_attn
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.models.attention import (
    blocked_attention,
    group_attention,
    pair_biases,
    use_blocked_attention,
)
from crossformer_vision.models.cpu.chunking import chunked_apply
from crossformer_vision.models.cpu.feed_forward import feed_forward
from crossformer_vision.models.cpu.large_kernels import LargeKernelConv2d
from crossformer_vision.models.grouping import (
    Layout,
    ceil_div,
    group,
    key_padding_mask,
    lda_count_layout,
    lda_map_layout,
    lda_region_layout,
    pad_to_multiple,
    relative_offsets,
    sda_layout,
    ungroup,
)
from crossformer_vision.models.heads import apply_key_mask, join_heads, split_heads
from crossformer_vision.models.index_cache import cached
from crossformer_vision.models.stage_options import (
    add_absolute_position,
    check_options,
    check_position_bias,
    per_block,
    resolve_group_size,
    resolve_strides,
)
from crossformer_vision.models.timm_interface import StagedClassifier, check_size
from crossformer_vision.models.tracing import sym_max, sym_min
from crossformer_vision.types import Kwargs

__all__ = ["CrossFormer"]

# ------------------------------------------------------------------------------------------------------------
# Cross-scale embedding layer (section 3.1 of CrossFormer)
# ------------------------------------------------------------------------------------------------------------


def cel_widths(dim: int, count: int, split: str = "halving") -> list[int]:
    """Channels of the kernels of a CEL, from small to large kernels.

    Large kernels get fewer channels, since their cost grows with the square of their size (section 3.1).

    Args:
        dim: Sum of the channels.
        count: Number of kernels.
        split: ``"halving"``, with the last one repeated, or ``"equal"``.

    >>> cel_widths(96, 4), cel_widths(96, 4, "equal")
    ([48, 24, 12, 12], [24, 24, 24, 24])
    """
    widths = [dim >> (i + 1) if split == "halving" else dim // count for i in range(count - 1)]
    return [*widths, dim - sum(widths)]


@register_notrace_module
class CrossScaleEmbedding(nn.Module):
    """Cross-scale embedding layer, CEL (section 3.1 and figure 2 of CrossFormer).

    Convolutions with several kernel sizes share a stride and are centered on the same points. Their outputs
    are concatenated, so each embedding mixes patches of several scales. The first CEL normalizes its output,
    later ones their input. Sizes that the stride does not divide are padded right and bottom. A kernel that
    exceeds the stride by an odd number reaches one position further right and down.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_sizes: Kernel sizes, from small to large.
        stride: Stride of all kernels: 4 in the first CEL, 2 in later ones.
        norm_first: Normalize the input (later CELs) instead of the output (first CEL).
        split: Channels of the kernels, see ``cel_widths``.

    Raises:
        ValueError: If a kernel is smaller than the stride.
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
        self.prefers_channels_last = in_dim >= 8
        widths = cel_widths(dim, len(kernel_sizes), split)
        pairs = zip(kernel_sizes, widths, strict=True)
        convs = [LargeKernelConv2d(in_dim, width, k, stride) for k, width in pairs]
        self.convs = cast(Sequence[LargeKernelConv2d], nn.ModuleList(convs))
        self.norm = nn.LayerNorm(in_dim if norm_first else dim)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_dim)`` to ``(B, ceil(H / stride), ceil(W / stride), dim)``."""
        if self.norm_first:
            x = self.norm(x)
        # Channels last makes large kernels three times faster, but oneDNN's gradient for a single image 20
        # times slower.
        if self.prefers_channels_last and (not torch.is_grad_enabled() or x.shape[0] > 1):
            x = x.contiguous()
        x = x.permute(0, 3, 1, 2)  # NCHW as a view, channels last in memory
        x = pad_to_multiple(x, self.stride)
        scales: list[Tensor] = []
        for conv in self.convs:
            is_odd = (conv.kernel_size[0] - self.stride) % 2
            y = F.pad(x, (0, 1, 0, 1)) if is_odd else x
            scales.append(conv(y).permute(0, 2, 3, 1))
        x = torch.cat(scales, dim=-1)
        return x if self.norm_first else self.norm(x)


# ------------------------------------------------------------------------------------------------------------
# Dynamic position bias (section 3.3 of CrossFormer)
# ------------------------------------------------------------------------------------------------------------


class DynamicPositionBias(nn.Module):
    """Dynamic position bias, DPB (section 3.3 and figure 3b of CrossFormer).

    A small MLP maps the offset between two embeddings to one bias per head, so the same weights serve groups
    of any size. It is evaluated once for the distinct offsets of a group.

    Args:
        dim: Channels of the stage.
        num_heads: Number of attention heads, h.
        width: Hidden units of the MLP. ``None`` for ``dim // 16``, as published.
        is_shared: Use one bias for all heads.
    """

    frozen: Tensor | None
    """Biases of shape ``(h, 2 * Gh - 1, 2 * Gw - 1)``, see ``freeze_position_bias``."""

    def __init__(self, dim: int, num_heads: int, width: int | None = None, is_shared: bool = False) -> None:
        super().__init__()
        width = width or dim // 16
        self.num_heads = num_heads
        self.proj = nn.Linear(2, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out))
            for out in (width, width, 1 if is_shared else num_heads)
        )
        self.register_buffer("frozen", None, persistent=False)

    @override
    def forward(self, gh: int, gw: int, like: Tensor) -> Tensor:
        """Biases of groups of ``gh x gw`` members.

        Args:
            gh: Rows of a group.
            gw: Columns of a group.
            like: Tensor whose device and dtype are used. The weights may be quantized or sharded.

        Returns:
            Shape ``(h, (2 * gh - 1) * (2 * gw - 1))``, in the order of ``relative_offsets``.
        """
        frozen = self.frozen
        if frozen is not None and 2 * gh - 1 <= frozen.shape[1] and 2 * gw - 1 <= frozen.shape[2]:
            top, left = (frozen.shape[1] + 1) // 2 - gh, (frozen.shape[2] + 1) // 2 - gw
            return frozen[:, top : top + 2 * gh - 1, left : left + 2 * gw - 1].flatten(1)
        return self.compute(gh, gw, like)

    def compute(self, gh: int, gw: int, like: Tensor) -> Tensor:
        """``forward`` without the frozen biases.

        Args:
            gh: Rows of a group.
            gw: Columns of a group.
            like: Tensor with the device and dtype of the result.
        """
        offsets = cached(relative_offsets, gh, gw, like.device)
        biases = self.proj(offsets.to(like.dtype))
        for layer in self.layers:
            biases = layer(biases)
        return biases.t().expand(self.num_heads, -1).contiguous()

    @override
    def train(self, mode: bool = True) -> "DynamicPositionBias":
        if mode:  # the weights are about to change
            self.frozen = None
        return super().train(mode)


# ------------------------------------------------------------------------------------------------------------
# Short- and long-distance attention (sections 3.2 and 3.3 of CrossFormer)
# ------------------------------------------------------------------------------------------------------------


@register_notrace_module
class LongShortAttention(nn.Module):
    """Multi-head self-attention within groups with a position bias: SDA or LDA (section 3.2 of CrossFormer).

    Args:
        dim: Channels, C.
        num_heads: Number of attention heads, h.
        group_size: Side of a group in members, G.
        interval: Distance between members of an LDA group, I. 0 for SDA; ``None`` for
            ``ceil(max(H, W) / G)``.
        lda_span: ``"map"``, ``"region"`` or ``"count"``, see the module docstring.
        position_bias: Name of the position bias, see ``create_position_bias``.
        bias_width: Hidden units of DPB, see ``DynamicPositionBias``.
        is_bias_shared: Use one position bias for all heads.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: int,
        interval: int | None,
        lda_span: str = "map",
        position_bias: str = "dynamic",
        bias_width: int | None = None,
        is_bias_shared: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide dim {dim}")
        self.num_heads = num_heads
        self.group_size = group_size
        self.interval = interval
        self.lda_span = lda_span
        self.fused_attn = use_fused_attn()  # False for hooks on the attention, as in timm's AttentionExtract
        self.attn_drop = nn.Identity()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.position_bias = create_position_bias(
            position_bias, dim, num_heads, group_size, bias_width, is_bias_shared
        )
        self.proj = nn.Linear(dim, dim)

    def layout(self, H: int, W: int) -> Layout:
        """Layout of the groups of an ``H x W`` map."""
        return self.small_layout(H, W) if min(H, W) <= self.group_size else self.large_layout(H, W)

    def small_layout(self, H: int, W: int) -> Layout:
        """Layout if a side is at most G: SDA in squares of the shorter side, or one group."""
        if self.lda_span == "count" and self.interval != 0:
            return lda_count_layout(H, W, self.group_size)
        return lda_map_layout(H, W, 1) if self.lda_span == "region" else sda_layout(H, W, sym_min(H, W))

    def large_layout(self, H: int, W: int) -> Layout:
        """Layout if both sides exceed G."""
        G, interval = self.group_size, self.interval
        if interval is None:
            interval = ceil_div(sym_max(H, W), G)
        if interval == 0:
            return sda_layout(H, W, G)
        if self.lda_span == "count":
            return lda_count_layout(H, W, G)
        if self.lda_span == "map":
            return lda_map_layout(H, W, interval)
        return lda_region_layout(H, W, G, interval)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map of shape ``(B, H, W, C)`` to a map of the same shape."""
        return self.forward_groups(x, self.layout(x.shape[1], x.shape[2]))

    def forward_groups(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention within the groups of a layout, for a map of shape ``(B, H, W, C)``."""
        B, H, W, _ = x.shape
        x = group(x, layout)
        biases = self.position_bias(layout.gh, layout.gw, x)
        if use_blocked_attention(layout):
            q, k, v = split_heads(self.qkv(x), self.num_heads)
            x = self.proj(join_heads(blocked_attention(q, k, v, biases.to(q.dtype), layout, H, W)))
        else:
            bias, mask = pair_biases(biases, layout), key_padding_mask(B, H, W, layout, x.device)
            x = (
                chunked_apply(x.shape[1], self.attend, x, bias, mask)
                if self.fused_attn
                else self.attend(x, bias, mask)
            )
        return ungroup(x, layout, B, H, W)

    def attend(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Attention within groups.

        Args:
            x: Groups, shape ``(N, L, C)``.
            bias: Position bias, shape ``(1, h, L, L)`` or ``(N, h, L, L)``.
            mask: ``True`` for valid keys, shape ``(N, 1, 1, L)``. ``None`` if all are valid.

        Returns:
            Shape ``(N, L, C)``.
        """
        qkv = self.qkv(x)
        bias = bias.to(qkv.dtype)
        if self.fused_attn:
            return self.proj(group_attention(qkv, self.num_heads, bias, mask))
        q, k, v = split_heads(qkv, self.num_heads)
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + apply_key_mask(bias, mask)
        return self.proj(join_heads(self.attn_drop(logits.softmax(-1)) @ v))


class BlockContext(NamedTuple):
    """Position and configuration of an attention layer.

    Attributes:
        stage: Stage, from 0.
        block: Block of the stage, from 0.
        dim: Channels.
        num_heads: Number of attention heads.
        group_size: G.
        interval: I of LDA.
        lda_span: ``"map"``, ``"region"`` or ``"count"``.
        position_bias: Name of the position bias.
        bias_width: Hidden units of DPB.
        is_bias_shared: Whether all heads share a position bias.
    """

    stage: int
    block: int
    dim: int
    num_heads: int
    group_size: int
    interval: int | None
    lda_span: str
    position_bias: str
    bias_width: int | None = None
    is_bias_shared: bool = False


def create_position_bias(
    name: str,
    dim: int,
    num_heads: int,
    group_size: int,
    width: int | None = None,
    is_shared: bool = False,
) -> nn.Module:
    """Create DPB (``"dynamic"``) or one of the alternatives in ``ablations.POSITION_BIASES``.

    Args:
        name: ``"dynamic"`` or a key of ``POSITION_BIASES``.
        dim: Channels of the stage.
        num_heads: Number of attention heads.
        group_size: Side of a group.
        width: Hidden units of DPB.
        is_shared: Use one bias of DPB for all heads.
    """
    if name == "dynamic":
        return DynamicPositionBias(dim, num_heads, width, is_shared)
    from crossformer_vision.models.ablations import POSITION_BIASES

    return POSITION_BIASES[name](dim, num_heads, group_size)


def create_attention(name: str, context: BlockContext) -> nn.Module:
    """Create SDA in even and LDA in odd blocks (``"long_short"``), or one of ``ablations.ATTENTIONS``."""
    if name == "long_short":
        interval = context.interval if context.block % 2 else 0
        return LongShortAttention(
            context.dim,
            context.num_heads,
            context.group_size,
            interval,
            context.lda_span,
            context.position_bias,
            context.bias_width,
            context.is_bias_shared,
        )
    from crossformer_vision.models.ablations import ATTENTIONS

    return ATTENTIONS[name](context)


# ------------------------------------------------------------------------------------------------------------
# Block, stage, model
# ------------------------------------------------------------------------------------------------------------


class AmplitudeCooling(nn.Module):
    """Amplitude cooling layer, ACL (section 3.4 of CrossFormer++): depthwise 3x3 convolution and LayerNorm.

    It has no residual connection, which limits the growth of activations with depth.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map of shape ``(B, H, W, C)`` to a map of the same shape."""
        x = self.conv(x.permute(0, 3, 1, 2))
        return self.norm(x.permute(0, 2, 3, 1))


@register_notrace_module
class FeedForward(nn.Module):
    """MLP of a block: linear, GELU, linear.

    Args:
        dim: Channels.
        hidden_dim: Hidden channels.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., C)`` to the same shape."""
        return feed_forward(x, self.fc1, self.fc2)


class CrossFormerBlock(nn.Module):
    """``x + attention(norm(x))``, ``x + mlp(norm(x))`` and an optional ACL (figure 2 of CrossFormer).

    Args:
        dim: Channels.
        attn: Attention layer.
        mlp_ratio: Hidden channels of the MLP relative to ``dim``.
        drop_path: Stochastic depth rate.
        amplitude_cooling: Whether an ACL follows.
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

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map of shape ``(B, H, W, C)`` to a map of the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return self.acl(x)


class CrossFormerStage(nn.Module):
    """A CEL and one block per attention layer, which alternate SDA and LDA.

    Args:
        embed: CEL.
        dim: Channels.
        attentions: Attention layers.
        mlp_ratio: Hidden channels of the MLPs relative to ``dim``.
        drop_path: Stochastic depth rate of each block.
        amplitude_cooling: An ACL follows every n-th block except the last; 0 for none.
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
            has_acl = amplitude_cooling > 0 and i % amplitude_cooling == 0 and i != len(attentions)
            self.blocks.append(CrossFormerBlock(dim, attn, mlp_ratio, drop_path[i - 1], has_acl))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, in_dim)`` to ``(B, ceil(H / stride), ceil(W / stride), dim)``."""
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x


class CrossFormer(StagedClassifier):
    """CrossFormer and CrossFormer++, a timm model.

    Maps images of shape ``(B, in_chans, H, W)``, with H and W of at least 32, to logits of shape
    ``(B, num_classes)``. ``forward_features`` returns ``(B, ceil(H / 32), ceil(W / 32), 8 * embed_dim)``.

    Args:
        in_chans: Channels of the images.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: ``"avg"``, or ``""`` for features without pooling.
        embed_dim: Channels of the first stage, D. They double in each stage.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        group_size: G: an int per stage, or a list per stage with an int per block; or a name in
            ``ablations.GROUP_MODES``.
        interval: I of LDA blocks, per stage or per block. 0 turns a block into SDA; ``None`` is
            ``ceil(max(H, W) / G)``.
        lda_span: ``"map"``, ``"region"`` or ``"count"``, see the module docstring.
        patch_sizes: Kernels of the first CEL.
        merge_sizes: Kernels of the later CELs.
        strides: Strides of the CELs.
        embed_split: Channels of the kernels of a CEL: ``"halving"`` or ``"equal"``.
        output_stride: 8, 16 or 32. Stages beyond it keep the resolution, for decoders such as DeepLabV3.
        amplitude_cooling: Blocks from one ACL of CrossFormer++ to the next: 3 as published, 0 for none.
        attention: ``"long_short"``, or a name in ``ablations.ATTENTIONS``.
        position_bias: ``"dynamic"``, or a name in ``ablations.POSITION_BIASES``.
        position_bias_width: Hidden units of DPB in all stages. ``None`` for ``dim // 16``, as published.
        position_bias_heads: ``"separate"``, or ``"shared"`` for one bias of DPB for all heads.
        mlp_ratio: Hidden channels of the MLPs relative to those of the stage.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block. It rises linearly from 0 over all blocks.
        weight_init: ``""`` as published, or ``"xavier_mlp"`` for narrow stages, see ``init_weights``.

    Raises:
        ValueError: If options are invalid or do not fit the depths, and for images smaller than 32 pixels.
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
        lda_span: Literal["map", "region", "count"] = "map",
        patch_sizes: Sequence[int] = (4, 8, 16, 32),
        merge_sizes: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        strides: Sequence[int] = (4, 2, 2, 2),
        embed_split: Literal["halving", "equal"] = "halving",
        output_stride: Literal[8, 16, 32] = 32,
        amplitude_cooling: int = 0,
        attention: str = "long_short",
        position_bias: str = "dynamic",
        position_bias_width: int | None = None,
        position_bias_heads: Literal["separate", "shared"] = "separate",
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal["", "xavier_mlp"] = "",
    ) -> None:
        super().__init__()
        check_options(lda_span, weight_init, embed_split, output_stride, attention, position_bias, group_size)
        check_position_bias(position_bias, position_bias_width, position_bias_heads)
        reductions = resolve_strides(strides, depths, output_stride)
        group_sizes = per_block(resolve_group_size(group_size, depths), depths, "group_size")
        intervals = per_block(interval, depths, "interval")
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, [*depths], stagewise=True))
        self.num_classes, self.global_pool, self.output_fmt = num_classes, global_pool, "NHWC"
        self.stages = nn.ModuleList()
        context = partial(
            BlockContext,
            lda_span=lda_span,
            position_bias=position_bias,
            bias_width=position_bias_width,
            is_bias_shared=position_bias_heads == "shared",
        )
        kernels, widths = (patch_sizes, *merge_sizes), (in_chans, *dims)
        for i, dim in enumerate(dims):
            stride = reductions[i] // (reductions[i - 1] if i else 1)
            embed: nn.Module = CrossScaleEmbedding(widths[i], dim, kernels[i], stride, i > 0, embed_split)
            if i == 0 and position_bias == "absolute":
                embed = add_absolute_position(embed, dim)
            attentions = [
                create_attention(attention, context(i, k, dim, num_heads[i], size, steps))
                for k, (size, steps) in enumerate(zip(group_sizes[i], intervals[i], strict=True))
            ]
            stage = CrossFormerStage(embed, dim, attentions, mlp_ratio, rates[i], int(amplitude_cooling))
            self.stages.append(stage)
        self.feature_info = describe_stages(dims, reductions)
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, input_fmt="NHWC")
        self.apply(partial(init_weights, xavier_mlp=weight_init == "xavier_mlp"))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images of shape ``(B, in_chans, H, W)`` to the normalized map of the last stage."""
        x = check_size(x).permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def describe_stages(dims: Sequence[int], reductions: Sequence[int]) -> list[Kwargs]:
    """Channels, stride and name of each stage, timm's ``feature_info``."""
    return [
        {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
        for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
    ]


def init_weights(module: nn.Module, xavier_mlp: bool) -> None:
    """Initialize linear layers as published: truncated normal with a standard deviation of 0.02, zero biases.

    Args:
        module: Module to initialize.
        xavier_mlp: Use Xavier initialization for MLPs. Its scale is about the same at ViT-B's width, but
            larger in narrow stages, which speeds up the training of crossformer_nano.
    """
    if isinstance(module, nn.Linear):
        # torch's function, because timm's trunc_normal_ occasionally samples 100-sigma outliers.
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, FeedForward) and xavier_mlp:  # visited after its linear layers
        nn.init.xavier_normal_(module.fc1.weight)
        nn.init.xavier_normal_(module.fc2.weight)
