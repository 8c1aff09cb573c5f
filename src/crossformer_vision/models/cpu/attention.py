"""Attention on CPUs: recomputed in training, plain products under functional transforms."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from crossformer_vision.compat import is_batched, softmax_backward
from crossformer_vision.models.cpu.chunking import (
    autograd_gradients,
    chunk_slices,
    chunked_apply,
    in_functorch,
    needs_cpu_grad,
)
from crossformer_vision.models.heads import apply_key_mask, join_heads, split_heads


def attend_on_cpu(
    qkv: Tensor, num_heads: int, bias: Tensor, key_padding_mask: Tensor | None
) -> Tensor | None:
    """Attention for cases in which CPUs need a separate implementation.

    In training, attention matrices are recomputed in the backward pass instead of stored, which is faster and
    saves memory. Under functional transforms, the fused kernel has no gradient for a bias.

    Args:
        qkv: See ``models.attention.group_attention``, as for the other arguments.
        num_heads: Number of attention heads.
        bias: Position bias.
        key_padding_mask: Mask of valid keys.

    Returns:
        Attention output, or ``None`` where PyTorch's fused kernel is the right choice.
    """
    if needs_cpu_grad(qkv, bias):
        return RecomputedAttention.apply(qkv, num_heads, bias, key_padding_mask)
    if qkv.device.type == "cpu" and in_functorch():
        return plain_attention(qkv, num_heads, bias, key_padding_mask)
    return None


def plain_attention(qkv: Tensor, num_heads: int, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as matrix products and softmax.

    Args:
        qkv: Packed queries, keys and values, ``(N, L, 3 * C)``.
        num_heads: Number of heads.
        bias: Position bias, ``(1, num_heads, L, L)``.
        mask: Key padding mask, or ``None``.
    """
    q, k, v = contiguous_heads(qkv, num_heads)
    x = attention_weights(q, k, num_heads, bias, mask) @ v
    return join_heads(x.unflatten(0, (-1, num_heads)))


def fused_attention(qkv: Tensor, num_heads: int, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by PyTorch's fused kernel.

    Args:
        qkv: Packed queries, keys and values, ``(N, L, 3 * C)``.
        num_heads: Number of heads.
        bias: Position bias, ``(1, num_heads, L, L)``.
        mask: Key padding mask, or ``None``.
    """
    q, k, v = split_heads(qkv, num_heads)
    return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=apply_key_mask(bias, mask)))


def contiguous_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries, keys and values, contiguous and of shape ``(N * h, L, d)``, from ``(N, L, 3 * C)``."""
    N, L, C = qkv.shape
    d = C // (3 * num_heads)
    q, k, v = qkv.view(N, L, 3, num_heads, d).permute(2, 0, 3, 1, 4).reshape(3, N * num_heads, L, d).unbind(0)
    return q * d**-0.5, k, v


def attention_weights(q: Tensor, k: Tensor, num_heads: int, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of scaled queries ``(N * h, L, d)`` with keys, shape ``(N * h, L, L)``.

    Args:
        q: Scaled queries, ``(N * num_heads, L, d)``.
        k: Keys, ``(N * num_heads, L, d)``.
        num_heads: Number of heads.
        bias: Position bias, ``(1, num_heads, L, L)``.
        mask: Key padding mask, or ``None``.
    """
    groups = len(q) // num_heads
    logits = (q @ k.transpose(1, 2)).unflatten(0, (groups, num_heads)) + apply_key_mask(bias, mask)
    return logits.softmax(-1).flatten(0, 1)


class RecomputedAttention(torch.autograd.Function):
    """Attention for CPU training that recomputes attention matrices chunk by chunk in the backward pass.

    A chunk of groups goes through all steps while it is in the cache, which costs less time than reading
    stored matrices.
    """

    @staticmethod
    @override
    def forward(ctx: Any, qkv: Tensor, num_heads: int, bias: Tensor, mask: Tensor | None) -> Tensor:
        """See ``attend_on_cpu``."""
        ctx.num_heads = num_heads
        ctx.save_for_backward(qkv, bias, mask)
        # Inputs are detached because SDPA selects its kernel by requires_grad. In 16 bits the kernel is
        # slower than matrix products.
        attention = plain_attention if qkv.element_size() == 2 else fused_attention
        return chunked_apply(qkv.shape[1], attention, qkv.detach(), num_heads, bias.detach(), mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        """Gradients of ``qkv`` and the bias."""
        qkv, bias, mask = ctx.saved_tensors
        num_heads = ctx.num_heads
        if is_batched(grad):
            qkv_grad, bias_grad = autograd_gradients(
                lambda x, y: plain_attention(x, num_heads, y, mask), (qkv, bias), grad
            )
            return qkv_grad, None, bias_grad, None
        qkv_grad = torch.empty_like(qkv)
        bias_grads: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            for chunk in chunk_slices(qkv, qkv.shape[1]):
                logit_grad = _chunk_gradients(
                    qkv[chunk],
                    num_heads,
                    bias if len(bias) == 1 else bias[chunk],
                    None if mask is None else mask[chunk],
                    grad[chunk],
                    qkv_grad[chunk],
                )
                if ctx.needs_input_grad[2]:
                    bias_grads.append(_bias_gradient(logit_grad, bias, None if mask is None else mask[chunk]))
        if not bias_grads:
            return qkv_grad, None, None, None
        total = sum(bias_grads[1:], bias_grads[0]) if len(bias) == 1 else torch.cat(bias_grads)
        return qkv_grad, None, total.to(bias.dtype), None


def _chunk_gradients(
    qkv: Tensor, num_heads: int, bias: Tensor, mask: Tensor | None, grad: Tensor, qkv_grad: Tensor
) -> Tensor:
    """Write the gradient of a chunk's ``qkv`` in place.

    Returns:
        Gradient of the logits, shape ``(N, h, L, L)``.
    """
    q, k, v = contiguous_heads(qkv, num_heads)
    output_grad = grad.unflatten(2, (num_heads, q.shape[-1])).transpose(1, 2).flatten(0, 1)
    attention = attention_weights(q, k, num_heads, bias, mask)
    attention_grad = output_grad @ v.transpose(1, 2)
    logit_grad = softmax_backward(attention_grad, attention, qkv.dtype)
    q_grad = logit_grad @ k * q.shape[-1] ** -0.5
    k_grad = logit_grad.transpose(1, 2) @ q
    v_grad = attention.transpose(1, 2) @ output_grad
    parts = qkv_grad.unflatten(2, (3, num_heads, -1))
    for i, part in enumerate((q_grad, k_grad, v_grad)):
        parts[:, :, i] = part.unflatten(0, (-1, num_heads)).transpose(1, 2)
    return logit_grad.unflatten(0, (-1, num_heads))


def _bias_gradient(logit_grad: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of a chunk's bias: zero for masked keys, summed if all groups share the bias."""
    if mask is not None:
        logit_grad = logit_grad * mask
    if len(bias) == 1:
        dtype = torch.promote_types(bias.dtype, torch.float32)
        return logit_grad.sum(0, keepdim=True, dtype=dtype)
    return logit_grad
