"""Pictures: training curves, confusion matrices, precision and recall, predictions."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

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


def _figure(width: float, height: float, rows: int = 1, cols: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False)


def denormalised(
    image: NDArray[np.float32], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """A network's input (3, H, W) as a picture (H, W, 3) in 0..1."""
    return (image.transpose(1, 2, 0) * np.array(std, np.float32) + np.array(mean, np.float32)).clip(0, 1)


def curves(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Losses, validation metrics and learning rate by epoch.

    Args:
        rows: one an epoch, with `epoch`, `lr` and any `train_…` and `val_…` values; not each need have all.
        path: the PNG to write.
    """
    names = [name for name in {k: 0 for row in rows for k in row} if name.startswith(("train_", "val_"))]
    losses = [name for name in names if name.endswith("loss")]
    metrics = [name for name in names if not name.endswith("loss")]
    figure, axes = _figure(12, 3.4, 1, 3)
    for axis, title, group in zip(
        axes[0], ("loss", "validation", "learning rate"), (losses, metrics, ["lr"])
    ):
        for name in group:
            known = [row for row in rows if name in row]
            axis.plot(
                [row["epoch"] + 1 for row in known],
                [row[name] for row in known],
                marker="." if len(known) < 40 else "",
                label=name,
            )
        if title == "validation" and metrics:
            best = max((row for row in rows if metrics[0] in row), key=lambda row: row[metrics[0]])
            axis.annotate(
                f"{best[metrics[0]]:.4f}",
                (best["epoch"] + 1, best[metrics[0]]),
                xytext=(0, -14),
                textcoords="offset points",
                ha="center",
            )
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if group != ["lr"]:
            axis.legend()
    figure.savefig(path, dpi=110)


def confusion_matrix(matrix: NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Share of each true class (row) given each class (column); counts and names up to 30 classes."""
    n = len(classes)
    side = max(4.5, min(12.0, 1.5 + 0.5 * n))
    figure, axes = _figure(side, side)
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
    figure.savefig(path, dpi=110)


def predictions(shown: Sequence[tuple[NDArray[np.float32], str, str, float]], path: Path) -> None:
    """A grid of images with their predicted class and its probability; wrong ones in red, with the true
    class.

    Args:
        shown: (image (H, W, 3) in 0..1, true class, predicted class, probability) each.
        path: the PNG to write.
    """
    cols = min(8, len(shown))
    rows = -(-len(shown) // cols)
    figure, axes = _figure(1.6 * cols, 1.9 * rows, rows, cols)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, true, predicted, probability) in zip(axes.flat, shown):
        axis.imshow(image)
        right = true == predicted
        title = f"{predicted} {probability:.0%}" + ("" if right else f"\nnot {true}")
        axis.set_title(title, fontsize=8, color="darkgreen" if right else "crimson")
    figure.savefig(path, dpi=110)


def precision_recall(kinds: dict[str, dict[str, NDArray[np.float64]]], path: Path) -> None:
    """Precision by recall at an IoU of 0.5, a plot for each of boxes and masks, a line a class.

    Args:
        kinds: `"box"` or `"mask"` -> class -> precision at recalls from 0 to 1; negative where there is none.
        path: the PNG to write.
    """
    figure, axes = _figure(5.5 * len(kinds), 4.2, 1, len(kinds))
    for axis, (kind, classes) in zip(axes[0], kinds.items()):
        shown = {name: values for name, values in classes.items() if (values >= 0).any()}
        for name, values in shown.items():
            recall = np.linspace(0, 1, len(values))
            label = f"{name} {values[values >= 0].mean():.2f}" if len(shown) <= 20 else None
            axis.plot(recall, np.where(values >= 0, values, np.nan), lw=1, alpha=0.7, label=label)
        if shown:
            mean = np.mean([np.clip(values, 0, 1) for values in shown.values()], axis=0)
            axis.plot(np.linspace(0, 1, len(mean)), mean, "k", lw=2, label=f"mean {mean.mean():.2f}")
            axis.legend(fontsize=7)
        axis.set(
            title=f"{kind}es at IoU 0.5" if kind == "box" else f"{kind}s at IoU 0.5",
            xlabel="recall",
            ylabel="precision",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


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
    font = ImageFont.load_default(max(11, round(min(drawn.size) / 24)))
    for n, (box, label) in enumerate(zip(objects["boxes"], objects["labels"])):
        colour = COLOURS[(n if masks is not None else int(label) - 1) % len(COLOURS)]
        canvas.rectangle([float(v) for v in box], outline=colour, width=line)
        words = [classes[int(label) - 1]] if len(classes) > 1 else []
        if "scores" in objects:
            words.append(f"{objects['scores'][n]:.2f}".replace("0.", ".", 1))
        if not words or len(objects["boxes"]) > CROWD:
            continue
        text = " ".join(words)
        left, top = float(box[0]), float(box[1])
        area = canvas.textbbox((left, top), text, font=font, anchor="lb")
        if area[1] < 0:  # no room above the box
            area = canvas.textbbox((left, top), text, font=font, anchor="lt")
        canvas.rectangle(area, fill=colour)
        canvas.text((area[0], area[1]), text, fill="black", font=font, anchor="lt")
    return drawn


def captioned(image: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The image below some lines of text; small images are enlarged to have room for them."""
    factor = max(1, round(320 / image.width))
    image = image.resize((image.width * factor, image.height * factor))
    size = max(12, round(image.width / 24))
    font = ImageFont.load_default(size)
    height = round(1.5 * size)
    page = Image.new("RGB", (image.width, image.height + height * len(lines) + size // 2), "white")
    page.paste(image, (0, page.height - image.height))
    canvas = ImageDraw.Draw(page)
    for n, line in enumerate(lines):
        canvas.text((size // 2, size // 4 + n * height), line, fill="black", font=font)
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
    tallest = max(pixels.shape[0] / pixels.shape[1] for pixels, _, _ in rows)
    figure, axes = _figure(13, (3.2 * tallest + 0.3) * lines, lines, 4)
    for axis in axes.flat:
        axis.axis("off")
    for k, (pixels, truth, found) in enumerate(rows):
        image = Image.fromarray((pixels * 255).round().astype(np.uint8))
        factor = max(
            1, round(480 / min(image.size))
        )  # small images are enlarged, to have room for the labels
        for column, (title, objects) in enumerate((("true", truth), ("found, score 0.5 or more", found))):
            axis = axes[k // 2][2 * (k % 2) + column]
            axis.imshow(draw_objects(*enlarged(image, objects, factor), classes))
            axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)


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


def overlay(image: Image.Image, class_map: NDArray[np.integer[Any]], strength: float = 0.6) -> Image.Image:
    """The image under the colours of its classes; pixels of value 255 keep their own.

    Args:
        image: RGB.
        class_map: (H, W) of the same size, index of the class.
        strength: of the colours, in 0..1.
    """
    pixels = np.array(image, np.float32)
    known = class_map != 255
    colours = palette(int(class_map[known].max()) + 1 if known.any() else 1)
    pixels[known] += strength * (colours[class_map[known]] - pixels[known])
    return Image.fromarray(pixels.round().astype(np.uint8))


def with_legend(
    picture: Image.Image, class_map: NDArray[np.integer[Any]], classes: Sequence[str]
) -> Image.Image:
    """The picture above the colours and names of the classes in its class map, the largest first."""
    factor = max(1, round(320 / picture.width))
    picture = picture.resize((picture.width * factor, picture.height * factor))
    counts = np.bincount(class_map[class_map != 255].ravel(), minlength=len(classes))
    present = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    size = max(12, round(picture.width / 40))
    font = ImageFont.load_default(size)
    places: list[tuple[int, int]] = []
    x, y = size // 2, picture.height + size // 2
    for k in present:
        width = round(font.getlength(classes[k])) + 3 * size
        if x + width > picture.width and x > size // 2:
            x, y = size // 2, y + round(1.6 * size)
        places.append((x, y))
        x += width
    page = Image.new("RGB", (picture.width, y + 2 * size), "white")
    page.paste(picture, (0, 0))
    canvas = ImageDraw.Draw(page)
    colours = palette(len(classes))
    for k, (x, y) in zip(present, places):
        canvas.rectangle((x, y, x + size, y + size), fill=tuple(int(v) for v in colours[k]))
        canvas.text((x + round(1.4 * size), y + size // 2), classes[k], fill="black", font=font, anchor="lm")
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
    from matplotlib.patches import Patch

    figure, axes = _figure(
        11, 0.6 + 11 / 3 * sum(r[0].shape[0] / r[0].shape[1] + 0.06 for r in rows), len(rows), 3
    )
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
    colours = palette(len(classes)) / 255
    patches = [Patch(color=colours[k], label=classes[k]) for k in sorted(present)][:40]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(8, max(1, len(patches))), fontsize=8)
    figure.savefig(path, dpi=110)


def class_bars(classes: Sequence[str], values: NDArray[np.float64], name: str, path: Path) -> None:
    """A bar for each class, the best first, with their mean; classes without a value are left out.

    Args:
        classes: names.
        values: (classes,) in 0..1, or NaN.
        name: of the values.
        path: the PNG to write.
    """
    order = [
        int(k) for k in np.argsort(-np.nan_to_num(values, nan=-1), kind="stable") if not np.isnan(values[k])
    ]
    figure, axes = _figure(7, 1.2 + 0.22 * len(order))
    axis = axes[0][0]
    axis.barh([classes[k] for k in order], values[order], color=palette(len(classes))[order] / 255)
    for place, k in enumerate(order):
        axis.text(values[k] + 0.01, place, f"{values[k]:.2f}", va="center", fontsize=7)
    if order:
        mean = float(values[order].mean())
        axis.axvline(mean, color="black", lw=1, ls="--")
        axis.set_title(f"mean {name} {mean:.4f}")
    axis.set(xlabel=name, xlim=(0, 1.08))
    axis.invert_yaxis()
    figure.savefig(path, dpi=110)
