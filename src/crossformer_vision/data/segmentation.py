"""Data module of semantic segmentation."""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from torchvision.datasets import Cityscapes
from typing_extensions import override

from crossformer_vision.data.augmentation import Steps
from crossformer_vision.data.class_lists import IGNORED, read_classes, value_table
from crossformer_vision.data.layout import FORMATS, find_map_format
from crossformer_vision.data.loader import SeededLoader
from crossformer_vision.data.module import BaseDataModule
from crossformer_vision.data.readers.class_maps import ClassMapImages, pair_files, uses_0_and_255
from crossformer_vision.data.readers.coco import CocoImages, find_coco_split
from crossformer_vision.data.readers.digits import DigitMaps
from crossformer_vision.data.readers.object_maps import ObjectMaps
from crossformer_vision.data.readers.yolo import YoloImages, find_yolo_images, read_yolo_dataset
from crossformer_vision.data.sampling import SAMPLING_POWERS, ReadImages, sampling_weights
from crossformer_vision.data.segmentation_transforms import ToInput, TrainingTransform, ValidationTransform
from crossformer_vision.errors import NoSuchSplit, UserError, check_choice, error_line
from crossformer_vision.models import find_model
from crossformer_vision.types import JsonObject

log = logging.getLogger("crossformer_vision")

VOC_CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]  # fmt: skip


