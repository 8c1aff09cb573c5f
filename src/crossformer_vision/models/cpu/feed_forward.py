"""The MLP of a block on CPUs: chunked in inference, with GELU recomputed in training."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.compat import has_hooks, is_batched
from crossformer_vision.models.cpu.chunking import (
    autograd_gradients,
    chunk_slices,
    chunked_apply,
    needs_cpu_grad,
)


def feed_forward(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """``fc2(gelu(fc1(x)))``.

    The hidden map is the largest tensor of the network. CPU inference computes it in chunks that stay in the
    cache; CPU training stores it once, before GELU.

    Args:
        x: Shape ``(..., C)``.
        fc1: First layer.
        fc2: Second layer.
    """

    def mlp(chunk: Tensor) -> Tensor:
        return gelu_linear(fc1(chunk), fc2)

    return chunked_apply(1, mlp, x.flatten(0, -2)).view_as(x)


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """``linear(gelu(x))`` for ``x`` of shape ``(N, hidden)``; CPU training does not store ``gelu(x)``."""
    return linear_of_gelu(x, linear.weight, linear.bias) if is_plain(linear) else linear(F.gelu(x))


def linear_of_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu_linear`` for the weights of a layer.

    Args:
        x: Shape ``(N, hidden)``.
        weight: Shape ``(C, hidden)``.
        bias: Shape ``(C,)``.
    """
    if needs_cpu_grad(x, weight):
        if not torch.is_autocast_enabled("cpu") or x.dtype == torch.get_autocast_dtype("cpu"):
            return GeluLinear.apply(x, weight, bias)
    return F.linear(F.gelu(x), weight, bias)


def is_plain(linear: nn.Linear) -> bool:
    """Whether a layer may be bypassed: it has a bias and no adapter, parametrization or hook."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or linear.bias is None:
        return False
    return not has_hooks(linear)


class GeluLinear(torch.autograd.Function):
    """``linear(gelu(x))`` that recomputes ``gelu(x)``, the largest tensor, in the backward pass."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """See ``gelu_linear``."""
        ctx.save_for_backward(x, weight)
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)  # once, not by autocast in each chunk
        return chunked_apply(1, lambda chunk: F.linear(F.gelu(chunk), weight, bias), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        x, weight = ctx.saved_tensors
        if is_batched(grad):
            bias = weight.new_zeros(len(weight))  # its value does not matter
            return autograd_gradients(lambda x, *p: F.linear(F.gelu(x), *p), (x, weight, bias), grad)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        weight_grad = bias_grad = None
        with torch.autocast("cpu", enabled=False):
            for chunk in chunk_slices(x, 1):
                if x_grad is not None:
                    activation_grad = grad[chunk] @ weight.to(grad.dtype)
                    x_grad[chunk] = torch.ops.aten.gelu_backward(activation_grad, x[chunk])
                if ctx.needs_input_grad[1]:
                    part = (grad[chunk].t() @ F.gelu(x[chunk])).to(dtype)
                    weight_grad = part if weight_grad is None else weight_grad + part
            if ctx.needs_input_grad[2]:
                bias_grad = grad.sum(0, dtype=dtype).to(weight.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return x_grad, weight_grad, bias_grad
