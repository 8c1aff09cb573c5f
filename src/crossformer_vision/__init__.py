"""CrossFormer and CrossFormer++ for PyTorch. Importing this package registers the models with timm."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "1.0.0.dev0"
__all__ = [
    "Classification",
    "ClassificationData",
    "ClassificationResult",
    "CrossFormer",
    "Detection",
    "DetectionData",
    "DetectionResult",
    "LoadReport",
    "Predictor",
    "Segmentation",
    "SegmentationData",
    "SegmentationResult",
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
    "ClassificationResult": "crossformer_vision.inference.results",
    "DetectionResult": "crossformer_vision.inference.results",
    "Detection": "crossformer_vision.tasks.detection",
    "DetectionData": "crossformer_vision.data.detection",
    "Predictor": "crossformer_vision.inference.predictor",
    "Segmentation": "crossformer_vision.tasks.segmentation",
    "SegmentationData": "crossformer_vision.data.segmentation",
    "SegmentationResult": "crossformer_vision.inference.results",
    "CrossFormer": "crossformer_vision.models.crossformer",
    "LoadReport": "crossformer_vision.weights.loading",
    "UserError": "crossformer_vision.errors",
    "create_detector": "crossformer_vision.models.dense.detectors",
    "create_segmenter": "crossformer_vision.models.dense.segmenters",
    "freeze_position_bias": "crossformer_vision.models.freezing",
    "load_checkpoint": "crossformer_vision.weights.loading",
    "load_predictor": "crossformer_vision.inference.load",
}


if TYPE_CHECKING:
    from crossformer_vision.data.classification import ClassificationData
    from crossformer_vision.data.detection import DetectionData
    from crossformer_vision.data.segmentation import SegmentationData
    from crossformer_vision.errors import UserError
    from crossformer_vision.inference.load import load_predictor
    from crossformer_vision.inference.predictor import Predictor
    from crossformer_vision.inference.results import ClassificationResult, DetectionResult, SegmentationResult
    from crossformer_vision.models.crossformer import CrossFormer
    from crossformer_vision.models.dense.detectors import create_detector
    from crossformer_vision.models.dense.segmenters import create_segmenter
    from crossformer_vision.models.freezing import freeze_position_bias
    from crossformer_vision.tasks.classification import Classification
    from crossformer_vision.tasks.detection import Detection
    from crossformer_vision.tasks.segmentation import Segmentation
    from crossformer_vision.weights.loading import LoadReport, load_checkpoint
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


for _module in ("variants", "pvt"):  # register the models with timm
    importlib.import_module(f"crossformer_vision.models.{_module}")
