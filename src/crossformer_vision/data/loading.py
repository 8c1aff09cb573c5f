"""How every task reads its samples: images as RGB, in an order and with random numbers that follow from
(seed, epoch, index) alone.

So a run does not depend on the number of workers, two processes see what one would, and a run that was killed
goes on from its checkpoint as if nothing had happened.
"""

import logging
import os
import random
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from crossformer_vision.data.images import reason, to_rgb
from crossformer_vision.errors import NoSuchSplit, UserError, check_names, check_range

log = logging.getLogger("crossformer_vision")


def mix_seed(*parts: int) -> int:
    """One 32-bit seed from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generators() -> Any:
    """The states of all generators, for `restore_generators`."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return *states, torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def restore_generators(states: Any) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put all generators back after the block; not in a loader's worker, where nobody else draws."""
    if get_worker_info() is not None:
        yield
        return
    states = generators()
    try:
        yield
    finally:
        restore_generators(states)


class Source(Protocol):
    """Images, each with what is to be learned of it, as they lie somewhere."""

    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[Image.Image, Any]: ...
    def name(self, index: int) -> str: ...


class ReadImages(Dataset[Any]):
    """The samples of a source.

    Args:
        source: of images and their targets.
        transform: (image in RGB, target) -> sample.
        skip_corrupt: count an image that cannot be read, instead of stopping. In training the next one stands
            in for it, so that batches stay full; otherwise it is left out: the sample is None.
        train: whether this is training.
        least: pixels of a side below which an image is counted as small: it will be padded up.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image, Any], Any],
        skip_corrupt: bool,
        train: bool = True,
        least: int = 0,
    ) -> None:
        self.source, self.transform, self.skip_corrupt = source, transform, skip_corrupt
        self.train, self.least = train, least
        self.small = torch.full((1,), -1).share_memory_()  # the first that a worker has met
        self.skipped = torch.zeros(1, dtype=torch.int64).share_memory_()  # counted by all workers

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        for k in range(len(self)):
            at = (index + k) % len(self)
            try:
                image, target = self.source.read(at)
                image = to_rgb(image)
            except UserError:  # of its labels
                raise
            except Exception as error:
                if not self.skip_corrupt:
                    raise UserError(
                        f"{self.source.name(at)}: cannot read this image ({reason(error)}); replace it, or "
                        "leave such images out with --data.skip_corrupt true"
                    ) from None
                self.skipped += 1
                if not self.train:
                    return None
                continue
            if min(image.size) < self.least and self.small < 0:
                self.small.fill_(at)
            return self.transform(image, target)
        raise UserError(f"none of the {len(self)} images can be read")


class SeededDataset(Dataset[Any]):
    """A map-style dataset read by (epoch, index), which seed whatever its transforms draw."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        (sample,) = self.__getitems__([key])
        return sample

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        """A batch, as torch's loader asks for it: other people's random numbers are put back once for all."""
        samples = []
        with kept_generators():
            for epoch, index in keys:
                seed = mix_seed(self.seed, epoch, index)
                random.seed(seed)
                np.random.seed(seed)
                torch.default_generator.manual_seed(seed)
                samples.append(self.dataset[index])
        return samples


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one of `world` processes.

    The k-th batches of all processes together are the k-th batch of a single process with their global batch
    size.

    Args:
        length: samples in the dataset.
        batch_size: of this process.
        seed: of the order.
        train: shuffle, and drop the samples that do not fill a global batch; otherwise all, in order.
        rank, world: this process, and how many there are.
        kinds: of the samples, in training: a batch holds one kind, apart from the last ones, which hold what
            is left over.
        same_order: in all epochs, for Lightning's `overfit_batches`.
        limit: of the batches that are not for training, how many will be taken (int), or which share (float).
            Where these are not all, they come evenly from the whole dataset: files are in the order of their
            classes, of which the first batches would have one or two.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        train: bool,
        rank: int = 0,
        world: int = 1,
        kinds: list[int] | None = None,
        same_order: bool = False,
        limit: int | float = 1.0,
    ) -> None:
        self.length, self.batch_size, self.seed, self.train = length, batch_size, seed, train
        self.rank, self.world, self.kinds, self.same_order = rank, world, kinds, same_order
        self.limit = limit
        self.sampler = self  # where Lightning looks for `set_epoch`
        self.epoch = 0
        self.start = 0  # batch that the next iteration begins with

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole = self.batch_size * self.world
        return self.length // whole if self.train else -(-self.length // whole)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.length)
        if self.train:
            epoch = 0 if self.same_order else self.epoch
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator)
            if self.kinds:
                order = self._by_kind(order)
        whole = self.batch_size * self.world
        taken = whole * (int(self.limit * len(self)) if isinstance(self.limit, float) else self.limit)
        if not self.train and 0 < taken < self.length:
            spread = torch.arange(taken) * self.length // taken
            rest = torch.ones(self.length, dtype=torch.bool).index_fill_(0, spread, False)
            order = torch.cat([spread, order[rest]])
        start, self.start = self.start, 0
        for k in range(start, len(self)):
            batch = order[k * whole : (k + 1) * whole][self.rank :: self.world].tolist()
            yield [(self.epoch, index) for index in batch]

    def _by_kind(self, order: torch.Tensor) -> torch.Tensor:
        assert self.kinds
        whole = self.batch_size * self.world
        filling: dict[int, list[int]] = {}
        batches: list[int] = []
        for index in order.tolist():
            kind = filling.setdefault(self.kinds[index], [])
            kind.append(index)
            if len(kind) == whole:
                batches += kind
                kind.clear()
        return torch.tensor(batches + [index for kind in filling.values() for index in kind])


