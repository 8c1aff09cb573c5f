"""How fast networks are, beside one another."""

import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    calls: dict[str, Callable[[], object]], seconds: float = 2.0, rounds: int = 7
) -> dict[str, list[float]]:
    """Seconds of each call, in `rounds` of all of them by turns.

    By turns, since a machine's speed changes by more than what is to be told apart; a ratio of two medians of
    one run is what can be compared with another's.

    Args:
        calls: name -> what is timed; each is called once before.
        seconds: about how long all rounds of a call take together.
        rounds: at least three.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(max(3, rounds) * 50):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        if done + 1 >= max(3, rounds) and time.perf_counter() - began > seconds * len(calls):
            break
    return times


def images_per_second(times: list[float], batch: int) -> float:
    """Of the median call."""
    return batch / statistics.median(times)
