"""Inside a CrossFormer: who is in a group and attends to whom, what an embedding sees, how activations grow.

`record` runs a network on one image and keeps what its blocks did; the functions beside it give the rest, all
as arrays. `inspect.page` draws them.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crossformer_vision.errors import UserError
from crossformer_vision.models.attention import takes_blocks
from crossformer_vision.models.crossformer import CrossFormer, LongShortAttention
from crossformer_vision.models.grouping import Layout, group

Map = NDArray[np.float32]
ROLLED_OUT = 4096  # most positions of a map whose attention is kept whole, (HW, HW)


def crossformer_in(net: nn.Module) -> CrossFormer:
    """The CrossFormer that a network is, or is built on.

    Raises:
        UserError: there is none, or its attention is one of the ablations'.
    """
    found = next((m for m in net.modules() if isinstance(m, CrossFormer)), None)
    if found is None:
        raise UserError("there is no CrossFormer in this network, whose groups could be shown")
    for stage in found.stages:
        for block in stage.blocks:  # type: ignore[union-attr]
            if type(block.attn) is not LongShortAttention:  # type: ignore[union-attr]
                raise UserError("its attention is an ablation's; long and short distance attention is shown")
    return found


def members(H: int, W: int, layout: Layout) -> NDArray[np.int64]:
    """The positions of each group of an H x W map, counted along its rows: (groups, L); -1 is padding."""
    numbers = torch.arange(1, H * W + 1).view(1, H, W, 1)
    return group(numbers, layout).squeeze(-1).numpy() - 1


def group_of(H: int, W: int, layout: Layout, y: int, x: int) -> NDArray[np.bool_]:
    """Who shares a group with the position (y, x): (H, W)."""
    groups = members(H, W, layout)
    (mine,) = groups[(groups == y * W + x).any(1)]
    inside = np.zeros(H * W, bool)
    inside[mine[mine >= 0]] = True
    return inside.reshape(H, W)


@dataclass
class BlockAttention:
    """What one block attended to, on one image.

    Attributes:
        size: (H, W) of its map.
        layout: of its groups.
        weights: (groups, h, L, L), of each query to each key.
    """

    size: tuple[int, int]
    layout: Layout
    weights: Map

    def of(self, y: int, x: int, head: int | None = None) -> Map:
        """What the position (y, x) attends to, in one head or on average: (H, W), of sum 1."""
        groups = members(*self.size, self.layout)
        (at, query) = np.argwhere(groups == y * self.size[1] + x)[0]
        row = self.weights[at, :, query]
        row = row.mean(0) if head is None else row[head]
        seen = np.zeros(self.size[0] * self.size[1], np.float32)
        real = groups[at] >= 0
        seen[groups[at][real]] = row[real]
        return seen.reshape(self.size)

    def matrix(self) -> Map:
        """The attention of all positions to all, on average over the heads: (HW, HW).

        Raises:
            UserError: a map of more than `ROLLED_OUT` positions.
        """
        H, W = self.size
        if H * W > ROLLED_OUT:
            raise UserError(f"a map of {H}x{W} is too large for the attention of all its positions to all")
        groups = members(H, W, self.layout)
        whole = np.zeros((H * W + 1, H * W + 1), np.float32)  # padding goes into the last row and column
        whole[groups[:, :, None], groups[:, None, :]] = self.weights.mean(1)
        return whole[:-1, :-1]


@dataclass
class Record:
    """What the blocks of a network did on one image.

    Attributes:
        blocks: (stage, block), from 0 -> its attention.
        amplitudes: (stage, block) -> mean absolute value of what it put out, before amplitude cooling.
        cooled: (stage, block) -> the same after the amplitude cooling layer that follows it.
    """

    blocks: dict[tuple[int, int], BlockAttention] = field(default_factory=dict)
    amplitudes: dict[tuple[int, int], float] = field(default_factory=dict)
    cooled: dict[tuple[int, int], float] = field(default_factory=dict)

    def rollout(self, stage: int) -> Map:
        """Attention rollout (arXiv 2005.00928) through the blocks of a stage: (HW, HW), rows of sum 1.

        Each block's attention, averaged over its heads, and the identity in equal parts, multiplied in the
        order of the blocks. Stages are not rolled out together: between them the embeddings mix positions.

        Raises:
            UserError: a map of more than `ROLLED_OUT` positions.
        """
        rolled: Any = None
        for _, block in sorted((k, v) for k, v in self.blocks.items() if k[0] == stage):
            matrix = block.matrix()
            step = 0.5 * (matrix + np.eye(len(matrix), dtype=np.float32))
            rolled = step if rolled is None else step @ rolled
        return rolled


@torch.no_grad()
def record(net: nn.Module, images: Tensor) -> Record:
    """Run a CrossFormer on an image and keep what its blocks did.

    Args:
        net: a CrossFormer, or a network that is built on one.
        images: (1, 3, H, W), normalised.

    Raises:
        UserError: no CrossFormer; an image so large that groups have more than 2,048 members.
    """
    model = crossformer_in(net)
    kept = Record()

    def keep_attention(place: tuple[int, int], attention: LongShortAttention) -> list[Any]:
        found: dict[str, Any] = {}

        def before(_: nn.Module, args: tuple[Tensor]) -> None:
            H, W = args[0].shape[1:3]
            layout = attention.layout(H, W)
            if takes_blocks(layout):
                raise UserError(f"groups of {layout.gh}x{layout.gw} members are too large: a smaller --size")
            found.update(size=(H, W), layout=layout)

        def weights(_: nn.Module, __: Any, output: Tensor) -> None:
            kept.blocks[place] = BlockAttention(weights=output.float().cpu().numpy(), **found)

        return [
            attention.register_forward_pre_hook(before),
            attention.attn_drop.register_forward_hook(weights),
        ]

    def keep_amplitude(place: tuple[int, int], cooling: nn.Module) -> list[Any]:
        def after(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            kept.amplitudes[place] = float(args[0].abs().mean())
            if not isinstance(cooling, nn.Identity):
                kept.cooled[place] = float(output.abs().mean())

        return [cooling.register_forward_hook(after)]

    attentions: list[tuple[LongShortAttention, bool]] = []
    with ExitStack() as hooks:
        for s, stage in enumerate(model.stages):
            blocks: Any = stage.blocks
            for b, block in enumerate(blocks):
                attentions.append((block.attn, block.attn.fused_attn))
                for hook in (*keep_attention((s, b), block.attn), *keep_amplitude((s, b), block.acl)):
                    hooks.callback(hook.remove)
        try:
            for attention, _ in attentions:
                attention.fused_attn = False  # type: ignore[misc]
            model.forward_features(images)
        finally:
            for attention, fused in attentions:
                attention.fused_attn = fused  # type: ignore[misc]
    return kept


def patches(net: nn.Module, stage: int, y: int, x: int) -> list[tuple[float, float, float, float]]:
    """What the kernels of a stage's CEL see of the image for one embedding: (x1, y1, x2, y2) in pixels each.

    Kernels of later stages take positions of the map before them; a position is drawn as the square of pixels
    that it stands for, though its own kernels saw more.
    """
    model = crossformer_in(net)
    embed: Any = model.stages[stage].embed
    embed = getattr(embed, "embed", embed)  # with absolute positions
    unit = 1 if stage == 0 else model.feature_info[stage - 1]["reduction"]
    boxes = []
    for conv in embed.convs:
        k, pad = conv.kernel_size[0], conv.padding[0]
        left, top = x * embed.stride - pad, y * embed.stride - pad
        boxes.append((left * unit, top * unit, (left + k) * unit, (top + k) * unit))
    return boxes


@torch.no_grad()
def position_bias(attention: LongShortAttention, gh: int, gw: int) -> Map:
    """DPB of a block for groups of gh x gw: (h, 2gh - 1, 2gw - 1), by offset of query less key."""
    like = attention.qkv.weight
    table = attention.position_bias(gh, gw, like)
    return table.view(-1, 2 * gh - 1, 2 * gw - 1).float().cpu().numpy()


def class_activation(net: nn.Module, images: Tensor, label: int | None = None) -> Map:
    """Grad-CAM (arXiv 1610.02391) of a classifier's last map, by the library of that name: (H, W) in 0..1.

    Args:
        net: any timm classifier whose last stage is a map.
        images: (1, 3, H, W), normalised.
        label: index of the class; None for the likeliest.

    Raises:
        UserError: the library is not installed; the last stage is no map.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossformer-vision[inspect]'") from None
    infos: Any = getattr(net, "feature_info", None)
    last: list[Any] = list(infos or ())
    if not last:
        raise UserError(f"{type(net).__name__} has no maps, on which a class could be shown")
    layer = net.get_submodule(last[-1]["module"])
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"

    def as_map(x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise UserError(f"{type(net).__name__} ends in tokens, not in a map")
        return x.permute(0, 3, 1, 2) if channels_last else x

    targets = None if label is None else [ClassifierOutputTarget(label)]
    with torch.enable_grad(), GradCAM(net, [layer], reshape_transform=as_map) as cam:
        return np.asarray(cam(images, targets)[0], np.float32)
