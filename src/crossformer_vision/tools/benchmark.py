"""How fast networks are, beside one another."""

import ast
import csv
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from crossformer_vision.errors import UserError, check_range, counted
from crossformer_vision.inference.exported import OnnxNetwork, OpenVinoNetwork
from crossformer_vision.models import find_model, fixed_size
from crossformer_vision.models.dense.backbones import create_backbone, feature_maps
from crossformer_vision.models.grouping import freeze_position_bias
from crossformer_vision.plotting import visualize
from crossformer_vision.tools import info
from crossformer_vision.tools.info import DETECTORS, count_macs
from crossformer_vision.training.devices import emulation_note

SEGMENTERS = ("semantic_fpn", "upernet")
ENGINES: dict[str, dict[str, Any] | None] = {  # -> keywords of torch.compile
    "eager": None,
    "compiled": {},
    # Freezing is among the options since dynamo keeps graphs apart by these: a row would else get the
    # graph of a compiled one of the same network.
    "frozen": {"options": {"freezing": True}},
    "autotuned": {"options": {"freezing": True, "max_autotune": True}},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}
FROZEN = ("frozen", "autotuned")  # whose weights and position biases are constants
DTYPES = {  # -> of the weights and images, of autocast
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "amp-bfloat16": (torch.float32, torch.bfloat16),
    "amp-float16": (torch.float32, torch.float16),
}


# ------------------------------------------------------------------------------------------------------------
# Timing
# ------------------------------------------------------------------------------------------------------------


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
    accelerated = torch.accelerator.is_available()
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(max(3, rounds) * 50):
        for name, call in calls.items():
            if accelerated:
                torch.accelerator.synchronize()
            start = time.perf_counter()
            call()
            if accelerated:
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - start)
        if done + 1 >= max(3, rounds) and time.perf_counter() - began > seconds * len(calls):
            break
    return times


def images_per_second(times: list[float], batch: int) -> float:
    """Of the median call."""
    return batch / statistics.median(times)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call holds at its peak beyond what was there before, by torch's allocator."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        call()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in seen.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


