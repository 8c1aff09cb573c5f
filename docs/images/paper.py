"""The pictures of docs/paper.md: python docs/images/paper.py (scikit-learn brings the photo)."""

from pathlib import Path

import numpy as np
import timm
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.datasets import load_sample_image

import crossformer_vision  # noqa: F401  # registers the models
from crossformer_vision.models.grouping import lda_map_layout, lda_region_layout, sda_layout
from crossformer_vision.plotting import visualize
from crossformer_vision.tools.inspection import group_of, patches

HERE = Path(__file__).parent
COLOURS = ("#e69f00", "#56b4e9", "#cc79a7", "#f0e442")


def save(figure, name: str) -> None:
    """A PNG of 128 colours: a third of the size, and nothing is lost that one would see."""
    visualize.save_figure(figure, HERE / name)
    Image.open(HERE / name).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        HERE / name, optimize=True
    )


def photo(height: int, width: int) -> np.ndarray:
    """The middle of the flower, (height, width, 3)."""
    whole = Image.fromarray(load_sample_image("flower.jpg"))
    scale = max(height / whole.height, width / whole.width)
    whole = whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    return np.asarray(whole.crop((left, top, left + width, top + height)))


def embeddings() -> None:
    """The kernels of each stage's CEL around one point."""
    net = timm.create_model("crossformer_small")
    pixels = photo(224, 224)
    figure, axes = visualize.subplots(14, 4.2, 1, 4)
    for stage, axis in enumerate(axes[0]):
        stride = 4 * 2**stage
        boxes = patches(net, stage, 112 // stride, 96 // stride)
        axis.imshow(pixels)
        for (x1, y1, x2, y2), colour in zip(boxes, COLOURS, strict=False):
            for edge, width in (("black", 4), (colour, 2.2)):
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=edge, lw=width))
        kernels = "4, 8, 16, 32 pixels" if stage == 0 else "2 and 4 positions of the map before"
        axis.set_title(f"stage {stage + 1}, map of {224 // stride}x{224 // stride}\n{kernels}", fontsize=11)
        axis.axis("off")
    save(figure, "paper_embedding.png")


def draw(axis, pixels: np.ndarray, inside: np.ndarray, at: tuple[int, int] | None, title: str) -> None:
    """The members of a group in colour on the dimmed photo."""
    axis.imshow((pixels * 0.45 + 140).astype(np.uint8))
    uy, ux = pixels.shape[0] / inside.shape[0], pixels.shape[1] / inside.shape[1]
    for y, x in zip(*np.nonzero(inside), strict=True):
        axis.add_patch(Rectangle((x * ux, y * uy), ux, uy, fc="#0072b2", ec="white", lw=0.5, alpha=0.75))
    if at is not None:
        place = ((at[1] + 0.5) * ux, (at[0] + 0.5) * uy)
        axis.plot(*place, "+", ms=15, mew=5, color="white")
        axis.plot(*place, "+", ms=13, mew=2.5, color="black")
    axis.set(xlim=(0, pixels.shape[1]), ylim=(pixels.shape[0], 0))
    axis.set_title(title, fontsize=11)
    axis.axis("off")


def window(side: int, at: tuple[int, int], shift: int, size: int = 7) -> np.ndarray:
    """Swin's window of a position: (side, side) of bools. Windows that wrap around are cut by its mask."""
    start = [(p - shift) // size * size + shift for p in at]
    inside = np.zeros((side, side), bool)
    inside[max(0, start[0]) : start[0] + size, max(0, start[1]) : start[1] + size] = True
    return inside


def beside_swin() -> None:
    """Two blocks of CrossFormer and two of Swin: a point's groups, and what has reached it after both."""
    side, at = 28, (13, 12)  # stage 2 of crossformer_small at 224: G = 7, I = 4
    pixels = photo(448, 448)
    near, far = sda_layout(side, side, 7), lda_map_layout(side, side, 4)
    long = group_of(side, side, far, *at)
    shifted = window(side, at, 3)

    def reached(last: np.ndarray, before) -> np.ndarray:
        return np.any([before((int(y), int(x))) for y, x in zip(*np.nonzero(last), strict=True)], axis=0)

    rows = (
        ("SDA: 7x7 neighbours", group_of(side, side, near, *at)),
        ("then LDA: 7x7, every fourth", long),
        ("has reached the cross: all", reached(long, lambda p: group_of(side, side, near, *p))),
        ("Swin: a window of 7x7", window(side, at, 0)),
        ("then a shifted window", shifted),
        ("has reached the cross", reached(shifted, lambda p: window(side, p, 0))),
    )
    figure, axes = visualize.subplots(11, 7.9, 2, 3)
    for axis, (title, inside) in zip(axes.flat, rows, strict=True):
        draw(axis, pixels, inside, at, title)
    save(figure, "paper_swin.png")


def three_readings() -> None:
    """SDA and both LDAs where they differ: a map that is no square of G * I."""
    H, W, at = 28, 40, (16, 30)
    pixels = photo(16 * H, 16 * W)
    figure, axes = visualize.subplots(14, 3.9, 1, 3)
    for axis, (title, layout) in zip(
        axes[0],
        (
            ("SDA, G = 7", sda_layout(H, W, 7)),
            ('lda_span="map", I = 4: 7 x 10 members', lda_map_layout(H, W, 4)),
            ('lda_span="region", G = 7, I = 4: 7 x 7', lda_region_layout(H, W, 7, 4)),
        ),
        strict=True,
    ):
        draw(axis, pixels, group_of(H, W, layout, *at), at, title)
    save(figure, "paper_spans.png")


if __name__ == "__main__":
    embeddings()
    beside_swin()
    three_readings()
