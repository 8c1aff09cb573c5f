"""Draw groups, attention, position biases and amplitudes of a CrossFormer for one image."""

import io
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crossformer_vision.errors import UserError
from crossformer_vision.inference.predictor import Predictor
from crossformer_vision.models.crossformer import CrossFormer, LongShortAttention
from crossformer_vision.models.grouping import ceil_div, lda_count_layout, lda_map_layout, lda_region_layout
from crossformer_vision.plotting import drawing, visualize
from crossformer_vision.plotting.fonts import shorten, use_fonts_for
from crossformer_vision.tools.inspection import (
    MAX_POSITIONS,
    Map,
    Record,
    attention_layers,
    class_activation,
    find_crossformer,
    group_of,
    patches,
    position_bias,
    record,
)
from crossformer_vision.types import Kwargs

T = TypeVar("T")
Layers = Sequence[LongShortAttention]
MAX_ASPECT = 8  # longer side of a photo, in multiples of the target size of its shorter side
MIN_SIDE = 32
DEFAULT_SIDE = 448  # shorter side for detectors and segmenters, in pixels
BLUE, ORANGE = "#0072b2", "#d55e00"


def preprocess(
    predictor: Predictor, picture: Image.Image, size: int | None
) -> tuple[Tensor, NDArray[np.uint8]]:
    """Resize and normalize a photo, keeping its aspect ratio.

    Args:
        predictor: Predictor of the network.
        picture: The photo.
        size: Shorter side in pixels. ``None`` for that of a classifier's images, or 448.

    Returns:
        Normalized image, shape ``(1, 3, H, W)``, and its pixels, shape ``(H, W, 3)``.

    Raises:
        UserError: If the size is less than 32.
    """
    own_size = predictor.info.image.get("input_size")
    side = size or (int(own_size[-1]) if own_size else DEFAULT_SIDE)
    if side < MIN_SIDE:
        raise UserError(f"--size {side}: must be at least {MIN_SIDE} pixels")
    scale = min(side / min(picture.size), MAX_ASPECT * side / max(picture.size))
    width, height = (max(MIN_SIDE, round(length * scale)) for length in picture.size)
    pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
    cfg = predictor.info.image if "mean" in predictor.info.image else {}
    mean = torch.tensor(cfg.get("mean", (0.485, 0.456, 0.406)))
    std = torch.tensor(cfg.get("std", (0.229, 0.224, 0.225)))
    images = (torch.from_numpy(pixels) / 255 - mean) / std
    return images.permute(2, 0, 1)[None].float().to(predictor.device), pixels


def draw_page(
    predictor: Predictor,
    picture: Image.Image,
    path: str | Path,
    point: tuple[float, float] = (0.5, 0.5),
    stage: int = 2,
    block: int | None = None,
    head: int | None = None,
    size: int | None = None,
    compare_with: tuple[str, Predictor] | None = None,
) -> str:
    """Draw the page.

    Args:
        predictor: Predictor of a network with CrossFormer, for any task.
        picture: The photo.
        path: PNG file to write.
        point: Normalized x and y of the position to examine.
        stage: Stage, from 0.
        block: Block, from 0, shown with the other block of its SDA and LDA pair. ``None`` for the last one.
        head: Attention head, from 0. ``None`` for the mean of all.
        size: Shorter side of the image, see ``preprocess``.
        compare_with: Name and predictor of another CrossFormer whose amplitudes are drawn as well.

    Returns:
        A line that describes the page.

    Raises:
        UserError: If there is no CrossFormer, or no such stage, block, head or point.
    """
    model = find_crossformer(predictor.net)
    layers = attention_layers(select("stage", stage, list(model.stages)))
    last = len(layers) - 1 if block is None else block
    select("block", last, layers)
    if head is not None:
        select("head", head, range(layers[0].num_heads))
    if not all(0 <= p <= 1 for p in point):
        raise UserError(f"--point {point[0]:g},{point[1]:g}: normalized coordinates must be from 0 to 1")
    images, pixels = preprocess(predictor, picture, size)
    recorded = record(model, images)
    pair = block_pair(layers, last)
    H, W = recorded.blocks[stage, pair[0]].size
    position = position_at(point, H, W)
    photo_height = 3.1 * pixels.shape[0] / pixels.shape[1]  # on the page, in inches
    figure, axes = visualize.subplots(16, 3 * min(5.0, max(3.3, photo_height + 0.6)), 3, 5)
    for axis in figure.axes:
        axis.axis("off")
    page = _Page(pixels, (H, W), position)
    where = f"stage {stage + 1}, map {H}x{W}"
    page.patches(axes[0][0], patches(model, stage, *position), f"patches of one embedding\n{where}")
    _draw_groups(page, axes[0][1:4], layers, (H, W), position)
    _draw_attention(page, axes[1][:2], recorded, layers, stage, pair, head)
    _draw_rollouts(page, axes[1][2:4], recorded, model, point)
    class_note = _draw_class_activation(predictor, images, page, (axes[0][4], axes[1][4]))
    for k, b in enumerate(pair):
        _draw_position_bias(axes[2][2 * k : 2 * k + 2], recorded, layers, stage, b, head)
    other = None
    if compare_with is not None:
        name, other_predictor = compare_with
        other = (name, record(other_predictor.net, preprocess(other_predictor, picture, size)[0]))
    _draw_amplitudes(axes[2][4], recorded, other)
    visualize.save_figure(figure, Path(path))
    numbers = " and ".join(str(b + 1) for b in pair)
    return f"{path}: {where}, blocks {numbers}, position {position[0]}, {position[1]}{class_note}"


