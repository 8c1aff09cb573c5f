"""``crossformer export``: export a trained network for other runtimes."""

import sys
from functools import partial
from pathlib import Path
from typing import Literal

from crossformer_vision import export as exporting
from crossformer_vision.cli.function_parser import run_function
from crossformer_vision.errors import UserError
from crossformer_vision.export.formats import FORMATS


def export(
    source: str,
    /,
    *,
    format: Literal["onnx", "openvino", "torch"] | None = None,
    output: str | None = None,
    features: bool = False,
    int8: str | None = None,
) -> None:
    """Export a trained model as one graph for any batch size, height and width.

    The file is verified against the PyTorch model at several sizes. Takes some minutes.

    Args:
        source: Run directory, checkpoint of a run, or name of published weights.
        format: File format; by default that of the suffix of --output, or onnx.
        output: File: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2 (torch.export); named after the
            source by default.
        features: Export the backbone's four feature maps, without a head.
        int8: Folder of images. Quantize a classifier or segmenter to 8 bits with the value ranges that these
            images have, as OpenVINO.
    """
    if int8 is not None and format is None and output is None:
        format = "openvino"
    suffix = FORMATS[format or "onnx"]
    path = Path(source)
    stem = (path.parent if path.suffix == ".ckpt" else path).name
    file = Path(output or f"{stem}{'-features' if features else ''}{suffix}")
    if format and file.suffix != suffix:
        raise UserError(f"'{file.name}': a file of format {format} ends in {suffix}")
    report = partial(print, file=sys.stderr, flush=True)
    print(exporting.describe(exporting.export(source, file, features, int8, report), file))


def main(arguments: list[str]) -> None:
    """Run the command.

    Args:
        arguments: Command-line arguments after the name of the command.
    """
    run_function(export, "export", arguments)
