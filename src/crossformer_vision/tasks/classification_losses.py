"""Losses of classifiers that PyTorch lacks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(logits: Tensor, targets: Tensor, gamma: float, weights: Tensor | None = None) -> Tensor:
    """Focal loss (arXiv 1708.02002) of mutually exclusive classes, averaged over the batch.

    Args:
        logits: Shape ``(B, num_classes)``.
        targets: Class probabilities, shape ``(B, num_classes)``.
        gamma: Exponent; 0 is the cross-entropy.
        weights: Weight of each class, shape ``(num_classes,)``.
    """
    log_probabilities = logits.float().log_softmax(1)
    losses = -targets * (1 - log_probabilities.exp()) ** gamma * log_probabilities
    return (losses if weights is None else losses * weights).sum(1).mean()


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    gamma_negative: float = 4.0,
    gamma_positive: float = 1.0,
    margin: float = 0.05,
) -> Tensor:
    """Asymmetric loss (arXiv 2009.14119) of independent classes, averaged over images and classes.

    Args:
        logits: Shape ``(B, num_classes)``.
        targets: 1 for the classes of an image, shape ``(B, num_classes)``.
        weights: Weight of the positive images of each class, shape ``(num_classes,)``.
        gamma_negative: Exponent for images without the class.
        gamma_positive: Exponent for images with the class.
        margin: Probability below which an image without the class does not count.
    """
    probabilities = logits.float().sigmoid()
    shifted = (probabilities - margin).clamp(min=0)
    positive = targets * (1 - probabilities) ** gamma_positive * F.logsigmoid(logits.float())
    negative = (1 - targets) * shifted**gamma_negative * (1 - shifted).clamp(min=1e-8).log()
    positive = positive if weights is None else positive * weights
    return -torch.mean(positive + negative)
