"""Partition a map into attention groups and back.

A map of eight positions in one dimension. Positions with equal letters form a group:

    position                       0 1 2 3 4 5 6 7
    SDA, G = 4                     a a a a b b b b    sda_layout
    LDA over the map, I = 2        a b a b a b a b    lda_map_layout: every second position
    LDA in regions, G = 2, I = 2   a b a b c d c d    lda_region_layout: the same within G * I = 4
    LDA of the classifiers         a b a b a b a b    G = 4, I = 2: both, as G * I = 8 is the map
    LDA by count, G = 2            a b c d a b c d    lda_count_layout: two members, I = 8 / G = 4

The published classifiers have ``G * I`` equal to the side of every map at 224 pixels, so both definitions of
LDA are the same there. On other maps they differ.

Members of a group keep their order. Neighboring members are ``I`` positions apart, and DPB sees their offset
in members. A map that the groups do not fill is padded right and bottom. Seven positions with ``I = 2``:

    position   0 1 2 3 4 5 6 -
    group      a b a b a b a b    the last member of b is padding: masked as a key, dropped from the output
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossformer_vision.models.index_cache import cached
from crossformer_vision.models.tracing import is_open, may_differ, sym_min


class Layout(NamedTuple):
    """How a map is partitioned: regions, each with groups of ``gh x gw`` members that lie apart.

    Attributes:
        rows: Regions from top to bottom.
        cols: Regions from left to right.
        gh: Members of a group from top to bottom.
        gw: Members of a group from left to right.
        interval_h: Positions from one member to the next, from top to bottom.
        interval_w: Positions from one member to the next, from left to right.
    """

    rows: int
    cols: int
    gh: int
    gw: int
    interval_h: int
    interval_w: int

    @property
    def groups(self) -> int:
        """Number of groups of one map."""
        return self.rows * self.cols * self.interval_h * self.interval_w


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return (a + b - 1) // b


def sda_layout(H: int, W: int, G: int) -> Layout:
    """SDA: ``G x G`` neighbors form a group.

    Args:
        H: Height of the map.
        W: Width of the map.
        G: Group size.
    """
    return Layout(ceil_div(H, G), ceil_div(W, G), G, G, 1, 1)


def lda_map_layout(H: int, W: int, interval: int) -> Layout:
    """LDA over the map: members are ``interval`` apart, and groups have the aspect ratio of the map.

    Args:
        H: Height of the map.
        W: Width of the map.
        interval: Distance between members.
    """
    return Layout(1, 1, ceil_div(H, interval), ceil_div(W, interval), interval, interval)


def lda_region_layout(H: int, W: int, G: int, interval: int) -> Layout:
    """LDA in regions: members are ``interval`` apart within square regions of ``G * interval`` positions.

    Args:
        H: Height of the map.
        W: Width of the map.
        G: Group size.
        interval: Distance between members.
    """
    return Layout(ceil_div(H, G * interval), ceil_div(W, G * interval), G, G, interval, interval)


def lda_count_layout(H: int, W: int, G: int) -> Layout:
    """LDA by count: ``G`` members along each axis, or all if there are fewer, are spread over the map.

    Args:
        H: Height of the map.
        W: Width of the map.
        G: Group size.
    """
    gh, gw = sym_min(G, H), sym_min(G, W)
    return Layout(1, 1, gh, gw, ceil_div(H, gh), ceil_div(W, gw))


def padded_size(layout: Layout) -> tuple[int, int]:
    """Height and width of the map that the groups fill."""
    return layout.rows * layout.gh * layout.interval_h, layout.cols * layout.gw * layout.interval_w


def is_padded(H: int, W: int, layout: Layout) -> bool:
    """Whether an ``H x W`` map is padded; ``True`` if symbolic sizes do not decide it.

    Args:
        H: Height of the map.
        W: Width of the map.
        layout: Layout of its groups.
    """
    padded_H, padded_W = padded_size(layout)
    return may_differ(padded_H, H) or may_differ(padded_W, W)


def group(x: Tensor, layout: Layout) -> Tensor:
    """Partition a map into groups.

    Args:
        x: Map, shape ``(B, H, W, C)``. It is zero-padded right and bottom to what the groups fill.
        layout: Layout of the groups.

    Returns:
        Groups, shape ``(N, L, C)``, with ``L = gh * gw`` members.
    """
    rows, cols, gh, gw, interval_h, interval_w = layout
    B, H, W, C = x.shape
    if is_padded(H, W, layout):
        padded_H, padded_W = padded_size(layout)
        x = F.pad(x, (0, 0, 0, padded_W - W, 0, padded_H - H))
    x = x.view(B, rows, gh, interval_h, cols, gw, interval_w, C)
    x = x.permute(0, 1, 4, 3, 6, 2, 5, 7)  # B, row and col of the region, row and col offset, gh, gw, C
    return x.contiguous().view(B * layout.groups, gh * gw, C)


def ungroup(x: Tensor, layout: Layout, B: int, H: int, W: int) -> Tensor:
    """Inverse of ``group``.

    Args:
        x: Groups, shape ``(N, L, C)``.
        layout: Layout of the groups.
        B: Batch size.
        H: Height of the map before padding.
        W: Width of the map before padding.

    Returns:
        Map without padding, shape ``(B, H, W, C)``.
    """
    rows, cols, gh, gw, interval_h, interval_w = layout
    padded_H, padded_W = padded_size(layout)
    C = x.shape[-1]
    x = x.view(B, rows, cols, interval_h, interval_w, gh, gw, C)
    x = x.permute(0, 1, 5, 3, 2, 6, 4, 7)  # B, row, gh, row offset, col, gw, col offset, C
    x = x.contiguous().view(B, padded_H, padded_W, C)
    return crop(x, H, W) if is_padded(H, W, layout) else x


def crop(x: Tensor, H: int, W: int) -> Tensor:
    """Top left ``H x W`` positions of a map of shape ``(B, H', W', C)``.

    Args:
        x: Map, ``(B, H', W', C)``.
        H: Height of the result.
        W: Width of the result.
    """
    if not (is_open(H, x.shape[1]) or is_open(W, x.shape[2])):
        return x[:, :H, :W]
    # A slice would add a guard on whether it is the whole map.
    rows, cols = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    return x.index_select(1, rows).index_select(2, cols)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad images of shape ``(B, C, H, W)`` right and bottom so that ``multiple`` divides both sides."""
    H, W = x.shape[2], x.shape[3]
    pad_h, pad_w = ceil_div(H, multiple) * multiple - H, ceil_div(W, multiple) * multiple - W
    if may_differ(pad_h, 0) or may_differ(pad_w, 0):
        x = F.pad(x, (0, pad_w, 0, pad_h))
    return x


