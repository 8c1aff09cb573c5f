"""Predictors: a trained network with its preprocessing and postprocessing, one class per task."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Self, override

from crossformer_vision.data.rasters import RGB, PixelFormat, Pixels, image_size
from crossformer_vision.devices import emulation_note
from crossformer_vision.errors import UserError, error_line
from crossformer_vision.inference.inputs import ImageInput, open_image, square_crops
from crossformer_vision.inference.results import (
    ClassificationResult,
    DetectionResult,
    MultiLabelResult,
    Result,
    SegmentationResult,
)
from crossformer_vision.inference.tiling import detect_in_tiles, detector_input
from crossformer_vision.models.dense.masks import paste_binary_masks
from crossformer_vision.models.dense.transform import return_mask_crops
from crossformer_vision.models.dense.windows import predict_class_map
from crossformer_vision.plotting.drawing import stretch
from crossformer_vision.types import Kwargs

log = logging.getLogger("crossformer_vision")

NamedImage = tuple[Pixels, str]
"""An upright image as transforms take it, and its name."""
AnyImage = TypeVar("AnyImage", bound=ImageInput)


@dataclass
class ModelInfo:
    """Description of a predictor's network besides its weights.

    Attributes:
        task: ``classification``, ``detection`` or ``segmentation``.
        classes: Class names.
        source: Where the network is from, for messages.
        image: Preprocessing: arguments of timm's ``create_transform`` or of ``ToInput``.
        options: Options that the network was built from; empty for exported files.
        category_ids: Ids of the classes in the user's COCO file.
        values: Values of the classes in the user's class maps.
        test: Windows and flips of segmenters.
        test_scales: Image scales of segmenters.
        min_score: Minimum score of objects that an exported detector returns.
        pixel_format: Channels and values of the images.
        thresholds: Minimum probability of each class, for images with any number of classes; for detectors,
            default score threshold of each class.
        display_channels: Channels that plots show, for images that are not RGB.
    """

    task: str
    classes: list[str]
    source: str = "checkpoint"
    image: Kwargs = field(default_factory=dict)
    options: Kwargs = field(default_factory=dict)
    category_ids: list[int | str] | None = None
    values: list[int] | None = None
    test: Kwargs = field(default_factory=dict)
    test_scales: tuple[float, ...] = (1.0,)
    min_score: float = 0.0
    pixel_format: PixelFormat = RGB
    display_channels: list[int] | None = None
    thresholds: list[float] | None = None


class Predictor(ABC):
    """A trained network that predicts images: ``predictor("photo.jpg")``.

    Args:
        net: Network with its weights.
        info: Task, classes and preprocessing.
        device: Device to compute on.

    Raises:
        UserError: If weights are not finite.
    """

    batch_size = 1
    """Images that the network processes together."""

    def __init__(self, net: nn.Module, info: ModelInfo, device: torch.device) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
            raise UserError(
                f"{info.source}: its weights are not finite, so every output would be NaN. Use a checkpoint "
                "from before the run diverged"
            )
        self.net = net.to(device).eval()
        self.info, self.device = info, device
        self.dtype = torch.float32

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.info.task

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return self.info.classes

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to another device, or compute in another dtype.

        Args:
            device: ``cpu``, ``cuda``, …
            dtype: ``torch.float32``, or ``torch.bfloat16`` or ``torch.float16`` by autocast. Weights, boxes
                and probabilities stay in float32.

        Returns:
            This predictor.

        Raises:
            UserError: If the device does not exist or the dtype is another one.
        """
        if dtype is not None:
            if dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise UserError(f"dtype {dtype}: must be torch.float32, torch.bfloat16 or torch.float16")
            self.dtype = dtype
        if device is not None:
            self.device = check_device(device)
            self.net.to(self.device)
        if note := emulation_note(self.device, self.dtype):
            log.warning("%s", note)
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.classes)} classes, on {self.device}>"

    @overload
    def __call__(self, image: ImageInput) -> Result: ...
    @overload
    def __call__(self, image: list[AnyImage]) -> list[Result]: ...
    def __call__(self, image: ImageInput | list[AnyImage]) -> Result | list[Result]:
        """Predict an image, or each of a list of images.

        Args:
            image: Path, bytes of a file, open file, PIL image, array of shape ``(H, W, 3)`` or ``(H, W)``, or
                tensor of shape ``(3, H, W)``, with integers in 0..255 or floats in 0..1; or a list of these.
                For a network of other images, arrays and tensors have its channels and values.

        Returns:
            A result, or a list of results.

        Raises:
            UserError: If an image cannot be read.
        """
        if not isinstance(image, list):
            return self.predict([self.open(image)])[0]
        opened = [self.open(one) for one in image]
        batches = (opened[n : n + self.batch_size] for n in range(0, len(opened), self.batch_size))
        return [result for batch in batches for result in self.predict(batch)]

    def open(self, image: ImageInput) -> NamedImage:
        """Read an image in the network's format, see ``open_image``."""
        return open_image(image, self.info.pixel_format)

    def require_rgb(self, feature: str) -> None:
        """Check that the network takes RGB images.

        Args:
            feature: What needs them, for the message.

        Raises:
            UserError: If it takes others.
        """
        if not self.info.pixel_format.is_rgb:
            expected = self.info.pixel_format
            raise UserError(f"{self.info.source}: takes images with {expected}; {feature} supports RGB only")

    def picture(self, image: Pixels) -> Image.Image:
        """An image as RGB picture, for plots."""
        if isinstance(image, Image.Image):
            return image
        pixels = stretch(image.numpy(), self.info.display_channels)
        return Image.fromarray((pixels * 255).round().astype(np.uint8))

    @torch.inference_mode()
    def predict(self, images: list[NamedImage]) -> list[Result]:
        """Predict images that are already loaded.

        Args:
            images: Images of ``open`` and their names.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._predict(images)

    @abstractmethod
    def _predict(self, images: list[NamedImage]) -> list[Result]:
        """Preprocess, run the network, postprocess."""


class ClassificationPredictor(Predictor):
    """Predicts class probabilities. See ``Predictor`` for the arguments."""

    batch_size = 8

    def __init__(self, net: nn.Module, info: ModelInfo, device: torch.device) -> None:
        super().__init__(net, info, device)
        from crossformer_vision.data.classification_transforms import evaluation_transform

        self.transform = evaluation_transform(info.image, info.pixel_format.is_rgb)
        self.use_crops = info.image.get("crop_mode") != "squash"

    @override
    def _predict(self, images: list[NamedImage]) -> list[Result]:
        crops = [square_crops(image) if self.use_crops else [image] for image, _ in images]
        pixels = torch.stack([self.transform(crop) for crops_of_image in crops for crop in crops_of_image])
        logits: Tensor = self.net(pixels.to(self.device)).float()
        counts = [len(crops_of_image) for crops_of_image in crops]
        results: list[Result] = []
        for (image, name), image_logits in zip(images, logits.split(counts), strict=True):
            if not torch.isfinite(image_logits).all():
                raise UserError(f"{name}: the network's output is NaN in {self.dtype}. Use float32")
            picture, thresholds = self.picture(image), self.info.thresholds
            if thresholds is None:
                probabilities = image_logits.softmax(1).mean(0).cpu().numpy()
                results.append(ClassificationResult(name, picture, self.classes, probabilities))
            else:
                probabilities = image_logits.sigmoid().mean(0).cpu().numpy()
                results.append(MultiLabelResult(name, picture, self.classes, probabilities, thresholds))
        return results


class SegmentationPredictor(Predictor):
    """Predicts class maps. See ``Predictor`` for the arguments."""

    def __init__(self, net: nn.Module, info: ModelInfo, device: torch.device) -> None:
        super().__init__(net, info, device)
        from crossformer_vision.data.segmentation_transforms import ToInput

        self.transform = ToInput(**info.image)

    @override
    def _predict(self, images: list[NamedImage]) -> list[Result]:
        results: list[Result] = []
        for image, name in images:
            views = [self.transform(image, scale)[None].to(self.device) for scale in self.info.test_scales]
            width, height = image_size(image)
            size = (height, width)
            class_map = predict_class_map(self.net, views, size, **self.info.test)[0].cpu().numpy()
            class_map = class_map.astype(np.uint8)
            picture = self.picture(image)
            results.append(SegmentationResult(name, picture, self.classes, class_map, self.info.values))
        return results


class _Scorer(Protocol):
    score_thresh: float


class DetectionPredictor(Predictor):
    """Predicts boxes, and masks for Mask R-CNN.

    Args:
        net: Detector with its weights.
        info: Classes and preprocessing.
        device: Device to compute on.
        score_threshold: Minimum score of objects. ``None`` for that of each class in ``info``, or 0.5.
        tile_size: Side in pixels of overlapping tiles in which larger images are searched. ``None`` for whole
            images.
    """

    def __init__(
        self,
        net: nn.Module,
        info: ModelInfo,
        device: torch.device,
        score_threshold: float | None = None,
        tile_size: int | None = None,
    ) -> None:
        super().__init__(net, info, device)
        self.score_threshold, self.tile_size = score_threshold, tile_size
        # PyTorch detectors have a score threshold of their own; in exported ones it is part of the graph.
        self.scorer = cast("_Scorer", getattr(self.net, "roi_heads", self.net))
        self.own_threshold: float | None = getattr(self.scorer, "score_thresh", None)
        if self.own_threshold is not None:
            self.own_threshold = self.scorer.score_thresh = min(self.own_threshold, self.min_score)

    @property
    def thresholds(self) -> Tensor:
        """Minimum score of each class, ``(classes,)``."""
        if self.score_threshold is not None:
            return torch.full((len(self.classes),), self.score_threshold)
        return torch.tensor(self.info.thresholds or [0.5] * len(self.classes))

    @property
    def min_score(self) -> float:
        """The lowest of these scores."""
        return float(self.thresholds.min())

    @override
    def _predict(self, images: list[NamedImage]) -> list[Result]:
        return [self._predict_image(image, name) for image, name in images]

    def _predict_image(self, image: Pixels, name: str) -> Result:
        if self.tile_size and max(image_size(image)) > self.tile_size:
            objects = detect_in_tiles(self.net, image, self.tile_size, self.min_score, self.device)
            is_kept = objects["scores"] >= self.thresholds[objects["labels"] - 1]
            objects = {key: value[is_kept] for key, value in objects.items()}
        else:
            objects = self._detect(image)
        masks = objects["masks"].numpy().astype(np.uint8) if "masks" in objects else None
        boxes, labels, scores = (objects[key].float().numpy() for key in ("boxes", "labels", "scores"))
        labels = labels.astype(np.int64)
        ids = self.info.category_ids
        picture = self.picture(image)
        return DetectionResult(name, picture, self.classes, boxes, labels, scores, masks, ids)

    def _detect(self, image: Pixels) -> dict[str, Tensor]:
        """Objects in a whole image, on the CPU, with masks as large as the image."""
        pixels = detector_input(image).to(self.device)
        with return_mask_crops(self.net):
            objects = self._detect_above_threshold(pixels)
        is_kept = objects["scores"] >= self.thresholds.to(self.device)[objects["labels"] - 1]
        objects = {key: value[is_kept].cpu() for key, value in objects.items()}
        if "mask_crops" in objects:
            size = (pixels.shape[1], pixels.shape[2])
            objects["masks"] = paste_binary_masks(objects["mask_crops"], objects["boxes"], size)
        elif "masks" in objects:  # from an exported detector
            objects["masks"] = objects["masks"].squeeze(1) > 0.5
        return objects

    def _detect_above_threshold(self, pixels: Tensor) -> dict[str, Tensor]:
        """Run the detector with the score threshold, so that it computes no masks of dropped objects."""
        if self.own_threshold is None:
            return self.net([pixels])[0]
        self.scorer.score_thresh = max(self.own_threshold, self.min_score - 1e-6)
        try:
            return self.net([pixels])[0]
        finally:
            self.scorer.score_thresh = self.own_threshold


def best_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, or else the best available one.

    Raises:
        UserError: If the device does not exist.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return check_device(device or ("cuda" if cuda else "mps" if mps else "cpu"))


def check_device(device: str | torch.device) -> torch.device:
    """Check that tensors can be created on a device.

    Raises:
        UserError: If the device does not exist.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}': {error_line(error)}. Use cpu, which always works") from None
    return torch.device(device)
