"""Match detections with objects: confusion matrix and best score thresholds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from crossformer_vision.tasks.thresholds import best_threshold

Arrays = dict[str, Any]
MIN_IOU = 0.5  # of a box and the object that it finds


def best_score_thresholds(
    detections: Sequence[Arrays], ground_truth: Sequence[Arrays], num_classes: int
) -> list[float]:
    """Score threshold of each class at which its F1 score is best, at an IoU of 0.5.

    Args:
        detections: ``boxes``, ``labels`` and ``scores`` of each image.
        ground_truth: ``boxes``, ``labels`` and ``iscrowd`` of each image.
        num_classes: Number of classes. Labels run from 1.

    Returns:
        Threshold of each class; 0.5 for a class without objects or correct detections.
    """
    scores: list[list[float]] = [[] for _ in range(num_classes)]
    is_correct: list[list[bool]] = [[] for _ in range(num_classes)]
    for detected, true in zip(detections, ground_truth, strict=True):
        for label in np.unique(detected["labels"]).tolist():
            found = _select(detected, detected["labels"] == label)
            objects = _select(true, (true["labels"] == label) & (true["iscrowd"] == 0))
            matches = match_boxes(found, objects)
            crowds = _select(true, (true["labels"] == label) & (true["iscrowd"] == 1))
            is_counted = (matches >= 0) | ~is_inside(found, crowds)
            found, matches = _select(found, is_counted), matches[is_counted]
            scores[label - 1] += found["scores"].tolist()
            is_correct[label - 1] += (matches >= 0).tolist()
    counts = _count_objects(ground_truth, num_classes)
    return [
        best_threshold(np.array(class_scores), np.array(correct, bool), count)
        for class_scores, correct, count in zip(scores, is_correct, counts.tolist(), strict=True)
    ]


def confusion_matrix(
    detections: Sequence[Arrays],
    ground_truth: Sequence[Arrays],
    thresholds: Sequence[float],
) -> NDArray[np.int64]:
    """Number of objects by true and predicted class, at an IoU of 0.5.

    Args:
        detections: ``boxes``, ``labels`` and ``scores`` of each image.
        ground_truth: ``boxes``, ``labels`` and ``iscrowd`` of each image.
        thresholds: Minimum score of each class.

    Returns:
        Shape ``(classes + 1, classes + 1)``. The last row counts detections without an object, the last
        column objects that were not found.
    """
    background = len(thresholds)
    matrix = np.zeros((background + 1, background + 1), np.int64)
    minimum = np.array(thresholds)
    for detected, true in zip(detections, ground_truth, strict=True):
        found = _select(detected, detected["scores"] >= minimum[detected["labels"] - 1])
        objects = _select(true, true["iscrowd"] == 0)
        matches = match_boxes(found, objects)
        predicted = np.full(len(objects["labels"]), background)
        is_matched = matches >= 0
        is_false = ~is_matched & ~is_inside(found, _select(true, true["iscrowd"] == 1))
        predicted[matches[is_matched]] = found["labels"][is_matched] - 1
        np.add.at(matrix, (objects["labels"] - 1, predicted), 1)
        np.add.at(matrix, (np.full(is_false.sum(), background), found["labels"][is_false] - 1), 1)
    return matrix


def match_boxes(detected: Arrays, objects: Arrays) -> NDArray[np.int64]:
    """Assign each detection, highest score first, the free object that it overlaps most.

    Args:
        detected: ``boxes`` and ``scores``.
        objects: ``boxes``.

    Returns:
        Index of the object of each detection, -1 without one.
    """
    matches = np.full(len(detected["boxes"]), -1)
    if not (len(matches) and len(objects["boxes"])):
        return matches
    boxes = (torch.from_numpy(side["boxes"]) for side in (detected, objects))
    overlaps = box_iou(*boxes).numpy()
    for n in np.argsort(-detected["scores"], kind="stable"):
        best = int(overlaps[n].argmax())
        if overlaps[n, best] >= MIN_IOU:
            matches[n] = best
            overlaps[:, best] = -1
    return matches


def is_inside(detected: Arrays, crowds: Arrays) -> NDArray[np.bool_]:
    """Whether half of each detection lies in a crowd region, where it does not count, as in COCO's metrics.

    Args:
        detected: ``boxes``.
        crowds: ``boxes``.
    """
    boxes, regions = detected["boxes"], crowds["boxes"]
    if not (len(boxes) and len(regions)):
        return np.zeros(len(boxes), bool)
    top_left = np.maximum(boxes[:, None, :2], regions[None, :, :2])
    bottom_right = np.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    overlaps = (bottom_right - top_left).clip(0).prod(2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    inside: NDArray[np.bool_] = (overlaps >= MIN_IOU * areas[:, None].clip(1e-9)).any(1)
    return inside


def _select(arrays: Arrays, chosen: NDArray[np.bool_]) -> Arrays:
    """Chosen rows of boxes, labels and scores."""
    return {name: arrays[name][chosen] for name in ("boxes", "labels", "scores") if name in arrays}


def _count_objects(ground_truth: Sequence[Arrays], num_classes: int) -> NDArray[np.int64]:
    """Number of objects of each class, without crowds."""
    labels = [true["labels"][true["iscrowd"] == 0] for true in ground_truth]
    return np.bincount(np.concatenate([np.zeros(0, int), *labels]) - 1, minlength=num_classes)
