"""Weights of classes in the loss."""

from typing import Literal

import torch
from torch import Tensor

from crossformer_vision.data.module import BaseDataModule
from crossformer_vision.errors import UserError, check_choice, check_range

ClassWeights = Literal["none", "balanced"] | list[float]
"""``"none"``, ``"balanced"``, or a weight for each class."""


def check_class_weights(weights: ClassWeights, num_classes: int) -> ClassWeights:
    """Check the option ``class_weights`` of a task.

    Raises:
        UserError: If it is neither a known name nor a list with a weight for each class.
    """
    if isinstance(weights, str):
        check_choice("class_weights", weights, ("none", "balanced"))
        return weights
    if len(weights) != num_classes:
        raise UserError(f"class_weights has {len(weights)} values, but there are {num_classes} classes")
    for weight in weights:
        check_range("class_weights", weight, 0)
    return weights


def create_class_weights(weights: ClassWeights, data: object, multi_label: bool = False) -> Tensor | None:
    """Weight of each class.

    Args:
        weights: Option ``class_weights`` of a task.
        data: Data module whose classes are counted for ``"balanced"``.
        multi_label: Classes are independent: ``"balanced"`` is the number of images without a class, divided
            by that of images with it.

    Returns:
        Weights, shape ``(num_classes,)``; ``None`` for ``"none"``.

    Raises:
        UserError: If the data module cannot count classes.
    """
    if weights == "none":
        return None
    if weights != "balanced":
        return torch.tensor(weights, dtype=torch.float32)
    count_classes = getattr(data, "class_counts", None)
    if count_classes is None:
        raise UserError("class_weights='balanced': the data module has no class_counts()")
    counts = torch.as_tensor(count_classes()).double()
    if multi_label:
        if not isinstance(data, BaseDataModule):
            raise UserError("class_weights='balanced': give a list for a data module of your own")
        absent = len(data.open("train")) - counts
        return (absent.clamp(min=1) / counts.clamp(min=1)).float()
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()