def key_padding_mask(B: int, H: int, W: int, layout: Layout, device: torch.device) -> Tensor | None:
    """Mask of the members that are not padding.

    Args:
        B: Batch size.
        H: Height of the map.
        W: Width of the map.
        layout: Layout of the groups.
        device: Device of the mask.

    Returns:
        ``True`` for valid members, shape ``(N, 1, 1, L)``, or ``None`` if all are valid.
    """
    if not is_padded(H, W, layout):
        return None
    return cached(valid_members, H, W, layout, device).repeat(B, 1)[:, None, None, :]


def valid_members(H: int, W: int, layout: Layout, device: torch.device) -> Tensor:
    """``True`` for members of one map that are not padding, shape ``(groups, L)``.

    Args:
        H: Height of the map.
        W: Width of the map.
        layout: Layout of its groups.
        device: Device of the result.
    """
    return group(torch.ones(1, H, W, 1, dtype=torch.bool, device=device), layout).squeeze(-1)


def groups_by_mask(H: int, W: int, layout: Layout, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Groups of one map, collected by their mask.

    Args:
        H: Height of the map.
        W: Width of the map.
        layout: Layout of the groups.
        device: Device of the tensors.

    Returns:
        Pairs of group indices and the mask that these groups share, shape ``(L,)``.
    """
    rows, cols, gh, gw, interval_h, interval_w = layout

    def count_valid(size: int, region: int, offset: int, members: int, interval: int) -> int:
        return max(0, min(members, ceil_div(size - offset, interval) - region * members))

    indices: dict[tuple[int, int], list[int]] = {}
    positions = itertools.product(range(rows), range(cols), range(interval_h), range(interval_w))
    for index, (row, col, y, x) in enumerate(positions):
        counts = count_valid(H, row, y, gh, interval_h), count_valid(W, col, x, gw, interval_w)
        indices.setdefault(counts, []).append(index)
    return [
        (
            torch.tensor(group_indices, device=device),
            torch.tensor([y < h and x < w for y in range(gh) for x in range(gw)], device=device),
        )
        for (h, w), group_indices in indices.items()
    ]


def relative_offsets(gh: int, gw: int, device: torch.device) -> Tensor:
    """Distinct offsets (dy, dx) of queries from keys, float32, ``((2 * gh - 1) * (2 * gw - 1), 2)``.

    Args:
        gh: Rows of a group.
        gw: Columns of a group.
        device: Device of the result.
    """
    dy = torch.arange(1 - gh, gh, device=device)
    dx = torch.arange(1 - gw, gw, device=device)
    return torch.stack(torch.meshgrid(dy, dx, indexing="ij"), dim=-1).reshape(-1, 2).float()


def offset_indices(query_rows: int, gh: int, gw: int, device: torch.device) -> Tensor:
    """Index into ``relative_offsets`` for each query and key.

    Args:
        query_rows: Number of rows of queries, from the top of the group. For lower rows, add ``2 * gw - 1``
            per row.
        gh: Rows of the group.
        gw: Columns of the group.
        device: Device of the indices.

    Returns:
        Indices as int64, shape ``(query_rows * gw * L,)``.
    """
    y, x = torch.arange(gh, device=device), torch.arange(gw, device=device)
    dy = y[:query_rows, None] - y[None, :] + gh - 1  # query, key
    dx = x[:, None] - x[None, :] + gw - 1
    return (dy[:, None, :, None] * (2 * gw - 1) + dx[None, :, None, :]).reshape(-1)
