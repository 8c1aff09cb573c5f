"""What is inside a network, drawn: the page of `crossformer inspect`, and the attention of one point."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crossformer_vision.errors import UserError
from crossformer_vision.inference.predictor import Predictor
from crossformer_vision.models.grouping import across_map, across_regions
from crossformer_vision.plotting import visualize
from crossformer_vision.plotting.fonts import shortened, written
from crossformer_vision.tools.inspection import (
    ROLLED_OUT,
    Map,
    Record,
    class_activation,
    crossformer_in,
    group_of,
    patches,
    position_bias,
    record,
)

LONGEST = 8  # maximum longer side of a photo, in multiples of the target size of its shorter side


def seen(predictor: Predictor, picture: Image.Image, size: int | None) -> tuple[Tensor, NDArray[np.uint8]]:
    """A photo as a network is shown it here: (1, 3, H, W), normalised, and its pixels (H, W, 3).

    Args:
        size: of the shorter side; None for that of a classifier's images, 448 for others.
    """
    own = predictor.image.get("input_size")
    side = size or (int(own[-1]) if own else 448)
    if side < 32:
        raise UserError(f"--size {side}: images have 32 pixels or more")
    scale = min(side / min(picture.size), LONGEST * side / max(picture.size))
    whole = (max(32, round(picture.width * scale)), max(32, round(picture.height * scale)))
    pixels = np.array(picture.resize(whole, Image.Resampling.BICUBIC))
    cfg = predictor.image if "mean" in predictor.image else {}
    mean = torch.tensor(cfg.get("mean", (0.485, 0.456, 0.406)))
    std = torch.tensor(cfg.get("std", (0.229, 0.224, 0.225)))
    images = (torch.from_numpy(pixels) / 255 - mean) / std
    return images.permute(2, 0, 1)[None].float().to(predictor.device), pixels


def sheet(
    predictor: Predictor,
    picture: Image.Image,
    path: str | Path,
    point: tuple[float, float] = (0.5, 0.5),
    stage: int = 2,
    block: int | None = None,
    head: int | None = None,
    size: int | None = None,
    beside: tuple[str, Predictor] | None = None,
) -> str:
    """Draw what is inside a network on one page.

    Args:
        predictor: of a CrossFormer, in any task.
        picture: the photo.
        path: the PNG to write.
        point: of the photo, shares of its width and height, whose embedding is looked at.
        stage: from 0.
        block: from 0, whose pair of SDA and LDA is shown; None for the stage's last.
        head: from 0; None for all on average.
        size: see `seen`.
        beside: name and predictor of another CrossFormer, whose amplitudes are drawn, too.

    Returns:
        A line that says what was drawn.

    Raises:
        UserError: no CrossFormer; a stage, block, head or point that is not there.
    """
    model = crossformer_in(predictor.net)
    blocks: Any = check_place("stage", stage, model.stages).blocks
    last = len(blocks) - 1 if block is None else block
    check_place("block", last, blocks)
    if head is not None:
        check_place("head", head, range(blocks[0].attn.num_heads))
    if not all(0 <= p <= 1 for p in point):
        raise UserError(f"--point {point[0]:g},{point[1]:g}: shares of width and height, from 0 to 1")
    images, pixels = seen(predictor, picture, size)
    kept = record(model, images)
    pair = pair_of(blocks, last)
    H, W = kept.blocks[stage, pair[0]].size
    y, x = position(point, H, W)

    height = 3.1 * pixels.shape[0] / pixels.shape[1]  # of a photo on the page, in inches
    figure, axes = visualize.subplots(16, 3 * min(5.0, max(3.3, height + 0.6)), 3, 5)
    for axis in axes.flat:
        axis.axis("off")
    page = _Page(pixels, (H, W), (y, x))
    where = f"stage {stage + 1}, map {H}x{W}"
    page.patches(axes[0][0], patches(model, stage, y, x), f"patches of one embedding\n{where}")
    lda = blocks[min(1, len(blocks) - 1)].attn
    G, interval = lda.group_size, lda.interval or -(-max(H, W) // lda.group_size)
    sda = blocks[0].attn.layout(H, W)
    for axis, name, layout in (
        (axes[0][1], f"SDA: group of {sda.gh}x{sda.gw} neighbours", sda),
        (axes[0][2], f"LDA over the map, I = {interval}", across_map(H, W, interval)),
        (axes[0][3], f"LDA in regions, G = {G}, I = {interval}", across_regions(H, W, G, interval)),
    ):
        page.group(axis, group_of(H, W, layout, y, x), name)
    _pair(page, axes[1][:2], kept, blocks, stage, pair, head)
    coarse = [s for s in (len(model.stages) - 2, len(model.stages) - 1) if s >= 0]
    for axis, s in zip((axes[1][2], axes[1][3]), coarse):
        h, w = kept.blocks[s, 0].size
        if h * w > ROLLED_OUT:
            continue
        rolled = kept.rollout(s).reshape(h, w, h, w)[position(point, h, w)]
        page.heat(axis, rolled, f"rollout through stage {s + 1}\nfrom the cross")
    drawn_class = _class_activation(predictor, images, page, (axes[0][4], axes[1][4]))
    for k, b in enumerate(pair):
        layout = kept.blocks[stage, b].layout
        biases = position_bias(blocks[b].attn, layout.gh, layout.gw)
        chosen = range(min(2, len(biases))) if head is None else [head]
        for axis, number in zip(axes[2][2 * k : 2 * k + 2], chosen):
            axis.axis("on")
            gh, gw = layout.gh, layout.gw
            values = biases[number]
            middle, reach = (values.max() + values.min()) / 2, max(0.005, float(np.ptp(values)) / 2)
            place: Any = (0.5 - gw, gw - 0.5, gh - 0.5, 0.5 - gh)
            axis.imshow(values, "viridis", extent=place, vmin=middle - reach, vmax=middle + reach)
            title = f"DPB of block {b + 1}, head {number + 1}, by offset\n"
            axis.set_title(f"{title}dark {values.min():.2f}, bright {values.max():.2f}", fontsize=10)
    other = beside and (beside[0], record(beside[1].net, seen(beside[1], picture, size)[0]))
    _amplitudes(axes[2][4], kept, other)
    visualize.save_figure(figure, Path(path))
    return f"{path}: {where}, blocks {' and '.join(str(b + 1) for b in pair)}, position {y}, {x}{drawn_class}"


def attention_page(
    predictor: Predictor,
    picture: Image.Image,
    point: tuple[float, float],
    stage: int = 2,
    size: int | None = None,
) -> Image.Image:
    """What a point attends to in the last SDA and the last LDA of a stage, drawn on the photo.

    Args and errors: see `sheet`.
    """
    model = crossformer_in(predictor.net)
    blocks: Any = check_place("stage", stage, model.stages).blocks
    images, pixels = seen(predictor, picture, size)
    kept = record(model, images)
    pair = pair_of(blocks, len(blocks) - 1)
    H, W = kept.blocks[stage, pair[0]].size
    drawn = _Page(pixels, (H, W), position(point, H, W))
    width, height = 5 * len(pair), 5 * pixels.shape[0] / pixels.shape[1] + 0.6
    figure, axes = visualize.subplots(width, max(1.5, min(20, height)), 1, len(pair))
    for axis in axes.flat:
        axis.axis("off")
    _pair(drawn, axes[0], kept, blocks, stage, pair, None)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    return Image.open(stream)


def pair_of(blocks: Any, block: int) -> list[int]:
    """The SDA and the LDA of which a block is one; a stage's last may be alone."""
    first = block - block % 2
    return [b for b in (first, first + 1) if b < len(blocks)]


