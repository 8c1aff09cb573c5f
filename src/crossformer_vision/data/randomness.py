"""Seeds, and the state of all random number generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

NumpyState = dict[str, object] | tuple[str, NDArray[np.uint32], int, int, float]
RandomStates = tuple[tuple[object, ...], NumpyState, Tensor, Tensor | None]


def mix_seed(*parts: int) -> int:
    """One 32-bit seed from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_rng_state() -> RandomStates:
    """State of all generators, for ``set_rng_state``."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return *states, torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def set_rng_state(states: RandomStates) -> None:
    """Restore the state of all generators."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore all generators after a block. Does nothing in DataLoader workers."""
    if get_worker_info() is not None:
        yield
        return
    states = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(states)
