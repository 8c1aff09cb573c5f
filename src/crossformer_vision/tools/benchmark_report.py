"""Tables and plots of a benchmark."""

from operator import itemgetter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crossformer_vision.files import write_csv, write_json, write_text
from crossformer_vision.plotting import visualize
from crossformer_vision.types import JsonObject

CONSOLE_COLUMNS = (2, 4, 6)  # columns that fit into a terminal of 80 characters


def to_markdown(results: list[JsonObject]) -> list[str]:
    """Lines of a Markdown table.

    Args:
        results: Results of `run_benchmark`.
    """
    first = results[0]["model"]
    header = [
        "",
        "mode",
        "images/s",
        "ratio",
        f"ratio to {first} in the same mode",
        "ms (90 %, 99 %)",
        "memory",
    ]
    header += ["parameters", "MACs", "share of peak", "first call", "difference"]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---"] * len(header)) + " |"]
    for entry in results:
        height, width = entry["size"]
        mode = f"{entry['step']}, {entry['engine']}, {entry['dtype']}, {entry['batch']} of {height}x{width}"
        if "error" in entry:
            cells = [entry["model"], mode, f"not run: {entry['error']}".replace("|", "/"), *[""] * 9]
        else:
            latency = f"{entry['ms_median']:.1f} ({entry['ms_90']:.1f}, {entry['ms_99']:.1f})"
            share, gap, count = entry.get("peak_share"), entry.get("difference"), entry.get("macs")
            cells = [
                entry["model"],
                mode,
                f"{entry['images_per_second']:.1f}",
                f"{entry['ratio']:.2f}",
                f"{entry['ratio_in_mode']:.2f}",
                latency,
                f"{entry['memory'] / 2**20:.0f} MiB" if "memory" in entry else "",
                f"{entry['parameters'] / 1e6:.1f} M" if "parameters" in entry else "",
                "" if count is None else f"{count / 1e9:.2f} G",
                "" if share is None else f"{share:.2f}",
                f"{entry['first_call']:.1f} s",
                "" if gap is None else f"{gap:.0e}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot_throughput(results: list[JsonObject], path: Path) -> None:
    """Plot throughput over multiply-accumulates, with a marker for each mode.

    Args:
        results: Results of `run_benchmark`.
        path: PNG file to write.
    """
    from matplotlib.ticker import StrMethodFormatter

    figure, [[axis]] = visualize.subplots(8, 5)
    timed = [entry for entry in results if entry.get("macs") and "error" not in entry]
    keys = ("step", "engine", "dtype", "batch", "size")
    varied = [key for key in keys if len({str(entry[key]) for entry in timed}) > 1]
    modes = list(dict.fromkeys(tuple(str(entry[key]) for key in varied) for entry in timed))
    for mode, marker in zip(modes, "os^Dv<>PX*" * len(modes)):
        points_of_mode = [e for e in timed if tuple(str(e[key]) for key in varied) == mode]
        points = [(e["macs"] / 1e9, e["images_per_second"]) for e in points_of_mode]
        axis.plot(*zip(*points), marker, label=", ".join(mode) or None)
    axis.set(xlabel="GMACs per image", ylabel="images per second", yscale="log")
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter(StrMethodFormatter("{x:g}"))
    axis.margins(x=0.2, y=0.15)
    axis.grid(alpha=0.3, which="both")
    if varied:
        axis.legend(fontsize=8)
    by_rate = sorted(timed, key=itemgetter("images_per_second"))
    fastest = {e["model"]: (e["macs"] / 1e9, e["images_per_second"], e["model"]) for e in by_rate}
    visualize.label_points(figure, axis, list(fastest.values()))
    visualize.save_figure(figure, path)


def write_report(results: list[JsonObject], metadata: JsonObject, output: Path) -> None:
    """Write ``benchmark.json``, ``.md``, ``.csv`` and ``.png``, and print a table.

    Args:
        results: Results of `run_benchmark`.
        metadata: Further entries of the JSON file.
        output: Existing directory.
    """
    write_json(output / "benchmark.json", {"rows": results, **metadata})
    lines = to_markdown(results)
    write_text(output / "benchmark.md", "\n".join(lines) + "\n")
    write_csv(output / "benchmark.csv", results)
    if any(entry.get("macs") for entry in results):
        plot_throughput(results, output / "benchmark.png")
    header, _, *body = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    table = Table(box=None)
    table.add_column("", overflow="fold")
    for column in CONSOLE_COLUMNS:
        table.add_column(header[column] if column != 4 else "in mode", justify="right", overflow="fold")
    for cells in body:
        table.add_row(f"{escape(cells[0])}\n  {cells[1]}", *[cells[column] for column in CONSOLE_COLUMNS])
    Console().print(table)
    print(f"benchmark.md, .json, .csv and .png in {output}")
