"""Timing of functions in one interleaved run, and their memory peaks."""

import statistics
import time
from collections.abc import Callable

import torch


def time_interleaved(
    calls: dict[str, Callable[[], object]], seconds: float = 2.0, rounds: int = 7
) -> dict[str, list[float]]:
    """Time functions in turn, round by round.

    The speed of a machine drifts over minutes by more than the differences of interest, so only ratios of
    medians from the same interleaved run are comparable between runs.

    Args:
        calls: Functions by name. Each is called once for warm-up.
        seconds: Approximate total time of all rounds of one function.
        rounds: Minimum number of rounds, at least 3.

    Returns:
        Seconds of each call, by name.
    """
    accelerated = torch.accelerator.is_available()
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for round_index in range(max(3, rounds) * 50):
        for name, call in calls.items():
            if accelerated:
                torch.accelerator.synchronize()
            start = time.perf_counter()
            call()
            if accelerated:
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - start)
        if round_index + 1 >= max(3, rounds) and time.perf_counter() - started > seconds * len(calls):
            break
    return times


def images_per_second(times: list[float], batch: int) -> float:
    """Throughput of the median call.

    Args:
        times: Seconds of each call.
        batch: Images per call.
    """
    return batch / statistics.median(times)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Memory peak of a call in bytes, beyond what was allocated before, from torch's allocator.

    Args:
        call: Function.
        device: Device whose memory is measured.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    allocated = peak = 0
    for _, size in changes:
        allocated += size
        peak = max(peak, allocated)
    return peak