def position(point: tuple[float, float], H: int, W: int) -> tuple[int, int]:
    """(row, column) of a point, in shares of width and height, on an H x W map."""
    return min(H - 1, int(point[1] * H)), min(W - 1, int(point[0] * W))


def check_place(what: str, index: int, of: Any) -> Any:
    """`of[index]`; a UserError that counts from 1 if there is none."""
    if not 0 <= index < len(of):
        raise UserError(f"--{what} {index + 1}: there are {len(of)}, counted from 1")
    return of[index]


def _pair(
    page: "_Page", axes: Any, kept: Record, blocks: Any, stage: int, pair: list[int], head: int | None
) -> None:
    """Draw what the page's position attends to in two blocks."""
    shown = "mean of heads" if head is None else f"head {head + 1}"
    for axis, b in zip(axes, pair, strict=False):
        kind = "LDA" if b % 2 and blocks[b].attn.interval != 0 else "SDA"
        weights = kept.blocks[stage, b].of(*page.at, head)
        page.heat(axis, weights, f"{kind}, block {b + 1}: attended\nfrom the cross, {shown}")


def _class_activation(predictor: Predictor, images: Tensor, page: "_Page", axes: tuple[Any, Any]) -> str:
    """Draw the photo with the likeliest classes, and where the likeliest is seen; nothing for other tasks."""
    if predictor.task != "classification":
        page.photo(axes[0], "photo")
        return ""
    with torch.no_grad():
        probabilities = predictor.net(images)[0].float().softmax(0)
    label = int(probabilities.argmax())
    name = predictor.classes[label]
    with written([name]):
        page.photo(axes[0], f"{shortened(name, 24)}\n{float(probabilities[label]):.0%}")
        try:
            activation = class_activation(predictor.net, images, label)
        except UserError as error:  # an extra
            axes[1].text(0.5, 0.5, str(error).replace(": ", ":\n"), ha="center", va="center", fontsize=8)
            return ""
        page.heat(axes[1], activation, f"Grad-CAM of\n{shortened(name, 24)}")
    return f", class {name}"


