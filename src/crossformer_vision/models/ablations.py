"""What the papers compare CrossFormer against, to be swapped into one by keyword.

Attention: Swin's shifted windows, PVT's spatial reduction. Positions: relative table, absolute embeddings,
none, DPB with residual connections. Group sizes of CrossFormer++ by name. The rest needs no parts of its own:
`patch_sizes`, `merge_sizes` and `embed_split` choose the kernels of the embeddings, `amplitude_cooling` the
period of the ACLs, and an interval of 0 makes a block SDA, so that `[[0, 0], [0, 4], …]` chooses among them.

    timm.create_model("crossformer_small", attention="shifted_window", position_bias="relative")
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossformer_vision.models.attention import masked, pair_biases
from crossformer_vision.models.crossformer import (
    ATTENTIONS,
    EMBEDDED_POSITIONS,
    GROUP_MODES,
    POSITION_BIASES,
    DynamicPositionBias,
    LongShortAttention,
    Place,
)
from crossformer_vision.models.grouping import Layout, group, kept, padded_size, relative_offsets, ungroup

# ------------------------------------------------------------------------------------------------------------
# Positions
# ------------------------------------------------------------------------------------------------------------


class ResidualPositionBias(DynamicPositionBias):
    """DPB whose first two hidden layers add to what they take (DPB-residual, table 7 of CrossFormer)."""

    def compute(self, gh: int, gw: int, like: Tensor) -> Tensor:
        offsets = relative_offsets(gh, gw, like.device).to(like.dtype)
        biases = self.proj(offsets)
        first, second, last = self.layers
        biases = biases + first(biases)
        biases = biases + second(biases)
        return last(biases).t().contiguous()


class RelativePositionBias(nn.Module):
    """A learned bias for each head and offset inside a group (RPB, as in Swin, arXiv 2103.14030).

    Args:
        num_heads: attention heads, h.
        group_size: G, the largest side of a group.

    Shape: for groups of gh x gw up to G x G -> (h, (2gh-1) * (2gw-1)), the middle of the table.

    Raises:
        ValueError: for a larger group: there is no bias for its offsets.
    """

    def __init__(self, num_heads: int, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size
        self.relative_table = nn.Parameter(torch.empty(num_heads, (2 * group_size - 1) ** 2))
        nn.init.trunc_normal_(self.relative_table, std=0.02)

    def forward(self, gh: int, gw: int, like: Tensor) -> Tensor:
        G = self.group_size
        if gh > G or gw > G:
            raise ValueError(
                f"a relative table of groups of {G}x{G} has no bias for groups of {gh}x{gw}: "
                'take position_bias="dynamic", or lda_span="region"'
            )
        table = self.relative_table.view(-1, 2 * G - 1, 2 * G - 1)
        return table[:, G - gh : G + gh - 1, G - gw : G + gw - 1].flatten(1).to(like.dtype)


class NoPositionBias(nn.Module):
    """A bias of zero, where positions are unknown to the attention."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, gh: int, gw: int, like: Tensor) -> Tensor:
        return like.new_zeros(self.num_heads, (2 * gh - 1) * (2 * gw - 1))


class AbsolutePosition(nn.Module):
    """The first embedding, with a learned vector added at each position (APE).

    It is of the 56x56 map of an image of 224x224, and is resized, bicubic, for others.

    Shape: (B, H, W, in_dim) -> (B, h, w, dim).
    """

    def __init__(self, embed: nn.Module, dim: int, side: int = 56) -> None:
        super().__init__()
        self.embed = embed
        self.absolute_position = nn.Parameter(torch.empty(1, dim, side, side))
        nn.init.trunc_normal_(self.absolute_position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        position: Tensor = self.absolute_position
        if x.shape[1:3] != position.shape[2:]:
            position = F.interpolate(position, size=x.shape[1:3], mode="bicubic", align_corners=False)
        return x + position.permute(0, 2, 3, 1)


POSITION_BIASES |= {
    "dynamic_residual": lambda dim, num_heads, group_size: ResidualPositionBias(dim, num_heads),
    "relative": lambda dim, num_heads, group_size: RelativePositionBias(num_heads, group_size),
    "absolute": lambda dim, num_heads, group_size: NoPositionBias(num_heads),
    "none": lambda dim, num_heads, group_size: NoPositionBias(num_heads),
}
EMBEDDED_POSITIONS["absolute"] = AbsolutePosition


# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------


class ShiftedWindowAttention(LongShortAttention):
    """Attention in windows of G x G, in every second block shifted by G // 2 (Swin, arXiv 2103.14030).

    The map is rolled, and positions that the roll brings together do not see each other. A map whose shorter
    side is at most G is not shifted; one that G does not divide is padded, and the padding is masked.

    Shape: (B, H, W, dim) -> (B, H, W, dim).
    """

    def __init__(self, dim: int, num_heads: int, group_size: int, shifted: bool, position_bias: str) -> None:
        super().__init__(dim, num_heads, group_size, 0, "map", position_bias)
        self.shifted = shifted

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        layout = self.layout(H, W)
        shift = self.group_size // 2 if self.shifted and min(H, W) > self.group_size else 0
        padded_H, padded_W = padded_size(layout)
        x = F.pad(x, (0, 0, 0, padded_W - W, 0, padded_H - H))
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = group(x, layout)
        bias = pair_biases(self.position_bias(layout.gh, layout.gw, x), layout)
        if shift or (padded_H, padded_W) != (H, W):
            seen = kept(window_mask, H, W, layout, shift, x.device)  # (windows, L, L)
            bias = masked(bias, seen.repeat(B, 1, 1)[:, None])
        x = ungroup(self.attend(x, bias, None), layout, B, padded_H, padded_W)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :H, :W]


