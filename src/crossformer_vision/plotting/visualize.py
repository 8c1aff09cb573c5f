"""Plots of training and evaluation: curves, confusion matrices, precision and recall, predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossformer_vision.plotting.drawing import (
    Objects,
    class_colors,
    draw_objects,
    enlarge,
    legend_colors,
    overlay_class_map,
)
from crossformer_vision.plotting.fonts import shorten, use_fonts_for
from crossformer_vision.types import Kwargs

if TYPE_CHECKING:  # matplotlib is imported only when a plot is drawn
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAME_LENGTH = 24  # characters of a class name in a plot
METRIC_LABELS = {"miou": "mIoU", "map": "mAP", "f1": "F1", "accuracy_top5": "top-5 accuracy"}


def metric_label(metric: str) -> str:
    """Label of a metric: ``val_mask_ap50`` becomes ``mask AP50``."""
    name = metric.removeprefix("val_").replace("train_", "train ")
    return METRIC_LABELS.get(name, name.replace("_ap", " AP").replace("_", " "))


def subplots(width: float, height: float, rows: int = 1, cols: int = 1) -> "tuple[Figure, list[list[Axes]]]":
    """Create a figure and a 2D array of its axes, without pyplot's global state.

    Args:
        width: Width of the figure in inches.
        height: Height of the figure in inches.
        rows: Rows of axes.
        cols: Columns of axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False).tolist()


def save_figure(figure: "Figure", path: Path) -> None:
    """Save a figure as PNG, with fewer dots per inch if a side would exceed 20,000 pixels."""
    figure.savefig(path, dpi=min(110, 20000 / max(figure.get_size_inches())))


def _legend(owner: "Axes | Figure", handles: "Sequence[Artist]", names: Sequence[str], **how: Any) -> None:
    """Add a legend with all names. matplotlib skips labels that begin with an underscore."""
    legend = owner.legend(handles, ["-"] * len(names), **how)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(shorten(name, MAX_NAME_LENGTH))


