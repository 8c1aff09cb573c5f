"""Decisions about sizes that hold for compiled, traced and exported graphs."""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def may_differ(a: int, b: int) -> bool:
    """``a != b``; ``True`` if symbolic sizes do not decide it, so that the graph must support both cases."""
    return not is_known(a == b)


def is_known(condition: bool) -> bool:
    """Whether a condition holds for all sizes of a graph. ``torch.jit.trace`` fixes the example's sizes."""
    return bool(condition) if torch.jit.is_tracing() else statically_known_true(condition)


def is_open(a: int, b: int) -> bool:
    """Whether symbolic sizes do not decide if ``a`` and ``b`` are equal."""
    return not (is_known(a == b) or is_known(a != b))


def sym_min(a: int, b: int) -> int:
    """``min(a, b)`` that an exported graph computes at run time."""
    return torch.sym_min(a, b) if torch.compiler.is_exporting() else min(a, b)  # type: ignore[return-value]


def sym_max(a: int, b: int) -> int:
    """``max(a, b)`` that an exported graph computes at run time."""
    return torch.sym_max(a, b) if torch.compiler.is_exporting() else max(a, b)  # type: ignore[return-value]


def is_traced() -> bool:
    """Whether operations are being compiled, exported or traced instead of executed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
