"""Inspect a CrossFormer: groups, attention, patches of embeddings, position biases, amplitudes.

``record`` runs a network on one image and records attention and amplitudes. ``inspection_page`` draws them.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crossformer_vision.errors import UserError, missing_extra
from crossformer_vision.models.attention import use_blocked_attention
from crossformer_vision.models.crossformer import CrossFormer, CrossScaleEmbedding, LongShortAttention
from crossformer_vision.models.grouping import Layout, group
from crossformer_vision.types import JsonObject, Kwargs

Map = NDArray[np.float32]
MAX_POSITIONS = 4096  # largest map whose attention matrix (HW, HW) is computed


def find_crossformer(net: nn.Module) -> CrossFormer:
    """The CrossFormer that a network is or contains.

    Raises:
        UserError: If there is none, or its attention is that of an ablation.
    """
    model = next((m for m in net.modules() if isinstance(m, CrossFormer)), None)
    if model is None:
        raise UserError("this network has no CrossFormer whose groups could be shown")
    for stage in model.stages:
        if any(type(layer) is not LongShortAttention for layer in attention_layers(stage)):
            raise UserError("its attention is that of an ablation; only SDA and LDA can be shown")
    return model


def attention_layers(stage: nn.Module) -> list[LongShortAttention]:
    """The attention layer of each block of a stage."""
    return [block.attn for block in stage.blocks]  # type: ignore[union-attr]


def group_members(H: int, W: int, layout: Layout) -> NDArray[np.int64]:
    """Positions of each group of a map, counted along its rows; -1 for padding.

    Args:
        H: Height of the map.
        W: Width of the map.
        layout: Layout of the groups.

    Returns:
        Shape ``(groups, L)``.
    """
    numbers = torch.arange(1, H * W + 1).view(1, H, W, 1)
    return group(numbers, layout).squeeze(-1).numpy() - 1


def group_of(H: int, W: int, layout: Layout, y: int, x: int) -> NDArray[np.bool_]:
    """Positions that share a group with a position.

    Args:
        H: Height of the map.
        W: Width of the map.
        layout: Layout of the groups.
        y: Row of the position.
        x: Column of the position.

    Returns:
        ``True`` for members, shape ``(H, W)``.
    """
    groups = group_members(H, W, layout)
    (members,) = groups[(groups == y * W + x).any(1)]
    is_member = np.zeros(H * W, bool)
    is_member[members[members >= 0]] = True
    return is_member.reshape(H, W)


@dataclass
class BlockAttention:
    """Attention of one block for one image.

    Attributes:
        size: Height and width of the map.
        layout: Layout of its groups.
        weights: Attention of each query to each key, shape ``(groups, h, L, L)``.
    """

    size: tuple[int, int]
    layout: Layout
    weights: Map

    def from_position(self, y: int, x: int, head: int | None = None) -> Map:
        """Attention of the query at a position to all positions.

        Args:
            y: Row.
            x: Column.
            head: Attention head. ``None`` for the mean of all.

        Returns:
            Shape ``(H, W)``, with sum 1.
        """
        groups = group_members(*self.size, self.layout)
        (index, query) = np.argwhere(groups == y * self.size[1] + x)[0]
        weights = self.weights[index, :, query]
        weights = weights.mean(0) if head is None else weights[head]
        attention = np.zeros(self.size[0] * self.size[1], np.float32)
        is_valid = groups[index] >= 0
        attention[groups[index][is_valid]] = weights[is_valid]
        return attention.reshape(self.size)

    def matrix(self) -> Map:
        """Attention between all positions, averaged over heads, shape ``(HW, HW)``.

        Raises:
            UserError: If the map has more than ``MAX_POSITIONS`` positions.
        """
        H, W = self.size
        if H * W > MAX_POSITIONS:
            raise UserError(f"a map of {H}x{W} is too large for the attention of all positions to all")
        groups = group_members(H, W, self.layout)
        matrix = np.zeros((H * W + 1, H * W + 1), np.float32)  # padding goes to the last row and column
        matrix[groups[:, :, None], groups[:, None, :]] = self.weights.mean(1)
        return matrix[:-1, :-1]


@dataclass
class Record:
    """Recorded activations of a network's blocks for one image, by (stage, block) from 0.

    Attributes:
        blocks: Attention.
        amplitudes: Mean absolute value of the block's output, before amplitude cooling.
        cooled: Mean absolute value after the amplitude cooling layer, if there is one.
    """

    blocks: dict[tuple[int, int], BlockAttention] = field(default_factory=dict)
    amplitudes: dict[tuple[int, int], float] = field(default_factory=dict)
    cooled: dict[tuple[int, int], float] = field(default_factory=dict)

    def rollout(self, stage: int) -> Map:
        """Attention rollout (arXiv 2005.00928) through the blocks of a stage.

        The mean of each block's attention and the identity, multiplied in the order of the blocks. Stages are
        not rolled out together, because embeddings between them mix positions.

        Args:
            stage: Stage, from 0.

        Returns:
            Shape ``(HW, HW)``, with rows of sum 1.

        Raises:
            UserError: If the map has more than ``MAX_POSITIONS`` positions.
        """
        result: Map | None = None
        for _, block in sorted((k, v) for k, v in self.blocks.items() if k[0] == stage):
            matrix = block.matrix()
            step: Map = 0.5 * (matrix + np.eye(len(matrix), dtype=np.float32))
            result = step if result is None else step @ result
        assert result is not None
        return result


@torch.no_grad()
def record(net: nn.Module, images: Tensor) -> Record:
    """Run a CrossFormer on an image and record attention and amplitudes of its blocks.

    Args:
        net: CrossFormer, or network that contains one.
        images: Normalized image, shape ``(1, C, H, W)``.

    Raises:
        UserError: If there is no CrossFormer, or groups have more than 2,048 members.
    """
    model = find_crossformer(net)
    result = Record()
    attentions: list[tuple[LongShortAttention, bool]] = []
    with ExitStack() as stack:
        for s, stage in enumerate(model.stages):
            for b, block in enumerate(stage.blocks):  # type: ignore[arg-type]
                attentions.append((block.attn, block.attn.fused_attn))
                hooks = _attention_hooks(result, (s, b), block.attn)
                hooks.append(_amplitude_hook(result, (s, b), block.acl))
                for hook in hooks:
                    stack.callback(hook.remove)
        try:
            for attention, _ in attentions:
                attention.fused_attn = False
            model.forward_features(images)
        finally:
            for attention, fused_attn in attentions:
                attention.fused_attn = fused_attn
    return result


def _attention_hooks(
    result: Record, place: tuple[int, int], attention: LongShortAttention
) -> list[RemovableHandle]:
    """Hooks that store the attention of a block."""
    context: Kwargs = {}

    def before(_: nn.Module, args: tuple[Tensor]) -> None:
        H, W = args[0].shape[1:3]
        layout = attention.layout(H, W)
        if use_blocked_attention(layout):
            raise UserError(f"groups of {layout.gh}x{layout.gw} members are too large. Use a smaller --size")
        context.update(size=(H, W), layout=layout)

    def after_softmax(_: nn.Module, __: object, output: Tensor) -> None:
        result.blocks[place] = BlockAttention(weights=output.float().cpu().numpy(), **context)

    return [
        attention.register_forward_pre_hook(before),
        attention.attn_drop.register_forward_hook(after_softmax),
    ]


def _amplitude_hook(result: Record, place: tuple[int, int], cooling: nn.Module) -> RemovableHandle:
    """Hook that stores the amplitudes before and after amplitude cooling."""

    def after(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        result.amplitudes[place] = float(args[0].abs().mean())
        if not isinstance(cooling, nn.Identity):
            result.cooled[place] = float(output.abs().mean())

    return cooling.register_forward_hook(after)


def patches(net: nn.Module, stage: int, y: int, x: int) -> list[tuple[float, float, float, float]]:
    """Patches of the image that the kernels of a stage's CEL cover for one embedding.

    Kernels of later stages cover positions of the previous map. Each position counts as a square of
    ``stride x stride`` pixels, although its own receptive field is larger.

    Args:
        net: CrossFormer, or network that contains one.
        stage: Stage, from 0.
        y: Row of the embedding.
        x: Column of the embedding.

    Returns:
        x1, y1, x2, y2 in pixels for each kernel.
    """
    model = find_crossformer(net)
    embed = next(m for m in model.stages[stage].modules() if isinstance(m, CrossScaleEmbedding))
    unit = 1 if stage == 0 else int(model.feature_info[stage - 1]["reduction"])
    boxes: list[tuple[float, float, float, float]] = []
    for conv in embed.convs:
        k, pad = conv.kernel_size[0], int(conv.padding[0])
        left, top = x * embed.stride - pad, y * embed.stride - pad
        boxes.append((left * unit, top * unit, (left + k) * unit, (top + k) * unit))
    return boxes


@torch.no_grad()
def position_bias(attention: LongShortAttention, gh: int, gw: int) -> Map:
    """DPB of a block by offset of query from key.

    Args:
        attention: Attention of the block.
        gh: Rows of a group.
        gw: Columns of a group.

    Returns:
        Shape ``(h, 2 * gh - 1, 2 * gw - 1)``.
    """
    table = attention.position_bias(gh, gw, attention.qkv.weight)
    return table.view(-1, 2 * gh - 1, 2 * gw - 1).float().cpu().numpy()


def class_activation(net: nn.Module, images: Tensor, label: int | None = None) -> Map:
    """Grad-CAM (arXiv 1610.02391) of a classifier's last map.

    Args:
        net: timm classifier whose last stage is a map.
        images: Normalized image, shape ``(1, C, H, W)``.
        label: Class index. ``None`` for the most likely class.

    Returns:
        Values in 0..1, shape ``(H, W)``.

    Raises:
        UserError: If grad-cam is not installed, or the last stage is not a map.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ModuleNotFoundError as error:
        raise missing_extra(error, "inspect") from None
    stages: list[JsonObject] = list(getattr(net, "feature_info", None) or ())
    if not stages:
        raise UserError(f"{type(net).__name__} has no maps on which a class could be shown")
    layer = net.get_submodule(stages[-1]["module"])
    is_channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"

    def as_map(x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise UserError(f"the last stage of {type(net).__name__} has tokens, not a map")
        return x.permute(0, 3, 1, 2) if is_channels_last else x

    targets = None if label is None else [ClassifierOutputTarget(label)]
    with torch.enable_grad(), GradCAM(net, [layer], reshape_transform=as_map) as cam:
        return np.asarray(cam(images, targets)[0], np.float32)
