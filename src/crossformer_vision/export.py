"""Trained networks as ONNX files for other programs, for any batch, height and width."""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossformer_vision.errors import UserError
from crossformer_vision.models.crossformer import LongShortAttention
from crossformer_vision.predict import Predictor, load_predictor
from crossformer_vision.predict.exported import KEY, OnnxNetwork

SIZES = ((64, 64), (97, 130), (225, 300), (64, 259), (231, 200))  # at which a graph is held against eager
TOLERANCE = 1e-3  # of the largest output


def export(what: Any, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a trained classifier or segmenter as one ONNX graph, and hold it against the network itself.

    Input `images`: (B, 3, H, W), float32, normalised; output `logits`: (B, classes), or (B, classes, H, W).
    The file says what it is (`what_it_says`): task, classes, how images are prepared; `load_predictor` and
    `crossformer predict` take it.

    Args:
        what: as for `load_predictor`: a run, a checkpoint, the name of published weights; or a `Predictor`.
        out: the file, `.onnx`.

    Returns:
        What the file says, with `differences`: size -> largest difference from the network, over its largest
        output.

    Raises:
        UserError: a detector, whose boxes are not exported; a network that comes out otherwise than it is;
            libraries that are not installed.
    """
    path = Path(out)
    if path.suffix != ".onnx":
        raise UserError(f"'{path.name}': exported files are ONNX and end in .onnx")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossformer-vision[export]'") from None
    predictor = what if isinstance(what, Predictor) else load_predictor(what, "cpu")
    if predictor.task == "detection":
        raise UserError("detectors cannot be exported yet: classifiers and segmenters can")
    if isinstance(predictor.net, OnnxNetwork):
        raise UserError(f"{what}: is an exported file already")
    net = copy.deepcopy(predictor.net).cpu().float().eval()
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # a fused kernel's strides are not a graph's
        if isinstance(module, LongShortAttention):
            module.forward = partial(either_layout, module)  # type: ignore[method-assign]
    own = own_size(predictor)
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = ""
    for sizes in (SIZES, (own,)):  # a network that takes one size alone is exported for that
        said = {**what_it_says(predictor), "size": None if sizes is SIZES else list(own)}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            new = Path(folder) / "new.onnx"
            try:
                graph = traced(net, own, fixed=sizes is not SIZES)
                call = write_onnx(graph, new, said)
                differences = {f"{h}x{w}": difference(net, call, (h, w)) for h, w in sizes}
            except Exception as error:  # of tracing, of many kinds; the next size may do
                failed = failed or (str(error) or type(error).__name__).strip().splitlines()[0]
                continue
            if max(differences.values()) <= TOLERANCE:
                new.replace(path)
                return {**said, "differences": differences}
            failed = failed or f"its outputs differ by {max(differences.values()):.1e}"
    raise UserError(f"this network cannot be exported ({failed})")


def either_layout(attention: LongShortAttention, x: Tensor) -> Tensor:
    """`LongShortAttention.forward` in a graph: which of two layouts it is follows from the image at hand."""
    H, W, G = x.shape[1], x.shape[2], attention.group_size
    if not isinstance(H * W, torch.SymInt):
        return attention.grouped(x, attention.layout(H, W))
    found: Tensor = torch.cond(
        torch.sym_min(H, W) <= G,
        lambda x: attention.grouped(x, attention.small_layout(x.shape[1], x.shape[2])),
        lambda x: attention.grouped(x, attention.large_layout(x.shape[1], x.shape[2])),
        (x,),
    )
    return found


def own_size(predictor: Predictor) -> tuple[int, int]:
    """H, W of the images that a classifier is given; of a segmenter, which takes any, a usual one."""
    size = predictor.image.get("input_size")
    return (256, 320) if size is None else (int(size[-2]), int(size[-1]))


def what_it_says(predictor: Predictor) -> dict[str, Any]:
    """What an exported file holds beside the graph, as JSON under `KEY`."""
    said = {"task": predictor.task, "classes": predictor.classes, "values": predictor.values}
    said["image"] = predictor.image
    if predictor.task == "segmentation":
        said |= {"test": predictor.test, "test_scales": list(predictor.test_scales)}
    return said


def traced(net: nn.Module, size: tuple[int, int], fixed: bool) -> torch.export.ExportedProgram:
    """The network as a graph, of any batch, and unless it is fixed of any height and width."""
    import torch.fx.experimental._config as config

    any_value = torch.export.Dim.DYNAMIC
    if not fixed:
        size = (max(size[0], 256), max(size[1], 320))  # of no special case: not square, larger than a group
    shapes = {0: any_value} if fixed else {0: any_value, 2: any_value, 3: any_value}
    patch: Any = config.patch  # type: ignore[attr-defined]
    oblivious = patch(backed_size_oblivious=True)  # 1 is no special size
    with torch.no_grad(), warnings.catch_warnings(), oblivious:
        warnings.simplefilter("ignore")
        return torch.export.export(net, (torch.randn(2, 3, *size),), dynamic_shapes=(shapes,))


def difference(net: nn.Module, call: Callable[[Tensor], Tensor], size: tuple[int, int]) -> float:
    """Largest difference of a graph's outputs, over the network's largest, of one and three images."""
    found = 0.0
    for batch in (1, 3):
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = net(images)
        got = call(images)
        if got.shape != expected.shape:
            return float("inf")
        found = max(found, float((got - expected).abs().max() / expected.abs().max()))
    return found


def write_onnx(
    graph: torch.export.ExportedProgram, path: Path, said: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    import torch.fx.experimental._config as config

    patch: Any = config.patch  # type: ignore[attr-defined]
    with warnings.catch_warnings(), patch(backed_size_oblivious=True):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            graph,
            dynamo=True,
            verbose=False,
            opset_version=20,
            input_names=["images"],
            output_names=["logits"],
        )
    program.model.metadata_props[KEY] = json.dumps(said)
    program.save(path)
    return OnnxNetwork(path)


def describe(said: dict[str, Any], out: Sequence[str] | str) -> str:
    """What `crossformer export` prints."""
    size = said["size"]
    serves = (
        "any batch, height and width from 32" if size is None else f"any batch of {size[0]}x{size[1]} alone"
    )
    worst = max(said["differences"].values())
    sizes = ", ".join(said["differences"])
    what = f"{said['task']}, {len(said['classes'])} classes"
    return f"{out}: {what}; {serves}\nagrees with the network within {worst:.0e} at {sizes}"
