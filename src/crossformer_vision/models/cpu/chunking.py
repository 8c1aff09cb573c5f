"""Computing a large tensor in pieces that stay in a CPU's cache, in inference and in training.

The largest tensors, of tens of MB, then never exist whole. What was measured stands in docs/results/speed.md.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossformer_vision.compat import in_forward_ad, is_batched


def piece_slices(x: Tensor, positions: int) -> list[slice]:
    """Pieces of the first dimension of `x`, whose entries have so many positions each; at least one.

    Smaller ones slow the products down, larger ones leave the cache.
    """
    size = max(1, 8192 // x.element_size() // positions)
    return [slice(start, start + size) for start in range(0, max(len(x), 1), size)]


def in_pieces(positions: int, f: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """`f(x, *args)`, computed over pieces of the first dimension by CPU inference.

    Tensors of `args` as long as `x` are cut with it.

    Args:
        positions: of the map in each entry of `x`.
    """
    at_once = (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled() or transformed()
    )
    if at_once or x.device.type != "cpu":
        return f(x, *args)
    first, *others = piece_slices(x, positions)
    if not others:
        return f(x, *args)
    cut = [isinstance(a, Tensor) and len(a) == len(x) for a in args]

    def piece(at: slice) -> Tensor:
        return f(x[at], *(a[at] if c else a for a, c in zip(args, cut, strict=True)))

    y = piece(first)
    whole = y.new_empty(len(x), *y.shape[1:])
    whole[first] = y
    for at in others:
        whole[at] = piece(at)  # while it is in the cache; `torch.cat` would read all of them again
    return whole


def trains_on_cpu(*tensors: Tensor) -> bool:
    """Whether a CPU computes gradients of these step by step: not compiled, traced or transformed."""
    return (
        tensors[0].device.type == "cpu"
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed())
    )


def transformed() -> bool:
    """Whether torch.func is at work (`grad`, `vmap` and the like), batched gradients, or forward-mode AD."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or in_forward_ad()


def plain_gradients(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a function by autograd, for batched gradients, which in-place writes do not allow.

    Args:
        f: Function of the inputs.
        inputs: Tensors that gradients are computed for.
        grad: Gradient of the output.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = f(*leaves)
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """`linear(gelu(x))`, (N, hidden) -> (N, dim); a CPU's training does not keep `gelu(x)`."""
    if is_plain(linear) and trains_on_cpu(x, linear.weight):
        if not torch.is_autocast_enabled("cpu") or x.dtype == torch.get_autocast_dtype("cpu"):
            return GeluLinear.apply(x, linear.weight, linear.bias)
    return linear(F.gelu(x))


def is_plain(linear: nn.Linear) -> bool:
    """Whether its weights may be used without a call: no adapter, parametrisation, hook or missing bias."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or linear.bias is None:
        return False
    hooks = (linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks)
    return not any((*hooks, linear._backward_hooks))


class GeluLinear(torch.autograd.Function):
    """`linear(gelu(x))`; `gelu(x)`, with `x` the largest tensor of a network, is made again for the
    gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)  # once, not by autocast in each piece
        return in_pieces(1, lambda piece: F.linear(F.gelu(piece), weight, bias), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if is_batched(grad):
            bias = weight.new_zeros(len(weight))  # its value does not matter
            return plain_gradients(lambda x, *params: F.linear(F.gelu(x), *params), (x, weight, bias), grad)
        exact = torch.promote_types(weight.dtype, torch.float32)
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        weight_grad = bias_grad = None
        with torch.autocast("cpu", enabled=False):
            for at in piece_slices(x, 1):
                if x_grad is not None:
                    activation_grad = grad[at] @ weight.to(grad.dtype)
                    x_grad[at] = torch.ops.aten.gelu_backward(activation_grad, x[at])
                if ctx.needs_input_grad[1]:
                    part = (grad[at].t() @ F.gelu(x[at])).to(exact)
                    weight_grad = part if weight_grad is None else weight_grad + part
            if ctx.needs_input_grad[2]:
                bias_grad = grad.sum(0, dtype=exact).to(weight.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return x_grad, weight_grad, bias_grad
