"""Types of data that modules exchange."""

from collections.abc import Iterator
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray
from timm.models import FeatureInfo
from torch import Tensor, nn
from typing_extensions import NotRequired, Self

Kwargs = dict[str, Any]
"""Keyword arguments by name. The function that they are passed to defines their types."""

JsonObject = dict[str, Any]
"""A JSON object, such as the content of ``results.json`` or a row of a table."""

Checkpoint = dict[str, Any]
"""Content of a checkpoint file: a state dict, or weights, options and counters by name."""

CocoId = int | str
"""Id of an image or a category in a COCO file."""

Polygons = list[list[float]]
"""Polygons of an object, ``[x1, y1, x2, y2, ...]`` in pixels, as in COCO files."""


class ObjectTarget(TypedDict):
    """Objects of an image, as readers of object labels return them; see ``ObjectImages.read``."""

    image_id: int
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    iscrowd: NDArray[np.int64]
    area: NDArray[np.float32]
    masks: NotRequired[NDArray[np.uint8]]
    outlines: NotRequired[list[Polygons | JsonObject]]


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
