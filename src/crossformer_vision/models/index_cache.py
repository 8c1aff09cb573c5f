"""Cache of index tensors, which depend on sizes and devices but never on weights."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import TypeVarTuple, Unpack

from crossformer_vision.compat import in_dispatch_mode, in_functional_transform
from crossformer_vision.models.tracing import is_traced

T = TypeVar("T", bound=Tensor | Iterable[Tensor | Iterable[Tensor]])
Ts = TypeVarTuple("Ts")

MAX_BYTES = 64 << 20
_cache: dict[tuple[object, ...], Any] = {}


def cached(build: Callable[[Unpack[Ts]], T], *args: Unpack[Ts]) -> T:
    """``build(*args)``, computed once and shared by all blocks and models.

    The cache holds at most ``MAX_BYTES``. It is bypassed while tensors are symbolic or fake (compilation,
    tracing, dispatch modes, functional transforms). Threads may build the same entry twice but never see a
    partial one.

    Args:
        build: Function that creates a tensor, or a list of tuples of tensors.
        *args: Its hashable arguments.
    """
    if is_traced() or in_dispatch_mode() or in_functional_transform():
        return build(*args)
    key = (build, *args)
    value = _cache.get(key)
    if value is None:
        with torch.inference_mode(False):  # an inference tensor would break a later backward pass
            value = build(*args)
        if sum(map(_num_bytes, [*_cache.values(), value])) > MAX_BYTES:
            _cache.clear()
        if _num_bytes(value) <= MAX_BYTES:
            _cache[key] = value
    return value


def _num_bytes(value: Tensor | Iterable[Tensor | Iterable[Tensor]]) -> int:
    return value.nbytes if isinstance(value, Tensor) else sum(map(_num_bytes, value))
