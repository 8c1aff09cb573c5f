"""Split projections into attention heads, join heads, and mask keys."""

import torch
from torch import Tensor

MASKED_LOGIT = -3e4  # finite in float16, so that a fully masked group does not give NaN


def apply_key_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """The bias, with a value far below any logit for masked keys.

    Args:
        bias: Position bias, shape ``(1, h, L, L)`` or ``(N, h, L, L)``.
        mask: ``True`` for valid keys, broadcastable to the bias. ``None`` if all are valid.
    """
    return bias if mask is None else torch.where(mask, bias, MASKED_LOGIT)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed projections of shape ``(N, L, 3 * C)`` into queries, keys and values ``(N, h, L, d)``."""
    N, L, C = qkv.shape
    q, k, v = qkv.view(N, L, 3, num_heads, C // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def join_heads(x: Tensor) -> Tensor:
    """``(N, h, L, d)`` to ``(N, L, C)``."""
    return x.transpose(1, 2).flatten(2)
