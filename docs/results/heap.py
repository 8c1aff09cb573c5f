"""Time networks in separate processes, with glibc's default settings and with freed memory kept.

    python docs/results/heap.py swin_tiny_patch4_window7_224 crossformer_small --step training --rounds 11

times the processes in turn. It prints the median time per call in milliseconds, the speed relative to the
first network, and the page faults of the last call. Models are named as for `crossformer benchmark`.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection

import torch

from crossformer_vision.cli.process import keep_freed_memory
from crossformer_vision.compat import compiler_config
from crossformer_vision.tools.benchmark_step import DTYPES, ENGINES, FROZEN, Row, Step, parse_size


def serve(row: Row, keep: bool, pipe: Connection) -> None:
    """Run a step each time the pipe receives true, and send its seconds and page faults."""
    if keep:
        keep_freed_memory()
    step = Step(row, torch.device("cpu"))
    with compiler_config(freezing=row.engine in FROZEN):
        step()
        step()
    pipe.send(None)
    while pipe.recv():
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))


def main() -> None:
    """Start the processes, time them in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--size", type=parse_size, default=(224, 224))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--step", choices=("inference", "training"), default="inference")
    parser.add_argument("--engine", choices=ENGINES, default="eager")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[tuple[str, bool], Connection] = {}
    for keep in (False, True):
        for model in given.models:
            pipes[model, keep], end = spawn.Pipe()
            row = Row(model, given.size, given.step, given.engine, given.dtype, given.batch_size)
            spawn.Process(target=serve, args=(row, keep, end), daemon=True).start()
            end.close()  # otherwise recv would wait forever for a process that has failed
            pipes[model, keep].recv()
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in pipes}
    faults = {}
    for _ in range(given.rounds):
        for key, pipe in pipes.items():
            pipe.send(True)
            seconds, faults[key] = pipe.recv()
            times[key].append(seconds)
    for (model, keep), seconds_of_calls in times.items():
        first = statistics.median(times[given.models[0], keep])
        median = statistics.median(seconds_of_calls)
        heap = "memory kept" if keep else "default settings"
        print(f"{model}: {heap}, {1e3 * median:.0f} ms, {first / median:.2f}, {faults[model, keep]} faults")
    for pipe in pipes.values():
        pipe.send(False)


if __name__ == "__main__":
    main()