class SegmentationData(BaseDataModule):
    """Images with class maps.

    Training reads crops of one size. Validation reads whole images one by one, with class maps in their own
    size.

    Args:
        root: Folder in ADE20K's layout (``images/training/``, ``annotations/training/`` with PNGs of the same
            names, and the same for ``validation``; classes from ADE20K's ``objectInfo150.txt``, or from
            ``classes.json``: ``{"classes": ["sky", …], "ignore_index": 255}``), in that of Cityscapes
            (``leftImg8bit/``, ``gtFine/``) or of Pascal VOC (``VOCdevkit/``). Or objects in the format of
            COCO or YOLO with polygons or masks, which are rendered over the class ``background``. Null for
            the bundled digits.
        format: ``maps``, ``coco`` or ``yolo``; null to detect it from the layout.
        train_split: Split to train on; ``train`` also finds ``training``.
        val_split: Split to validate on; ``val`` also finds ``validation``.
        backbone: timm name of the backbone, whose normalization is used. The command takes it from the model.
        crop_size: Side of the training crops in pixels; for digits, of the images.
        short_side: Shorter side of resized images in pixels; null for the images' own size.
        long_side: Maximum longer side of resized images in pixels; null for no limit.
        size_divisor: Validation and prediction stretch each side up to a multiple of this.
        test_scales: Image scales of validation. The command takes them from the model.
        scales: Minimum and maximum scale of training images.
        max_share: Maximum share of one class in a training crop, unless ten crops exceed it.
        hflip: Probability of a horizontal flip.
        photometric: Distort brightness, contrast, saturation and hue.
        augmentation: Your own training augmentation instead of the four above: a callable, or list of
            callables, from an image and class map, torchvision's ``tv_tensors`` of bytes, to the same, which
            are then cropped or padded to ``crop_size`` and normalized. The command takes it as
            ``module.function``.
        batch_size: Crops per step of each process.
        num_workers: Processes that read images; null for one less than the number of cores, at most 8.
        train_images: Digits only: images per epoch.
        val_images: Digits only: validation images.
        sampling: How often classes occur in training: ``none`` for each image once per epoch, ``balanced``
            to draw images by the rarest of their classes, all equally often, ``sqrt`` in between. Images are
            then drawn with replacement.
        skip_corrupt: Skip and count unreadable images instead of stopping at the first.
        classes: Class names in their order; null for those of the data. The command takes those of a run that
            it resumes or validates.
        seed: Seed of order, augmentation and digits.
        **pixels: See ``BaseDataModule``.

    Raises:
        UserError: If an argument is invalid.
    """

    def __init__(
        self,
        root: str | None = None,
        format: Literal["maps", "coco", "yolo"] | None = None,
        train_split: str = "train",
        val_split: str = "val",
        backbone: str = "crossformer_nano",
        crop_size: int = 512,
        short_side: int | None = None,
        long_side: int | None = None,
        size_divisor: int = 1,
        test_scales: tuple[float, ...] = (1.0,),
        scales: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
        augmentation: Steps | None = None,
        batch_size: int = 2,
        num_workers: int | None = None,
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
            check_choice("format", format, ("maps", "coco", "yolo"))
        check_choice("sampling", sampling, tuple(SAMPLING_POWERS))
        self.sampling = sampling
        self.format = format
        self.model_cfg = find_model(backbone)
        self.resize_options = short_side, long_side, size_divisor
        self.test_scales, self.crop_size = test_scales, crop_size
        self.augmentation_options = scales, max_share, hflip, photometric, augmentation
        self.lengths = {"train": train_images, "val": val_images}
        self.uses_0_and_255 = False  # instead of 0 and 1
        self.values: list[int] = []  # of the classes, in the files of class maps

    @override
    def _read(self, stage: str) -> ReadImages:
        source = self._source(stage)
        self.classes = self.classes or list(source.classes)
        name = self.root or "the digits"
        if unknown := sorted(set(source.classes) - set(self.classes)):
            raise UserError(f"{name}: class '{unknown[0]}' is not among the run's {self.classes}")
        if missing := sorted(set(self.classes) - set(source.classes)):
            raise UserError(f"{name}: lacks class '{missing[0]}' of the run")
        if isinstance(source, (ClassMapImages, ObjectMaps)):
            self.values = source.reorder_classes(self.classes)
        self._find_pixel_format(source, stage)
        return ReadImages(
            source,
            self._transform(stage),
            self.skip_corrupt,
            stage == "train",
            min_side=32,
            pixel_format=self.pixel_format,
        )

    def to_input(self) -> ToInput:
        """Conversion of images to the network's input."""
        mean, std = self.mean or self.model_cfg.mean, self.std or self.model_cfg.std
        return ToInput(tuple(mean), tuple(std), *self.resize_options)

    def _transform(self, stage: str) -> TrainingTransform | ValidationTransform:
        """Augmentation or preprocessing of an image and its class map."""
        if stage == "val":
            return ValidationTransform(self.to_input(), self.test_scales)
        is_rgb = self.pixel_format.is_rgb
        return TrainingTransform(self.to_input(), self.crop_size, *self.augmentation_options, is_rgb=is_rgb)

    @override
    def describe(self) -> JsonObject:
        image = dict(vars(self.to_input()))
        return {"classes": self.classes, "image": image, "values": self.values, **self.describe_pixels()}

    def _source(self, stage: str) -> ClassMapImages | ObjectMaps | DigitMaps:
        """Reader of a split."""
        if self.root is None:
            return DigitMaps(stage, self.lengths[stage], self.crop_size, self.seed)
        root, split = Path(self.root), self.splits[stage]
        if not root.exists():
            raise UserError(f"{root}: no such folder. --data.root needs images/ and annotations/")
        if (format := self.format or find_map_format(root)) != "maps":
            return self._object_maps(root, format, stage)
        try:
            if (root / "leftImg8bit").is_dir():
                return cityscapes(root, split)
            if (root / "VOCdevkit").is_dir():
                return pascal_voc(root, split)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{root}: {error_line(error)}") from error
        for name in self.split_names(stage):
            images, maps = root / "images" / name, root / "annotations" / name
            if images.is_dir():
                if not maps.is_dir():
                    raise UserError(f"{maps}: no such folder, for the class maps of {images}")
                self.note_split(stage, images)
                return self._class_map_images(root, images, maps)
        raise NoSuchSplit(
            f"{root / 'images' / split}: no such folder. Name the split with --data.{stage}_split"
        )

    def _object_maps(self, root: Path, format: str, stage: str) -> ObjectMaps:
        """Reader of class maps that are rendered from objects."""
        self.label_format = FORMATS[format]
        if format == "yolo":
            dataset = read_yolo_dataset(root)
            name, images = find_yolo_images(dataset, self.split_names(stage))
            self.note_split(stage, images[0].parent, name)
            return ObjectMaps(YoloImages(dataset, images, masks=True))
        annotations, folder = find_coco_split(root, self.split_names(stage))
        self.note_split(stage, folder)
        return ObjectMaps(CocoImages(annotations, folder, masks=True, skip_missing=self.skip_corrupt))

    def _class_map_images(self, root: Path, images: Path, maps: Path) -> ClassMapImages:
        """Reader of images and class maps in ADE20K's layout."""
        pairs, classes = pair_files(images, maps), read_classes(root)
        if not self.images and uses_0_and_255(pairs, classes):
            log.warning(
                "%s: contains only the values 0 and 255, so 255 is class '%s'. If it is to be ignored, add "
                '"ignore_index": 255 to classes.json',
                maps,
                classes.names[1],
            )
            self.uses_0_and_255 = True
        if self.uses_0_and_255:
            classes.values[IGNORED] = 1
        return ClassMapImages(pairs, classes.names, classes.values, classes.colors)

    @override
    def training_size(self) -> tuple[int, int]:
        return self.crop_size, self.crop_size

    @cached_property
    def _training_pixels(self) -> NDArray[np.int64]:
        """Pixels of each class in each training image, ``(images, classes)``, counted in all class maps."""
        source: Any = self.open("train").source
        counts = np.zeros((len(source), self.num_classes), np.int64)
        for n in track(range(len(source)), "counting pixels of each class", transient=True):
            try:
                _, class_map = source.read(n)
            except UserError:
                raise
            except Exception:  # the image cannot be read, which is reported when it is used
                continue
            counts[n] = np.bincount(class_map.ravel(), minlength=256)[: self.num_classes]
        return counts

    @override
    def class_counts(self) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = self._training_pixels.sum(0)
        return counts

    def train_dataloader(self) -> SeededLoader:
        """Loader of the training crops."""
        power = SAMPLING_POWERS[self.sampling]
        weights = sampling_weights(self._training_pixels > 0, power) if power else None
        return self.create_loader("train", weights=weights)

    @override
    def val_dataloader(self) -> SeededLoader:
        return self.create_loader("val", batch_size=1)


def pascal_voc(root: Path, split: str) -> ClassMapImages:
    """Class maps of Pascal VOC, of the latest year in ``VOCdevkit``.

    Args:
        root: Folder with ``VOCdevkit``.
        split: Name of the split.

    Raises:
        UserError: If no year has class maps of this split, or one of its files is missing.
    """
    for year in sorted((root / "VOCdevkit").glob("VOC*"), reverse=True):
        split_file = year / "ImageSets/Segmentation" / f"{split}.txt"
        if split_file.is_file():
            lines = split_file.read_text(encoding="utf-8").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            pairs = [(year / f"JPEGImages/{n}.jpg", year / f"SegmentationClass/{n}.png") for n in names]
            for path in (path for pair in pairs for path in pair):
                if not path.is_file():
                    raise UserError(f"{path}: no such file, which {split_file} names. Add what is missing")
            return ClassMapImages(pairs, VOC_CLASSES, value_table(len(VOC_CLASSES)))
    raise UserError(
        f"{root}/VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt: no such file, nor of another year. "
        "Unpack Pascal VOC there, or name another split"
    )


def cityscapes(root: Path, split: str) -> ClassMapImages:
    """Cityscapes' finely annotated images, with the 19 classes of its evaluation.

    Args:
        root: Folder with ``leftImg8bit`` and ``gtFine``.
        split: Name of the split.
    """
    dataset = Cityscapes(str(root), split, mode="fine", target_type="semantic")
    values = np.full(256, IGNORED, np.uint8)
    kinds = [kind for kind in Cityscapes.classes if not kind.ignore_in_eval]
    for kind in kinds:
        values[kind.id] = kind.train_id
    names = [kind.name for kind in sorted(kinds, key=lambda kind: kind.train_id)]
    pairs = [(Path(i), Path(maps[0])) for i, maps in zip(dataset.images, dataset.targets, strict=True)]
    return ClassMapImages(pairs, names, values)