class _Page:
    """Draws on the photo what belongs to positions of one map."""

    def __init__(self, pixels: NDArray[np.uint8], size: tuple[int, int], at: tuple[int, int]) -> None:
        self.pixels, self.size, self.at = pixels, size, at
        self.unit = (pixels.shape[0] / size[0], pixels.shape[1] / size[1])
        self.cross = ((at[1] + 0.5) * self.unit[1], (at[0] + 0.5) * self.unit[0])

    def photo(self, axis: Any, title: str, dimmed: bool = False) -> None:
        image = (self.pixels * 0.45 + 140).astype(np.uint8) if dimmed else self.pixels
        axis.imshow(image)
        axis.set_title(title, fontsize=10)

    def mark(self, axis: Any) -> None:
        axis.plot(*self.cross, "+", ms=13, mew=4, color="white")
        axis.plot(*self.cross, "+", ms=12, mew=2, color="black")
        axis.set(xlim=(0, self.pixels.shape[1]), ylim=(self.pixels.shape[0], 0))

    def patches(self, axis: Any, boxes: list[tuple[float, float, float, float]], title: str) -> None:
        from matplotlib.patches import Rectangle

        self.photo(axis, title)
        for (x1, y1, x2, y2), colour in zip(boxes, visualize.COLOURS, strict=False):
            edge = np.array(colour) / 255
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="black", lw=3.2))
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=edge, lw=1.8))
        x1, y1, x2, y2 = boxes[-1]  # and as much around it
        margin = (x2 - x1) / 2
        axis.set(xlim=(x1 - margin, x2 + margin), ylim=(y2 + margin, y1 - margin))

    def group(self, axis: Any, inside: NDArray[np.bool_], title: str) -> None:
        """The members in colour on the dimmed photo, each its own square."""
        from matplotlib.patches import Rectangle

        self.photo(axis, title, dimmed=True)
        ys, xs = np.nonzero(inside)
        uy, ux = self.unit
        least = 0.02 * max(self.pixels.shape[:2])  # of a side that is seen
        for y, x in zip(ys, xs):
            h, w = max(uy, least), max(ux, least)
            corner = ((x + 0.5) * ux - w / 2, (y + 0.5) * uy - h / 2)
            axis.add_patch(Rectangle(corner, w, h, fc="#0072b2", ec="white", lw=0.6, alpha=0.75))
        self.mark(axis)

    def heat(self, axis: Any, values: Map, title: str) -> None:
        """A map of any size over the photo in grey; brightest where it is largest."""
        axis.imshow(self.pixels.mean(2), cmap="gray", vmin=0, vmax=255)
        height, width = self.pixels.shape[:2]
        nearest = dict(extent=(0, width, height, 0), interpolation="nearest")
        top = float(values.max()) or 1.0
        strength = np.sqrt(values / top).clip(0, 1)  # faint weights are seen, too
        axis.imshow(values, cmap="inferno", alpha=0.25 + 0.6 * strength, vmin=0, vmax=top, **nearest)
        axis.set_title(title, fontsize=10)
        self.mark(axis)


def _amplitudes(axis: Any, kept: Record, beside: tuple[str, Record] | None) -> None:
    axis.axis("on")
    lines: list[tuple[str, Record, str]] = [("", kept, "#0072b2")]
    if beside is not None:
        lines.append((f"{shortened(beside[0], 16)}, ", beside[1], "#d55e00"))
    for name, one, colour in lines:
        places = sorted(one.amplitudes)
        axis.plot(
            range(1, 1 + len(places)),
            [one.amplitudes[p] for p in places],
            ".-",
            color=colour,
            label=f"{name}output",
        )
        if one.cooled:
            at = [1 + n for n, p in enumerate(places) if p in one.cooled]
            cooled = [one.cooled[p] for p in sorted(one.cooled)]
            axis.plot(at, cooled, "v", color=colour, mfc="white", label=f"{name}after ACL")
    axis.set_title("amplitude by block\n(mean absolute value)", fontsize=10)
    axis.set(xlabel="block", ylim=(0, 1.3 * axis.get_ylim()[1]))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left")
