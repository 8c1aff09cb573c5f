"""Trace networks with torch.export into graphs for any batch size, height and width."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from crossformer_vision.compat import assume, oblivious_sizes, set_size_ranges
from crossformer_vision.errors import UserError
from crossformer_vision.export.detectors import MaskRCNNGraph, RetinaNetGraph
from crossformer_vision.models import img_size_kwargs
from crossformer_vision.models.crossformer import LongShortAttention
from crossformer_vision.models.dense.backbones import (
    STRIDES,
    SimpleFeaturePyramid,
    create_backbone,
    extract_feature_maps,
)
from crossformer_vision.models.dense.base import DenseModel
from crossformer_vision.models.dense.detectors import MaskRCNN, RetinaNet
from crossformer_vision.models.grouping import Layout, pad_to_multiple, padded_size
from crossformer_vision.types import Kwargs
from crossformer_vision.weights.loading import load_checkpoint

MIN_SIDE = 32  # minimum height and width of images, in pixels


class Features(nn.Module):
    """The backbone of a network, returning maps at strides 4, 8, 16 and 32.

    Args:
        net: Classifier, segmenter or detector.
        options: Options of a classifier: its ``backbone`` and ``model_args``.

    Raises:
        UserError: If a classifier has no such maps.
    """

    outputs = tuple(f"stride_{stride}" for stride in STRIDES)

    def __init__(self, net: nn.Module, options: Kwargs) -> None:
        super().__init__()
        if isinstance(net, DenseModel):
            self.body: Any = net.body
            return
        name, arguments = options["backbone"], options["model_args"] or {}
        arguments = {**img_size_kwargs(name, options.get("image_size")), **arguments}
        self.body = create_backbone(name, False, **arguments).eval()
        if isinstance(self.body, SimpleFeaturePyramid):
            raise UserError(f"--features: a classifier of '{name}' has no maps at strides 4 to 32")
        load_checkpoint(self.body, net.state_dict())

    @override
    def forward(self, images: Tensor) -> list[Tensor]:
        return extract_feature_maps(self.body, pad_to_multiple(images, STRIDES[0]))


def trace(
    net: nn.Module, channels: int, size: tuple[int, int], is_fixed: bool
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """Trace a network.

    Args:
        net: The network. Its fused attention is switched off, as fused kernels have other strides.
        channels: Number of channels of the images.
        size: Height and width of the images to trace with.
        is_fixed: Whether the graph is for this size only.

    Returns:
        The graph, and the names of its outputs.
    """
    replaced: list[nn.Module] = []
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
        for kind, forward in (
            (LongShortAttention, forward_any_layout),
            (nn.AdaptiveAvgPool2d, pool_any_size),
        ):
            if isinstance(module, kind) and not is_fixed:
                module.forward = partial(forward, module)  # type: ignore[arg-type, method-assign]
                replaced.append(module)
    model = RetinaNetGraph(net) if isinstance(net, RetinaNet) else net
    model = MaskRCNNGraph(net) if isinstance(net, MaskRCNN) else model
    dynamic = torch.export.Dim.DYNAMIC
    if not is_fixed:
        size = (max(size[0], 256), max(size[1], 320))  # not square, and larger than a group
    shapes = {0: dynamic} if is_fixed else {0: dynamic, 2: dynamic, 3: dynamic}
    try:
        with torch.no_grad(), warnings.catch_warnings(), oblivious_sizes():
            warnings.simplefilter("ignore")
            images = torch.randn(2, channels, *size)
            graph = torch.export.export(model.eval(), (images,), dynamic_shapes=(shapes,))
    finally:
        for module in replaced:
            del module.forward
    set_size_ranges(graph, MIN_SIDE)
    return graph, getattr(model, "outputs", ("logits",))


def forward_any_layout(attention: LongShortAttention, x: Tensor) -> Tensor:
    """``LongShortAttention.forward`` for graphs: the image size at run time decides the layout of groups.

    The layout is chosen by arithmetic because OpenVINO 2026.4 gives wrong outputs for graphs with branches
    when images become larger. Its numbers pass through a tensor, so that later shapes do not contain
    formulas of height and width.

    Args:
        attention: The attention module.
        x: Map, shape ``(B, H, W, C)``.
    """
    H, W = x.shape[1], x.shape[2]
    if not isinstance(H * W, torch.SymInt):
        return attention.forward_groups(x, attention.layout(H, W))
    is_small = torch.sym_min(1, torch.sym_max(0, attention.group_size + 1 - torch.sym_min(H, W)))
    pairs = zip(attention.small_layout(H, W), attention.large_layout(H, W), strict=True)
    values = [torch.full((), is_small * a + (1 - is_small) * b, dtype=torch.int64) for a, b in pairs]
    layout = Layout(*(value.item() for value in torch.stack(values)))
    for value in layout:
        assume(value >= 1)
    padded_H, padded_W = padded_size(layout)
    assume(padded_H >= H)
    assume(padded_W >= W)
    return attention.forward_groups(x, layout)


def pool_any_size(pool: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    """``AdaptiveAvgPool2d.forward`` for maps of any size, as products with weights of rows and columns.

    Args:
        pool: The pooling module.
        x: Map, shape ``(B, C, H, W)``.
    """
    sides = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2
    weights = []
    for size, side in zip(x.shape[2:], sides, strict=True):
        assert side is not None
        cell, position = torch.arange(side, device=x.device)[:, None], torch.arange(size, device=x.device)
        start, end = cell * size // side, ((cell + 1) * size + side - 1) // side
        is_inside = ((position >= start) & (position < end)).to(x.dtype)
        weights.append(is_inside / (end - start))
    rows, columns = weights
    return rows @ x @ columns.t()
