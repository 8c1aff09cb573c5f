"""File formats of exported graphs: ONNX, OpenVINO and torch.export."""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from crossformer_vision.compat import oblivious_sizes
from crossformer_vision.inference.exported import METADATA_KEY, OnnxRuntime, OpenVinoRuntime
from crossformer_vision.types import JsonObject

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
Call = Callable[[Tensor], tuple[Tensor, ...]]
OPSET = 20


def write_onnx(
    graph: torch.export.ExportedProgram, outputs: tuple[str, ...], path: Path, metadata: JsonObject
) -> None:
    """Write a graph as ONNX.

    Args:
        graph: The graph.
        outputs: Names of its outputs.
        path: File to write.
        metadata: Metadata, stored as JSON in the file.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with warnings.catch_warnings(), oblivious_sizes(), suppress_loggers("onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
        )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # stack traces of every node: half of the file
    program.model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    program.save(path)


def write_openvino(
    graph: torch.export.ExportedProgram, outputs: tuple[str, ...], path: Path, metadata: JsonObject
) -> None:
    """Write a graph as OpenVINO: ``.xml`` and ``.bin``.

    Args:
        graph: Traced network.
        outputs: Names of the outputs.
        path: File to write.
        metadata: Metadata stored in the file.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "graph.onnx"
        write_onnx(graph, outputs, onnx_file, metadata)
        model = openvino.Core().read_model(onnx_file)
        model.set_rt_info(json.dumps(metadata), [METADATA_KEY])
        openvino.save_model(model, path, compress_to_fp16=False)


def write_torch(
    graph: torch.export.ExportedProgram, outputs: tuple[str, ...], path: Path, metadata: JsonObject
) -> None:
    """Write a graph for ``torch.export.load``.

    Args:
        graph: Traced network.
        outputs: Names of the outputs.
        path: File to write.
        metadata: Metadata stored in the file.
    """
    torch.export.save(graph, path, extra_files={METADATA_KEY: json.dumps(metadata)})


def load_torch(path: Path) -> Call:
    """Load a ``.pt2`` file that was just written. torch unpickles it, so never use this for other files."""
    program = torch.export.load(path).module(check_guards=False)

    def call(images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = program(images)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return call


WRITERS = {".onnx": write_onnx, ".xml": write_openvino, ".pt2": write_torch}
READERS: dict[str, Callable[[Path], Call]] = {
    ".onnx": OnnxRuntime,
    ".xml": OpenVinoRuntime,
    ".pt2": load_torch,
}


@contextmanager
def suppress_loggers(*names: str) -> Iterator[None]:
    """Let loggers report only errors within a block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