def attention_page(
    predictor: Predictor,
    picture: Image.Image,
    point: tuple[float, float],
    stage: int = 2,
    size: int | None = None,
) -> Image.Image:
    """Attention of a point in the last SDA and LDA block of a stage, drawn on the photo.

    See ``draw_page`` for arguments and errors.

    Args:
        predictor: Predictor of a network with CrossFormer.
        picture: The photo.
        point: Normalized x and y.
        stage: Stage, from 0.
        size: Shorter side of the image.
    """
    model = find_crossformer(predictor.net)
    layers = attention_layers(select("stage", stage, list(model.stages)))
    images, pixels = preprocess(predictor, picture, size)
    recorded = record(model, images)
    pair = block_pair(layers, len(layers) - 1)
    H, W = recorded.blocks[stage, pair[0]].size
    page = _Page(pixels, (H, W), position_at(point, H, W))
    width, height = 5 * len(pair), 5 * pixels.shape[0] / pixels.shape[1] + 0.6
    figure, axes = visualize.subplots(width, max(1.5, min(20, height)), 1, len(pair))
    for axis in figure.axes:
        axis.axis("off")
    _draw_attention(page, axes[0], recorded, layers, stage, pair, None)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    return Image.open(stream)


def block_pair(blocks: Sized, block: int) -> range:
    """The SDA and LDA block of the pair that a block belongs to. The last one may have no partner."""
    first = block - block % 2
    return range(first, min(first + 2, len(blocks)))


def position_at(point: tuple[float, float], H: int, W: int) -> tuple[int, int]:
    """Row and column of a point with normalized x and y on an ``H x W`` map.

    Args:
        point: Normalized x and y, from 0 to 1.
        H: Height of the map.
        W: Width of the map.
    """
    return min(H - 1, int(point[1] * H)), min(W - 1, int(point[0] * W))


def select(option: str, index: int, items: Sequence[T]) -> T:
    """An item by index.

    Args:
        option: Name of the option, for the message.
        index: Index, from 0.
        items: Items to select from.

    Raises:
        UserError: If there is no such item.
    """
    if not 0 <= index < len(items):
        raise UserError(f"--{option} {index + 1}: must be from 1 to {len(items)}")
    return items[index]


