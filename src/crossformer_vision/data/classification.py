"""Data module of image classification."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from crossformer_vision.data.augmentation import Steps
from crossformer_vision.data.classification_transforms import (
    AugmentationOptions,
    Transform,
    evaluation_transform,
    training_transform,
)
from crossformer_vision.data.loader import SeededLoader
from crossformer_vision.data.module import SYNONYMS, BaseDataModule
from crossformer_vision.data.rasters import Pixels
from crossformer_vision.data.readers.csv_labels import MultiLabelImages, read_csv, select_split
from crossformer_vision.data.readers.digits import DigitImages
from crossformer_vision.data.readers.folders import FolderImages, LabeledImages, hold_out
from crossformer_vision.data.readers.named_datasets import HuggingFaceImages, TimmImages
from crossformer_vision.data.readers.shards import ShardImages, find_shards
from crossformer_vision.data.readers.tar import TarImages
from crossformer_vision.data.sampling import SAMPLING_POWERS, ReadImages, Source, sampling_weights
from crossformer_vision.errors import NoSuchSplit, UserError, check_choice, check_range
from crossformer_vision.models import find_model
from crossformer_vision.types import JsonObject, Kwargs

log = logging.getLogger("crossformer_vision")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")


Label = int | NDArray[np.float32]
"""Index of the class of an image, or 1 for each of its classes, ``(num_classes,)``."""


class LabeledSource(Source, Protocol):
    """Images with class indices.

    Attributes:
        classes: Class names.
    """

    classes: list[str]


def _transform_image(transform: Transform, image: Pixels, label: Label) -> tuple[Tensor, Label]:
    """Apply a transform to the image of a sample."""
    return transform(image), label


class ClassificationData(BaseDataModule):
    """Images with one class each, with timm's readers and augmentation.

    Args:
        backbone: timm name of the model, whose image size, normalization and crop are the defaults.
        root: Folder with ``train/<class>/…`` and ``val/<class>/…`` (or ``validation``, ``test``), with tar
            files of class folders, with WebDataset shards (``train/*.tar``, or ``x-train-0000.tar``), or with
            class folders only (see ``val_share``); or a CSV file with the columns ``path``, ``label`` and
            perhaps ``split``; null for the bundled digits.
        dataset: Name of a dataset instead of a folder, as in timm: ``torch/cifar10``, ``hfds/ylecun/mnist``,
            …
        image_column: Hugging Face datasets only: column with the images; null if there is only one.
        label_column: Hugging Face datasets only: column with the classes; null for ``label``, or the only
            one.
        val_share: Share of each class to hold out for validation if ``root`` has class folders or ``train/``
            only; 1 for all images. The choice is saved as ``val_list.txt`` in the run directory.
        val_list: File with the names of validation images, one per line, relative to the folder of classes.
        classes: Class names in their order; null for those of the training images. The command takes those of
            a run that it resumes or validates.
        download: Download a torchvision dataset into ``root``.
        train_split: Folder, tar file or split to train on.
        val_split: Folder, tar file or split to validate on.
        image_size: Side of the square images in pixels; null for the model's own.
        batch_size: Images per step of each process.
        num_workers: Processes that read images; null for one less than the number of cores, at most 8.
        crop: ``resized`` crops a random area of 8 to 100 % (as for ImageNet), ``padded`` pads by an eighth
            and crops at random (as for CIFAR), ``none`` resizes whole images to the square, also in
            validation and prediction.
        hflip: Probability of a horizontal flip.
        auto_augment: timm's policy, such as ``rand-m9-mstd0.5-inc1``.
        color_jitter: Strength of color jitter; not used with ``auto_augment``.
        erasing: Probability of random erasing.
        augmentation: Your own training augmentation instead of the five above: a callable, or list of
            callables, from an RGB PIL image to a PIL image or a tensor ``(3, H, W)`` of bytes or of floats in
            0..1, which is then resized and normalized. The command takes it as ``module.function``.
        crop_pct: Share of the image that validation crops from the center, unless ``crop`` is ``none``; null
            for the model's own.
        interpolation: ``bicubic`` or ``bilinear``; null for the model's own.
        train_images: Digits only: images per epoch.
        val_images: Digits only: validation images.
        sampling: How often classes occur in training: ``none`` for each image once per epoch, ``balanced``
            for all classes equally often, ``sqrt`` in between. Images are then drawn with replacement.
        skip_corrupt: Skip and count unreadable images instead of stopping at the first.
        multi_label: CSV only: classes are independent, even if each image has one. Always so if an image has
            several.
        seed: Seed of order, augmentation and digits.
        **pixels: See ``BaseDataModule``.

    Raises:
        UserError: If an argument is invalid.
    """

    def __init__(
        self,
        backbone: str = "crossformer_nano",
        root: str | None = None,
        dataset: str | None = None,
        download: bool = False,
        train_split: str = "train",
        val_split: str = "val",
        image_size: int | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        crop: Literal["resized", "padded", "none"] = "resized",
        hflip: float = 0.5,
        auto_augment: str | None = None,
        color_jitter: float | None = None,
        erasing: float = 0.0,
        augmentation: Steps | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
        train_images: int = 4000,
        val_images: int = 1000,
        sampling: Literal["none", "balanced", "sqrt"] = "none",
        skip_corrupt: bool = False,
        val_share: float = 0.2,
        val_list: str | None = None,
        classes: list[str] | None = None,
        seed: int = 0,
        image_column: str | None = None,
        label_column: str | None = None,
        multi_label: bool = False,
        **pixels: Any,
    ) -> None:
        super().__init__(
            root, train_split, val_split, batch_size, num_workers, skip_corrupt, seed, classes, **pixels
        )
        check_choice("crop", crop, ("resized", "padded", "none"))
        check_choice("sampling", sampling, tuple(SAMPLING_POWERS))
        if interpolation is not None:
            check_choice("interpolation", interpolation, INTERPOLATIONS)
        for name, value in (("hflip", hflip), ("erasing", erasing), ("val_share", val_share)):
            check_range(name, value, 0, 1)
        for name, column in (("image_column", image_column), ("label_column", label_column)):
            if column is not None and not (dataset or "").startswith("hfds/"):
                raise UserError(
                    f"--data.{name} {column}: only for a Hugging Face dataset (--data.dataset hfds/NAME)"
                )
        self.val_share, self.val_list, self.sampling = val_share, val_list, sampling
        self.multi_label = multi_label
        self.held_out: list[str] = []  # validation images of a folder without splits
        self.model_cfg = find_model(backbone)
        self.dataset, self.download = dataset, download
        self.image_column, self.label_column = image_column, label_column
        self.image_size, self.crop_pct, self.interpolation = image_size, crop_pct, interpolation
        self.crop = crop
        self.augmentation = AugmentationOptions(
            crop, hflip, auto_augment, color_jitter, erasing, augmentation
        )
        self.lengths = {"train": train_images, "val": val_images}

    @override
    def _read(self, stage: str) -> ReadImages:
        source = self._source(stage)
        self.classes = self.classes or source.classes
        if not isinstance(source, (LabeledImages, TarImages, ShardImages)) and source.classes != self.classes:
            name = self.dataset or "the digits"
            raise UserError(f"{name}: has other classes than the run: {', '.join(self.classes[:5])}, …")
        if len(self.classes) < 2 and not isinstance(source, MultiLabelImages):
            source_name = self.root or self.dataset
            raise UserError(
                f"{source_name}: has one class, '{self.classes[0]}'; a classifier needs two or more"
            )
        if stage == "train" and (missing := sorted(set(self.classes) - set(source.classes))):
            raise UserError(f"{self.root or self.dataset}: has no class '{missing[0]}', which the run has")
        self._find_pixel_format(source, stage)
        transform = partial(_transform_image, self._transform(stage))
        return ReadImages(
            source, transform, self.skip_corrupt, stage == "train", pixel_format=self.pixel_format
        )

    def _find(self, stage: str) -> Path:
        """Folder or tar file of a split below ``root``."""
        root, split = Path(str(self.root)), self.splits[stage]
        if "://" in str(self.root):
            raise UserError(
                f"{self.root}: only local folders can be read. Download the files first, as by wget -r -np"
            )
        if not root.is_dir():
            here = "" if root.is_absolute() else f" in {Path.cwd()}"
            raise UserError(
                f"{root}: no such folder{here}. --data.root needs train/<class>/… and val/<class>/…, "
                "or <class>/…"
            )
        for name in self.split_names(stage):
            for path in (root / name, root / f"{name}.tar"):
                if path.exists():
                    return path
        raise NoSuchSplit(
            f"{root / split}: no such folder or tar file, nor class folders in {root}. Name the split with "
            f"--data.{stage}_split"
        )

    def _shards(self, stage: str) -> list[Path]:
        """WebDataset shards of a split."""
        names = self.split_names(stage)
        return next((found for name in names if (found := find_shards(Path(str(self.root)), name))), [])

    def _unsplit(self) -> Path | None:
        """Class folders of which some images are held out, if there is no folder for validation."""
        root, found = Path(str(self.root)), dict[str, Path]()
        if self._shards("train"):
            return None
        for stage in ("train", "val"):
            try:
                found[stage] = self._find(stage)
            except NoSuchSplit:
                continue
        if "val" in found or not self.val_share or self.splits["val"] not in SYNONYMS["val"]:
            return None
        if "train" in found:
            return found["train"] if found["train"].is_dir() else None
        has_classes = self.splits["train"] in SYNONYMS["train"] and any(p.is_dir() for p in root.iterdir())
        return root if has_classes else None

    def _part(self, images: LabeledImages, source: Path, stage: str) -> LabeledImages:
        """Images of a folder or file without splits: those that are held out, or the others."""
        names = set(images.names)
        if not self.held_out:
            if self.val_list:
                self.held_out = self._read_list(Path(self.val_list), names)
            else:
                self.held_out = hold_out(images, self.val_share, self.seed)
                log.warning(
                    "%s: no validation split; holding out %d of %d images, %.0f %% of %s",
                    source,
                    len(self.held_out),
                    len(images),
                    100 * self.val_share,
                    "the images" if isinstance(images, MultiLabelImages) else "each class",
                )
            if not self.held_out:
                raise UserError(f"{source}: too few images to hold some out for validation")
        held_out = set(self.held_out)
        return images.select(held_out if stage == "val" else names - held_out)

    @staticmethod
    def _read_list(path: Path, names: set[str]) -> list[str]:
        """Names in a list of validation images that exist."""
        try:
            listed = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        except OSError as error:
            raise UserError(f"{path}: cannot read this list of images ({error})") from None
        listed = [line for line in listed if line]
        found = [line for line in listed if line in names]
        if found and len(found) < len(listed):
            log.warning("%s: %d of its %d images do not exist", path, len(listed) - len(found), len(listed))
        if not found:
            raise UserError(f"{path}: none of its {len(listed)} lines names an image in --data.root")
        return found

    def _source(self, stage: str) -> LabeledSource:
        """Reader of a split."""
        if self.dataset and self.dataset.startswith("wds"):
            raise UserError(f"dataset '{self.dataset}': pass the folder of WebDataset shards as --data.root")
        if self.dataset:
            split = {"train": "train", "val": "validation"}.get(self.splits[stage], self.splits[stage])
            if self.dataset.startswith("hfds/"):
                columns = self.image_column, self.label_column
                return HuggingFaceImages(self.dataset, self.root, split, *columns, self.classes)
            return TimmImages(self.dataset, self.root, split, self.download)
        if not self.root:
            return DigitImages(stage, self.lengths[stage], self._size(), self.seed)
        if Path(self.root).suffix == ".csv":
            return self._listed(Path(self.root), stage)
        if shards := self._shards(stage):
            self.note_split(stage, shards[0].parent)
            return ShardImages(shards, self.classes)
        if folder := self._unsplit():
            return self._part(FolderImages(folder, self.classes), folder, stage)
        path = self._find(stage)
        self.note_split(stage, path)
        return TarImages(path, self.classes) if path.suffix == ".tar" else FolderImages(path, self.classes)

    def _listed(self, file: Path, stage: str) -> LabeledImages:
        """Images of a split that a CSV file lists."""
        if not file.is_file():
            raise UserError(
                f"{file}: no such file. --data.root needs a CSV file with the columns path and label"
            )
        images, splits = read_csv(file, self.classes, self.multi_label)
        self.label_format = "CSV"
        if not splits:
            return self._part(images, file, stage)
        self.note_split(stage, file)
        return select_split(file, images, splits, self.split_names(stage))

    @property
    def is_multi_label(self) -> bool:
        """Whether images have any number of classes. Opens the data."""
        self._open_any()
        return any(isinstance(images.source, MultiLabelImages) for images in self.images.values())

    def _size(self) -> int:
        return self.image_size or self.model_cfg.input_size[-1]

    def _image(self) -> Kwargs:
        """Size and normalization, as arguments of timm's ``create_transform``."""
        return dict(
            input_size=(self.pixel_format.channels, self._size(), self._size()),
            mean=tuple(self.mean or self.model_cfg.mean),
            std=tuple(self.std or self.model_cfg.std),
            interpolation=self.interpolation or self.model_cfg.interpolation,
        )

    @override
    def describe(self) -> JsonObject:
        crop: dict[str, float | str] = {"crop_pct": self.crop_pct or self.model_cfg.crop_pct}
        if self.crop == "none":
            crop = {"crop_pct": 1.0, "crop_mode": "squash"}
        return {"classes": self.classes, "image": {**self._image(), **crop}, **self.describe_pixels()}

    def _transform(self, stage: str) -> Transform:
        """AugmentationOptions or preprocessing of an image."""
        is_rgb = self.pixel_format.is_rgb
        if stage == "val":
            return evaluation_transform(self.describe()["image"], is_rgb)
        return training_transform(self._image(), self.augmentation, is_rgb)

    @override
    def training_size(self) -> tuple[int, int]:
        return self._size(), self._size()

    def _training_presence(self) -> NDArray[np.bool_]:
        """Whether each training image has each class, ``(images, classes)``.

        Raises:
            UserError: If it is only known after the images are read.
        """
        source = self.open("train").source
        if not isinstance(source, (LabeledImages, TarImages, ShardImages)):
            name = self.dataset or "the bundled digits"
            raise UserError(f"{name}: balancing classes needs class folders, tar files, shards or a CSV file")
        if isinstance(source, MultiLabelImages):
            return source.presence
        return source.labels[:, None] == np.arange(self.num_classes)

    @override
    def class_counts(self) -> NDArray[np.int64]:
        """Number of training images of each class."""
        counts: NDArray[np.int64] = self._training_presence().sum(0)
        return counts

    def train_dataloader(self) -> SeededLoader:
        """Loader of the training images."""
        power = SAMPLING_POWERS[self.sampling]
        weights = sampling_weights(self._training_presence(), power) if power else None
        return self.create_loader("train", weights=weights)

    @override
    def val_dataloader(self) -> SeededLoader:
        return self.create_loader("val")
