"""Networks as graphs that hold for every size."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._sympy.value_ranges import ValueRanges

from crossformer_vision.errors import UserError
from crossformer_vision.export.detectors import MaskRCNNGraph, RetinaNetGraph
from crossformer_vision.models import fixed_size
from crossformer_vision.models.crossformer import LongShortAttention
from crossformer_vision.models.dense.backbones import (
    STRIDES,
    DenseModel,
    SimplePyramid,
    create_backbone,
    feature_maps,
)
from crossformer_vision.models.dense.detectors import MaskRCNN, RetinaNet
from crossformer_vision.models.grouping import Layout, pad_to_multiple, padded_size
from crossformer_vision.weights.checkpoints import load_checkpoint

SMALLEST = 32  # height and width that the networks take


class Features(nn.Module):
    """The maps of a network's backbone at strides 4, 8, 16 and 32, (B, C, h, w).

    Args:
        net: a classifier, segmenter or detector.
        options: of the classifier: its `model` and `model_args`.
    """

    outputs = tuple(f"stride_{stride}" for stride in STRIDES)

    def __init__(self, net: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        if isinstance(net, DenseModel):
            self.body = net.body
        else:
            name, args = options["model"], options["model_args"] or {}
            args = {**fixed_size(name, options.get("image_size")), **args}
            self.body = create_backbone(name, False, **args).eval()
            if isinstance(self.body, SimplePyramid):
                raise UserError(f"--features: a classifier of '{name}' has no maps at strides 4 to 32")
            load_checkpoint(self.body, net.state_dict())

    def forward(self, images: Tensor) -> list[Tensor]:
        return feature_maps(self.body, pad_to_multiple(images, STRIDES[0]))


def traced(
    net: nn.Module, size: tuple[int, int], fixed: bool
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The network as a graph, of any batch, and unless it is fixed of any height and width; its outputs."""
    import torch.fx.experimental._config as config

    switched: list[nn.Module] = []
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # a fused kernel's strides are not a graph's
        for kind, forward in ((LongShortAttention, either_layout), (nn.AdaptiveAvgPool2d, pooled)):
            if isinstance(module, kind) and not fixed:
                module.forward = partial(forward, module)  # type: ignore[arg-type, method-assign]
                switched.append(module)
    whole = RetinaNetGraph(net) if isinstance(net, RetinaNet) else net
    whole = MaskRCNNGraph(net) if isinstance(net, MaskRCNN) else whole
    any_value = torch.export.Dim.DYNAMIC
    if not fixed:
        size = (max(size[0], 256), max(size[1], 320))  # of no special case: not square, larger than a group
    shapes = {0: any_value} if fixed else {0: any_value, 2: any_value, 3: any_value}
    patch: Any = config.patch  # type: ignore[attr-defined]
    oblivious = patch(backed_size_oblivious=True)  # 1 is no special size
    try:
        with torch.no_grad(), warnings.catch_warnings(), oblivious:
            warnings.simplefilter("ignore")
            graph = torch.export.export(whole.eval(), (torch.randn(2, 3, *size),), dynamic_shapes=(shapes,))
    finally:
        for module in switched:
            del module.forward
    # What held at this size the tracer takes for a condition on every size; no operation follows from it.
    for symbol, values in graph.range_constraints.items():
        if str(symbol).startswith("s"):
            least = 1 if values.lower <= 2 else SMALLEST
            graph.range_constraints[symbol] = ValueRanges(least, values.upper)
    return graph, getattr(whole, "outputs", ("logits",))


def either_layout(attention: LongShortAttention, x: Tensor) -> Tensor:
    """`LongShortAttention.forward` in a graph: which of two layouts it is follows from the image at hand.

    It is chosen by arithmetic: of a graph with branches OpenVINO 2026.4 gives wrong outputs whenever images
    grow. And its five numbers go through a tensor, so that the tracer, which would carry formulas of height
    and width through all later shapes, takes them for numbers that it does not know.
    """
    H, W = x.shape[1], x.shape[2]
    if not isinstance(H * W, torch.SymInt):
        return attention.grouped(x, attention.layout(H, W))
    small = torch.sym_min(1, torch.sym_max(0, attention.group_size + 1 - torch.sym_min(H, W)))
    either = zip(attention.small_layout(H, W), attention.large_layout(H, W), strict=True)
    values = [torch.full((), small * a + (1 - small) * b, dtype=torch.int64) for a, b in either]
    layout: Any = Layout(*(value.item() for value in torch.stack(values)))
    for value in layout:
        torch._check(value >= 1)
    padded_H, padded_W = padded_size(layout)
    torch._check(padded_H >= H)
    torch._check(padded_W >= W)
    return attention.grouped(x, layout)


def pooled(pool: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    """`AdaptiveAvgPool2d.forward` of a map of any size, as products with the weights of rows and columns."""
    sides = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2
    weights = []
    for size, side in zip(x.shape[2:], sides, strict=True):
        assert side is not None
        cell, place = torch.arange(side, device=x.device)[:, None], torch.arange(size, device=x.device)
        start, end = cell * size // side, ((cell + 1) * size + side - 1) // side
        inside = ((place >= start) & (place < end)).to(x.dtype)
        weights.append(inside / (end - start))
    rows, columns = weights
    return rows @ x @ columns.t()
