"""Pictures: training curves, confusion matrices, predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _figure(width: float, height: float, rows: int = 1, cols: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False)


def curves(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Losses, validation metrics and learning rate by epoch.

    Args:
        rows: one an epoch, with `epoch`, `lr` and any `train_…` and `val_…` values.
        path: the PNG to write.
    """
    names = [name for name in rows[-1] if name.startswith(("train_", "val_"))]
    losses = [name for name in names if name.endswith("loss")]
    metrics = [name for name in names if not name.endswith("loss")]
    figure, axes = _figure(12, 3.4, 1, 3)
    epochs = [row["epoch"] + 1 for row in rows]
    for axis, title, group in zip(
        axes[0], ("loss", "validation", "learning rate"), (losses, metrics, ["lr"])
    ):
        for name in group:
            axis.plot(
                epochs,
                [row.get(name, np.nan) for row in rows],
                marker="." if len(rows) < 40 else "",
                label=name,
            )
        if title == "validation" and metrics:
            best = int(np.nanargmax([row.get(metrics[0], np.nan) for row in rows]))
            value = rows[best][metrics[0]]
            axis.annotate(
                f"{value:.4f}",
                (epochs[best], value),
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
