"""Samples and their order, which depend only on (seed, epoch, index).

A run therefore does not depend on the number of workers, two processes see the same batches as one, and a
resumed run continues exactly.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from crossformer_vision.data.images import error_summary, to_pixels
from crossformer_vision.data.randomness import mix_seed, preserve_rng_state
from crossformer_vision.data.rasters import RGB, AnyImage, PixelFormat, Pixels, image_size
from crossformer_vision.errors import UserError
from crossformer_vision.models.grouping import ceil_div


class Source(Protocol):
    """Images with targets, as a reader provides them."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> tuple[AnyImage, object]:
        """An upright image and its target."""

    def name(self, index: int) -> str:
        """Name of an image, for messages."""


class ReadImages(Dataset[object]):
    """Samples of a source.

    Args:
        source: Images and targets.
        transform: Function from an image and a target to a sample.
        skip_corrupt: Skip and count unreadable images instead of raising an error. In training the next image
            replaces them, so that batches stay full; in validation the sample is ``None``.
        train: Whether the samples are for training.
        min_side: Side in pixels below which an image counts as small. Small images are padded.
        pixel_format: Format that all images have.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Pixels, Any], object],
        skip_corrupt: bool,
        train: bool = True,
        min_side: int = 0,
        pixel_format: PixelFormat = RGB,
    ) -> None:
        self.source, self.transform, self.skip_corrupt = source, transform, skip_corrupt
        self.train, self.min_side, self.pixel_format = train, min_side, pixel_format
        # Shared with all workers: index of a small image, or -1, and the number of skipped images.
        self.small = torch.full((1,), -1).share_memory_()
        self.skipped = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Pixels, Any]:
        """An image as transforms take it, and its target."""
        image, target = self.source.read(index)
        return to_pixels(image, self.pixel_format, self.source.name(index)), target

    def __getitem__(self, index: int) -> object:
        for k in range(len(self)):
            at = (index + k) % len(self)
            try:
                image, target = self.read(at)
            except UserError:  # about its labels
                raise
            except Exception as error:  # decoders raise errors of any kind
                if not self.skip_corrupt:
                    raise UserError(unreadable(self.source.name(at), error)) from None
                self.skipped += 1
                if not self.train:
                    return None
                continue
            if min(image_size(image)) < self.min_side and self.small < 0:
                self.small.fill_(at)
            return self.transform(image, target)
        raise UserError(f"none of the {len(self)} images can be read")


def unreadable(name: str, error: Exception) -> str:
    """Message about an image that cannot be read."""
    return (
        f"{name}: cannot read this image ({error_summary(error)}). Replace it, or skip such images with "
        "--data.skip_corrupt true"
    )


class SeededDataset(Dataset[object]):
    """A map-style dataset indexed by (epoch, index), which seed the random numbers of its transforms.

    Args:
        dataset: The dataset.
        seed: Seed of the run.
    """

    def __init__(self, dataset: ReadImages, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> object:
        (sample,) = self.__getitems__([key])
        return sample

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[object]:
        """A batch, as DataLoader requests it. The global random state is restored once per batch."""
        samples = []
        with preserve_rng_state():
            for epoch, index in keys:
                seed = mix_seed(self.seed, epoch, index)
                random.seed(seed)
                np.random.seed(seed)
                torch.default_generator.manual_seed(seed)
                samples.append(self.dataset[index])
        return samples


SAMPLING_POWERS = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}
"""Exponents of ``sampling_weights``."""


def sampling_weights(presence: NDArray[np.bool_], power: float) -> NDArray[np.float64]:
    """Sampling weight of each sample, from the number of samples of its rarest class.

    Args:
        presence: Whether each sample has each class, ``(samples, classes)``. Samples without a class count as
            one more class.
        power: Exponent of the number: 1 draws all classes equally often if each sample has one, 0.5 is a
            compromise with 0, their natural frequencies.
    """
    rarest = np.full(len(presence), (~presence.any(1)).sum(), np.int64)  # of samples without a class
    has_class = presence.any(1)
    rarest[has_class] = len(presence)
    for column, count in zip(presence.T, presence.sum(0).tolist(), strict=True):
        rarest[column] = np.minimum(rarest[column], count)
    return rarest.astype(np.float64) ** -power


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one of several processes.

    The k-th batches of all processes together are the k-th batch of one process with their global batch size.

    Args:
        length: Number of samples.
        batch_size: Batch size of this process.
        seed: Seed of the order.
        train: Shuffle, and drop samples that do not fill a global batch; otherwise all samples in order.
        rank: Index of this process.
        world: Number of processes.
        kinds: Kind of each sample. A training batch has samples of one kind, except the last ones of an
            epoch.
        same_order: Use the same order in all epochs, for Lightning's ``overfit_batches``.
        limit: Number (int) or share (float) of batches that validation uses. They are spread evenly over the
            dataset, because files are ordered by class.
        weights: Sampling weight of each sample. A training epoch draws samples with replacement. ``None`` to
            use each sample once.
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
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.train = length, batch_size, seed, train
        self.rank, self.world, self.kinds, self.same_order = rank, world, kinds, same_order
        self.limit, self.weights = limit, weights
        self.sampler = self  # Lightning calls set_epoch of this attribute
        self.epoch = 0
        self.start = 0  # batch that the next iteration starts with

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        global_batch = self.batch_size * self.world
        return self.length // global_batch if self.train else ceil_div(self.length, global_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._training_order() if self.train else self._validation_order()
        global_batch = self.batch_size * self.world
        start, self.start = self.start, 0
        for k in range(start, len(self)):
            batch = order[k * global_batch : (k + 1) * global_batch][self.rank :: self.world].tolist()
            yield [(self.epoch, index) for index in batch]

    def _training_order(self) -> torch.Tensor:
        epoch = 0 if self.same_order else self.epoch
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        if self.weights is None:
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.multinomial(torch.from_numpy(self.weights), self.length, True, generator=generator)
        return self._group_by_kind(order) if self.kinds else order

    def _validation_order(self) -> torch.Tensor:
        order = torch.arange(self.length)
        batches = int(self.limit * len(self)) if isinstance(self.limit, float) else self.limit
        count = self.batch_size * self.world * batches
        if not 0 < count < self.length:
            return order
        spread = torch.arange(count) * self.length // count
        is_rest = torch.ones(self.length, dtype=torch.bool).index_fill_(0, spread, False)
        return torch.cat([spread, order[is_rest]])

    def _group_by_kind(self, order: torch.Tensor) -> torch.Tensor:
        """The order with full batches of one kind first, then the rest."""
        assert self.kinds
        global_batch = self.batch_size * self.world
        incomplete: dict[int, list[int]] = {}
        batches: list[int] = []
        for index in order.tolist():
            batch = incomplete.setdefault(self.kinds[index], [])
            batch.append(index)
            if len(batch) == global_batch:
                batches += batch
                batch.clear()
        return torch.tensor(batches + [index for batch in incomplete.values() for index in batch])
