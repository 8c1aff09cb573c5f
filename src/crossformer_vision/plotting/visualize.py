"""Pictures: training curves, confusion matrices, precision and recall, predictions."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from crossformer_vision.plotting.fonts import fitted, font, shortened, written

if TYPE_CHECKING:  # matplotlib is imported where something is drawn
    from matplotlib.figure import Figure

# Of classes, in turn: told apart on photographs, and by people who see red and green alike (Okabe and Ito).
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


CROWD = 30  # objects in an image, above which their text would hide them
STRENGTH = 0.6  # of a class's colour over the image
NAME = 24  # most characters of a class name in a plot
CALLED = {"miou": "mIoU", "accuracy_top5": "top-5 accuracy"}


def called(metric: str) -> str:
    """A metric as people write it: `val_mask_ap50` is mask AP50."""
    name = metric.removeprefix("val_").replace("train_", "train ")
    return CALLED.get(name, name.replace("_ap", " AP").replace("_", " "))


def subplots(width: float, height: float, rows: int = 1, cols: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """As a PNG; matplotlib writes none with a side of 2^16 pixels."""
    figure.savefig(path, dpi=min(110, 20000 / max(figure.get_size_inches())))


def _legend(owner: Any, handles: Sequence[Any], names: Sequence[str], **options: Any) -> None:
    """With every name: matplotlib leaves out those that begin with an underscore."""
    legend = owner.legend(handles, ["-"] * len(names), **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(shortened(name, NAME))


def denormalised(
    image: NDArray[np.float32],
    mean: Sequence[float],
    std: Sequence[float],
    channels: tuple[int, int, int] = (0, 1, 2),
) -> NDArray[np.float32]:
    """A network's input (C, H, W) as a picture (H, W, 3) in 0..1.

    Args:
        image: with other than three channels it is stretched from its least to its greatest value.
        mean, std: by which three channels were normalised.
        channels: that are shown of more than three; of fewer, the first is.
    """
    if len(image) == 3:
        image = image * np.array(std, np.float32)[:, None, None] + np.array(mean, np.float32)[:, None, None]
        return image.transpose(1, 2, 0).clip(0, 1)
    image = image[list(channels if len(image) > 3 else (0, 0, 0))].transpose(1, 2, 0)
    return (image - image.min()) / max(float(np.ptp(image)), 1e-6)


def curves(rows: Sequence[dict[str, float]], path: Path | None, monitor: str) -> "Figure":
    """Losses, validation metrics and learning rate by epoch, as matplotlib's figure.

    Args:
        rows: one an epoch, with `epoch`, `lr` and any `train_…` and `val_…` values; not each need have all.
        path: the PNG to write; None for none.
        monitor: the metric that picks the checkpoint, of which the best is marked.
    """
    from cycler import cycler
    from matplotlib import colormaps

    names = [name for name in {k: 0 for row in rows for k in row} if name.startswith(("train_", "val_"))]
    losses = [name for name in names if name.endswith("loss")]
    metrics = sorted((name for name in names if not name.endswith("loss")), key=lambda name: name != monitor)
    figure, axes = subplots(15, 3.8, 1, 3)
    for axis, title, group in zip(
        axes[0], ("loss", "validation", "learning rate"), (losses, metrics, ["lr"])
    ):
        axis.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * cycler(color=colormaps["tab10"](range(10))))
        for name in group:
            known = [row for row in rows if name in row]
            if not known:
                continue
            label = called(name) if name.startswith("train") else f"val {called(name)}"
            axis.plot(
                [row["epoch"] + 1 for row in known],
                [row[name] for row in known],
                marker="." if len(known) < 40 else "",
                lw=2.2 if name == monitor else 1.3,
                label=label if title == "loss" else called(name),
            )
        scored = [row for row in rows if monitor in row]
        if title == "validation" and scored:
            best = max(scored, key=lambda row: (row[monitor], row["epoch"]))
            place = (best["epoch"] + 1, best[monitor])
            axis.plot(*place, "k*", ms=11, label=f"best {called(monitor)}: {best[monitor]:.4f}")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlim(0.5, max(row["epoch"] for row in rows) + 1.5)
        axis.grid(alpha=0.3)
        if group and group != ["lr"]:
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    if path is not None:
        save_figure(figure, path)
    return figure


def confusion_matrix(matrix: NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Share of each true class (row) given each class (column); counts and names up to 30 classes."""
    with written(classes):
        _confusion_matrix(matrix, [shortened(name, NAME) for name in classes], path)


