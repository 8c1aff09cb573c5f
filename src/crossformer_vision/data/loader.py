"""DataLoader that can resume within an epoch and whose workers ignore signals."""

import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from crossformer_vision.compat import shut_down_workers
from crossformer_vision.data.sampling import EpochBatches, ReadImages, SeededDataset

CollateFunction = Callable[[list[Any]], object]


class Collate:
    """Collates samples, dropping unreadable ones (``None``).

    Args:
        collate: Function that makes a batch of samples.
    """

    def __init__(self, collate: CollateFunction) -> None:
        self.collate = collate

    def __call__(self, samples: list[object]) -> object:
        """Collate a batch; ``None`` without samples, as in a process without a share of the last batch."""
        samples = [sample for sample in samples if sample is not None]
        return self.collate(samples) if samples else None


def ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a DataLoader worker.

    Terminals and schedulers send them to all processes of a job. The training process needs its workers to
    finish the current step before it saves.

    Args:
        worker: Index of the worker.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class SeededLoader:
    """A DataLoader of ``EpochBatches`` that counts the batches of the current epoch.

    It wraps a DataLoader instead of being one, because Lightning re-creates DataLoaders with a sampler of its
    own, which would lose the order.

    Args:
        dataset: Dataset of samples.
        batches: Batches of this process.
        seed: Seed of the run.
        num_workers: Number of worker processes.
        collate: Function that makes a batch of samples.
    """

    def __init__(
        self,
        dataset: ReadImages,
        batches: EpochBatches,
        seed: int,
        num_workers: int,
        collate: CollateFunction = default_collate,
    ) -> None:
        self.loader = DataLoader(
            SeededDataset(dataset, seed),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=Collate(collate),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals,
        )
        # At exit, Python terminates workers by SIGTERM, which they ignore, and would wait for them forever.
        self._finalizer = weakref.finalize(self, shut_down_workers, self.loader)
        self.batch_sampler = self.batches = batches  # Lightning looks for batch_sampler
        self.taken = 0

    def __len__(self) -> int:
        return len(self.batches)

    def close(self) -> None:
        """End the workers."""
        shut_down_workers(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that workers start with the first batch, when the epoch is known.
        self.taken = self.batches.start
        for batch in self.loader:
            self.taken += 1
            yield batch
