"""Losses of detectors that torchvision lacks."""

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

BETWEEN_THRESHOLDS = -2  # torchvision's match of anchors that do not count


def weighted_focal_loss(logits: Tensor, labels: Tensor, matches: Tensor, weights: Tensor) -> Tensor:
    """RetinaNet's classification loss with a weight for each class.

    Args:
        logits: Logits of all anchors, ``(anchors, classes)``.
        labels: Class index of each object, ``(objects,)``.
        matches: Index of the object of each anchor, -1 for the background, -2 for anchors that do not count.
        weights: Weight of each class, ``(classes,)``.
    """
    is_positive = matches >= 0
    targets = torch.zeros_like(logits)
    targets[is_positive, labels[matches[is_positive]]] = 1
    is_used = matches != BETWEEN_THRESHOLDS
    losses = sigmoid_focal_loss(logits[is_used], targets[is_used], reduction="none") * weights
    return losses.sum() / is_positive.sum().clamp(min=1)
