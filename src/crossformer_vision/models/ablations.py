"""Alternatives that the papers compare with parts of CrossFormer, selected by keyword.

- Attention: Swin's shifted windows, PVT's spatial reduction.
- Position biases: relative table, absolute embeddings, none, DPB with residual connections.
- Group sizes of CrossFormer++, by name.

Other ablations need no modules: ``patch_sizes``, ``merge_sizes`` and ``embed_split`` configure the CELs,
``amplitude_cooling`` the ACLs, and an interval of 0 turns a block into SDA.

    timm.create_model("crossformer_small", attention="shifted_window", position_bias="relative")
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.models.attention import pair_biases
from crossformer_vision.models.crossformer import BlockContext, DynamicPositionBias, LongShortAttention
from crossformer_vision.models.grouping import Layout, group, padded_size, relative_offsets, ungroup
from crossformer_vision.models.heads import apply_key_mask
from crossformer_vision.models.index_cache import cached

# ------------------------------------------------------------------------------------------------------------
# Positions
# ------------------------------------------------------------------------------------------------------------


class ResidualPositionBias(DynamicPositionBias):
    """DPB with residual connections around its first two hidden layers (table 7 of CrossFormer)."""

    @override
    def compute(self, gh: int, gw: int, like: Tensor) -> Tensor:
        biases = self.proj(relative_offsets(gh, gw, like.device).to(like.dtype))
        first, second, last = self.layers
        biases = biases + first(biases)
        biases = biases + second(biases)
        return last(biases).t().contiguous()


class RelativePositionBias(nn.Module):
    """Learned bias per head and offset (RPB, as in Swin, arXiv 2103.14030).

    Args:
        num_heads: Number of attention heads, h.
        group_size: Largest side of a group, G.
    """

    def __init__(self, num_heads: int, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size
        self.relative_table = nn.Parameter(torch.empty(num_heads, (2 * group_size - 1) ** 2))
        nn.init.trunc_normal_(self.relative_table, std=0.02)

    @override
    def forward(self, gh: int, gw: int, like: Tensor) -> Tensor:
        """Biases of shape ``(h, (2 * gh - 1) * (2 * gw - 1))``, see ``DynamicPositionBias``.

        Raises:
            ValueError: If the group is larger than ``G x G``.
        """
        G = self.group_size
        if gh > G or gw > G:
            raise ValueError(
                f"a relative table for groups of {G}x{G} has no bias for groups of {gh}x{gw}: "
                'use position_bias="dynamic", or lda_span="region"'
            )
        table = self.relative_table.view(-1, 2 * G - 1, 2 * G - 1)
        return table[:, G - gh : G + gh - 1, G - gw : G + gw - 1].flatten(1).to(like.dtype)


class NoPositionBias(nn.Module):
    """A bias of zero.

    Args:
        num_heads: Number of attention heads, h.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    @override
    def forward(self, gh: int, gw: int, like: Tensor) -> Tensor:
        return like.new_zeros(self.num_heads, (2 * gh - 1) * (2 * gw - 1))


class AbsolutePosition(nn.Module):
    """A CEL whose output gets a learned vector at each position (APE), resized for other map sizes.

    Args:
        embed: First CEL.
        dim: Channels of its output.
        side: Side of the map: 56 for images of 224.
    """

    def __init__(self, embed: nn.Module, dim: int, side: int = 56) -> None:
        super().__init__()
        self.embed = embed
        self.absolute_position = nn.Parameter(torch.empty(1, dim, side, side))
        nn.init.trunc_normal_(self.absolute_position, std=0.02)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        position: Tensor = self.absolute_position
        if x.shape[1:3] != position.shape[2:]:
            position = F.interpolate(position, size=x.shape[1:3], mode="bicubic", align_corners=False)
        return x + position.permute(0, 2, 3, 1)


POSITION_BIASES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "dynamic_residual": lambda dim, num_heads, group_size: ResidualPositionBias(dim, num_heads),
    "relative": lambda dim, num_heads, group_size: RelativePositionBias(num_heads, group_size),
    "absolute": lambda dim, num_heads, group_size: NoPositionBias(num_heads),
    "none": lambda dim, num_heads, group_size: NoPositionBias(num_heads),
}
"""Position biases by name, created from channels, heads and group size."""


# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------


class ShiftedWindowAttention(LongShortAttention):
    """Attention in windows of ``G x G``, shifted by ``G // 2`` in odd blocks (Swin, arXiv 2103.14030).

    The map is rolled, and pairs of positions that are adjacent only after the roll are masked. A map whose
    shorter side is at most G is not shifted. A map that G does not divide is padded, and the padding is
    masked.

    Args:
        dim: Channels.
        num_heads: Number of attention heads.
        group_size: G.
        is_shifted: Whether windows are shifted.
        position_bias: Name of the position bias.
    """

    def __init__(
        self, dim: int, num_heads: int, group_size: int, is_shifted: bool, position_bias: str
    ) -> None:
        super().__init__(dim, num_heads, group_size, 0, "map", position_bias)
        self.is_shifted = is_shifted

    @override
    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        layout = self.layout(H, W)
        shift = self.group_size // 2 if self.is_shifted and min(H, W) > self.group_size else 0
        padded_H, padded_W = padded_size(layout)
        x = F.pad(x, (0, 0, 0, padded_W - W, 0, padded_H - H))
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = group(x, layout)
        bias = pair_biases(self.position_bias(layout.gh, layout.gw, x), layout)
        if shift or (padded_H, padded_W) != (H, W):
            mask = cached(window_mask, H, W, layout, shift, x.device)
            bias = apply_key_mask(bias, mask.repeat(B, 1, 1)[:, None])
        x = ungroup(self.attend(x, bias, None), layout, B, padded_H, padded_W)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :H, :W]


def window_mask(H: int, W: int, layout: Layout, shift: int, device: torch.device) -> Tensor:
    """Mask of keys that each query attends to in the windows of a rolled map.

    Args:
        H: Height of the map before padding.
        W: Width of the map before padding.
        layout: Layout of the windows.
        shift: Shift of the windows.
        device: Device of the mask.

    Returns:
        ``True`` for valid keys, shape ``(windows, L, L)``.
    """
    padded_H, padded_W = padded_size(layout)

    def areas_along(size: int, window: int) -> Tensor:  # region index on each side of the seam
        position = torch.arange(size, device=device)
        return (
            (position >= size - window).long() + (position >= size - shift).long() if shift else position * 0
        )

    areas = areas_along(padded_H, layout.gh)[:, None] * 3 + areas_along(padded_W, layout.gw)
    rows, cols = torch.arange(padded_H, device=device), torch.arange(padded_W, device=device)
    valid = ((rows < H)[:, None] & (cols < W)).roll((-shift, -shift), (0, 1))
    areas, valid = (group(t[None, ..., None], layout)[..., 0] for t in (areas, valid))
    return (areas[:, :, None] == areas[:, None, :]) & valid[:, None, :]


