"""Attention in groups with a bias by offset, computed by what is fastest where it runs.

`crossformer.py` says what is computed; this file, in which order, in which pieces and by which kernels. What
was measured stands in docs/results/speed.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossformer_vision.compat import is_batched
from crossformer_vision.models.cpu.chunking import (
    in_pieces,
    piece_slices,
    plain_gradients,
    trains_on_cpu,
    transformed,
)
from crossformer_vision.models.grouping import Layout, is_padded, kept, kinds_of_groups, relative_rows

# ------------------------------------------------------------------------------------------------------------
# Biases
# ------------------------------------------------------------------------------------------------------------


def masked(bias: Tensor, real: Tensor | None) -> Tensor:
    """`bias`, and where `real` is False a value far below any logit; None: all are real.

    It is finite in float16, too, so that a group of padding alone gives numbers, not NaN.
    """
    return bias if real is None else torch.where(real, bias, -3e4)


def pair_biases(table: Tensor, layout: Layout) -> Tensor:
    """Biases by offset, (h, offsets) -> by query and key, (1, h, L, L)."""
    gh, gw = layout.gh, layout.gw
    if torch.jit.is_scripting():
        rows = relative_rows(gh, gh, gw, table.device)
    else:
        rows = kept(relative_rows, gh, gh, gw, table.device)
    return table.index_select(1, rows).view(1, -1, gh * gw, gh * gw)


# ------------------------------------------------------------------------------------------------------------
# Groups of up to 2,048 members
# ------------------------------------------------------------------------------------------------------------


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, L, 3C) -> queries, keys and values, each (N, h, L, d)."""
    N, L, C = qkv.shape
    q, k, v = qkv.view(N, L, 3, num_heads, C // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def join_heads(x: Tensor) -> Tensor:
    """(N, h, L, d) -> (N, L, C)."""
    return x.transpose(1, 2).flatten(2)


def group_attention(qkv: Tensor, num_heads: int, bias: Tensor, real: Tensor | None) -> Tensor:
    """`softmax(q k^T / sqrt(d) + bias) v` in each group.

    By the kernel of `scaled_dot_product_attention`, except in training on a CPU, where it would keep the
    attention matrices for the backward pass.

    Args:
        qkv: (N, L, 3C).
        bias: (1, h, L, L), or a bias a group, (N, h, L, L); of the type of `qkv`.
        real: which keys are, (N, 1, 1, L); None if all.

    Returns:
        (N, L, C).
    """
    if not torch.jit.is_scripting():
        if trains_on_cpu(qkv, bias):
            return TrainedInPieces.apply(qkv, num_heads, bias, real)
        if transformed() and qkv.device.type == "cpu":  # whose kernel has no gradient of a bias there
            return plain_attention(qkv, num_heads, bias, real)
    q, k, v = split_heads(qkv, num_heads)
    return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=masked(bias, real)))


def plain_attention(qkv: Tensor, num_heads: int, bias: Tensor, real: Tensor | None) -> Tensor:
    """`group_attention` as products and softmax."""
    q, k, v = contiguous_heads(qkv, num_heads)
    x = softmax(q, k, num_heads, bias, real) @ v
    return join_heads(x.unflatten(0, (-1, num_heads)))


