"""Throughput, latency and memory of models, compared in one interleaved run."""

import ast
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.compat import compiler_config
from crossformer_vision.devices import emulation_note
from crossformer_vision.errors import UserError, check_range, counted
from crossformer_vision.files import create_output_dir
from crossformer_vision.inference.exported import OnnxRuntime, OpenVinoRuntime
from crossformer_vision.models import find_model, img_size_kwargs
from crossformer_vision.models.dense.backbones import create_backbone, extract_feature_maps
from crossformer_vision.models.freezing import freeze_position_bias
from crossformer_vision.tools import info
from crossformer_vision.tools.benchmark_report import write_report
from crossformer_vision.tools.info import DETECTORS, count_macs
from crossformer_vision.tools.timing import peak_memory, time_interleaved
from crossformer_vision.training.run import environment_info

SEGMENTERS = ("semantic_fpn", "upernet")
ENGINES: dict[str, dict[str, Any] | None] = {  # arguments of torch.compile
    "eager": None,
    "compiled": {},
    # Dynamo distinguishes cached graphs by these options, so freezing must be one of them.
    "frozen": {"options": {"freezing": True}},
    "autotuned": {"options": {"freezing": True, "max_autotune": True}},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}
FROZEN = ("frozen", "autotuned")  # engines with weights and position biases as constants
DTYPES = {  # dtype of weights and images, dtype of autocast
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "amp-bfloat16": (torch.float32, torch.bfloat16),
    "amp-float16": (torch.float32, torch.float16),
}


# ------------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of a benchmark.

    Attributes:
        model: A timm model, also with a prefix ``features:``, ``retinanet:``, ``mask_rcnn:``,
            ``semantic_fpn:`` or ``upernet:``, and with arguments: ``crossformer_small,lda_span=region``. Or
            an exported file, ``.onnx`` or ``.xml``.
        size: Height and width of the images.
        step: ``inference``, or ``training`` (forward and backward pass, AdamW).
        engine: A key of ``ENGINES``.
        dtype: A key of ``DTYPES``.
        batch: Images per batch.
    """

    model: str
    size: tuple[int, int] = (224, 224)
    step: str = "inference"
    engine: str = "eager"
    dtype: str = "float32"
    batch: int = 8

    @property
    def mode(self) -> tuple[Any, ...]:
        """All fields except the model."""
        return self.size, self.step, self.engine, self.dtype, self.batch

    @property
    def is_training(self) -> bool:
        """Whether a training step is timed."""
        return self.step == "training"

    @property
    def is_exported(self) -> bool:
        """Whether the model is an exported file."""
        return Path(self.model).suffix in (".onnx", ".xml")

    def __str__(self) -> str:
        height, width = self.size
        return " ".join(
            [self.model, f"{height}x{width}", self.step, self.engine, self.dtype, str(self.batch)]
        )


def parse_spec(spec: str) -> tuple[str, str, dict[str, Any]]:
    """Split ``Row.model`` into head, timm model and arguments.

    >>> parse_spec("features:crossformer_small,lda_span=region,group_size=(14,14,7,7)")
    ('features', 'crossformer_small', {'lda_span': 'region', 'group_size': (14, 14, 7, 7)})

    Args:
        spec: Value of ``Row.model``.

    Raises:
        UserError: If the head or model is unknown.
    """
    name, *keywords = re.split(r",(?=\s*\w+=)", spec)
    head, colon, model = name.rpartition(":")
    known = ("features", *DETECTORS, *SEGMENTERS)
    if colon and head not in known:
        raise UserError(
            f"'{spec}': unknown head '{head}'. Choose from {', '.join(known)}, as in features:{model}"
        )
    find_model(model)
    values: dict[str, Any] = {}
    for keyword in keywords:
        key, _, value = keyword.partition("=")
        try:
            values[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key.strip()] = value
    return head, model, values


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from ``"224"`` or ``"800x1280"``.

    Args:
        text: Value of ``--size``.

    Raises:
        UserError: If it is neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"size '{text}': must be a number of pixels, or HEIGHTxWIDTH such as 800x1280")
    return int(sides[0]), int(sides[-1])


class Features(nn.Module):
    """Feature maps of a backbone.

    Args:
        model: timm model.
        keywords: Arguments of the model.
    """

    def __init__(self, model: str, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.body = create_backbone(model, **keywords)

    @override
    def forward(self, x: Tensor) -> list[Tensor]:
        return extract_feature_maps(self.body, x)


def create_network(row: Row) -> nn.Module:
    """Create the network of a row in float32, with reproducible random weights."""
    head, model, keywords = parse_spec(row.model)
    torch.manual_seed(0)
    if head == "features":
        return Features(model, keywords)
    short, long = sorted(row.size)
    if head in DETECTORS:
        return info.create_network(model, head, keywords, min_size=short, max_size=long)
    sized = img_size_kwargs(model, short) if not head and short == long else {}
    return info.create_network(model, head, {**sized, **keywords})


def load_exported(row: Row) -> nn.Module:
    """Load an exported file.

    Args:
        row: Row of the benchmark.

    Raises:
        ValueError: If the row asks for training, compilation or another dtype.
    """
    if (row.step, row.engine, row.dtype) != ("inference", "eager", "float32"):
        raise ValueError("exported files support only --step inference, --engine eager, --dtype float32")
    path = Path(row.model)
    return OnnxRuntime(path) if path.suffix == ".onnx" else OpenVinoRuntime(path)


class Step:
    """A callable that runs one step of a row on random images.

    Args:
        row: Row of the benchmark.
        device: Device of the network.

    Raises:
        ValueError: If a frozen network would be trained.
    """

    def __init__(self, row: Row, device: torch.device) -> None:
        if row.is_training and row.engine in FROZEN:
            raise ValueError(f"--engine {row.engine} supports only --step inference")
        self.row, self.device = row, device
        weights, self.autocast = DTYPES[row.dtype]
        self.net = load_exported(row) if row.is_exported else create_network(row)
        self.net = self.net.to(device, weights).train(row.is_training)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(row.batch, 3, *row.size, generator=generator).to(device, weights)
        self.is_detector = not row.is_exported and parse_spec(row.model)[0] in DETECTORS
        if self.is_detector:
            self.images = self.images.sigmoid()
            height, width = row.size
            boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.3, 0.3, 0.9, 0.9]], device=device)
            boxes = boxes * torch.tensor([width, height, width, height], device=device)
            masks = torch.ones(2, height, width, dtype=torch.uint8, device=device)
            self.target = {"boxes": boxes, "labels": torch.tensor([1, 2], device=device), "masks": masks}
        if row.is_training:
            self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-5, fused=True)
        if row.engine in FROZEN and any(hasattr(module, "frozen") for module in self.net.modules()):
            freeze_position_bias(self.net, *row.size)
        keywords = ENGINES[row.engine]
        self.run: Callable[..., Any] = self.net if keywords is None else torch.compile(self.net, **keywords)

    def __call__(self) -> Any:
        """Run the step; returns the output of inference."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            if not self.row.is_training:
                with torch.no_grad():
                    return self.run(list(self.images) if self.is_detector else self.images)
            loss = self.compute_loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None

    def compute_loss(self) -> Tensor:
        """Loss of a detector, or cross-entropy of logits or feature maps with class 0."""
        if self.is_detector:
            return sum(self.run(list(self.images), [self.target] * len(self.images)).values())
        out = self.run(self.images)
        outs = [out] if isinstance(out, Tensor) else list(out.values() if isinstance(out, dict) else out)
        outs = [o for o in outs if o is not None]
        return torch.stack([F.cross_entropy(o, torch.zeros_like(o[:, 0]).long()) for o in outs]).sum()

    @contextmanager
    def compiler_settings(self) -> Iterator[None]:
        """Context with settings of torch.compile for the first calls."""
        with compiler_config(freezing=self.row.engine in FROZEN):
            yield