# ------------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What is timed, and how.

    Attributes:
        what: a timm model; `features:` one, its maps; `retinanet:`, `mask_rcnn:`, `semantic_fpn:` or
            `upernet:` one; with keywords of the model: `crossformer_small,lda_span=region`; or a file of
            `crossformer export`, `.onnx` or `.xml`.
        size: H, W of the images.
        step: `inference`, or `training`: forward, backward, AdamW.
        engine: a name in `ENGINES`.
        dtype: a name in `DTYPES`.
        batch: images at a time.
    """

    what: str
    size: tuple[int, int] = (224, 224)
    step: str = "inference"
    engine: str = "eager"
    dtype: str = "float32"
    batch: int = 8

    @property
    def mode(self) -> tuple[Any, ...]:
        """All but what is timed."""
        return self.size, self.step, self.engine, self.dtype, self.batch

    @property
    def training(self) -> bool:
        return self.step == "training"

    @property
    def exported(self) -> bool:
        return Path(self.what).suffix in (".onnx", ".xml")

    def __str__(self) -> str:
        height, width = self.size
        return " ".join([self.what, f"{height}x{width}", self.step, self.engine, self.dtype, str(self.batch)])


def parsed(what: str) -> tuple[str, str, dict[str, Any]]:
    """The head, the timm model and its keywords that a `Row.what` names.

    >>> parsed("features:crossformer_small,lda_span=region,group_size=(14,14,7,7)")
    ('features', 'crossformer_small', {'lda_span': 'region', 'group_size': (14, 14, 7, 7)})

    Raises:
        UserError: an unknown head or model, a keyword without a value.
    """
    name, *keywords = re.split(r",(?=\s*\w+=)", what)
    head, colon, model = name.rpartition(":")
    known = ("features", *DETECTORS, *SEGMENTERS)
    if colon and head not in known:
        raise UserError(f"'{what}': no head '{head}'; there are {', '.join(known)}, as in features:{model}")
    find_model(model)
    values: dict[str, Any] = {}
    for keyword in keywords:
        key, _, value = keyword.partition("=")
        try:
            values[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key.strip()] = value
    return head, model, values


def image_size(given: str) -> tuple[int, int]:
    """H, W of `"224"` or `"800x1280"`.

    Raises:
        UserError: anything else.
    """
    sides = given.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"size '{given}': it is a number of pixels, or height x width, as 800x1280")
    return int(sides[0]), int(sides[-1])


class Features(nn.Module):
    """The maps of a backbone."""

    def __init__(self, model: str, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.body = create_backbone(model, **keywords)

    def forward(self, x: Tensor) -> list[Tensor]:
        return feature_maps(self.body, x)


def network(row: Row) -> nn.Module:
    """The network of a row, in float32, with the same random weights each time."""
    head, model, keywords = parsed(row.what)
    torch.manual_seed(0)
    if head == "features":
        return Features(model, keywords)
    short, long = sorted(row.size)
    if head in DETECTORS:
        return info.network(model, head, keywords, min_size=short, max_size=long)
    sized = fixed_size(model, short) if not head and short == long else {}
    return info.network(model, head, {**sized, **keywords})


def file_of(row: Row) -> nn.Module:
    """The network of an exported file."""
    if (row.step, row.engine, row.dtype) != ("inference", "eager", "float32"):
        raise ValueError("an exported file infers as it is: inference, eager, float32")
    path = Path(row.what)
    return OnnxNetwork(path) if path.suffix == ".onnx" else OpenVinoNetwork(path)


class Step:
    """One call of a row on images of noise: `step()`."""

    def __init__(self, row: Row, device: torch.device) -> None:
        if row.training and row.engine in FROZEN:
            raise ValueError("what is frozen is not trained: inference alone")
        self.row, self.device = row, device
        weights, self.autocast = DTYPES[row.dtype]
        self.net = (file_of(row) if row.exported else network(row)).to(device, weights).train(row.training)
        draw = torch.Generator().manual_seed(0)
        self.images = torch.randn(row.batch, 3, *row.size, generator=draw).to(device, weights)
        self.detector = not row.exported and parsed(row.what)[0] in DETECTORS
        if self.detector:
            self.images = self.images.sigmoid()
            height, width = row.size
            boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.3, 0.3, 0.9, 0.9]], device=device)
            boxes = boxes * torch.tensor([width, height, width, height], device=device)
            masks = torch.ones(2, height, width, dtype=torch.uint8, device=device)
            self.target = {"boxes": boxes, "labels": torch.tensor([1, 2], device=device), "masks": masks}
        if row.training:
            self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-5, fused=True)
        if row.engine in FROZEN and any(hasattr(module, "frozen") for module in self.net.modules()):
            freeze_position_bias(self.net, *row.size)
        keywords = ENGINES[row.engine]
        self.run: Callable[..., Any] = self.net if keywords is None else torch.compile(self.net, **keywords)

    def __call__(self) -> Any:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            if not self.row.training:
                with torch.no_grad():
                    return self.run(list(self.images) if self.detector else self.images)
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None

    def loss(self) -> Tensor:
        if self.detector:
            return sum(self.run(list(self.images), [self.target] * len(self.images)).values())
        out = self.run(self.images)
        outs = [out] if isinstance(out, Tensor) else list(out.values() if isinstance(out, dict) else out)
        outs = [o for o in outs if o is not None]
        return torch.stack([F.cross_entropy(o, torch.zeros_like(o[:, 0]).long()) for o in outs]).sum()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """What holds while the first call compiles."""
        import torch._dynamo
        import torch._inductor.config as inductor

        with (
            torch._dynamo.config.patch(recompile_limit=256),  # rows share the code of their classes
            inductor.patch(freezing=self.row.engine in FROZEN),
        ):
            yield


def outputs(out: Any) -> list[Tensor]:
    """The tensors of a network's output that can be compared with another's."""
    if isinstance(out, Tensor):
        return [out.detach().float()]
    if isinstance(out, (list, tuple)) and all(isinstance(o, Tensor) for o in out):
        return [o.detach().float() for o in out]
    return []


def difference(out: Any, reference: Any) -> float | None:
    """Largest difference of two outputs, over the largest value; None where they are no maps or logits."""
    pairs = list(zip(outputs(out), outputs(reference)))
    if not pairs:
        return None
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# ------------------------------------------------------------------------------------------------------------
# The benchmark
# ------------------------------------------------------------------------------------------------------------


def benchmark(
    rows: list[Row],
    device: torch.device,
    rounds: int = 7,
    seconds: float = 2.0,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Time all rows in one interleaved run.

    Returns:
        A dictionary a row: what `Row` says; `images_per_second`; `ms_median`, `ms_90`, `ms_99` of a call;
        `ratio` to the first row and `ratio_in_mode` to the first row of the same mode; `memory`, bytes at the
        peak of a step; `parameters`; `macs` of an image; `peak_share` of what this machine's matrix product
        gives in that type in the same run, counting a training step as three forward passes;
        `first_call`, seconds; `difference` from the eager float32 outputs, over the largest of them;
        `error`, why a row could not be run, and nothing else then.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose work is waited for, and whose memory is measured
    found: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    references: dict[tuple[Any, ...], Any] = {}
    for row in rows:
        log(f"  {row}")
        entry: dict[str, Any] = {**row.__dict__, "size": list(row.size)}
        found.append(entry)
        try:
            step = Step(row, device)
            began = time.perf_counter()
            with step.compiling():
                out = step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                entry["first_call"] = round(time.perf_counter() - began, 2)
                step()  # training may compile again for the gradients
            if not (row.training or row.exported):
                key = (row.what, row.size, row.batch)
                if key not in references:
                    plain = Row(row.what, row.size, batch=row.batch)
                    references[key] = out if plain == row else Step(plain, device)()
                entry["difference"] = difference(out, references[key])
            if not row.exported:
                entry["memory"] = peak_memory(step, device)
                entry["parameters"] = sum(p.numel() for p in step.net.parameters())
                entry["macs"] = macs(row)
            calls[str(row)] = step
        except UserError:
            raise
        except Exception as error:  # the others are still compared
            entry["error"] = (str(error) or type(error).__name__).splitlines()[0]
    times = interleaved(calls | products(rows, device), seconds, rounds)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    firsts: dict[tuple[Any, ...], float] = {}
    for row, entry in zip(rows, found):
        if "error" in entry:
            continue
        spent = sorted(times[str(row)])
        rate = row.batch / medians[str(row)]
        firsts.setdefault(row.mode, rate)
        firsts.setdefault((), rate)
        entry["images_per_second"] = rate
        entry |= {f"ms_{p}": 1e3 * spent[min(len(spent) - 1, len(spent) * p // 100)] for p in (90, 99)}
        entry["ms_median"] = 1e3 * medians[str(row)]
        entry["ratio"], entry["ratio_in_mode"] = rate / firsts[()], rate / firsts[row.mode]
        if entry.get("macs"):
            flops = 2 * entry["macs"] * rate * (3 if row.training else 1)
            entry["peak_share"] = flops / (2 * product_side(device) ** 3 / medians[product_of(row)])
    return found


def product_side(device: torch.device) -> int:
    """Of the matrix product that stands for the peak; a GPU is called longer than it computes a small one."""
    return 2048 if device.type == "cpu" else 8192


def product_of(row: Row) -> str:
    weights, autocast = DTYPES[row.dtype]
    return f"matrix product {autocast or weights}"


def products(rows: list[Row], device: torch.device) -> dict[str, Callable[[], object]]:
    """A matrix product for each type that rows compute in."""
    calls: dict[str, Callable[[], object]] = {}
    side = product_side(device)
    for row in rows:
        weights, autocast = DTYPES[row.dtype]
        x = torch.randn(side, side, device=device).to(autocast or weights)
        calls[product_of(row)] = partial(torch.mm, x, x)
    return calls


def macs(row: Row) -> float | None:
    """Multiply-accumulates of an image; None of a network that cannot be counted without its weights."""
    try:
        with torch.device("meta"):
            # A table of biases is an output of its module as it is, of which the counter wants a gradient.
            return count_macs(network(row).eval().requires_grad_(False), *row.size)
    except Exception:  # networks may refuse tensors without data in any way
        return None


# ------------------------------------------------------------------------------------------------------------
# What is written
# ------------------------------------------------------------------------------------------------------------


def markdown(found: list[dict[str, Any]]) -> list[str]:
    """A table's lines."""
    first = found[0]["what"]
    head = ["", "mode", "images/s", "ratio", f"ratio to {first} in the mode", "ms (90 %, 99 %)", "memory"]
    head += ["parameters", "MACs", "share of the peak", "first call", "difference"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for entry in found:
        height, width = entry["size"]
        mode = f"{entry['step']}, {entry['engine']}, {entry['dtype']}, {entry['batch']} of {height}x{width}"
        if "error" in entry:
            cells = [entry["what"], mode, f"not run: {entry['error']}".replace("|", "/"), *[""] * 9]
        else:
            latency = f"{entry['ms_median']:.1f} ({entry['ms_90']:.1f}, {entry['ms_99']:.1f})"
            share, gap, count = entry.get("peak_share"), entry.get("difference"), entry.get("macs")
            cells = [
                entry["what"],
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


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Throughput by multiply-accumulates, a marker a mode."""
    from matplotlib.ticker import StrMethodFormatter

    figure, axes = visualize.subplots(8, 5)
    axis = axes[0][0]
    timed = [entry for entry in found if entry.get("macs") and "error" not in entry]
    keys = ("step", "engine", "dtype", "batch", "size")
    varied = [key for key in keys if len({str(entry[key]) for entry in timed}) > 1]
    modes = list(dict.fromkeys(tuple(str(entry[key]) for key in varied) for entry in timed))
    for mode, marker in zip(modes, "os^Dv<>PX*" * len(modes)):
        some = [e for e in timed if tuple(str(e[key]) for key in varied) == mode]
        places = [(e["macs"] / 1e9, e["images_per_second"]) for e in some]
        axis.plot(*zip(*places), marker, label=", ".join(mode) or None)
    axis.set(xlabel="multiply-accumulates of an image (G)", ylabel="images a second", yscale="log")
    for labels in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        labels(StrMethodFormatter("{x:g}"))
    axis.margins(x=0.2, y=0.15)
    axis.grid(alpha=0.3, which="both")
    if varied:
        axis.legend(fontsize=8)
    by_rate = sorted(timed, key=itemgetter("images_per_second"))
    fastest = {e["what"]: (e["macs"] / 1e9, e["images_per_second"], e["what"]) for e in by_rate}
    visualize.name_points(figure, axis, list(fastest.values()))
    visualize.save_figure(figure, path)


def run(rows: list[Row], device: torch.device, rounds: int, out: Path) -> list[dict[str, Any]]:
    """Print the table of all rows, and write it to `out` as JSON, Markdown, CSV and a plot.

    Raises:
        UserError: what a row names is not there; or, at the end, no row could be run.
    """
    from crossformer_vision.files import make_folder, write_json, write_text
    from crossformer_vision.training.run import about

    for row in rows:
        if row.exported:
            if not Path(row.what).is_file():
                raise UserError(f"{row.what}: no such file")
        else:
            parsed(row.what)
        check_range("batch", row.batch, 1)
    for dtype in dict.fromkeys(autocast or weights for weights, autocast in (DTYPES[r.dtype] for r in rows)):
        if note := emulation_note(device, dtype):
            print(f"note: {note}")
    make_folder(out)
    print(f"{counted(len(rows), 'row')} on {device}:")
    found = benchmark(rows, device, rounds)
    write_json(out / "benchmark.json", {"rows": found, "threads": torch.get_num_threads(), **about()})
    lines = markdown(found)
    write_text(out / "benchmark.md", "\n".join(lines) + "\n")
    with (out / "benchmark.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for entry in found for key in entry)))
        writer.writeheader()
        writer.writerows(found)
    if any(entry.get("macs") for entry in found):
        plot(found, out / "benchmark.png")
    head, _, *body = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    shown, narrow = Table(box=None), (2, 4, 6)  # what a terminal of 80 columns has room for
    shown.add_column("", overflow="fold")
    for column in narrow:
        shown.add_column(head[column] if column != 4 else "in mode", justify="right", overflow="fold")
    for cells in body:
        shown.add_row(f"{escape(cells[0])}\n  {cells[1]}", *[cells[column] for column in narrow])
    Console().print(shown)
    print(f"benchmark.md, .json, .csv and .png in {out}")
    if all("error" in entry for entry in found):
        raise UserError(f"none of the rows could be run: {rows[0]}: {found[0]['error']}")
    return found