def contiguous_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, L, 3C) -> scaled queries, keys and values, each (N * h, L, d) and contiguous."""
    N, L, C = qkv.shape
    d = C // (3 * num_heads)
    q, k, v = qkv.view(N, L, 3, num_heads, d).permute(2, 0, 3, 1, 4).reshape(3, N * num_heads, L, d).unbind(0)
    return q * d**-0.5, k, v


def softmax(q: Tensor, k: Tensor, num_heads: int, bias: Tensor, real: Tensor | None) -> Tensor:
    """Attention of scaled queries (N * h, L, d) to keys: (N * h, L, L)."""
    groups = len(q) // num_heads
    logits = (q @ k.transpose(1, 2)).unflatten(0, (groups, num_heads)) + masked(bias, real)
    return logits.softmax(-1).flatten(0, 1)


class TrainedInPieces(torch.autograd.Function):
    """`group_attention` of training on a CPU: attention matrices are made again for the gradients, not kept.

    Pieces of groups go through all steps while they are in the cache, which costs less time than reading the
    matrices back does.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, bias: Tensor, real: Tensor | None) -> Tensor:
        ctx.num_heads = num_heads
        ctx.save_for_backward(qkv, bias, real)
        # Detached, since SDPA's choice of a kernel asks what wants a gradient, not whether it is recorded.
        # In 16 bits its kernel is slower than the products that the backward pass takes.
        attention = plain_attention if qkv.element_size() == 2 else group_attention
        return in_pieces(qkv.shape[1], attention, qkv.detach(), num_heads, bias.detach(), real)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        qkv, bias, real = ctx.saved_tensors
        heads, L = ctx.num_heads, qkv.shape[1]
        if is_batched(grad):
            grads = plain_gradients(lambda x, y: plain_attention(x, heads, y, real), (qkv, bias), grad)
            return grads[0], None, grads[1], None
        qkv_grad = torch.empty_like(qkv)
        bias_grads = []
        with torch.autocast("cpu", enabled=False):
            for at in piece_slices(qkv, L):
                q, k, v = contiguous_heads(qkv[at], heads)
                its_bias = bias if len(bias) == 1 else bias[at]
                its_real = None if real is None else real[at]
                its_grad = grad[at].unflatten(2, (heads, q.shape[-1])).transpose(1, 2).flatten(0, 1)
                attention = softmax(q, k, heads, its_bias, its_real)
                weight_grad = its_grad @ v.transpose(1, 2)
                logit_grad = torch.ops.aten._softmax_backward_data(weight_grad, attention, -1, qkv.dtype)
                q_grad = logit_grad @ k * q.shape[-1] ** -0.5
                k_grad = logit_grad.transpose(1, 2) @ q
                v_grad = attention.transpose(1, 2) @ its_grad
                parts = qkv_grad[at].unflatten(2, (3, heads, -1))
                for i, its in enumerate((q_grad, k_grad, v_grad)):
                    parts[:, :, i] = its.unflatten(0, (-1, heads)).transpose(1, 2)
                if ctx.needs_input_grad[2]:
                    logit_grad = logit_grad.unflatten(0, (-1, heads))
                    if its_real is not None:  # a masked key has a value that is not the bias
                        logit_grad = logit_grad * its_real
                    if len(bias) == 1:
                        exact = torch.promote_types(bias.dtype, torch.float32)
                        logit_grad = logit_grad.sum(0, keepdim=True, dtype=exact)
                    bias_grads.append(logit_grad)
        bias_grad = None
        if bias_grads:
            bias_grad = sum(bias_grads[1:], bias_grads[0]) if len(bias) == 1 else torch.cat(bias_grads)
            bias_grad = bias_grad.to(bias.dtype)
        return qkv_grad, None, bias_grad, None


# ------------------------------------------------------------------------------------------------------------
# Larger groups
# ------------------------------------------------------------------------------------------------------------


BLOCK = 1 << 20  # biases that exist at a time where queries go in blocks


def takes_blocks(layout: Layout) -> bool:
    """Whether `blocked_attention` is for groups of this size: no (h, L, L) exists beyond 2,048 members.

    An exported graph computes all at once, since the number of blocks would follow from the size.
    """
    return not torch.compiler.is_exporting() and layout.gh * layout.gw > 2048


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout, H: int, W: int
) -> Tensor:
    """Attention in large groups, whose queries go in blocks, each with its slice of the biases.

    Memory grows with the members of a group, not with their square; in training too, where a block is
    computed again in the backward pass.

    Args:
        q, k, v: (N, h, L, d).
        table: biases by offset, (h, offsets).
        H, W: of the map before padding.

    Returns:
        (N, h, L, d).
    """
    if not is_padded(H, W, layout):
        return _blocks(q, k, v, table, layout, None)
    # Groups of one kind share their masked biases.
    kinds = kept(kinds_of_groups, H, W, layout, q.device)
    count = layout.rows * layout.cols * layout.interval**2
    q, k, v = (t.unflatten(0, (-1, count)) for t in (q, k, v))
    parts = []
    for numbers, real in kinds:
        one, its_keys, its_values = (t.index_select(1, numbers).flatten(0, 1) for t in (q, k, v))
        parts.append(_blocks(one, its_keys, its_values, table, layout, real).unflatten(0, (len(q), -1)))
    back = torch.cat([numbers for numbers, _ in kinds]).argsort()
    return torch.cat(parts, dim=1).index_select(1, back).flatten(0, 1)


def _blocks(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout, real: Tensor | None) -> Tensor:
    """`blocked_attention` of groups that have the same members real, (L,)."""
    gh, gw = layout.gh, layout.gw
    heads, L = q.shape[1], gh * gw
    step = max(1, min(gh, BLOCK // (heads * gw * L)))  # rows of queries in a block
    rows = kept(relative_rows, step, gh, gw, q.device)
    again = torch.is_grad_enabled() and (q.requires_grad or table.requires_grad)
    blocks = []
    for y in range(0, gh, step):
        queries = q[:, :, y * gw : (y + step) * gw]
        further = table[:, y * (2 * gw - 1) :]  # see `relative_rows`
        args = (queries, k, v, further, rows[: queries.shape[2] * L], real)
        if again:
            blocks.append(checkpoint(_block, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_block(*args))
    return torch.cat(blocks, dim=2)


def _block(q: Tensor, k: Tensor, v: Tensor, table: Tensor, rows: Tensor, real: Tensor | None) -> Tensor:
    bias = table.index_select(1, rows).view(1, q.shape[1], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=masked(bias, real))