def _confusion_matrix(matrix: NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    n = len(classes)
    side = max(4.5, min(12.0, 1.5 + 0.5 * n))
    figure, axes = subplots(side, side)
    axis = axes[0][0]
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    figure.colorbar(
        axis.imshow(shares, vmin=0, vmax=1, cmap="Blues"), shrink=0.7, label="share of the true class"
    )
    axis.set(
        xlabel="predicted", ylabel="true", title=f"accuracy {np.trace(matrix) / max(1, matrix.sum()):.2%}"
    )
    if n <= 30:
        axis.set_xticks(range(n), classes, rotation=90)
        axis.set_yticks(range(n), classes)
        for i in range(n):
            for j in range(n):
                if matrix[i, j]:
                    colour = "white" if shares[i, j] > 0.5 else "black"
                    axis.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=7, color=colour)
    save_figure(figure, path)


def predictions(shown: Sequence[tuple[NDArray[np.float32], str, str, float]], path: Path) -> None:
    """A grid of images with their predicted class and its probability; wrong ones in red, with the true
    class.

    Args:
        shown: (image (H, W, 3) in 0..1, true class, predicted class, probability) each.
        path: the PNG to write.
    """
    with written([name for _, true, predicted, _ in shown for name in (true, predicted)]):
        _predictions(shown, path)


def _predictions(shown: Sequence[tuple[NDArray[np.float32], str, str, float]], path: Path) -> None:
    cols = min(8, len(shown))
    rows = -(-len(shown) // cols)
    figure, axes = subplots(1.6 * cols, 1.9 * rows, rows, cols)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, true, predicted, probability) in zip(axes.flat, shown):
        axis.imshow(image)
        right = true == predicted
        title = f"{shortened(predicted, 18)} {probability:.0%}"
        title += "" if right else f"\nnot {shortened(true, 18)}"
        axis.set_title(title, fontsize=8, color="darkgreen" if right else "crimson")
    save_figure(figure, path)


def precision_recall(kinds: dict[str, dict[str, NDArray[np.float64]]], path: Path) -> None:
    """Precision by recall at an IoU of 0.5, a plot for each of boxes and masks, a line a class.

    Args:
        kinds: `"box"` or `"mask"` -> class -> precision at recalls from 0 to 1; negative where there is none.
        path: the PNG to write.
    """
    with written([name for classes in kinds.values() for name in classes]):
        _precision_recall(kinds, path)


