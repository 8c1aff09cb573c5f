"""Validation metrics of classifiers, with one class per image or several."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from crossformer_vision.files import write_csv
from crossformer_vision.plotting import visualize
from crossformer_vision.tasks.distributed import gather_lists
from crossformer_vision.tasks.thresholds import best_threshold

Row = dict[str, str | int | float]


class SingleLabelMetrics(nn.Module):
    """Metrics of mutually exclusive classes.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # Lightning's own mean is wrong if processes have different numbers of images.
        self.loss = MeanMetric()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.accuracy_top5 = (
            MulticlassAccuracy(num_classes, average="micro", top_k=5) if num_classes > 5 else None
        )
        self.confusion = MulticlassConfusionMatrix(num_classes)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits: Shape ``(B, num_classes)``.
            targets: Class indices, shape ``(B,)``.
        """
        self.loss(F.cross_entropy(logits, targets), len(logits))
        self.accuracy(logits, targets)
        self.confusion(logits, targets)
        if self.accuracy_top5 is not None:
            self.accuracy_top5(logits, targets)

    def compute(self) -> dict[str, Tensor]:
        """Metrics of all processes by name. Resets them."""
        metrics: dict[str, Metric] = {"loss": self.loss, "accuracy": self.accuracy}
        if self.accuracy_top5 is not None:
            metrics["accuracy_top5"] = self.accuracy_top5
        values = {name: metric.compute() for name, metric in metrics.items()}
        self.matrix = self.confusion.compute().cpu()  # true class, predicted class
        for metric in (*metrics.values(), self.confusion):
            metric.reset()
        return values

    def class_table(self, classes: list[str]) -> list[Row]:
        """Images, precision, recall and F1 score of each class in the last validation, one row per class."""
        correct, true, predicted = self.matrix.diagonal(), self.matrix.sum(1), self.matrix.sum(0)
        scores = {
            "precision": correct / predicted.clamp(min=1),
            "recall": correct / true.clamp(min=1),
            "f1": 2 * correct / (true + predicted).clamp(min=1),
        }
        return [
            {
                "class": name,
                "images": int(true[k]),
                **{key: round(float(values[k]), 4) for key, values in scores.items()},
            }
            for k, name in enumerate(classes)
        ]

    def plot(self, plot_dir: Path, classes: list[str]) -> None:
        """Write ``confusion_matrix.png`` and ``classes.csv``."""
        write_csv(plot_dir / "classes.csv", self.class_table(classes))
        visualize.plot_confusion_matrix(self.matrix.numpy(), classes, plot_dir / "confusion_matrix.png")


class MultiLabelMetrics(nn.Module):
    """Metrics of independent classes, any number of which an image may have.

    Args:
        num_classes: Number of classes.

    Attributes:
        thresholds: Minimum probability of each class, at which its F1 score in the last validation is best.
        keep_thresholds: Use the thresholds as they are instead of choosing them.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.thresholds = [0.5] * num_classes
        self.keep_thresholds = False
        self.batches: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits: Shape ``(B, num_classes)``.
            targets: 1 for the classes of an image, shape ``(B, num_classes)``.
        """
        self.loss(F.binary_cross_entropy_with_logits(logits, targets), len(logits))
        self.batches.append((logits.sigmoid().cpu().numpy(), targets.cpu().numpy() > 0.5))

    def compute(self) -> dict[str, Tensor]:
        """Mean average precision and mean F1 score of the classes that occur, and the loss. Resets them."""
        empty = np.zeros((0, len(self.thresholds)))
        batches = [(empty.astype(np.float32), empty > 0), *gather_lists(self.batches)]
        scores, true = (np.concatenate([batch[k] for batch in batches]) for k in (0, 1))
        self.batches = []
        if not self.keep_thresholds:
            self.thresholds = [best_threshold(*columns) for columns in zip(scores.T, true.T, strict=True)]
        predicted = scores >= np.array(self.thresholds, np.float32)
        self.counts = true.sum(0)
        correct, positive = (predicted & true).sum(0), predicted.sum(0)
        self.precision = correct / positive.clip(1)
        self.recall = correct / self.counts.clip(1)
        self.f1 = np.where(self.counts > 0, 2 * correct / (positive + self.counts).clip(1), np.nan)
        self.ap = np.full(len(self.counts), np.nan)
        for k in np.flatnonzero(self.counts):
            self.ap[k] = average_precision_score(true[:, k], scores[:, k])
        loss = self.loss.compute()
        self.loss.reset()
        means = {"map": self.ap, "f1": self.f1}
        return {"loss": loss, **{name: torch.tensor(_mean(values)) for name, values in means.items()}}

    def class_table(self, classes: list[str]) -> list[Row]:
        """Images, AP and, at its threshold, precision, recall and F1 score of each class."""
        columns = {"ap": self.ap, "precision": self.precision, "recall": self.recall, "f1": self.f1}
        return [
            {
                "class": name,
                "images": int(self.counts[k]),
                "threshold": round(self.thresholds[k], 4),
                **{key: round(float(values[k]), 4) for key, values in columns.items()},
            }
            for k, name in enumerate(classes)
        ]

    def plot(self, plot_dir: Path, classes: list[str]) -> None:
        """Write ``class_ap.png`` and ``classes.csv``."""
        write_csv(plot_dir / "classes.csv", self.class_table(classes))
        visualize.plot_class_bars(classes, self.ap, "AP", plot_dir / "class_ap.png")


def _mean(values: NDArray[np.floating]) -> float:
    """Mean of the values that are defined, or 0."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else 0.0
