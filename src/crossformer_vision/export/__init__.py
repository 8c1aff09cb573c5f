"""Export trained networks as graphs for any batch size, height and width."""

import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from crossformer_vision.errors import UserError, check_output, counted, error_line, missing_extra
from crossformer_vision.export.formats import FORMATS, READERS, WRITERS
from crossformer_vision.export.graphs import Features, trace
from crossformer_vision.export.int8 import quantize, record_inputs
from crossformer_vision.export.verification import difference, different_objects, worst_difference
from crossformer_vision.inference.load import Source, load_predictor
from crossformer_vision.inference.predictor import DetectionPredictor, Predictor
from crossformer_vision.models.dense.transform import DetectorTransform
from crossformer_vision.types import JsonObject

SIZES = ((64, 64), (97, 130), (225, 300), (64, 259), (231, 200))  # image sizes for verification
TOLERANCE = 1e-3  # relative to the largest output; for detectors, the share of objects that may differ


@dataclass
class ExportReport:
    """Result of ``export``.

    Attributes:
        metadata: Metadata of the file: task, classes, preprocessing.
        size: Height and width, if the graph accepts only one size.
        differences: Difference from the PyTorch model by image size: maximum difference relative to the
            largest output; for detectors, the share of objects that the graph does not find.
        objects: Number of compared objects of a detector.
        fixed_size_reason: Why the graph accepts only one size.
        int8: Result of quantization, see ``int8.quantize``. ``differences`` are measured before it.
    """

    metadata: JsonObject
    size: tuple[int, int] | None
    differences: dict[str, float]
    objects: int = 0
    fixed_size_reason: str = ""
    int8: JsonObject = field(default_factory=dict)


