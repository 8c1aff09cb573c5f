"""Trained networks as files for other programs, for any batch, height and width."""

import copy
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossformer_vision.errors import UserError, check_output, counted
from crossformer_vision.export import graphs
from crossformer_vision.export.int8 import quantize, recorded
from crossformer_vision.inference.exported import KEY, OnnxNetwork, OpenVinoNetwork
from crossformer_vision.inference.predictor import Predictor, load_predictor
from crossformer_vision.models.dense.openmmlab import paste_masks

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
SIZES = ((64, 64), (97, 130), (225, 300), (64, 259), (231, 200))  # at which a graph is held against eager
TOLERANCE = 1e-3  # of the largest output; of a detector's objects at all sizes, the share that may be others

Call = Callable[[Tensor], tuple[Tensor, ...]]


def export(
    what: Any,
    out: str | os.PathLike[str],
    features: bool = False,
    int8: str | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Write a trained network as one graph, and hold it against the network itself.

    Input `images`: (B, 3, H, W), float32, normalised. Outputs: of a classifier `logits` (B, classes); of a
    segmenter `logits` (B, classes, H, W); of a detector, for the best n (`max_detections`) objects of each
    image, `boxes` (B, n, 4) x1, y1, x2, y2 in pixels, `labels` (B, n) from 1, `scores` (B, n), 0 where there
    are no more, and of Mask R-CNN `masks` (B, n, 28, 28) of each box, as probabilities.

    ONNX and OpenVINO files say what they are (`what_it_says`): task, classes, how images are prepared;
    `load_predictor` and `crossformer predict` take them. A program of torch says it too, but torch unpickles
    it, so it is for one's own `torch.export.load` alone.

    Args:
        what: as for `load_predictor`: a run, a checkpoint, the name of published weights; or a `Predictor`.
        out: the file: `.onnx`, `.xml` for OpenVINO, which puts a `.bin` beside it, or `.pt2` for torch.
        features: the backbone's maps alone, `stride_4` to `stride_32`, (B, C, h, w).
        int8: a folder of images like those to come, of which a few hundred are enough: the file of a
            classifier or segmenter, OpenVINO's, computes in 8 bits with the ranges that they show.
        report: Called with a progress message before each step. Does nothing by default.

    Returns:
        What the file says, with `differences`: size -> how far it is from the network. Of tensors the largest
        difference over the largest output; of detectors the share of objects that are not found there with
        the same label, borders within half a pixel, a score within 0.001 and the same mask; with `objects`,
        how many were compared; with `failed`, why it serves one size alone, if it does; and with `int8`, what
        `int8.quantize` returns, the differences being those of the file before.

    Raises:
        UserError: a network that comes out otherwise than it is; libraries that are not installed.
    """
    path = Path(out)
    if path.suffix not in FORMATS.values():
        raise UserError(f"'{path.name}': exported files end in {', '.join(FORMATS.values())}")
    try:
        if path.suffix != ".pt2":
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        if path.suffix == ".xml":
            import openvino  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossformer-vision[export]'") from None
    if int8 is not None:
        if path.suffix != ".xml":
            raise UserError(f"'{path.name}': files in 8 bits are OpenVINO's and end in .xml")
        if not importlib.util.find_spec("nncf"):  # heavy: imported where it is used
            raise UserError("nncf is not installed: pip install 'crossformer-vision[export]'")
    if isinstance(what, (str, os.PathLike)):
        check_output("--out", path, what)
    predictor = what if isinstance(what, Predictor) else load_predictor(what, "cpu")
    if not predictor.options:
        raise UserError(f"{what}: is an exported file already")
    if int8 is not None and (features or predictor.task == "detection"):
        raise UserError("classifiers and segmenters are exported in 8 bits, no detectors or features")
    inputs = None if int8 is None else recorded(predictor.to("cpu"), int8)
    net = copy.deepcopy(predictor.net).cpu().float().eval()
    if features:
        net = graphs.Features(net, predictor.options)
    said = {**what_it_says(predictor), **({"task": "features"} if features else {})}
    own = own_size(predictor)
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = ""
    for sizes in (SIZES, (own,)):  # a network that takes one size alone is exported for that
        said["size"] = None if sizes is SIZES else list(own)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            new = Path(folder) / path.name
            try:
                served = "any size" if sizes is SIZES else f"{own[0]}x{own[1]} only"
                report(f"tracing the model for {served} (up to three minutes)")
                graph, outputs = graphs.traced(net, own, fixed=sizes is not SIZES)
                report(f"writing {path.name}")
                WRITERS[path.suffix](graph, outputs, new, said)
                call = READERS[path.suffix](new)
                compare = different_objects if said["task"] == "detection" else difference
                differences, counts = {}, {}
                for height, width in sizes:
                    name = f"{height}x{width}"
                    report(f"comparing outputs with the PyTorch model at {name}")
                    differences[name], counts[name] = compare(net, call, (height, width))
            except Exception as error:  # of tracing, of many kinds; the next size may do
                failed = failed or (str(error) or type(error).__name__).strip().splitlines()[0]
                continue
            if worst(differences, counts) <= TOLERANCE:
                found = {"differences": differences, "objects": sum(counts.values()), "failed": failed}
                if inputs is not None:
                    report(f"quantizing to 8 bits with {counted(len(inputs), 'input')} (some minutes)")
                    found["int8"] = quantize(new, predictor, inputs, said)
                path.unlink(missing_ok=True)  # OpenVINO's .xml does not stand beside another's .bin
                for file in sorted(Path(folder).iterdir()):  # .bin before .xml
                    file.replace(path.parent / file.name)
                return {**said, **found}
            failed = failed or f"its outputs differ by {worst(differences, counts):.1e}"
    raise UserError(f"this network cannot be exported ({failed})")


def worst(differences: dict[str, float], counts: dict[str, int]) -> float:
    """Of all sizes: the largest difference, or the share of all objects."""
    if objects := sum(counts.values()):
        return sum(differences[name] * max(1, counts[name]) for name in counts) / objects
    return max(differences.values())


def own_size(predictor: Predictor) -> tuple[int, int]:
    """H, W of the images that a network is given; a usual one for those that take any."""
    size = predictor.image.get("input_size") or (predictor.options.get("model_args") or {}).get("img_size")
    if isinstance(size, int):
        return size, size
    return (256, 320) if size is None else (int(size[-2]), int(size[-1]))


def what_it_says(predictor: Predictor) -> dict[str, Any]:
    """What an exported file holds beside the graph, as JSON under `KEY`."""
    said = {"task": predictor.task, "classes": predictor.classes, "values": predictor.values}
    said["image"] = predictor.image
    if predictor.task == "segmentation":
        said |= {"test": predictor.test, "test_scales": list(predictor.test_scales)}
    if predictor.task == "detection":
        transform: Any = predictor.net.transform
        sizes = {"min_size": transform.min_size[-1], "max_size": transform.max_size}
        said["image"] = {**sizes, "mean": transform.image_mean, "std": transform.image_std}
        said["category_ids"] = predictor.category_ids
        said["least_score"] = getattr(predictor.net, "roi_heads", predictor.net).score_thresh
    return said


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def write_onnx(
    graph: torch.export.ExportedProgram, outputs: tuple[str, ...], path: Path, said: dict[str, Any]
) -> None:
    import torch.fx.experimental._config as config
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    patch: Any = config.patch  # type: ignore[attr-defined]
    with warnings.catch_warnings(), patch(backed_size_oblivious=True), quiet("onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            graph,
            dynamo=True,
            verbose=False,
            opset_version=20,
            input_names=["images"],
            output_names=list(outputs),
        )
        ClearMetadataAndDocStringPass()(program.model)  # stack traces of every node: half the file
    program.model.metadata_props[KEY] = json.dumps(said)
    program.save(path)


def write_openvino(
    graph: torch.export.ExportedProgram, outputs: tuple[str, ...], path: Path, said: dict[str, Any]
) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder) / "graph.onnx"
        write_onnx(graph, outputs, between, said)
        model = openvino.Core().read_model(between)
        model.set_rt_info(json.dumps(said), [KEY])
        openvino.save_model(model, path, compress_to_fp16=False)


def write_torch(
    graph: torch.export.ExportedProgram, outputs: tuple[str, ...], path: Path, said: dict[str, Any]
) -> None:
    torch.export.save(graph, path, extra_files={KEY: json.dumps(said)})


def read_torch(path: Path) -> Call:
    """A program that was just written: torch unpickles such files."""
    call: Any = torch.export.load(path).module(check_guards=False)

    def together(images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = call(images)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return together


WRITERS = {".onnx": write_onnx, ".xml": write_openvino, ".pt2": write_torch}
READERS: dict[str, Callable[[Path], Call]] = {
    ".onnx": OnnxNetwork,
    ".xml": OpenVinoNetwork,
    ".pt2": read_torch,
}


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Within, loggers say errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------------
# Against the network itself
# ------------------------------------------------------------------------------------------------------------


def pictures(batch: int, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) of 0..1: coloured patches under noise, in which detectors find something."""
    seed = torch.Generator().manual_seed(batch)
    patches = torch.rand(batch, 3, -(-size[0] // 24), -(-size[1] // 24), generator=seed)
    patches = nn.functional.interpolate(patches, size=size, mode="nearest")
    return (patches + 0.1 * torch.randn(patches.shape, generator=seed)).clamp(0, 1)


def difference(net: nn.Module, call: Call, size: tuple[int, int]) -> tuple[float, int]:
    """Largest difference of a graph's outputs, over the network's largest, of one and three images; and 0."""
    found = 0.0
    for batch in (1, 3):
        images = 4 * pictures(batch, size) - 2
        with torch.no_grad():
            expected = net(images)
        expected = [expected] if isinstance(expected, Tensor) else expected
        for got, one in zip(call(images), expected, strict=True):
            if got.shape != one.shape or not torch.isfinite(got).all():
                return float("inf"), 0
            found = max(found, float((got - one).abs().max() / one.abs().max().clamp(min=1e-9)))
    return found, 0


def different_objects(net: Any, call: Call, size: tuple[int, int]) -> tuple[float, int]:
    """The share of a detector's objects that a graph does not find, of one and three images; and how many
    there are."""
    net.transform.min_size, net.transform.max_size = (min(size),), max(size)  # as large as they are
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (net.transform.image_mean, net.transform.image_std))
    missing, objects = 0, 0
    for batch in (1, 3):
        images = pictures(batch, size)
        with torch.no_grad():
            expected = net(list(images))
        boxes, labels, scores, *masks = call((images - mean) / std)
        for n, one in enumerate(expected):
            near = (one["boxes"][:, None] - boxes[n]).abs().amax(2) <= 0.5
            near &= (one["labels"][:, None] == labels[n]) & (
                (one["scores"][:, None] - scores[n]).abs() <= 1e-3
            )
            same = near.any(1)
            if masks:
                own = masks[0][n][near.int().argmax(1)][:, None]
                pasted = paste_masks(own, one["boxes"], size)
                same &= ((pasted - one["masks"]).abs() > 0.02).flatten(1).float().mean(1) < 1e-3
            missing += int((~same).sum()) + abs(int((scores[n] > 0).sum()) - len(near))
            objects += len(near)
    return missing / max(1, objects), objects


def describe(said: dict[str, Any], out: str | os.PathLike[str]) -> str:
    """What `crossformer export` prints."""
    size = said["size"]
    serves = "any batch, height and width from 32"
    if size is not None:
        serves = f"any batch of {size[0]}x{size[1]} alone (of others: {said['failed']})"
    largest = max(said["differences"].values())
    sizes = ", ".join(said["differences"])
    what = "features" if said["task"] == "features" else f"{said['task']}, {len(said['classes'])} classes"
    if said["task"] == "detection":
        agrees = f"at least {1 - largest:.1%} of the network's {said['objects']} objects found"
        agrees = agrees if said["objects"] else "no object to compare was found"
    else:
        agrees = f"agrees with the network within {largest:.0e}"
    if "int8" in said:
        layers = "{layers} of {all_layers} layers in 8 bits, by {images} inputs".format(**said["int8"])
        of = "pixels" if said["task"] == "segmentation" else "images"
        sizes += f" before\n{layers}; {said['int8']['agreement']:.1%} of their {of} get the same class"
    return f"{out}: {what}; {serves}\n{agrees} at {sizes}"