def _precision_recall(kinds: dict[str, dict[str, NDArray[np.float64]]], path: Path) -> None:
    figure, axes = subplots(7 * len(kinds), 4.6, 1, len(kinds))
    for axis, (kind, classes) in zip(axes[0], kinds.items()):
        lines, labels = [], []
        shown = {name: values for name, values in classes.items() if (values >= 0).any()}
        for name, values in shown.items():
            recall = np.linspace(0, 1, len(values))
            lines += axis.plot(recall, np.where(values >= 0, values, np.nan), lw=1, alpha=0.7)
            labels.append(f"{shortened(name, NAME - 5)} {values[values >= 0].mean():.2f}")
        if shown:
            mean = np.mean([np.clip(values, 0, 1) for values in shown.values()], axis=0)
            (line,) = axis.plot(np.linspace(0, 1, len(mean)), mean, "k", lw=2)
            several = len(shown) <= 20
            lines, labels = (
                [line, *lines[: 20 * several]],
                [f"mean {mean.mean():.2f}", *labels[: 20 * several]],
            )
            _legend(axis, lines, labels, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        axis.set(
            title=f"{kind}es at IoU 0.5" if kind == "box" else f"{kind}s at IoU 0.5",
            xlabel="recall",
            ylabel="precision",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def draw_objects(image: Image.Image, objects: dict[str, NDArray[Any]], classes: Sequence[str]) -> Image.Image:
    """The image with masks and boxes, and the class and score of each; no text over more than `CROWD`.

    Args:
        image: RGB.
        objects: `boxes` (n, 4) in pixels, `labels` (n,) from 1, and, if there are, `scores` (n,) and `masks`
            (n, H, W) of 0 and 1.
        classes: names; that of label 1 comes first.
    """
    pixels = np.array(image, np.float32)
    masks = objects.get("masks")
    if masks is not None:
        for n, mask in enumerate(masks):  # instances of a class lie side by side: each has its own colour
            pixels[mask > 0] = 0.5 * pixels[mask > 0] + 0.5 * np.array(COLOURS[n % len(COLOURS)])
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    canvas = ImageDraw.Draw(drawn)
    line = max(1, round(min(drawn.size) / 250))
    letters = font(classes, max(11, round(min(drawn.size) / 24)))
    colours = [
        COLOURS[(n if masks is not None else int(label) - 1) % len(COLOURS)]
        for n, label in enumerate(objects["labels"])
    ]
    for (x0, y0, x1, y1), colour in zip(np.asarray(objects["boxes"], float).reshape(-1, 4).tolist(), colours):
        # A file's box may have a negative side.
        canvas.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=colour, width=line)
    for n, (box, label) in enumerate(zip(objects["boxes"], objects["labels"])):
        words = [classes[int(label) - 1]] if len(classes) > 1 else []
        if "scores" in objects:
            words.append(f"{objects['scores'][n]:.2f}".replace("0.", ".", 1))
        if not words or len(objects["boxes"]) > CROWD:
            continue
        score = f" {words[-1]}" if "scores" in objects and len(words) > 1 else ""
        room = drawn.width - letters.getlength(score) - 2
        text = fitted(words[0], letters, room) + score
        left, top = float(box[0]), float(box[1])
        left = max(0.0, min(left, drawn.width - letters.getlength(text) - 2))  # inside the picture
        area = canvas.textbbox((left, top), text, font=letters, anchor="lb")
        if area[1] < 0:  # no room above the box
            area = canvas.textbbox((left, max(0.0, top)), text, font=letters, anchor="lt")
        canvas.rectangle(area, fill=colours[n])
        canvas.text((area[0], area[1]), text, fill="black", font=letters, anchor="lt")
    return drawn


def _readable(image: Image.Image) -> Image.Image:
    """Small images are enlarged to have room for text below or above them; long ones are not."""
    factor = max(1, min(round(320 / min(image.size)), round(1280 / max(image.size))))
    return image.resize((image.width * factor, image.height * factor))


def captioned(image: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The image below some lines of text."""
    image = _readable(image)
    width = max(320, image.width)
    size = max(12, round(min(width, 3 * image.height) / 24))
    letters = font(lines, size)
    height = round(1.5 * size)
    page = Image.new("RGB", (width, image.height + height * len(lines) + size // 2), "white")
    page.paste(image, (0, page.height - image.height))
    canvas = ImageDraw.Draw(page)
    for n, line in enumerate(lines):
        place = (size // 2, size // 4 + n * height)
        canvas.text(place, fitted(line, letters, width - size), fill="black", font=letters)
    return page


def detections(
    rows: Sequence[tuple[NDArray[np.float32], dict[str, NDArray[Any]], dict[str, NDArray[Any]]]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """What is in some images beside what was found, two images a row.

    Args:
        rows: (image (H, W, 3) in 0..1, true objects, found objects) each; see `draw_objects`.
        classes: names; that of label 1 comes first.
        path: the PNG to write.
    """
    lines = -(-len(rows) // 2)
    tallest = min(3.0, max(pixels.shape[0] / pixels.shape[1] for pixels, _, _ in rows))
    figure, axes = subplots(13, (3.2 * tallest + 0.3) * lines, lines, 4)
    for axis in axes.flat:
        axis.axis("off")
    for k, (pixels, truth, found) in enumerate(rows):
        image = Image.fromarray((pixels * 255).round().astype(np.uint8))
        # Small images are enlarged, to have room for the labels.
        factor = max(1, min(round(480 / min(image.size)), round(1280 / max(image.size))))
        for column, (title, objects) in enumerate((("true", truth), ("found, score 0.5 or more", found))):
            axis = axes[k // 2][2 * (k % 2) + column]
            axis.imshow(draw_objects(*enlarged(image, objects, factor), classes))
            axis.set_title(title, fontsize=9)
    save_figure(figure, path)


def enlarged(
    image: Image.Image, objects: dict[str, NDArray[Any]], factor: int
) -> tuple[Image.Image, dict[str, NDArray[Any]]]:
    """An image and its objects, `factor` times as large."""
    objects = {**objects, "boxes": objects["boxes"] * factor}
    if "masks" in objects:
        objects["masks"] = objects["masks"].repeat(factor, 1).repeat(factor, 2)
    return image.resize((image.width * factor, image.height * factor)), objects


def palette(classes: int) -> NDArray[np.uint8]:
    """Colours (classes, 3) that are told apart: `COLOURS`, then all hues, light and dark in turn."""
    colours: list[tuple[int, ...]] = [*COLOURS[:classes]]
    for k in range(classes - len(colours)):
        hue, value = (k * 0.618034) % 1, (1.0, 0.6, 0.8)[k % 3]
        rgb = colorsys.hsv_to_rgb(hue, (0.9, 0.6)[k // 3 % 2], value)
        colours.append(tuple(round(255 * channel) for channel in rgb))
    return np.array(colours, np.uint8)


def overlay(image: Image.Image, class_map: NDArray[np.integer[Any]]) -> Image.Image:
    """The image in grey under the colours of its classes; pixels of value 255 keep their own.

    Args:
        image: RGB.
        class_map: (H, W) of the same size, index of the class.
    """
    pixels = np.array(image, np.float32)
    grey = np.array(image.convert("L"), np.float32)[..., None]
    known = class_map != 255
    colours = palette(int(class_map[known].max()) + 1 if known.any() else 1)
    pixels[known] = (1 - STRENGTH) * grey[known] + STRENGTH * colours[class_map[known]]
    return Image.fromarray(pixels.round().astype(np.uint8))


def legend_colours(classes: int) -> NDArray[np.uint8]:
    """`palette` as `overlay` shows it over a medium grey."""
    return ((1 - STRENGTH) * 128 + STRENGTH * palette(classes).astype(np.float32)).round().astype(np.uint8)


def with_legend(
    picture: Image.Image, class_map: NDArray[np.integer[Any]], classes: Sequence[str]
) -> Image.Image:
    """The picture above the colours and names of the classes in its class map, the largest first."""
    picture = _readable(picture)
    total = max(320, picture.width)
    counts = np.bincount(class_map[class_map != 255].ravel(), minlength=len(classes))
    present = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    size = max(12, round(min(total, 3 * picture.height) / 40))
    letters = font(classes, size)
    names = {k: fitted(classes[k], letters, total - 3 * size) for k in present}
    places: list[tuple[int, int]] = []
    x, y = size // 2, picture.height + size // 2
    for k in present:
        width = round(letters.getlength(names[k])) + 3 * size
        if x + width > total and x > size // 2:
            x, y = size // 2, y + round(1.6 * size)
        places.append((x, y))
        x += width
    page = Image.new("RGB", (total, y + 2 * size), "white")
    page.paste(picture, (0, 0))
    canvas = ImageDraw.Draw(page)
    colours = legend_colours(len(classes))
    for k, (x, y) in zip(present, places):
        canvas.rectangle((x, y, x + size, y + size), fill=tuple(int(v) for v in colours[k]))
        canvas.text((x + round(1.4 * size), y + size // 2), names[k], fill="black", font=letters, anchor="lm")
    return page


def segmentations(
    rows: Sequence[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Images, their true and their predicted class maps; pixels that are not counted are left as they are.

    Args:
        rows: (image (h, w, 3) in 0..1, true, predicted class map (H, W)) each.
        classes: names.
        path: the PNG to write.
    """
    with written(classes):
        _segmentations(rows, classes, path)


def _segmentations(
    rows: Sequence[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]],
    classes: Sequence[str],
    path: Path,
) -> None:
    from matplotlib.patches import Patch

    heights = [min(3.0, r[0].shape[0] / r[0].shape[1]) + 0.06 for r in rows]
    figure, axes = subplots(11, 0.6 + 11 / 3 * sum(heights), len(rows), 3)
    present: set[int] = set()
    for line, (pixels, true, predicted) in zip(axes, rows):
        height, width = true.shape
        image = Image.fromarray((pixels * 255).round().astype(np.uint8)).resize((width, height))
        shown = np.where(true == 255, 255, predicted)
        present |= {int(k) for k in np.unique(np.stack([true, shown])) if k != 255}
        pictures = (image, overlay(image, true), overlay(image, shown))
        for axis, title, picture in zip(line, ("image", "true", "predicted"), pictures):
            axis.imshow(picture)
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    colours, listed = legend_colours(len(classes)) / 255, sorted(present)[:40]
    patches = [Patch(color=colours[k]) for k in listed]
    longest = max((len(classes[k]) for k in listed), default=1)
    columns = max(1, min(8, len(listed), 120 // min(NAME, longest + 6)))
    place = dict(loc="outside lower center", ncols=columns, fontsize=8)
    _legend(figure, patches, [classes[k] for k in listed], **place)
    save_figure(figure, path)


def name_points(figure: Any, axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name beside each point of a plot, with a line to it; further down where it would meet others.

    Args:
        figure: of the axis, whose limits and data are there already.
        axis: of the figure.
        points: x and y in the axis' units, name.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it would make room for the names, and so move the points
    unit = figure.dpi / 72
    line = dict(arrowstyle="-", lw=0.5, color="0.5", shrinkA=0, shrinkB=3)
    centres = axis.transData.transform([point[:2] for point in points]) if points else []
    taken = [Bbox.from_bounds(x - 3 * unit, y - 3 * unit, 6 * unit, 6 * unit) for x, y in centres]
    for (at_x, at_y), (x, y, name) in sorted(zip(centres, points, strict=True), key=lambda pair: -pair[0][1]):
        how = dict(xytext=(0, 0), textcoords="offset points", va="center", fontsize=8, arrowprops=line)
        label = axis.annotate(name, (x, y), **how)
        size = label.get_window_extent()
        left = max(axis.bbox.x0, min(at_x + 12 * unit, axis.bbox.x1 - size.width))
        box = Bbox.from_bounds(left, at_y - size.height / 2, size.width, size.height)
        down = 0
        while any(box.overlaps(other) for other in taken):
            box, down = box.translated(0, -unit), down + 1
        label.set_position(((left - at_x) / unit, -down))
        taken.append(box)


def class_bars(classes: Sequence[str], values: NDArray[np.float64], name: str, path: Path) -> None:
    """A bar for each class, the best first, with their mean; classes without a value are left out.

    Args:
        classes: names.
        values: (classes,) in 0..1, or NaN.
        name: of the values.
        path: the PNG to write.
    """
    with written(classes):
        _class_bars([shortened(c, NAME) for c in classes], values, name, path)


def _class_bars(classes: Sequence[str], values: NDArray[np.float64], name: str, path: Path) -> None:
    order = [
        int(k) for k in np.argsort(-np.nan_to_num(values, nan=-1), kind="stable") if not np.isnan(values[k])
    ]
    figure, axes = subplots(7, 1.2 + 0.22 * len(order))
    axis = axes[0][0]
    axis.barh(range(len(order)), values[order], color=palette(len(classes))[order] / 255)
    axis.set_yticks(range(len(order)), [classes[k] for k in order])
    for place, k in enumerate(order):
        axis.text(values[k] + 0.01, place, f"{values[k]:.2f}", va="center", fontsize=7)
    if order:
        mean = float(values[order].mean())
        axis.axvline(mean, color="black", lw=1, ls="--")
        axis.set_title(f"mean {name} {mean:.4f}")
    axis.set(xlabel=name, xlim=(0, 1.08))
    axis.invert_yaxis()
    save_figure(figure, path)
