"""Muon with matrices of one shape orthogonalized in one batch."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Muon
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor

from crossformer_vision.compat import (
    foreach_add_,
    foreach_lerp,
    foreach_lerp_,
    foreach_mul_,
    is_muon_matrix,
    muon_coefficients,
)
from crossformer_vision.devices import computes_fast
from crossformer_vision.types import Kwargs

GRAM_ASPECT_RATIO = 1.5  # at which iterating on the Gram matrix starts to need fewer operations


class BatchedMuon(Muon):
    """timm's Muon for matrices, in one batch per shape and in a dtype that the device computes fast.

    timm orthogonalizes one matrix at a time and in bfloat16 on every device, which CPUs without bfloat16
    instructions emulate. Everything else is timm's: momentum, scaling of the learning rate, AdamW or NAdamW
    for parameters that are not matrices, and the layout of the state.

    Args:
        params: Parameters or parameter groups.
        **options: Options of ``timm.optim.Muon`` except ``algo``, ``conv_mode``, ``capturable`` and
            ``scale_eps``, which keep their defaults.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            Loss of ``closure``, or ``None`` without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = [self._matrices(group) for group in self.param_groups]
        gradients = [[p.grad for p in params] for params in matrices]
        for group, params in zip(self.param_groups, matrices):
            self._update_matrices(group, params)
            for p in params:
                p.grad = None  # so that timm's step skips them
        try:
            super().step()
        finally:
            for params, saved in zip(matrices, gradients):
                for p, gradient in zip(params, saved):
                    p.grad = gradient
        return loss

    def _matrices(self, group: Kwargs) -> list[Tensor]:
        """Parameters of a group that Muon updates, selected by shape at their first step, as in timm."""
        matrices = []
        for p in group["params"]:
            if p.grad is None or p.grad.is_sparse:
                continue
            state = self.state[p]
            if "use_muon" not in state:
                state["use_muon"] = is_muon_matrix(p)
            if state["use_muon"]:
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                matrices.append(p)
        return matrices

    def _update_matrices(self, group: Kwargs, params: list[Tensor]) -> None:
        if not params:
            return
        lr, momentum = group["lr"], group["momentum"]
        gradients = [p.grad for p in params if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        foreach_mul_(params, 1 - lr * group["weight_decay"])
        foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = list(foreach_lerp(gradients, buffers, momentum)) if group["nesterov"] else buffers
        by_shape: dict[tuple[torch.Size, torch.device], list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            by_shape[p.shape, p.device].append(i)
        coefficients = muon_coefficients(group["ns_coefficients"])
        coefficients += coefficients[-1:] * (group["ns_steps"] - len(coefficients))
        for (shape, _), numbers in by_shape.items():
            stacked = torch.stack([updates[i].flatten(1) for i in numbers])
            directions = orthogonalize(stacked, coefficients[: group["ns_steps"]], group["eps"])
            adjust = group["adjust_lr_fn"]
            scale = get_lr_scale(directions.shape, adjust) if adjust else 1.0
            steps = directions.to(stacked.dtype).unflatten(2, shape[1:]).unbind(0)
            foreach_add_([params[i] for i in numbers], steps, alpha=-lr * scale)


def orthogonalize(
    matrices: Tensor, coefficients: list[tuple[float, float, float]], eps: float = 1e-7
) -> Tensor:
    """Replace singular values of matrices by about 1, by the Newton-Schulz iteration of Muon.

    Accelerators that compute bfloat16 fast iterate in it, as timm does. CPUs iterate in float32: on the Gram
    matrix where that needs fewer operations, which beats bfloat16 even on CPUs that have it.

    Args:
        matrices: Matrices of one shape, ``(N, rows, columns)``.
        coefficients: ``(a, b, c)`` of each iteration ``a X + b (X X^T) X + c (X X^T)^2 X``.
        eps: Smallest Frobenius norm that a matrix is divided by.

    Returns:
        Orthogonalized matrices, ``(N, rows, columns)``, in the dtype of the iteration.
    """
    device = matrices.device
    if device.type != "cpu" and computes_fast(device, torch.bfloat16):
        return zeropower_via_newtonschulz(
            matrices, len(coefficients), coefficients, eps, dtype=torch.bfloat16
        )
    rows, columns = matrices.shape[1:]
    if max(rows, columns) < GRAM_ASPECT_RATIO * min(rows, columns):
        return zeropower_via_newtonschulz(matrices, len(coefficients), coefficients, eps, dtype=torch.float32)
    return gram_newton_schulz(matrices.float(), coefficients, eps)


def gram_newton_schulz(
    matrices: Tensor, coefficients: list[tuple[float, float, float]], eps: float = 1e-7
) -> Tensor:
    """The Newton-Schulz iteration on Gram matrices: only its first and last product involve the long side.

    With ``A = X X^T`` an iteration is ``X <- Q X`` and ``A <- Q A Q`` where ``Q = a I + b A + c A^2``.

    Args:
        matrices: Matrices of one shape, ``(N, rows, columns)``, float32.
        coefficients: ``(a, b, c)`` of each iteration.
        eps: Smallest Frobenius norm that a matrix is divided by.

    Returns:
        Orthogonalized matrices, ``(N, rows, columns)``, float32.
    """
    if matrices.size(1) > matrices.size(2):
        return gram_newton_schulz(matrices.mT, coefficients, eps).mT
    X = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    A = torch.bmm(X, X.mT)
    product: Tensor | None = None
    for k, (a, b, c) in enumerate(coefficients):
        Q = torch.baddbmm(A, A, A, beta=b, alpha=c)
        Q.diagonal(dim1=1, dim2=2).add_(a)
        product = Q if product is None else torch.bmm(Q, product)
        if k + 1 < len(coefficients):
            A = torch.bmm(torch.bmm(Q, A), Q)
    return X if product is None else torch.bmm(product, X)
