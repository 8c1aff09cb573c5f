"""Networks by turns, each in a process of its own, with and without what glibc gives back to the system.

    python docs/results/heap.py swin_tiny_patch4_window7_224 crossformer_small --step training --rounds 11

prints milliseconds of a call (median), the speed as a ratio to the first network's, and the page faults of
the last call. What is timed is named as for `crossformer benchmark`.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection

import torch

from crossformer_vision.cli import keep_freed_memory
from crossformer_vision.tools.benchmark_step import DTYPES, ENGINES, Row, Step, parse_size


def serve(row: Row, keep: bool, pipe: Connection) -> None:
    if keep:
        keep_freed_memory()
    step = Step(row, torch.device("cpu"))
    with step.compiling():
        step()
        step()
    pipe.send(None)
    while pipe.recv():
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="+")
    parser.add_argument("--size", type=parse_size, default=(224, 224))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--step", choices=("inference", "training"), default="inference")
    parser.add_argument("--engine", choices=ENGINES, default="eager")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[tuple[str, bool], Connection] = {}
    for keep in (False, True):
        for what in given.what:
            pipes[what, keep], end = spawn.Pipe()
            row = Row(what, given.size, given.step, given.engine, given.dtype, given.batch)
            spawn.Process(target=serve, args=(row, keep, end), daemon=True).start()
            end.close()  # so that a process that fails ends the pipe
            pipes[what, keep].recv()
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in pipes}
    faults = {}
    for _ in range(given.rounds):
        for key, pipe in pipes.items():
            pipe.send(True)
            seconds, faults[key] = pipe.recv()
            times[key].append(seconds)
    for (what, keep), spent in times.items():
        first = statistics.median(times[given.what[0], keep])
        ms = statistics.median(spent)
        heap = "kept" if keep else "given back"
        print(f"{what}: {heap}, {1e3 * ms:.0f} ms, {first / ms:.2f}, {faults[what, keep]} faults")
    for pipe in pipes.values():
        pipe.send(False)


if __name__ == "__main__":
    main()
