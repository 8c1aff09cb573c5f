"""Attention within groups, with an additive bias by offset. Measurements: docs/results/speed.md."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossformer_vision.models.cpu.attention import attend_on_cpu
from crossformer_vision.models.grouping import Layout, groups_by_mask, is_padded, offset_indices
from crossformer_vision.models.heads import apply_key_mask, join_heads, split_heads
from crossformer_vision.models.index_cache import cached

MAX_DENSE_MEMBERS = 2048  # largest group whose (L, L) matrices are materialized
BLOCK_BIASES = 1 << 20  # position biases per block of queries in larger groups


def pair_biases(table: Tensor, layout: Layout) -> Tensor:
    """Expand biases by offset to biases by query and key.

    Args:
        table: Biases in the order of ``relative_offsets``, shape ``(h, (2 * gh - 1) * (2 * gw - 1))``.
        layout: Layout of the groups.

    Returns:
        Shape ``(1, h, L, L)``.
    """
    gh, gw = layout.gh, layout.gw
    indices = cached(offset_indices, gh, gh, gw, table.device)
    return table.index_select(1, indices).view(1, -1, gh * gw, gh * gw)


def group_attention(qkv: Tensor, num_heads: int, bias: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Multi-head attention within groups with an additive position bias.

    Implements equation 4 of CrossFormer (arXiv 2108.00154).

    Args:
        qkv: Packed queries, keys and values, shape ``(N, L, 3 * C)``.
        num_heads: Number of attention heads, h.
        bias: Position bias, shape ``(1, h, L, L)`` or ``(N, h, L, L)``, same dtype as ``qkv``.
        key_padding_mask: ``True`` for valid keys, shape ``(N, 1, 1, L)``. ``None`` if all are valid.

    Returns:
        Attention output, shape ``(N, L, C)``.
    """
    output = attend_on_cpu(qkv, num_heads, bias, key_padding_mask)
    if output is not None:
        return output
    q, k, v = split_heads(qkv, num_heads)
    bias = apply_key_mask(bias, key_padding_mask)
    return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


def use_blocked_attention(layout: Layout) -> bool:
    """Whether groups are too large for ``(L, L)`` matrices.

    Exported graphs always materialize them, because the number of blocks would depend on the size.
    """
    return not torch.compiler.is_exporting() and layout.gh * layout.gw > MAX_DENSE_MEMBERS


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout, H: int, W: int
) -> Tensor:
    """Attention within large groups, with queries processed in blocks.

    Memory grows linearly with the number of members. In training, blocks are recomputed in the backward pass.

    Args:
        q: Queries, shape ``(N, h, L, d)``.
        k: Keys, same shape.
        v: Values, same shape.
        table: Biases by offset, shape ``(h, (2 * gh - 1) * (2 * gw - 1))``.
        layout: Layout of the groups.
        H: Height of the map before padding.
        W: Width of the map before padding.

    Returns:
        Attention output, shape ``(N, h, L, d)``.
    """
    if not is_padded(H, W, layout):
        return _attend_in_blocks(q, k, v, table, layout, None)
    groups_of_masks = cached(groups_by_mask, H, W, layout, q.device)
    groups = layout.groups
    batch = len(q) // groups
    q, k, v = (t.unflatten(0, (batch, groups)) for t in (q, k, v))
    outputs = []
    for indices, mask in groups_of_masks:
        queries, keys, values = (t.index_select(1, indices).flatten(0, 1) for t in (q, k, v))
        output = _attend_in_blocks(queries, keys, values, table, layout, mask)
        outputs.append(output.unflatten(0, (batch, -1)))
    order = torch.cat([indices for indices, _ in groups_of_masks]).argsort()
    return torch.cat(outputs, dim=1).index_select(1, order).flatten(0, 1)


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout, mask: Tensor | None
) -> Tensor:
    """``blocked_attention`` for groups that share a mask of shape ``(L,)``."""
    gh, gw = layout.gh, layout.gw
    num_heads, L = q.shape[1], gh * gw
    step = max(1, min(gh, BLOCK_BIASES // (num_heads * gw * L)))  # rows of queries per block
    indices = cached(offset_indices, step, gh, gw, q.device)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or table.requires_grad)
    outputs = []
    for y in range(0, gh, step):
        queries = q[:, :, y * gw : (y + step) * gw]
        shifted_table = table[:, y * (2 * gw - 1) :]  # see offset_indices
        args = (queries, k, v, shifted_table, indices[: queries.shape[2] * L], mask)
        if needs_grad:
            outputs.append(checkpoint(_attend_block, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend_block(*args))
    return torch.cat(outputs, dim=2)


def _attend_block(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, indices: Tensor, mask: Tensor | None
) -> Tensor:
    bias = table.index_select(1, indices).view(1, q.shape[1], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=apply_key_mask(bias, mask))
