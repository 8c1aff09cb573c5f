"""``crossformer benchmark``: time models side by side."""

from itertools import product
from pathlib import Path
from typing import Literal

import torch

from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.inference.predictor import best_device
from crossformer_vision.tools.benchmark import run
from crossformer_vision.tools.benchmark_step import Row, parse_size

Step = Literal["inference", "training"]
Engine = Literal["eager", "compiled", "frozen", "autotuned", "reduce-overhead", "max-autotune"]
Dtype = Literal["float32", "bfloat16", "float16", "amp-bfloat16", "amp-float16"]


def benchmark(
    models: list[str],
    /,
    *,
    size: list[str] = ["224"],  # noqa: B006
    step: list[Step] = ["inference"],  # noqa: B006
    engine: list[Engine] = ["eager"],  # noqa: B006
    dtype: list[Dtype] = ["float32"],  # noqa: B006
    batch_size: list[int] = [8],  # noqa: B006
    device: str | None = None,
    rounds: int = 7,
    threads: int | None = None,
    output: str = "runs/benchmark",
) -> None:
    """Time models side by side in one interleaved run.

    Options with several values make one row for each combination.

      crossformer benchmark crossformer_small swin_tiny_patch4_window7_224 --step inference training
      crossformer benchmark crossformer_small convnext_tiny --engine eager compiled --dtype float32 bfloat16
      crossformer benchmark features:crossformer_small,lda_span=region features:resnet50 --size 800x1280

    Args:
        models: timm models; features:MODEL for feature maps; retinanet:MODEL, mask_rcnn:, semantic_fpn:,
            upernet:; with keywords of the model: MODEL,key=value; files of crossformer export.
        size: Image sizes: 224, or HxW.
        step: What to time.
        engine: eager; compiled (torch.compile); for inference on CPUs frozen, with weights and position
            biases as constants, and autotuned, frozen with kernels chosen by timing.
        dtype: Dtype of weights and images. amp- keeps the weights in float32 and uses autocast.
        batch_size: Images per batch.
        device: cpu, cuda, …; the best available by default.
        rounds: Minimum number of rounds. Each row is timed once per round.
        threads: CPU threads; one per core by default.
        output: Directory for the table and plot.
    """
    if threads:
        torch.set_num_threads(threads)
    modes = product([parse_size(text) for text in size], step, engine, dtype, batch_size)
    rows = [Row(model, *mode) for mode in modes for model in models]
    run(rows, best_device(device), rounds, Path(output))


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(benchmark, "benchmark", arguments)
