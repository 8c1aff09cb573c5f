"""Data module of detection and instance segmentation."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from typing_extensions import override

from crossformer_vision.data.augmentation import PhotometricDistortion, Steps, compose_checked
from crossformer_vision.data.detection_transforms import ToTensors, object_labels
from crossformer_vision.data.layout import FORMATS, find_label_format
from crossformer_vision.data.loader import SeededLoader
from crossformer_vision.data.module import BaseDataModule
from crossformer_vision.data.mosaic import MosaicImages
from crossformer_vision.data.readers.coco import CocoImages, find_coco_split
from crossformer_vision.data.readers.digits import DigitObjects
from crossformer_vision.data.readers.objects import ObjectImages
from crossformer_vision.data.readers.voc import VocImages, find_voc_split
from crossformer_vision.data.readers.yolo import YoloImages, find_yolo_images, read_yolo_dataset
from crossformer_vision.data.sampling import SAMPLING_POWERS, ReadImages, sampling_weights
from crossformer_vision.errors import UserError, check_choice, check_range
from crossformer_vision.types import CocoId, JsonObject

log = logging.getLogger("crossformer_vision")

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
"""Images and targets."""
PADDING_COLOR = (124, 116, 104)  # ImageNet's mean, around images that do not fill their crop


def collate_detection(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> Batch:
    """Collate samples into lists, because images of different sizes cannot be stacked."""
    return [image for image, _ in samples], [target for _, target in samples]


class DetectionData(BaseDataModule):
    """Images with boxes, and masks for Mask R-CNN, with labels in the format of COCO, YOLO or Pascal VOC.

    Training batches have images that are all wide or all tall. Validation reads images one by one, so that a
    result does not depend on the size of other images.

    Args:
        root: Folder with COCO's layout: ``annotations/instances_<split>.json`` and the images in ``<split>/``
            or ``images/<split>/``; or ``<split>/_annotations.coco.json`` beside the images. Or with YOLO's:
            ``data.yaml``, ``images/<split>/`` and ``labels/<split>/``. Or with Pascal VOC's:
            ``Annotations/*.xml``, ``JPEGImages/`` and ``ImageSets/Main/<split>.txt``. Null for the bundled
            digits.
        format: Format of the labels: ``coco``, ``yolo`` or ``voc``; null to detect it from the layout.
        train_split: Split to train on; ``train`` also finds ``train2017``.
        val_split: Split to validate on; ``val`` also finds ``val2017`` and ``valid``.
        detector: Detector to train; ``mask_rcnn`` also reads masks. The command takes it from the model.
        min_size: Shorter side of training images in pixels, or a list to choose from at random. The command
            takes it from the model.
        max_size: Maximum longer side of training images in pixels. The command takes it from the model.
        batch_size: Images per step of each process.
        num_workers: Processes that read images; null for one less than the number of cores, at most 8.
        mosaic: Probability that a training image becomes a mosaic with three others.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        scale_jitter: Minimum and maximum scale before a crop of ``min_size`` squared; null to resize without
            a crop.
        photometric: Distort brightness, contrast, saturation and hue.
        augmentation: Your own training augmentation instead of the four above and the resizing: a callable,
            or list of callables, from an image and its target as torchvision's ``transforms.v2`` take them
            (``tv_tensors``; ``boxes``, ``labels`` and, for ``mask_rcnn``, ``masks``) to the same. Objects
            without a box are removed. The command takes it as ``module.function``.
        skip_empty: Do not train on images without objects.
        image_size: Digits only: side of the images in pixels.
        train_images: Digits only: images per epoch.
        val_images: Digits only: validation images.
        sampling: How often classes occur in training: ``none`` for each image once per epoch, ``balanced``
            to draw images by the rarest of their classes, all equally often, ``sqrt`` in between. Images are
            then drawn with replacement.
        skip_corrupt: Skip and count unreadable images instead of stopping at the first.
        classes: Class names in the order of their labels; null for those of the training file, in the order
            of their ids. The command takes those of a run that it resumes or validates.
        seed: Seed of order, augmentation and digits.
        **pixels: See ``BaseDataModule``.

    Raises:
        UserError: If an argument is invalid.
    """

    def __init__(
        self,
        root: str | None = None,
        format: Literal["coco", "yolo", "voc"] | None = None,
        train_split: str = "train",
        val_split: str = "val",
        detector: Literal["retinanet", "mask_rcnn"] = "retinanet",
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        batch_size: int = 2,
        num_workers: int | None = None,
        mosaic: float = 0.0,
        hflip: float = 0.5,
        vflip: float = 0.0,
        scale_jitter: tuple[float, float] | None = None,
        photometric: bool = False,
        augmentation: Steps | None = None,
        skip_empty: bool = False,
        image_size: int = 128,
        train_images: int = 1000,
        val_images: int = 200,
        sampling: Literal["none", "balanced", "sqrt"] = "none",
        skip_corrupt: bool = False,
        classes: list[str] | None = None,
        seed: int = 0,
        **pixels: Any,
    ) -> None:
        super().__init__(
            root, train_split, val_split, batch_size, num_workers, skip_corrupt, seed, classes, **pixels
        )
        if format is not None:
            check_choice("format", format, tuple(FORMATS))
        check_choice("sampling", sampling, tuple(SAMPLING_POWERS))
        check_range("mosaic", mosaic, 0, 1)
        self.sampling, self.mosaic = sampling, mosaic
        self.format = format
        self.masks = detector == "mask_rcnn"
        self.min_sizes = [min_size] if isinstance(min_size, int) else list(min_size)
        self.max_size = max_size
        self.hflip, self.vflip = hflip, vflip
        self.scale_jitter, self.photometric, self.skip_empty = scale_jitter, photometric, skip_empty
        self.image_size, self.augmentation = image_size, augmentation
        self.lengths = {"train": train_images, "val": val_images}
        self.category_ids: list[CocoId] = []  # of the classes, in the training file

    @override
    def _read(self, stage: str) -> ReadImages:
        source = self._source(stage)
        self.classes = self.classes or list(source.categories.values())
        ids = {name: category for category, name in source.categories.items()}
        if isinstance(source, DigitObjects):
            if set(ids) != set(self.classes):
                raise UserError(f"the digits have other classes than the run: {', '.join(self.classes[:5])}")
        elif stage == "train" and (missing := [name for name in self.classes if name not in ids]):
            raise UserError(f"{source.annotations}: lacks class '{missing[0]}' of the run")
        if not self.category_ids and set(self.classes) <= set(ids):
            self.category_ids = [ids[name] for name in self.classes]
        self._find_pixel_format(source, stage)
        jitter = self.scale_jitter
        max_size = max(1, int(self.min_sizes[-1] * jitter[0])) if jitter else self.max_size
        crops = bool(jitter or self.augmentation)
        transform = ToTensors(self._transform(stage), stage == "train", crops, max_size)
        if stage == "train" and self.mosaic:
            if not self.pixel_format.is_rgb:
                raise UserError("--data.mosaic is for RGB images. Set it to 0")
            return MosaicImages(source, transform, self.skip_corrupt, self.mosaic)
        return ReadImages(
            source,
            transform,
            self.skip_corrupt,
            stage == "train",
            min_side=32,
            pixel_format=self.pixel_format,
        )

    @override
    def describe(self) -> JsonObject:
        return {"classes": self.classes, "category_ids": self.category_ids, **self.describe_pixels()}

    def _source(self, stage: str) -> ObjectImages | DigitObjects:
        """Reader of a split."""
        if self.root is None:
            return DigitObjects(stage, self.lengths[stage], self.image_size, self.masks, self.seed)
        root, train = Path(self.root), stage == "train"
        if not root.exists():
            raise UserError(f"{root}: no such folder. --data.root needs images and their labels")
        found = find_label_format(root)
        if found is None and self.format is None:
            raise UserError(
                f"{root}: has no labels in the format of COCO, YOLO or Pascal VOC. Check --data.root, or set "
                "--data.format"
            )
        format = self.format or (found[0] if found else "coco")
        self.label_format = FORMATS[format]
        skip_empty = self.skip_empty and train
        outlines = self.masks and train and self.augmentation is None and not self.mosaic
        classes, options = self.classes or None, (self.masks, train, skip_empty, outlines)
        if format == "yolo":
            dataset = read_yolo_dataset(root)
            name, images = find_yolo_images(dataset, self.split_names(stage))
            self.note_split(stage, images[0].parent, name)
            return YoloImages(dataset, images, classes, *options)
        if format == "voc":
            if self.masks:
                raise UserError(f"{root}: Pascal VOC labels have no masks. Use --model.detector retinanet")
            split = find_voc_split(root, self.split_names(stage))
            self.note_split(stage, split.source, split.source.stem)
            return VocImages(root, split, classes, train, skip_empty)
        annotations, folder = find_coco_split(root, self.split_names(stage))
        self.note_split(stage, folder)
        return CocoImages(annotations, folder, classes, *options, self.skip_corrupt)

    def _transform(self, stage: str) -> v2.Compose:
        """Augmentation of an image and its target."""
        steps: list[Callable[..., object]] = []
        is_rgb = self.pixel_format.is_rgb
        if stage == "train" and self.augmentation is not None:
            steps.append(compose_checked(self.augmentation, is_rgb))
            steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
        elif stage == "train":
            if self.photometric and is_rgb:
                steps.append(PhotometricDistortion())
            # Without antialiasing, as in torchvision's detectors.
            if self.scale_jitter:
                side = (self.min_sizes[-1],) * 2
                fill = {tv_tensors.Image: PADDING_COLOR if is_rgb else self.mean, tv_tensors.Mask: 0}
                steps += [
                    v2.ScaleJitter(side, self.scale_jitter, antialias=False),
                    v2.RandomCrop(side, pad_if_needed=True, fill=fill),
                ]
            else:
                steps.append(v2.RandomShortestSize(self.min_sizes, self.max_size, antialias=False))
            steps += [v2.RandomHorizontalFlip(self.hflip), v2.RandomVerticalFlip(self.vflip)]
            steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=object_labels)]
        steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True))
        return v2.Compose(steps)

    @override
    def training_size(self) -> tuple[int, int]:
        return self.min_sizes[-1], self.max_size

    def _training_objects(self) -> ObjectImages:
        """Training images with objects.

        Raises:
            UserError: If these are the bundled digits.
        """
        source = self.open("train").source
        if not isinstance(source, ObjectImages):
            raise UserError("the bundled digits: balancing classes needs data of your own (--data.root)")
        return source

    @override
    def class_counts(self) -> NDArray[np.int64]:
        source = self._training_objects()
        return np.bincount(source.labels[source.iscrowd == 0] - 1, minlength=self.num_classes)

    def _sampling_weights(self) -> NDArray[np.float64] | None:
        """Sampling weight of each training image."""
        if not (power := SAMPLING_POWERS[self.sampling]):
            return None
        source = self._training_objects()
        presence = np.zeros((len(source), self.num_classes), bool)
        presence[source.image, source.labels - 1] = True
        return sampling_weights(presence, power)

    def train_dataloader(self) -> SeededLoader:
        """Loader of the training images, in batches that are all wide or all tall."""
        source = self.open("train").source
        assert isinstance(source, (ObjectImages, DigitObjects))
        is_tall = [int(height > width) for width, height in np.asarray(source.sizes).tolist()]
        return self.create_loader(
            "train", collate=collate_detection, kinds=is_tall, weights=self._sampling_weights()
        )

    @override
    def val_dataloader(self) -> SeededLoader:
        return self.create_loader("val", batch_size=1, collate=collate_detection)
