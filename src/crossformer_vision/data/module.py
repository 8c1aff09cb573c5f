"""Base class of the data modules: splits, classes, loaders, and resume within an epoch."""

import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from weakref import WeakSet

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import default_collate

from crossformer_vision.data.loader import CollateFunction, SeededLoader
from crossformer_vision.data.rasters import RGB
from crossformer_vision.data.sampling import EpochBatches, ReadImages, Source
from crossformer_vision.data.statistics import check_display_channels, find_pixel_format, measure_images
from crossformer_vision.devices import count_cores
from crossformer_vision.errors import NoSuchSplit, UserError, check_names, check_range
from crossformer_vision.models.grouping import ceil_div
from crossformer_vision.types import JsonObject

log = logging.getLogger("crossformer_vision")

MAX_WORKERS = 8
SYNONYMS = {
    "train": ("train", "training", "train2017"),
    "val": ("val", "validation", "valid", "val2017", "test"),
}


class BaseDataModule(L.LightningDataModule):
    """Base of the data modules. A subclass implements ``_read``, ``describe``, ``training_size`` and loaders.

    Grayscale, palette, RGB and RGBA files of 8 bits are read as RGB. NumPy files, TIFF with other channels,
    and files of 16 bits or floats keep their channels. All images must have the format of the first.

    It stores the position within an epoch itself: Lightning also restores stateful loaders, but not after a
    schedule has read the number of steps.

    Args:
        root: Folder of the data, or ``None`` for bundled data.
        train_split: Name of the training split.
        val_split: Name of the validation split.
        batch_size: Batch size of each process.
        num_workers: Worker processes. ``None`` for one less than the number of cores, at most 8.
        skip_corrupt: Skip and count unreadable images.
        seed: Seed of order and augmentation.
        classes: Class names in their order. ``None`` for those of the data.
        channels: Number of channels; null for that of the first image; 3 for RGB.
        mean: Mean of each channel, for normalization, after 8- and 16-bit values are scaled to 0..1. Null for
            the backbone's, or for that of the training images if they are not RGB images.
        std: Standard deviation of each channel, as ``mean``.
        display_channels: Channels that plots show as red, green and blue, from 0, for images that are not
            RGB; null for the first three.

    Attributes:
        pixel_format: Format of the images, known after a split is open.
        classes: Class names, known after a split is open.
        found_splits: Where the splits were found.
        label_format: Format of the labels, for messages; empty for bundled data and class folders.
        global_batch: Batch size of all processes, known after the training loader is created.

    Raises:
        UserError: If an argument is invalid.
    """

    def __init__(
        self,
        root: str | None,
        train_split: str,
        val_split: str,
        batch_size: int,
        num_workers: int | None,
        skip_corrupt: bool,
        seed: int,
        classes: list[str] | None,
        channels: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        display_channels: list[int] | None = None,
    ) -> None:
        super().__init__()
        check_range("batch_size", batch_size, 1)
        if channels is not None:
            check_range("channels", channels, 1)
        if (mean is None) != (std is None):
            raise UserError("mean and std: set both, or neither")
        self.channels, self.mean, self.std, self.display_channels = channels, mean, std, display_channels
        self.pixel_format = RGB
        self._is_format_known = False
        self.root, self.splits = root, {"train": train_split, "val": val_split}
        self.batch_size, self.skip_corrupt, self.seed = batch_size, skip_corrupt, seed
        if num_workers is None:
            num_workers = min(MAX_WORKERS, count_cores() - 1)
        self.num_workers = num_workers
        self.classes = list(classes or ())
        check_names("classes", self.classes)
        self.found_splits: dict[str, Path] = {}
        self.label_format = ""
        self.images: dict[str, ReadImages] = {}
        self.global_batch = batch_size
        self._training: SeededLoader | None = None
        self._loaders: WeakSet[SeededLoader] = WeakSet()
        self._resumed: dict[str, int] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes. Opens the data if no class names were given.

        Raises:
            UserError: If a folder is missing or empty, or its classes are invalid.
        """
        if not self.classes:
            self._open_any()
        return len(self.classes)

    @property
    def in_chans(self) -> int:
        """Number of channels of the images. Opens the data."""
        self._open_any()
        return self.pixel_format.channels

    @property
    def image_mean(self) -> list[float] | None:
        """Mean of each channel, ``None`` for the backbone's. Opens the data."""
        self._open_any()
        return self.mean

    @property
    def image_std(self) -> list[float] | None:
        """Standard deviation of each channel, ``None`` for the backbone's. Opens the data."""
        self._open_any()
        return self.std

    def _open_any(self) -> None:
        """Open both splits, or the only one that data for validation have."""
        missing: list[NoSuchSplit] = []
        for stage in ("train", "val"):
            try:
                self.open(stage)
            except NoSuchSplit as error:
                missing.append(error)
        if missing and "val" not in self.images:
            raise missing[0]

    def open(self, stage: str) -> ReadImages:
        """Samples of a split. The first split that is opened defines the classes if none were given.

        Args:
            stage: ``train`` or ``val``.

        Raises:
            UserError: See ``num_classes``.
        """
        if stage not in self.images:
            self.images[stage] = self._read(stage)
        return self.images[stage]

    def _read(self, stage: str) -> ReadImages:
        """Open a split."""
        raise NotImplementedError

    def _find_pixel_format(self, source: Source, stage: str) -> None:
        """Find the format of the images and, unless they are RGB, their mean and standard deviation.

        Args:
            source: Images of the split.
            stage: ``train`` or ``val``.

        Raises:
            UserError: If the first image has another number of channels than ``channels``.
        """
        if not self._is_format_known:
            self.pixel_format = find_pixel_format(source, self.channels)
            self._is_format_known = True
            count = self.pixel_format.channels
            for name, values in (("mean", self.mean), ("std", self.std)):
                if values is not None and len(values) != count:
                    raise UserError(
                        f"--data.{name} has {len(values)} values, but images have {count} channels"
                    )
            check_display_channels(self.display_channels, count)
        if self.pixel_format.is_rgb or self.mean is not None:
            return
        if stage == "val":
            with suppress(NoSuchSplit):
                self.open("train")
        if self.mean is None:
            self.mean, self.std = measure_images(source, self.pixel_format)

    def describe_pixels(self) -> JsonObject:
        """Format and normalization of the images for checkpoints; empty for RGB with the backbone's."""
        content: JsonObject = {"mean": self.mean, "std": self.std} if self.mean else {}
        if not self.pixel_format.is_rgb:
            content |= {"pixel_format": asdict(self.pixel_format), "display_channels": self.display_channels}
        return content

    def note_split(self, stage: str, path: Path, name: str | None = None) -> None:
        """Record where a split was found. Warns if ``best.ckpt`` would be selected on test images.

        Args:
            stage: ``train`` or ``val``.
            path: Its folder or file.
            name: Name of the split, if it is not that of the path.
        """
        self.found_splits[stage] = path
        name = name or path.name.removesuffix(".tar")
        if stage == "val" and name == "test" and self.splits["val"] != "test":
            log.warning(
                "%s: there is no validation split, so best.ckpt is selected on the test images. To use other "
                "images, name their folder with --data.val_split",
                path,
            )

    def split_names(self, stage: str) -> tuple[str, ...]:
        """Names under which a split is looked for: the given one, and its synonyms if it is a common one."""
        split, common = self.splits[stage], SYNONYMS[stage]
        return (split, *common) if split in common else (split,)

    def class_counts(self) -> NDArray[np.int64]:
        """Number of training images, objects or pixels of each class."""
        raise NotImplementedError

    def describe(self) -> JsonObject:
        """Metadata for checkpoints: class names and preprocessing."""
        raise NotImplementedError

    @property
    def skipped(self) -> int:
        """Number of unreadable images that were skipped by this process and its workers."""
        return sum(int(images.skipped) for images in self.images.values())

    def notices(self) -> list[str]:
        """Lines about images that were read, for the user."""
        lines = [f"unreadable images were skipped {self.skipped} times"] if self.skipped else []
        for images in self.images.values():
            if (index := int(images.small)) >= 0:
                name = images.source.name(index)
                lines.append(f"images of less than {images.min_side} pixels are padded, such as {name}")
        return lines

    def create_loader(
        self,
        stage: str,
        batch_size: int | None = None,
        collate: CollateFunction = default_collate,
        kinds: list[int] | None = None,
        weights: NDArray[np.float64] | None = None,
    ) -> SeededLoader:
        """Create the loader of this process. With fewer training images than a batch, batches are smaller.

        Args:
            stage: ``train`` or ``val``.
            batch_size: Batch size of this process. ``None`` for that of the options.
            collate: Function that makes a batch of samples.
            kinds: See ``EpochBatches``.
            weights: See ``EpochBatches``.

        Raises:
            UserError: If there are fewer training images than processes.
        """
        dataset, train, batch_size = self.open(stage), stage == "train", batch_size or self.batch_size
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if train:
            batch_size = self._fill_batch(len(dataset), batch_size, world)
        is_overfitting = bool(self.trainer and getattr(self.trainer, "overfit_batches", 0))
        batches = EpochBatches(
            len(dataset),
            batch_size,
            self.seed,
            train,
            rank,
            world,
            kinds,
            is_overfitting,
            self._limit(),
            weights,
        )
        loader = SeededLoader(dataset, batches, self.seed, self.num_workers, collate)
        self._loaders.add(loader)
        if train:
            self.global_batch = batch_size * world
            done = self._resumed.get("taken", 0) * self._resumed.get("batch", self.global_batch)
            batches.start = min(ceil_div(done, self.global_batch), len(batches) - 1)
            self._resumed = {}
            self._training = loader
        return loader

    @staticmethod
    def _fill_batch(images: int, batch_size: int, world: int) -> int:
        """Batch size that the training images can fill."""
        if images >= batch_size * world:
            return batch_size
        smaller = images // world
        if not smaller:
            raise UserError(f"{images} training images are too few for {world} processes")
        log.warning(
            "%d training images do not fill a batch of %d; using batches of %d",
            images,
            batch_size * world,
            smaller * world,
        )
        return smaller

    def _limit(self) -> int | float:
        """Number or share of the batches that validation or test uses; all in prediction."""
        if getattr(self.trainer, "predicting", False):
            return 1.0
        name = "limit_test_batches" if getattr(self.trainer, "testing", False) else "limit_val_batches"
        return getattr(self.trainer, name, 1.0)

    def teardown(self, stage: str) -> None:
        """End the workers of all loaders."""
        for loader in self._loaders:
            loader.close()

    def training_size(self) -> tuple[int, int]:
        """Height and width of training images."""
        raise NotImplementedError

    def val_dataloader(self) -> SeededLoader:
        """Loader of the validation images."""
        raise NotImplementedError

    def test_dataloader(self) -> SeededLoader:
        """Loader of the validation images. ``val_split`` selects others."""
        return self.val_dataloader()

    def predict_dataloader(self) -> SeededLoader:
        """Loader of the validation images."""
        return self.val_dataloader()

    @property
    def start(self) -> int:
        """Batch with which training continues in the current epoch."""
        return self._training.batches.start if self._training else 0

    def state_dict(self) -> dict[str, int]:
        """Position within the epoch."""
        if self._training is None or self.trainer is None:
            return {}
        taken = self._training.taken % int(self.trainer.num_training_batches)
        return {"taken": taken, "batch": self.global_batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue within an epoch when the training loader is created."""
        self._resumed = dict(state_dict)