def window_mask(H: int, W: int, layout: Layout, shift: int, device: torch.device) -> Tensor:
    """Which keys each query sees in the windows of a rolled map: (windows, L, L), bool."""
    padded_H, padded_W = padded_size(layout)

    def parts(size: int, window: int) -> Tensor:  # what lay on either side of the roll's seam
        place = torch.arange(size, device=device)
        return (place >= size - window).long() + (place >= size - shift).long() if shift else place * 0

    areas = parts(padded_H, layout.gh)[:, None] * 3 + parts(padded_W, layout.gw)
    rows, cols = torch.arange(padded_H, device=device), torch.arange(padded_W, device=device)
    real = ((rows < H)[:, None] & (cols < W)).roll((-shift, -shift), (0, 1))
    areas, real = (group(t[None, ..., None], layout)[..., 0] for t in (areas, real))
    return (areas[:, :, None] == areas[:, None, :]) & real[:, None, :]


class SpatialReductionAttention(nn.Module):
    """Attention over the map, whose keys and values a strided convolution reduces (PVT, arXiv 2102.12122).

    Sizes that the reduction does not divide lose their rest, as published; a map smaller than it is padded.

    Args:
        dim: channels.
        num_heads: attention heads.
        reduction: of both sides; 1 for none.

    Shape: (B, H, W, dim) -> (B, H, W, dim).
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

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x.flatten(1, 2), self.reduced(x)).view(x.shape)

    def reduced(self, x: Tensor) -> Tensor:
        """What keys and values are made of: (B, H, W, C) -> (B, L, C)."""
        H, W = x.shape[1], x.shape[2]
        if self.reduction > 1:
            x = x.permute(0, 3, 1, 2)
            if self.reduction > H or self.reduction > W:
                x = F.pad(x, (0, max(0, self.reduction - W), 0, max(0, self.reduction - H)))
            x = self.norm(self.sr(x).permute(0, 2, 3, 1))
        return x.flatten(1, 2)

    def attend(self, x: Tensor, reduced: Tensor) -> Tensor:
        """Queries of x (B, N, C), keys and values of `reduced` (B, L, C) -> (B, N, C)."""
        (B, N, C), L, h = x.shape, reduced.shape[1], self.num_heads
        q = self.q(x).view(B, N, h, C // h).transpose(1, 2)
        k, v = self.kv(reduced).view(B, L, 2, h, C // h).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


def shifted_window(at: Place) -> nn.Module:
    """Windows of G, in odd blocks shifted; there is no interval."""
    shifted = at.block % 2 == 1
    return ShiftedWindowAttention(at.dim, at.num_heads, at.group_size, shifted, at.position_bias)


def spatial_reduction(at: Place) -> nn.Module:
    """PVT's reductions of a stage, 8, 4, 2 and 1, in each of its blocks; there are no groups."""
    if at.position_bias not in ("absolute", "none"):
        raise ValueError(
            f"position_bias is 'absolute' or 'none' with spatial_reduction, not {at.position_bias!r}"
        )
    return SpatialReductionAttention(at.dim, at.num_heads, max(1, 8 >> at.stage))


ATTENTIONS |= {"shifted_window": shifted_window, "spatial_reduction": spatial_reduction}


# ------------------------------------------------------------------------------------------------------------
# Group sizes of CrossFormer++
# ------------------------------------------------------------------------------------------------------------

# With `interval=(None,) * 4`: LDA's members then lie ceil(side / G) apart.


def progressive(mode: str, depths: Sequence[int], side: int = 56) -> list[list[int]]:
    """Group sizes that grow with depth, a list a stage (CrossFormer++, section 3.3).

    Args:
        mode: `"linear"` from 4 to the map's side; `"linear_div"` and `"alter"` go over to the side's half and
            whole where that passes half of it, all at once or, in the third stage, by turns.
        depths: blocks a stage.
        side: of the first stage's map, 56 for images of 224.
    """
    total = sum(depths)
    sizes: list[list[int]] = []
    k = 0
    for stage, depth in enumerate(depths):
        R = side >> stage
        sizes.append([])
        for _ in range(depth):
            grown = R * (4 / side + k * (1 - 4 / side) / total)
            size = max(4, math.ceil(grown - 1e-9))
            if grown > R // 2:
                if mode == "linear_div":
                    size = R if stage != 2 or grown > 3 / 4 * R else R // 2
                elif mode == "alter":
                    size = R if stage != 2 or k % 2 else R // 2
            sizes[-1].append(size)
            k += 1
    return sizes


def constant(depths: Sequence[int]) -> list[list[int]]:
    """The group sizes of CrossFormer++'s classifiers: one a stage."""
    return [[G] * depth for G, depth in zip((4, 4, 14, 7), depths, strict=True)]


def seven_fourteen(depths: Sequence[int]) -> list[list[int]]:
    """The same, but half of it in the third stage's first four blocks."""
    sizes = constant(depths)
    sizes[2][:4] = [7] * len(sizes[2][:4])
    return sizes


GROUP_MODES |= {
    "constant": constant,
    "linear": lambda depths: progressive("linear", depths),
    "linear_div": lambda depths: progressive("linear_div", depths),
    "alter": lambda depths: progressive("alter", depths),
    "7_14": seven_fourteen,
}