def plot_curves(rows: Sequence[dict[str, float]], path: Path | None, monitor: str) -> "Figure":
    """Plot losses, validation metrics and learning rate by epoch.

    Args:
        rows: Values of each epoch: ``epoch``, ``lr`` and any ``train_…`` and ``val_…``. Rows may lack some.
        path: PNG file to write, or ``None``.
        monitor: Metric that selects the checkpoint. Its best value is marked.

    Returns:
        matplotlib's figure.
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
            label = metric_label(name) if name.startswith("train") else f"val {metric_label(name)}"
            axis.plot(
                [row["epoch"] + 1 for row in known],
                [row[name] for row in known],
                marker="." if len(known) < 40 else "",
                lw=2.2 if name == monitor else 1.3,
                label=label if title == "loss" else metric_label(name),
            )
        scored = [row for row in rows if monitor in row]
        if title == "validation" and scored:
            best = max(scored, key=lambda row: (row[monitor], row["epoch"]))
            place = (best["epoch"] + 1, best[monitor])
            axis.plot(*place, "k*", ms=11, label=f"best {metric_label(monitor)}: {best[monitor]:.4f}")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
        axis.set_xlim(0.5, max(row["epoch"] for row in rows) + 1.5)
        axis.grid(alpha=0.3)
        if group and group != ["lr"]:
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    if path is not None:
        save_figure(figure, path)
    return figure


def plot_confusion_matrix(
    matrix: NDArray[np.int64], classes: Sequence[str], path: Path, title: str | None = None
) -> None:
    """Plot how often each true class (row) was predicted as each class (column).

    Counts and names are written for up to 30 classes.

    Args:
        matrix: Number of images by true and predicted class, ``(classes, classes)``.
        classes: Names of the classes.
        path: PNG file to write.
        title: Title. ``None`` for the accuracy.
    """
    with use_fonts_for(classes):
        title = title or f"accuracy {np.trace(matrix) / max(1, matrix.sum()):.2%}"
        _plot_confusion_matrix(matrix, [shorten(name, MAX_NAME_LENGTH) for name in classes], path, title)


def _plot_confusion_matrix(matrix: NDArray[np.int64], classes: Sequence[str], path: Path, title: str) -> None:
    n = len(classes)
    side = max(4.5, min(12.0, 1.5 + 0.5 * n))
    figure, [[axis]] = subplots(side, side)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    figure.colorbar(
        axis.imshow(shares, vmin=0, vmax=1, cmap="Blues"), shrink=0.7, label="share of the true class"
    )
    axis.set(xlabel="predicted", ylabel="true", title=title)
    if n <= 30:
        axis.set_xticks(range(n), classes, rotation=90)
        axis.set_yticks(range(n), classes)
        for i in range(n):
            for j in range(n):
                if matrix[i, j]:
                    color = "white" if shares[i, j] > 0.5 else "black"
                    axis.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=7, color=color)
    save_figure(figure, path)


def plot_predictions(shown: Sequence[tuple[NDArray[np.float32], str, str, float]], path: Path) -> None:
    """Plot images with their predicted class and its probability. Errors are red and name the true class.

    Args:
        shown: Image ``(H, W, 3)`` with values from 0 to 1, true class, predicted class and probability.
        path: PNG file to write.
    """
    with use_fonts_for([name for _, true, predicted, _ in shown for name in (true, predicted)]):
        _plot_predictions(shown, path)


def _plot_predictions(shown: Sequence[tuple[NDArray[np.float32], str, str, float]], path: Path) -> None:
    cols = min(8, len(shown))
    rows = -(-len(shown) // cols)
    figure, _ = subplots(1.6 * cols, 1.9 * rows, rows, cols)
    for axis in figure.axes:
        axis.axis("off")
    for axis, (image, true, predicted, probability) in zip(figure.axes, shown):
        axis.imshow(image)
        right = true == predicted
        title = f"{shorten(predicted, 18)} {probability:.0%}"
        title += "" if right else f"\nnot {shorten(true, 18)}"
        axis.set_title(title, fontsize=8, color="darkgreen" if right else "crimson")
    save_figure(figure, path)


def plot_precision_recall(kinds: dict[str, dict[str, NDArray[np.float64]]], path: Path) -> None:
    """Plot precision over recall at an IoU of 0.5, with a plot for each kind and a line per class.

    Args:
        kinds: Precision at recalls from 0 to 1, by ``"box"`` or ``"mask"`` and class; negative if undefined.
        path: PNG file to write.
    """
    with use_fonts_for([name for classes in kinds.values() for name in classes]):
        _plot_precision_recall(kinds, path)


def _plot_precision_recall(kinds: dict[str, dict[str, NDArray[np.float64]]], path: Path) -> None:
    figure, axes = subplots(7 * len(kinds), 4.6, 1, len(kinds))
    for axis, (kind, classes) in zip(axes[0], kinds.items()):
        lines, labels = [], []
        shown = {name: values for name, values in classes.items() if (values >= 0).any()}
        for name, values in shown.items():
            recall = np.linspace(0, 1, len(values))
            lines += axis.plot(recall, np.where(values >= 0, values, np.nan), lw=1, alpha=0.7)
            labels.append(f"{shorten(name, MAX_NAME_LENGTH - 5)} {values[values >= 0].mean():.2f}")
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


def plot_detections(
    rows: Sequence[tuple[NDArray[np.float32], Objects, Objects]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Plot ground truth and detections side by side, two images per row.

    Args:
        rows: Image ``(H, W, 3)`` with values from 0 to 1, true objects and detected objects of each. See
            `draw_objects`.
        classes: Names of the classes; label 1 is the first.
        path: PNG file to write.
    """
    lines = -(-len(rows) // 2)
    tallest = min(3.0, max(pixels.shape[0] / pixels.shape[1] for pixels, _, _ in rows))
    figure, axes = subplots(13, (3.2 * tallest + 0.3) * lines, lines, 4)
    for axis in figure.axes:
        axis.axis("off")
    for k, (pixels, truth, found) in enumerate(rows):
        image = Image.fromarray((pixels * 255).round().astype(np.uint8))
        # Small images are enlarged to make room for the labels.
        factor = max(1, min(round(480 / min(image.size)), round(1280 / max(image.size))))
        for column, (title, objects) in enumerate((("true", truth), ("detected, score at least 0.5", found))):
            axis = axes[k // 2][2 * (k % 2) + column]
            axis.imshow(draw_objects(*enlarge(image, objects, factor), classes))
            axis.set_title(title, fontsize=9)
    save_figure(figure, path)


def plot_segmentations(
    rows: Sequence[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Plot images with their true and predicted class maps. Ignored pixels have no overlay.

    Args:
        rows: Image ``(h, w, 3)`` with values from 0 to 1, true and predicted class map ``(H, W)`` of each.
        classes: Names of the classes.
        path: PNG file to write.
    """
    with use_fonts_for(classes):
        _plot_segmentations(rows, classes, path)


def _plot_segmentations(
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
        pictures = (image, overlay_class_map(image, true), overlay_class_map(image, shown))
        for axis, title, picture in zip(line, ("image", "true", "predicted"), pictures):
            axis.imshow(picture)
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    colors, listed = legend_colors(len(classes)) / 255, sorted(present)[:40]
    patches = [Patch(color=colors[k]) for k in listed]
    longest = max((len(classes[k]) for k in listed), default=1)
    columns = max(1, min(8, len(listed), 120 // min(MAX_NAME_LENGTH, longest + 6)))
    place = dict(loc="outside lower center", ncols=columns, fontsize=8)
    _legend(figure, patches, [classes[k] for k in listed], **place)
    save_figure(figure, path)


def label_points(figure: "Figure", axis: "Axes", points: Sequence[tuple[float, float, str]]) -> None:
    """Label points of a plot. Labels that would overlap are moved down and connected by a line.

    Args:
        figure: Figure with its final limits and data.
        axis: Axes of the points.
        points: Coordinates in units of the axes, and label of each point.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it would move the points to make room for the labels
    unit = figure.dpi / 72
    line = dict(arrowstyle="-", lw=0.5, color="0.5", shrinkA=0, shrinkB=3)
    centres = axis.transData.transform([point[:2] for point in points]) if points else np.empty((0, 2))
    taken = [Bbox.from_bounds(x - 3 * unit, y - 3 * unit, 6 * unit, 6 * unit) for x, y in centres]
    for (at_x, at_y), (x, y, name) in sorted(zip(centres, points, strict=True), key=lambda pair: -pair[0][1]):
        how: Kwargs = dict(textcoords="offset points", va="center", fontsize=8, arrowprops=line)
        label = axis.annotate(name, (x, y), (0, 0), **how)
        size = label.get_window_extent()
        left = max(axis.bbox.x0, min(at_x + 12 * unit, axis.bbox.x1 - size.width))
        box = Bbox.from_bounds(left, at_y - size.height / 2, size.width, size.height)
        down = 0
        while any(box.overlaps(other) for other in taken):
            box, down = box.translated(0, -unit), down + 1
        label.set_position(((left - at_x) / unit, -down))
        taken.append(box)


def plot_class_bars(classes: Sequence[str], values: NDArray[np.float64], name: str, path: Path) -> None:
    """Plot a bar for each class in descending order, and their mean. Classes without a value are skipped.

    Args:
        classes: Names of the classes.
        values: Values from 0 to 1 or NaN, ``(classes,)``.
        name: Label of the values.
        path: PNG file to write.
    """
    with use_fonts_for(classes):
        _plot_class_bars([shorten(c, MAX_NAME_LENGTH) for c in classes], values, name, path)


def _plot_class_bars(classes: Sequence[str], values: NDArray[np.float64], name: str, path: Path) -> None:
    order = [
        int(k) for k in np.argsort(-np.nan_to_num(values, nan=-1), kind="stable") if not np.isnan(values[k])
    ]
    figure, [[axis]] = subplots(7, 1.2 + 0.22 * len(order))
    axis.barh(range(len(order)), values[order], color=class_colors(len(classes))[order] / 255)
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
