"""Table and plot of a grid's results."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crossformer_vision.errors import UserError, error_line
from crossformer_vision.files import write_csv, write_json, write_text
from crossformer_vision.inference.load import load_predictor
from crossformer_vision.plotting import visualize
from crossformer_vision.plotting.fonts import use_fonts_for
from crossformer_vision.tools.grid import Grid, folder_name
from crossformer_vision.tools.timing import images_per_second, time_interleaved
from crossformer_vision.training.run import environment_info
from crossformer_vision.types import JsonObject

Results = dict[str, dict[int, JsonObject]]
"""Content of ``results.json`` by row and seed."""


def write_report(grid: Grid, results: Results, errors: dict[str, str], output_dir: Path) -> JsonObject:
    """Write ``compare.md``, ``.csv``, ``.json`` and ``.png``, and print the table.

    Args:
        grid: The grid.
        results: Results of its cells.
        errors: Error of each failed cell.
        output_dir: Directory of the runs and the table.

    Returns:
        Content of ``compare.json``.

    Raises:
        UserError: If cells have failed, after the table is written.
    """
    metric = next((r["metric"] for seeds in results.values() for r in seeds.values()), "score")
    first_runs = {row: next(iter(seeds.items())) for row, seeds in results.items() if seeds}
    speeds = measure_throughput(
        {
            row: (output_dir / folder_name(row) / f"seed-{seed}", result["image_size"])
            for row, (seed, result) in first_runs.items()
        }
    )
    rows = [summarize(row, results, metric, speeds) for row in grid.rows]
    scores = {row: {str(s): r[metric] for s, r in sorted(seeds.items())} for row, seeds in results.items()}
    content = {"metric": metric, "rows": rows, "cells": scores, "failed": errors, **environment_info()}
    write_json(output_dir / "compare.json", content)
    write_csv(output_dir / "compare.csv", rows)
    table = [format_row(row) for row in rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header(metric), ["---"] * len(table[0]), *table)]
    write_text(output_dir / "compare.md", "\n".join(lines) + "\n")
    if any(row["mean"] is not None and row["macs"] for row in rows):
        plot(rows, metric, output_dir / "compare.png")
    print_table(header(metric), table)
    done, total = sum(map(len, results.values())), len(grid.rows) * len(grid.seeds)
    print(f"{done} of {total} cells; compare.md, .csv, .json and .png in {output_dir}")
    if errors:
        cell, line = next(iter(errors.items()))
        raise UserError(f"{len(errors)} cells failed, such as {cell}: {line}")
    return content


def summarize(row: str, results: Results, metric: str, speeds: dict[str, float]) -> JsonObject:
    """A row of the table; unknown values are ``None``.

    Args:
        row: Name of the row.
        results: Results of all rows. The first row is the baseline.
        metric: Metric to compare. ``p`` is the p-value of a paired t-test over the seeds of both rows.
        speeds: Images per second by row.
    """
    baseline = next(iter(results))
    scores = {seed: float(result[metric]) for seed, result in results[row].items()}
    shared_seeds = [seed for seed in scores if seed in results[baseline]]
    differences = [scores[seed] - float(results[baseline][seed][metric]) for seed in shared_seeds]
    result = next(iter(results[row].values()), {})
    is_compared = row != baseline and bool(differences)
    return {
        "row": row,
        "seeds": len(scores),
        "mean": statistics.mean(scores.values()) if scores else None,
        "std": statistics.stdev(scores.values()) if len(scores) > 1 else None,
        "difference": statistics.mean(differences) if is_compared else None,
        "p": paired_p(differences) if is_compared else None,
        "parameters": result.get("parameters"),
        "macs": result.get("macs"),
        "images_per_second": round(speeds[row], 1) if row in speeds else None,
        "speed": round(speeds[row] / speeds[baseline], 3) if {row, baseline} <= speeds.keys() else None,
    }


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a t-test for a mean of zero; ``None`` for fewer than two or for equal differences."""
    from scipy import stats

    if len(differences) < 2 or max(differences) == min(differences):
        return None
    return float(stats.ttest_1samp(differences, 0).pvalue)


@torch.no_grad()
def measure_throughput(runs: dict[str, tuple[Path, Sequence[int]]], batch_size: int = 16) -> dict[str, float]:
    """Images per second of networks in float32, measured in one interleaved run.

    Skips runs on other machines, and networks that fail, for which the error is printed.

    Args:
        runs: Run directory, and height and width of the images, by row.
        batch_size: Images per batch.
    """
    calls: dict[str, Callable[[], object]] = {}
    for row, (run_dir, size) in runs.items():
        paths = [run_dir / name for name in ("best.ckpt", "last.ckpt") if (run_dir / name).is_file()]
        if not paths:
            continue
        predictor = load_predictor(paths[0])
        images = torch.rand(batch_size, 3, *size, device=predictor.device)
        call = partial(predictor.net, list(images) if predictor.task == "detection" else images)
        try:
            call()
        except Exception as error:  # such as too little memory
            print(f"{row}: not timed ({error_line(error)})", flush=True)
        else:
            calls[row] = call
    times = time_interleaved(calls) if calls else {}
    return {row: images_per_second(seconds, batch_size) for row, seconds in times.items()}


def header(metric: str) -> list[str]:
    """Column titles of the table."""
    name = metric.removeprefix("val_")
    return ["", name, "seeds", "difference", "p", "parameters", "MACs", "images/s", "speed"]


def format_row(row: JsonObject) -> list[str]:
    """Cells of a row as text."""
    mean, std, p = row["mean"], row["std"], row["p"]
    return [
        row["row"].replace("|", "/"),
        "-" if mean is None else f"{mean:.4f}" + (f" ± {std:.4f}" if std is not None else ""),
        str(row["seeds"]),
        "" if row["difference"] is None else f"{row['difference']:+.4f}",
        "" if p is None else f"{p:.3f}",
        "-" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f} M",
        "-" if row["macs"] is None else f"{row['macs'] / 1e9:.3f} G",
        "-" if row["images_per_second"] is None else f"{row['images_per_second']:.0f}",
        "-" if row["speed"] is None else f"{row['speed']:.2f}",
    ]


def print_table(titles: list[str], rows: list[list[str]]) -> None:
    """Print the columns that fit a terminal of 80 characters."""
    columns = (1, 3, 6, 8)
    table = Table(box=None)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(titles[column], justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(escape(cells[0]), *[cells[column] for column in columns])
    Console().print(table)


def plot(rows: list[JsonObject], metric: str, path: Path) -> None:
    """Plot the score of each row, with its spread over seeds, by the MACs of the model.

    Args:
        rows: Rows of the table.
        metric: Metric on the vertical axis.
        path: PNG file to write.
    """
    plotted = [row for row in rows if row["mean"] is not None and row["macs"]]
    with use_fonts_for([row["row"] for row in plotted]):
        figure, [[axis]] = visualize.subplots(7.5, 4.8)
        for row in plotted:
            axis.errorbar(row["macs"] / 1e9, row["mean"], yerr=row["std"], fmt="o", capsize=3)
        axis.set(xlabel="GMACs per image", ylabel=visualize.metric_label(metric))
        axis.margins(x=0.25, y=0.15)
        axis.grid(alpha=0.3)
        points = [(row["macs"] / 1e9, row["mean"], row["row"]) for row in plotted]
        visualize.label_points(figure, axis, points)
        visualize.save_figure(figure, path)