def _comparable_outputs(out: Any) -> list[Tensor]:
    """Logits or feature maps in float32; empty for other outputs."""
    if isinstance(out, Tensor):
        return [out.detach().float()]
    if isinstance(out, (list, tuple)) and all(isinstance(o, Tensor) for o in out):
        return [o.detach().float() for o in out]
    return []


def relative_difference(out: Any, reference: Any) -> float | None:
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


# ------------------------------------------------------------------------------------------------------------
# The benchmark
# ------------------------------------------------------------------------------------------------------------


def run_benchmark(
    rows: list[Row],
    device: torch.device,
    rounds: int = 7,
    seconds: float = 2.0,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
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
    results: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    references: dict[tuple[Any, ...], Any] = {}
    for row in rows:
        log(f"  {row}")
        entry: dict[str, Any] = {**row.__dict__, "size": list(row.size)}
        results.append(entry)
        try:
            calls[str(row)] = _prepare(row, device, entry, references)
        except UserError:
            raise
        except Exception as error:  # the other rows are still compared
            entry["error"] = (str(error) or type(error).__name__).splitlines()[0]
    times = time_interleaved(calls | matrix_products(rows, device), seconds, rounds)
    medians = {name: statistics.median(row_times) for name, row_times in times.items()}
    first_rates: dict[tuple[Any, ...], float] = {}
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
    row: Row, device: torch.device, entry: dict[str, Any], references: dict[tuple[Any, ...], Any]
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
    with step.compiler_settings():
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


def run(rows: list[Row], device: torch.device, rounds: int, output: Path) -> list[dict[str, Any]]:
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
