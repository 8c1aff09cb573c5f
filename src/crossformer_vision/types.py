"""Types of data that modules exchange."""

from collections.abc import Iterator
from typing import Any, Protocol

from timm.models import FeatureInfo
from torch import Tensor, nn
from typing_extensions import Self

Kwargs = dict[str, Any]
"""Keyword arguments by name. The function that they are passed to defines their types."""

JsonObject = dict[str, Any]
"""A JSON object, such as the content of ``results.json`` or a row of a table."""

Checkpoint = dict[str, Any]
"""Content of a checkpoint file: a state dict, or weights, options and counters by name."""


class Backbone(Protocol):
    """A timm ``features_only`` model: images ``(B, C, H, W)`` to one feature map per stride."""

    feature_info: FeatureInfo
    training: bool

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the model."""

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode."""

    def eval(self) -> Self:
        """Switch to evaluation mode."""