class SpatialReductionAttention(nn.Module):
    """Attention over the map with keys and values reduced by a strided convolution (PVT, arXiv 2102.12122).

    Rows and columns beyond a multiple of the reduction are ignored, as published. Maps smaller than it are
    padded.

    Args:
        dim: Channels.
        num_heads: Number of attention heads.
        reduction: Reduction of both sides; 1 for none.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide dim {dim}")
        self.num_heads, self.reduction = num_heads, reduction
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr: nn.Module = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else nn.Identity()
        self.norm: nn.Module = nn.LayerNorm(dim) if reduction > 1 else nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map of shape ``(B, H, W, C)`` to a map of the same shape."""
        return self.attend(x.flatten(1, 2), self.reduce(x)).view(x.shape)

    def reduce(self, x: Tensor) -> Tensor:
        """Reduced map for keys and values: ``(B, H, W, C)`` to ``(B, L, C)``."""
        H, W = x.shape[1], x.shape[2]
        if self.reduction > 1:
            x = x.permute(0, 3, 1, 2)
            if self.reduction > H or self.reduction > W:
                x = F.pad(x, (0, max(0, self.reduction - W), 0, max(0, self.reduction - H)))
            x = self.norm(self.sr(x).permute(0, 2, 3, 1))
        return x.flatten(1, 2)

    def attend(self, x: Tensor, reduced: Tensor) -> Tensor:
        """Attention of all positions to the reduced ones.

        Args:
            x: Positions, shape ``(B, N, C)``.
            reduced: Reduced positions, shape ``(B, L, C)``.

        Returns:
            Shape ``(B, N, C)``.
        """
        (B, N, C), L, h = x.shape, reduced.shape[1], self.num_heads
        q = self.q(x).view(B, N, h, C // h).transpose(1, 2)
        k, v = self.kv(reduced).view(B, L, 2, h, C // h).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


def shifted_window(context: BlockContext) -> nn.Module:
    """Windows of G, shifted in odd blocks. The interval is not used."""
    is_shifted = context.block % 2 == 1
    return ShiftedWindowAttention(
        context.dim, context.num_heads, context.group_size, is_shifted, context.position_bias
    )


def spatial_reduction(context: BlockContext) -> nn.Module:
    """PVT's reductions of 8, 4, 2 and 1 in the four stages. Group sizes are not used.

    Raises:
        ValueError: If there is a position bias, which this attention does not have.
    """
    if context.position_bias not in ("absolute", "none"):
        raise ValueError(
            "position_bias must be 'absolute' or 'none' with spatial_reduction, not "
            f"{context.position_bias!r}"
        )
    return SpatialReductionAttention(context.dim, context.num_heads, max(1, 8 >> context.stage))


ATTENTIONS: dict[str, Callable[[BlockContext], nn.Module]] = {
    "shifted_window": shifted_window,
    "spatial_reduction": spatial_reduction,
}
"""Attention layers by name."""


# ------------------------------------------------------------------------------------------------------------
# Group sizes of CrossFormer++ (section 3.3), for ``interval=(None,) * 4``
# ------------------------------------------------------------------------------------------------------------


def progressive(mode: str, depths: Sequence[int], side: int = 56) -> list[list[int]]:
    """Group sizes that grow with depth (section 3.3 of CrossFormer++).

    Args:
        mode: ``"linear"``, from 4 to the map's side; ``"linear_div"`` and ``"alter"`` change to half of the
            side and the whole side where the linear size exceeds half of it, at once or alternating in the
            third stage.
        depths: Blocks per stage.
        side: Side of the first stage's map: 56 for images of 224.

    Returns:
        One list per stage.
    """
    total = sum(depths)
    sizes: list[list[int]] = []
    k = 0
    for stage, depth in enumerate(depths):
        R = side >> stage
        sizes.append([])
        for _ in range(depth):
            linear = R * (4 / side + k * (1 - 4 / side) / total)
            size = max(4, math.ceil(linear - 1e-9))
            if linear > R // 2:
                if mode == "linear_div":
                    size = R if stage != 2 or linear > 3 / 4 * R else R // 2
                elif mode == "alter":
                    size = R if stage != 2 or k % 2 else R // 2
            sizes[-1].append(size)
            k += 1
    return sizes


def constant(depths: Sequence[int]) -> list[list[int]]:
    """Group sizes of CrossFormer++'s classifiers: one per stage."""
    return [[G] * depth for G, depth in zip((4, 4, 14, 7), depths, strict=True)]


def seven_fourteen(depths: Sequence[int]) -> list[list[int]]:
    """Group sizes of CrossFormer++'s classifiers, with 7 in the first four blocks of the third stage."""
    sizes = constant(depths)
    sizes[2][:4] = [7] * len(sizes[2][:4])
    return sizes


GROUP_MODES: dict[str, Callable[[Sequence[int]], list[list[int]]]] = {
    "constant": constant,
    "linear": lambda depths: progressive("linear", depths),
    "linear_div": lambda depths: progressive("linear_div", depths),
    "alter": lambda depths: progressive("alter", depths),
    "7_14": seven_fourteen,
}
"""Group sizes by name, from the blocks per stage."""
