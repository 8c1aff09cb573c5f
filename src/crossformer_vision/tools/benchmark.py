"""Throughput, latency and memory of models, compared in one interleaved run."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from crossformer_vision.compat import compiler_config
from crossformer_vision.devices import emulation_note
from crossformer_vision.errors import UserError, check_range, counted
from crossformer_vision.files import create_output_dir
from crossformer_vision.tools.benchmark_report import write_report
from crossformer_vision.tools.benchmark_step import DTYPES, FROZEN, Row, Step, create_network, parse_spec
from crossformer_vision.tools.info import count_macs
from crossformer_vision.tools.timing import peak_memory, time_interleaved
from crossformer_vision.training.run import environment_info
from crossformer_vision.types import JsonObject


def _comparable_outputs(out: object) -> list[Tensor]:
    """Logits or feature maps in float32; empty for other outputs."""
    if isinstance(out, Tensor):
        return [out.detach().float()]
    if isinstance(out, (list, tuple)) and all(isinstance(o, Tensor) for o in out):
        return [o.detach().float() for o in out]
    return []


def relative_difference(out: object, reference: object) -> float | None:
    """Maximum difference of two outputs, in relation to the maximum of the second.

    Args:
        out: Output of a network.
        reference: Output to compare with.

    Returns:
        ``None`` if they are neither logits nor feature maps.
    """
    pairs = list(zip(_comparable_outputs(out), _comparable_outputs(reference)))
    if not pairs:
        return None
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def run_benchmark(
    rows: list[Row],
    device: torch.device,
    rounds: int = 7,
    seconds: float = 2.0,
    log: Callable[[str], None] = print,
) -> list[JsonObject]:
    """Time all rows in one interleaved run.

    Args:
        rows: Rows of the benchmark.
        device: Device of the networks.
        rounds: Minimum number of rounds.
        seconds: Approximate total time of all rounds of one row.
        log: Called with a line for each row.

    Returns:
        A dictionary for each row: the fields of `Row`; ``images_per_second``; ``ms_median``, ``ms_90`` and
        ``ms_99`` of a call; ``ratio`` to the first row and ``ratio_in_mode`` to the first row of the same
        mode; ``memory``, the memory peak of a step in bytes; ``parameters``; ``macs`` of an image;
        ``peak_share``, the share of the throughput of a matrix product of the same dtype, where a training
        step counts as three forward passes; ``first_call`` in seconds; ``difference``, the maximum difference
        from the eager float32 outputs in relation to their maximum. A row that could not be run has ``error``
        instead.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # synchronization and memory statistics refer to the current device
    results: list[JsonObject] = []
    calls: dict[str, Callable[[], object]] = {}
    references: dict[tuple[object, ...], object] = {}
    for row in rows:
        log(f"  {row}")
        entry: JsonObject = {**row.__dict__, "size": list(row.size)}
        results.append(entry)
        try:
            calls[str(row)] = _prepare(row, device, entry, references)
        except UserError:
            raise
        except Exception as error:  # the other rows are still compared
            entry["error"] = (str(error) or type(error).__name__).splitlines()[0]
    times = time_interleaved(calls | matrix_products(rows, device), seconds, rounds)
    medians = {name: statistics.median(row_times) for name, row_times in times.items()}
    first_rates: dict[tuple[object, ...], float] = {}
    for row, entry in zip(rows, results):
        if "error" in entry:
            continue
        row_times = sorted(times[str(row)])
        rate = row.batch / medians[str(row)]
        first_rates.setdefault(row.mode, rate)
        first_rates.setdefault((), rate)
        entry["images_per_second"] = rate
        for p in (90, 99):
            entry[f"ms_{p}"] = 1e3 * row_times[min(len(row_times) - 1, len(row_times) * p // 100)]
        entry["ms_median"] = 1e3 * medians[str(row)]
        entry["ratio"], entry["ratio_in_mode"] = rate / first_rates[()], rate / first_rates[row.mode]
        if entry.get("macs"):
            flops = 2 * entry["macs"] * rate * (3 if row.is_training else 1)
            entry["peak_share"] = flops / (2 * product_side(device) ** 3 / medians[product_name(row)])
    return results


def _prepare(
    row: Row, device: torch.device, entry: JsonObject, references: dict[tuple[object, ...], object]
) -> Step:
    """Compile a row and measure everything but its time.

    Args:
        row: Row of the benchmark.
        device: Device of the network.
        entry: Result of the row, which is filled in.
        references: Outputs of the eager float32 networks, which are shared by rows.

    Returns:
        The step to time.
    """
    step = Step(row, device)
    started = time.perf_counter()
    with compiler_config(freezing=row.engine in FROZEN):
        out = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        entry["first_call"] = round(time.perf_counter() - started, 2)
        step()  # training may compile again for the gradients
    if not (row.is_training or row.is_exported):
        key = (row.model, row.size, row.batch)
        if key not in references:
            reference = Row(row.model, row.size, batch=row.batch)
            references[key] = out if reference == row else Step(reference, device)()
        entry["difference"] = relative_difference(out, references[key])
    if not row.is_exported:
        entry["memory"] = peak_memory(step, device)
        entry["parameters"] = sum(p.numel() for p in step.net.parameters())
        entry["macs"] = row_macs(row)
    return step


def product_side(device: torch.device) -> int:
    """Side of the matrix product that measures peak throughput. Small ones are launch-bound on GPUs."""
    return 2048 if device.type == "cpu" else 8192


def product_name(row: Row) -> str:
    """Name of the matrix product with the dtype of a row."""
    weights, autocast = DTYPES[row.dtype]
    return f"matrix product {autocast or weights}"


def matrix_products(rows: list[Row], device: torch.device) -> dict[str, Callable[[], object]]:
    """A matrix product for each dtype of the rows.

    Args:
        rows: Rows of the benchmark.
        device: Device of the matrices.
    """
    calls: dict[str, Callable[[], object]] = {}
    side = product_side(device)
    for row in rows:
        weights, autocast = DTYPES[row.dtype]
        x = torch.randn(side, side, device=device).to(autocast or weights)
        calls[product_name(row)] = partial(torch.mm, x, x)
    return calls


def row_macs(row: Row) -> float | None:
    """Multiply-accumulates of an image, or ``None`` if the network does not support meta tensors."""
    try:
        with torch.device("meta"):
            # The counter registers a gradient hook on outputs. A bias table is a parameter and an output.
            return count_macs(create_network(row).eval().requires_grad_(False), *row.size)
    except Exception:  # networks raise errors of any type for meta tensors
        return None


def run(rows: list[Row], device: torch.device, rounds: int, output: Path) -> list[JsonObject]:
    """Run a benchmark, print its table and write its files.

    Args:
        rows: Rows of the benchmark.
        device: Device of the networks.
        rounds: Minimum number of rounds.
        output: Directory for ``benchmark.json``, ``.md``, ``.csv`` and ``.png``.

    Returns:
        Results of `run_benchmark`.

    Raises:
        UserError: If a model or file does not exist or, at the end, if no row could be run.
    """
    for row in rows:
        if row.is_exported:
            if not Path(row.model).is_file():
                raise UserError(f"{row.model}: no such file")
        else:
            parse_spec(row.model)
        check_range("batch", row.batch, 1)
    for dtype in dict.fromkeys(autocast or weights for weights, autocast in (DTYPES[r.dtype] for r in rows)):
        if note := emulation_note(device, dtype):
            print(f"note: {note}")
    create_output_dir(output)
    print(f"{counted(len(rows), 'row')} on {device}:")
    results = run_benchmark(rows, device, rounds)
    write_report(results, {"threads": torch.get_num_threads(), **environment_info()}, output)
    if all("error" in entry for entry in results):
        raise UserError(f"none of the rows could be run: {rows[0]}: {results[0]['error']}")
    return results