class _Page:
    """Draws maps on the photo.

    Args:
        pixels: Photo, shape ``(H, W, 3)``.
        size: Height and width of the map.
        position: Row and column that is examined.
    """

    def __init__(self, pixels: NDArray[np.uint8], size: tuple[int, int], position: tuple[int, int]) -> None:
        self.pixels, self.size, self.position = pixels, size, position
        self.unit = (pixels.shape[0] / size[0], pixels.shape[1] / size[1])
        self.cross = ((position[1] + 0.5) * self.unit[1], (position[0] + 0.5) * self.unit[0])

    def photo(self, axis: Axes, title: str, is_dimmed: bool = False) -> None:
        """Draw the photo.

        Args:
            axis: Axes to draw into.
            title: Title of the axes.
            is_dimmed: Draw the photo with less contrast.
        """
        image = (self.pixels * 0.45 + 140).astype(np.uint8) if is_dimmed else self.pixels
        axis.imshow(image)
        axis.set_title(title, fontsize=10)

    def mark(self, axis: Axes) -> None:
        """Mark the examined position with a cross."""
        axis.plot(*self.cross, "+", ms=13, mew=4, color="white")
        axis.plot(*self.cross, "+", ms=12, mew=2, color="black")
        axis.set(xlim=(0, self.pixels.shape[1]), ylim=(self.pixels.shape[0], 0))

    def patches(self, axis: Axes, boxes: list[tuple[float, float, float, float]], title: str) -> None:
        """Draw boxes around patches, zoomed in.

        Args:
            axis: Axes to draw into.
            boxes: Boxes as ``x1, y1, x2, y2`` in pixels.
            title: Title of the axes.
        """
        self.photo(axis, title)
        for (x1, y1, x2, y2), color in zip(boxes, drawing.COLORS, strict=False):
            edge = np.array(color) / 255
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="black", lw=3.2))
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=edge, lw=1.8))
        x1, y1, x2, y2 = boxes[-1]
        margin = (x2 - x1) / 2
        axis.set(xlim=(x1 - margin, x2 + margin), ylim=(y2 + margin, y1 - margin))

    def group(self, axis: Axes, is_member: NDArray[np.bool_], title: str) -> None:
        """Draw the members of a group as squares on the dimmed photo.

        Args:
            axis: Axes to draw into.
            is_member: ``True`` for members, ``(H, W)``.
            title: Title of the axes.
        """
        self.photo(axis, title, is_dimmed=True)
        unit_y, unit_x = self.unit
        min_side = 0.02 * max(self.pixels.shape[:2])  # to be visible
        for y, x in zip(*np.nonzero(is_member)):
            h, w = max(unit_y, min_side), max(unit_x, min_side)
            corner = ((x + 0.5) * unit_x - w / 2, (y + 0.5) * unit_y - h / 2)
            axis.add_patch(Rectangle(corner, w, h, fc=BLUE, ec="white", lw=0.6, alpha=0.75))
        self.mark(axis)

    def heat(self, axis: Axes, values: Map, title: str) -> None:
        """Draw a map of any size over the gray photo.

        Args:
            axis: Axes to draw into.
            values: Map of any size.
            title: Title of the axes.
        """
        axis.imshow(self.pixels.mean(2), cmap="gray", vmin=0, vmax=255)
        height, width = self.pixels.shape[:2]
        nearest: Kwargs = {"extent": (0, width, height, 0), "interpolation": "nearest"}
        top = float(values.max()) or 1.0
        strength = np.sqrt(values / top).clip(0, 1)  # shows small values too
        axis.imshow(values, cmap="inferno", alpha=0.25 + 0.6 * strength, vmin=0, vmax=top, **nearest)
        axis.set_title(title, fontsize=10)
        self.mark(axis)


def _draw_groups(
    page: _Page, axes: list[Axes], layers: Layers, size: tuple[int, int], position: tuple[int, int]
) -> None:
    """Draw the group of a position in SDA, and in LDA over the map and in regions or by count."""
    H, W = size
    lda = layers[min(1, len(layers) - 1)]
    G, interval = lda.group_size, lda.interval or ceil_div(max(H, W), lda.group_size)
    sda = layers[0].layout(H, W)
    last = f"LDA in regions, G = {G}, I = {interval}", lda_region_layout(H, W, G, interval)
    if lda.lda_span == "count":
        last = f"LDA by count, G = {G}", lda_count_layout(H, W, G)
    for axis, title, layout in (
        (axes[0], f"SDA: group of {sda.gh}x{sda.gw} neighbors", sda),
        (axes[1], f"LDA over the map, I = {interval}", lda_map_layout(H, W, interval)),
        (axes[2], *last),
    ):
        page.group(axis, group_of(H, W, layout, *position), title)