class Collate:
    """Samples -> batch, without those that could not be read; None where nothing is left.

    That happens where a process has no share of the last validation batch, too.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        samples = [sample for sample in samples if sample is not None]
        return self.collate(samples) if samples else None


def leave_signals_to_the_run(worker: int) -> None:
    """For a loader's worker: a terminal's Ctrl-C and a scheduler's SIGTERM go to all processes of a job.

    The one that trains then saves what it has, and for the step that it is at it needs its workers.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def close_loader(loader: DataLoader[Any]) -> None:
    """End the workers of a loader, as Lightning does with those of a DataLoader."""
    workers: Any = loader._iterator
    loader._iterator = None
    if hasattr(workers, "_shutdown_workers"):
        workers._shutdown_workers()


class SeededLoader:
    """A DataLoader of `EpochBatches` that counts the batches taken in this epoch.

    It has one, and is none: Lightning makes a DataLoader anew with a sampler of its own, for several
    processes and for predictions, and would lose the order.
    """

    def __init__(
        self,
        dataset: Any,
        batches: EpochBatches,
        seed: int,
        num_workers: int,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.loader = DataLoader(
            SeededDataset(dataset, seed),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=Collate(collate),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_to_the_run,
        )
        # Workers do not hear SIGTERM, by which Python ends them: it would wait for them forever at its exit.
        self._finalizer = weakref.finalize(self, close_loader, self.loader)
        self.batch_sampler = self.batches = batches  # the first name is Lightning's, for `set_epoch`
        self.taken = 0

    def __len__(self) -> int:
        return len(self.batches)

    def close(self) -> None:
        """End its workers."""
        close_loader(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # A generator: the loader's workers start at the first batch, when the epoch is known.
        self.taken = self.batches.start
        for batch in self.loader:
            self.taken += 1
            yield batch


SYNONYMS = {
    "train": ("train", "training", "train2017"),
    "val": ("val", "validation", "valid", "val2017", "test"),
}


class ResumableData(L.LightningDataModule):
    """Base of the data modules: what all know of their images; training goes on in the middle of an epoch.

    A subclass writes `_read`, which opens a split, and `describe`.

    Lightning restores a stateful loader too, but not once anything has asked for the number of steps, as a
    schedule must.
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
    ) -> None:
        super().__init__()
        check_range("batch_size", batch_size, 1)
        self.root, self.splits = root, {"train": train_split, "val": val_split}
        self.batch_size, self.skip_corrupt, self.seed = batch_size, skip_corrupt, seed
        self.num_workers = min(8, max(0, (os.cpu_count() or 1) - 1)) if num_workers is None else num_workers
        self.classes = list(classes or ())
        check_names("classes", self.classes)
        self.found_splits: dict[str, Path] = {}  # where "train" and "val" were found
        self.images: dict[str, ReadImages] = {}  # "train" and "val", once opened
        self.global_batch = batch_size  # of all processes, once training images are loaded
        self._training: SeededLoader | None = None
        self._loaders: WeakSet[SeededLoader] = WeakSet()
        self._resumed: dict[str, int] = {}

    @property
    def num_classes(self) -> int:
        """How many classes there are: as given, or as the images have them, which are then looked for.

        Raises:
            UserError: a folder is missing or has no images, or their classes are wrong.
        """
        if not self.classes:
            missing: list[NoSuchSplit] = []
            for stage in ("train", "val"):  # where there is only validation, it has the classes
                try:
                    self.open(stage)
                except NoSuchSplit as error:
                    missing.append(error)
            if missing and "val" not in self.images:
                raise missing[0]
        return len(self.classes)

    def open(self, stage: str) -> ReadImages:
        """The images of `"train"` or `"val"`; the first that are opened name the classes, if nobody did.

        Raises:
            UserError: see `num_classes`.
        """
        if stage not in self.images:
            self.images[stage] = self._read(stage)
        return self.images[stage]

    def _read(self, stage: str) -> ReadImages:
        raise NotImplementedError

    def note_split(self, stage: str, path: Path) -> None:
        """Keep where a split was found; warn if test images are about to choose the best checkpoint."""
        self.found_splits[stage] = path
        if stage == "val" and path.name.removesuffix(".tar") == "test" and self.splits["val"] != "test":
            log.warning(
                "%s: there is no split for validation; best.ckpt is chosen on the test images. To hold out "
                "others, name their folder with --data.val_split",
                path,
            )

    def split_names(self, stage: str) -> tuple[str, ...]:
        """Where a split is looked for: under its name, and if that is a usual one, under the others."""
        split, usual = self.splits[stage], SYNONYMS[stage]
        return (split, *usual) if split in usual else (split,)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must say for its weights to be of use: names of the classes, the images' size."""
        raise NotImplementedError

    @property
    def skipped(self) -> int:
        """How often an unreadable image was left out so far, by this process and its workers."""
        return sum(int(images.skipped) for images in self.images.values())

    def notices(self) -> list[str]:
        """What a person should know of the images that were read, a line each."""
        lines = [f"{self.skipped} times an unreadable image was left out"] if self.skipped else []
        for images in self.images.values():
            if (at := int(images.small)) >= 0:
                what = f"images of less than {images.least} pixels are padded up, such as"
                lines.append(f"{what} {images.source.name(at)}")
        return lines

    def loader(
        self,
        stage: str,
        batch_size: int | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
        kinds: list[int] | None = None,
    ) -> SeededLoader:
        """The loader of this process; `batch_size` is its own. For `kinds` see `EpochBatches`.

        Fewer training images than a batch has make smaller batches, with a notice.
        """
        dataset, train, batch_size = self.open(stage), stage == "train", batch_size or self.batch_size
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if train and len(dataset) < batch_size * world:
            batch_size, wanted = len(dataset) // world, batch_size
            if not batch_size:
                raise UserError(f"{len(dataset)} training images are too few for {world} processes")
            log.warning(
                "%d training images do not fill a batch of %d: batches of %d",
                len(dataset),
                wanted * world,
                batch_size * world,
            )
        overfit = bool(self.trainer and getattr(self.trainer, "overfit_batches", 0))
        testing, predicting = (bool(getattr(self.trainer, k, False)) for k in ("testing", "predicting"))
        limit = getattr(self.trainer, "limit_test_batches" if testing else "limit_val_batches", 1.0)
        limit = 1.0 if predicting else limit  # in the dataset's order
        batches = EpochBatches(len(dataset), batch_size, self.seed, train, rank, world, kinds, overfit, limit)
        loader = SeededLoader(dataset, batches, self.seed, self.num_workers, collate)
        self._loaders.add(loader)
        if train:
            self.global_batch = batch_size * world
            done = self._resumed.get("taken", 0) * self._resumed.get("batch", self.global_batch)
            batches.start = min(-(-done // self.global_batch), len(batches) - 1)
            self._resumed = {}
            self._training = loader
        return loader

    def teardown(self, stage: str) -> None:
        for loader in self._loaders:
            loader.close()

    def training_size(self) -> tuple[int, int]:
        """Height and width of the images that are trained on, as far as they have one."""
        raise NotImplementedError

    def val_dataloader(self) -> SeededLoader:
        raise NotImplementedError

    def test_dataloader(self) -> SeededLoader:
        """The validation images: name others by `val_split`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> SeededLoader:
        return self.val_dataloader()

    @property
    def start(self) -> int:
        """The batch with which training goes on in its epoch."""
        return self._training.batches.start if self._training else 0

    def state_dict(self) -> dict[str, int]:
        if self._training is None or self.trainer is None:
            return {}
        taken = self._training.taken % int(self.trainer.num_training_batches)
        return {"taken": taken, "batch": self.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resumed = dict(state)