def export(
    source: Source | Predictor,
    output: str | os.PathLike[str],
    features: bool = False,
    int8: str | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> ExportReport:
    """Export a trained network as one graph, and verify it against the PyTorch model.

    The input ``images`` are normalized float32 images of shape ``(B, C, H, W)``. Outputs are, for a
    classifier, ``logits`` of shape ``(B, num_classes)``; for a segmenter, ``logits`` of shape
    ``(B, num_classes, H, W)``; for a detector, for the best N objects of each image, ``boxes`` of shape
    ``(B, N, 4)`` in pixels, ``labels`` from 1 and ``scores`` of shape ``(B, N)``, with scores of 0 for
    missing objects, and for Mask R-CNN ``masks`` of shape ``(B, N, 28, 28)`` as probabilities within each
    box.

    ONNX and OpenVINO files contain metadata, so that ``load_predictor`` and ``crossformer predict`` accept
    them. torch unpickles ``.pt2`` files, so load only your own, by ``torch.export.load``.

    Args:
        source: Predictor, or a source of ``load_predictor``.
        output: File: ``.onnx``, ``.xml`` for OpenVINO, with a ``.bin`` beside it, or ``.pt2`` for
            torch.export.
        features: Export only the backbone's maps ``stride_4`` to ``stride_32``, shape ``(B, C, h, w)``.
        int8: Folder of a few hundred typical images, to quantize a classifier or segmenter (OpenVINO only).
        report: Called with a progress message before each step. Does nothing by default.

    Raises:
        UserError: If the network cannot be exported, outputs of the graph differ from the PyTorch model, or a
            library is missing.
    """
    path = Path(output)
    _check_format(path, int8)
    if isinstance(source, (str, os.PathLike)):
        check_output("--output", path, source)
    predictor = source if isinstance(source, Predictor) else load_predictor(source, "cpu")
    if not predictor.info.options:
        raise UserError(f"{predictor.info.source}: is an exported file already")
    if int8 is not None and (features or predictor.task == "detection"):
        raise UserError("--int8: only classifiers and segmenters can be quantized, not detectors or features")
    inputs = None if int8 is None else record_inputs(predictor, int8)
    net = copy.deepcopy(predictor.net).cpu().float().eval()
    metadata = export_metadata(predictor)
    if features:
        net, metadata["task"] = Features(net, predictor.info.options), "features"
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    default_size = input_size(predictor)
    for size in (None, default_size):  # fall back to a fixed size
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            file = Path(folder) / path.name
            try:
                result = _export_graph(net, metadata, file, default_size, size is not None, report)
            except Exception as error:  # tracing raises errors of any kind
                reason = reason or error_line(error)
                continue
            result.fixed_size_reason = reason
            if inputs is not None:
                report(f"quantizing to 8 bits with {counted(len(inputs), 'input')} (some minutes)")
                result.int8 = quantize(file, predictor, inputs, result.metadata)
            path.unlink(missing_ok=True)  # never leave an old .xml beside a new .bin
            for part in sorted(Path(folder).iterdir()):  # .bin before .xml
                part.replace(path.parent / part.name)
            return result
    raise UserError(f"this network cannot be exported ({reason})")


def _check_format(path: Path, int8: str | None) -> None:
    """Check the suffix of the file, and that the libraries for it are installed."""
    if path.suffix not in FORMATS.values():
        raise UserError(f"'{path.name}': exported files end in {', '.join(FORMATS.values())}")
    if int8 is not None and path.suffix != ".xml":
        raise UserError(f"'{path.name}': 8-bit files are OpenVINO's and end in .xml")
    libraries = {".onnx": ["onnxruntime", "onnxscript"], ".xml": ["onnxruntime", "onnxscript", "openvino"]}
    needed = [*libraries.get(path.suffix, []), *(["nncf"] if int8 is not None else [])]
    for library in needed:
        if importlib.util.find_spec(library) is None:
            raise missing_extra(ModuleNotFoundError(name=library), "export")


def _export_graph(
    net: nn.Module,
    metadata: JsonObject,
    path: Path,
    size: tuple[int, int],
    is_fixed: bool,
    report: Callable[[str], None],
) -> ExportReport:
    """Trace, write and verify a graph.

    Args:
        net: The network.
        metadata: Metadata that is stored in the file.
        path: File to write.
        size: Height and width of the images to trace with.
        is_fixed: Whether the graph is for this size only.
        report: Called with progress messages.

    Raises:
        UserError: If the outputs differ.
    """
    metadata = {**metadata, "size": list(size) if is_fixed else None}
    scope = f"{size[0]}x{size[1]} only" if is_fixed else "any size"
    report(f"tracing the model for {scope} (up to three minutes)")
    channels = metadata.get("pixel_format", {}).get("channels", 3)
    graph, outputs = trace(net, channels, size, is_fixed)
    report(f"writing {path.name}")
    WRITERS[path.suffix](graph, outputs, path, metadata)
    call = READERS[path.suffix](path)
    compare = different_objects if metadata["task"] == "detection" else difference
    differences, counts = {}, {}
    for height, width in (size,) if is_fixed else SIZES:
        name = f"{height}x{width}"
        report(f"comparing outputs with the PyTorch model at {name}")
        differences[name], counts[name] = compare(net, call, channels, (height, width))
    if (worst := worst_difference(differences, counts)) > TOLERANCE:
        raise UserError(f"its outputs differ by {worst:.1e}")
    return ExportReport(metadata, size if is_fixed else None, differences, sum(counts.values()))


def input_size(predictor: Predictor) -> tuple[int, int]:
    """Height and width of the network's images, or a common size for networks that accept any."""
    model_args = predictor.info.options.get("model_args") or {}
    size = predictor.info.image.get("input_size") or model_args.get("img_size")
    if isinstance(size, int):
        return size, size
    return (256, 256) if size is None else (int(size[-2]), int(size[-1]))


def export_metadata(predictor: Predictor) -> JsonObject:
    """Metadata that is stored in an exported file: task, classes and preprocessing."""
    info = predictor.info
    metadata: JsonObject = {
        "task": info.task,
        "classes": info.classes,
        "values": info.values,
        "image": info.image,
    }
    if info.thresholds is not None:
        metadata["thresholds"] = info.thresholds
    if not info.pixel_format.is_rgb:
        metadata["pixel_format"] = asdict(info.pixel_format)
        metadata["display_channels"] = info.display_channels
    if info.task == "segmentation":
        metadata |= {"test": info.test, "test_scales": list(info.test_scales)}
    if isinstance(predictor, DetectionPredictor):
        transform = predictor.net.transform
        assert isinstance(transform, DetectorTransform)
        sizes = {"min_size": transform.min_size[-1], "max_size": transform.max_size}
        metadata["image"] = {**sizes, "mean": transform.image_mean, "std": transform.image_std}
        metadata["category_ids"] = info.category_ids
        metadata["min_score"] = predictor.own_threshold
    return metadata


def describe(report: ExportReport, output: str | os.PathLike[str]) -> str:
    """Two or three lines about an exported file.

    Args:
        report: Result of ``export``.
        output: The file.
    """
    task = report.metadata["task"]
    accepts = "any batch size, height and width from 32"
    if report.size is not None:
        accepts = f"any batch size at {report.size[0]}x{report.size[1]} only ({report.fixed_size_reason})"
    content = task if task == "features" else f"{task}, {len(report.metadata['classes'])} classes"
    worst = max(report.differences.values())
    if task != "detection":
        verified = f"outputs differ from the PyTorch model by at most {worst:.0e}"
    elif report.objects:
        verified = f"at least {1 - worst:.1%} of {report.objects} objects match the PyTorch model"
    else:
        verified = "no objects were found to compare"
    lines = [f"{output}: {content}; {accepts}", f"verified at {', '.join(report.differences)}: {verified}"]
    if report.int8:
        unit = "pixels" if task == "segmentation" else "images"
        lines[1] += " (before quantization)"
        lines.append(
            f"{report.int8['layers']} of {report.int8['all_layers']} layers in 8 bits, with ranges of "
            f"{report.int8['images']} inputs; {report.int8['agreement']:.1%} of their {unit} keep their class"
        )
    return "\n".join(lines)