def _draw_attention(
    page: _Page, axes: list[Axes], recorded: Record, layers: Layers, stage: int, pair: range, head: int | None
) -> None:
    """Draw the attention of the examined position in two blocks."""
    heads = "mean of heads" if head is None else f"head {head + 1}"
    for axis, b in zip(axes, pair, strict=False):
        kind = "LDA" if b % 2 and layers[b].interval != 0 else "SDA"
        weights = recorded.blocks[stage, b].from_position(*page.position, head)
        page.heat(axis, weights, f"{kind}, block {b + 1}: attention\nfrom the cross, {heads}")


def _draw_rollouts(
    page: _Page, axes: list[Axes], recorded: Record, model: CrossFormer, point: tuple[float, float]
) -> None:
    """Draw attention rollout from a point through the two coarsest stages."""
    stages = [s for s in (len(model.stages) - 2, len(model.stages) - 1) if s >= 0]
    for axis, s in zip(axes, stages):
        h, w = recorded.blocks[s, 0].size
        if h * w <= MAX_POSITIONS:
            rollout = recorded.rollout(s).reshape(h, w, h, w)[position_at(point, h, w)]
            page.heat(axis, rollout, f"rollout through stage {s + 1}\nfrom the cross")


def _draw_position_bias(
    axes: list[Axes], recorded: Record, layers: Layers, stage: int, block: int, head: int | None
) -> None:
    """Draw DPB of a block, of two heads or the selected one."""
    layout = recorded.blocks[stage, block].layout
    gh, gw = layout.gh, layout.gw
    biases = position_bias(layers[block], gh, gw)
    heads = range(min(2, len(biases))) if head is None else [head]
    for axis, number in zip(axes, heads):
        axis.axis("on")
        values = biases[number]
        middle, reach = (values.max() + values.min()) / 2, max(0.005, float(np.ptp(values)) / 2)
        extent = (0.5 - gw, gw - 0.5, gh - 0.5, 0.5 - gh)
        axis.imshow(values, "viridis", extent=extent, vmin=middle - reach, vmax=middle + reach)
        title = f"DPB of block {block + 1}, head {number + 1}, by offset\n"
        axis.set_title(f"{title}dark {values.min():.2f}, bright {values.max():.2f}", fontsize=10)


def _draw_class_activation(predictor: Predictor, images: Tensor, page: _Page, axes: tuple[Axes, Axes]) -> str:
    """Draw the photo with the most likely class and its class activation; only the photo for other tasks.

    Returns:
        A note on the class for the line that describes the page.
    """
    if predictor.task != "classification":
        page.photo(axes[0], "photo")
        return ""
    with torch.no_grad():
        logits = predictor.net(images)[0].float()
    probabilities = logits.softmax(0) if predictor.info.thresholds is None else logits.sigmoid()
    label = int(probabilities.argmax())
    name = predictor.classes[label]
    with use_fonts_for([name]):
        page.photo(axes[0], f"{shorten(name, 24)}\n{float(probabilities[label]):.0%}")
        try:
            activation = class_activation(predictor.net, images, label)
        except UserError as error:
            axes[1].text(0.5, 0.5, str(error).replace(": ", ":\n"), ha="center", va="center", fontsize=8)
            return f", no class activation: {error}"
        page.heat(axes[1], activation, f"Grad-CAM of\n{shorten(name, 24)}")
    return f", class {name}"


def _draw_amplitudes(axis: Axes, recorded: Record, other: tuple[str, Record] | None) -> None:
    """Draw the amplitude of each block's output, of one or two networks."""
    axis.axis("on")
    lines: list[tuple[str, Record, str]] = [("", recorded, BLUE)]
    if other is not None:
        lines.append((f"{shorten(other[0], 16)}, ", other[1], ORANGE))
    for name, record_, color in lines:
        places = sorted(record_.amplitudes)
        amplitudes = [record_.amplitudes[place] for place in places]
        axis.plot(range(1, 1 + len(places)), amplitudes, ".-", color=color, label=f"{name}output")
        if record_.cooled:
            numbers = [1 + n for n, place in enumerate(places) if place in record_.cooled]
            cooled = [record_.cooled[place] for place in sorted(record_.cooled)]
            axis.plot(numbers, cooled, "v", color=color, mfc="white", label=f"{name}after ACL")
    axis.set_title("amplitude by block\n(mean absolute value)", fontsize=10)
    axis.set(xlabel="block", ylim=(0, 1.3 * axis.get_ylim()[1]))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left")
