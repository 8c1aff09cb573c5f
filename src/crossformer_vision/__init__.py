"""CrossFormer and CrossFormer++ for PyTorch. Importing this package registers the models with timm."""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "Classification",
    "ClassificationData",
    "Classified",
    "CrossFormer",
    "Detected",
    "Detection",
    "DetectionData",
    "LoadReport",
    "Predictor",
    "Segmentation",
    "SegmentationData",
    "Segmented",
    "UserError",
    "create_detector",
    "create_segmenter",
    "freeze_position_bias",
    "load_checkpoint",
    "load_predictor",
]

_HOMES = {
    "Classification": "crossformer_vision.tasks.classification",
    "ClassificationData": "crossformer_vision.data.classification",
    "Classified": "crossformer_vision.predict.results",
    "Detected": "crossformer_vision.predict.results",
    "Detection": "crossformer_vision.tasks.detection",
    "DetectionData": "crossformer_vision.data.detection",
    "Predictor": "crossformer_vision.predict",
    "Segmentation": "crossformer_vision.tasks.segmentation",
    "SegmentationData": "crossformer_vision.data.segmentation",
    "Segmented": "crossformer_vision.predict.results",
    "CrossFormer": "crossformer_vision.models.crossformer",
    "LoadReport": "crossformer_vision.checkpoints",
    "UserError": "crossformer_vision.errors",
    "create_detector": "crossformer_vision.models.detectors",
    "create_segmenter": "crossformer_vision.models.segmenters",
    "freeze_position_bias": "crossformer_vision.models.grouping",
    "load_checkpoint": "crossformer_vision.checkpoints",
    "load_predictor": "crossformer_vision.predict",
}


if TYPE_CHECKING:
    from crossformer_vision.checkpoints import LoadReport, load_checkpoint
    from crossformer_vision.data.classification import ClassificationData
    from crossformer_vision.data.detection import DetectionData
    from crossformer_vision.data.segmentation import SegmentationData
    from crossformer_vision.errors import UserError
    from crossformer_vision.models.crossformer import CrossFormer
    from crossformer_vision.models.detectors import create_detector
    from crossformer_vision.models.grouping import freeze_position_bias
    from crossformer_vision.models.segmenters import create_segmenter
    from crossformer_vision.predict import Predictor, load_predictor
    from crossformer_vision.predict.results import Classified, Detected, Segmented
    from crossformer_vision.tasks.classification import Classification
    from crossformer_vision.tasks.detection import Detection
    from crossformer_vision.tasks.segmentation import Segmentation
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


# Importing registers the models and the way to their weights. The installed command alone puts that off until
# a verb needs it, so that its help does not wait seconds for torch.
if PurePath(next(iter(sys.argv), "")).name not in ("crossformer", "crossformer.exe"):
    importlib.import_module("crossformer_vision.published")
