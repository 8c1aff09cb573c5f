"""Compute large tensors in chunks that stay in the CPU cache. Measurements: docs/results/speed.md."""

from collections.abc import Callable

import torch
from torch import Tensor

from crossformer_vision.compat import in_forward_ad, in_functional_transform
from crossformer_vision.models.tracing import is_traced

CHUNK_BYTES = 8192  # per channel; smaller chunks slow matrix products down, larger ones leave the cache


def chunk_slices(x: Tensor, positions: int) -> list[slice]:
    """Slices of dimension 0 that fit the cache; at least one.

    Args:
        x: Tensor to slice.
        positions: Positions of the map per entry of dimension 0.
    """
    size = max(1, CHUNK_BYTES // x.element_size() // positions)
    return [slice(start, start + size) for start in range(0, max(len(x), 1), size)]


def chunked_apply(positions: int, function: Callable[..., Tensor], x: Tensor, *args: object) -> Tensor:
    """``function(x, *args)``, computed chunk by chunk in CPU inference.

    Args:
        positions: Positions of the map per entry of ``x``.
        function: Function that treats entries of dimension 0 independently.
        x: Tensor to slice along dimension 0.
        *args: Further arguments. Tensors as long as ``x`` are sliced with it.
    """
    if x.device.type != "cpu" or is_traced() or torch.is_grad_enabled() or in_functorch():
        return function(x, *args)
    first, *others = chunk_slices(x, positions)
    if not others:
        return function(x, *args)
    tensors = [arg if isinstance(arg, Tensor) and len(arg) == len(x) else None for arg in args]

    def apply(chunk: slice) -> Tensor:
        sliced = (arg if t is None else t[chunk] for arg, t in zip(args, tensors, strict=True))
        return function(x[chunk], *sliced)

    y = apply(first)
    output = y.new_empty(len(x), *y.shape[1:])
    output[first] = y
    for chunk in others:
        output[chunk] = apply(chunk)  # while it is in the cache; torch.cat would read all chunks again
    return output


def needs_cpu_grad(*tensors: Tensor) -> bool:
    """Whether a CPU records gradients of these tensors eagerly: not compiled, traced or transformed."""
    return (
        tensors[0].device.type == "cpu"
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
        and not (is_traced() or in_functorch())
    )


def in_functorch() -> bool:
    """Whether torch.func (``grad``, ``vmap``, …), batched gradients or forward-mode AD are active."""
    if torch.compiler.is_compiling():
        return False
    return in_functional_transform() or in_forward_ad()


def autograd_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a function by autograd, for batched gradients, which do not allow in-place writes.

    Args:
        function: Function of the inputs.
        inputs: Tensors whose gradients are computed.
        grad: Gradient of the output.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = function(*leaves)
    return torch.autograd.grad(output, leaves, grad.to(output.dtype))
