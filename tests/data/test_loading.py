"""Tests for data loading: order and random numbers depend only on (seed, epoch, index)."""

import random
import subprocess
import sys

import lightning as L
import numpy as np
import pytest
import torch

from crossformer_vision.data.classification import ClassificationData
from crossformer_vision.data.loader import SeededLoader
from crossformer_vision.data.randomness import preserve_rng_state, seed_all
from crossformer_vision.data.sampling import EpochBatches


class Noise:
    """Dataset of items with their index and one number from each random generator."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return torch.tensor(
            [index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64
        )


def loader(num_workers=0, train=True, rank=0, world=1, batch_size=4):
    batches = EpochBatches(23, batch_size, seed=5, train=train, rank=rank, world=world)
    return SeededLoader(Noise(), batches, seed=5, num_workers=num_workers)


def epoch(loader, number):
    loader.batches.set_epoch(number)
    return list(loader)


@pytest.mark.parametrize("train", [True, False])
def test_batches_do_not_depend_on_num_workers(train):
    a, b = loader(0, train), loader(2, train)
    for number in (0, 1):
        for x, y in zip(epoch(a, number), epoch(b, number), strict=True):
            assert torch.equal(x, y)
    assert not torch.equal(torch.cat(epoch(a, 0))[:, 1:], torch.cat(epoch(a, 1))[:, 1:])


def test_two_processes_load_the_same_samples_as_one():
    whole = epoch(loader(batch_size=4), 3)
    halves = [epoch(loader(batch_size=2, rank=rank, world=2), 3) for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == len(halves[1]) == 23 // 4
    for all_, *parts in zip(whole, *halves, strict=True):
        assert sorted(all_.tolist()) == sorted(torch.cat(parts).tolist())


def test_validation_covers_each_image_once():
    parts = [torch.cat(epoch(loader(train=False, batch_size=2, rank=rank, world=2), 0)) for rank in (0, 1)]
    assert sorted(torch.cat(parts)[:, 0].tolist()) == list(range(23))


@pytest.mark.parametrize(("limit", "taken"), [(1.0, None), (2, 8), (0.5, 12), (99, None), (0, None)])
def test_limited_validation_samples_the_whole_split(limit, taken):
    batches = EpochBatches(23, 4, seed=5, train=False, limit=limit)
    order = [index for batch in batches for _, index in batch]
    assert sorted(order) == list(range(23))
    if taken is None:
        assert order == list(range(23))
    else:
        assert order[:taken] == [n * 23 // taken for n in range(taken)]


class Labels(L.LightningModule):
    def predict_step(self, batch):
        return batch[1]


def test_predictions_follow_dataset_order():
    """Limited validation samples the whole split, but prediction keeps the dataset order."""
    data = ClassificationData(image_size=32, val_images=30, batch_size=4, num_workers=0)
    said = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    found = L.Trainer(limit_val_batches=2, **said).predict(Labels(), data)
    images = data.open("val")
    assert torch.cat(found).tolist() == [int(images[n][1]) for n in range(30)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_resumes_at_saved_batch(num_workers):
    whole = epoch(loader(num_workers), 1)
    first = loader(num_workers)
    first.batches.set_epoch(1)
    batches = iter(first)
    taken = [next(batches) for _ in range(2)]
    second = loader(num_workers)
    second.batches.start = first.taken
    rest = epoch(second, 1)
    assert all(torch.equal(x, y) for x, y in zip(taken + rest, whole, strict=True))
    assert len(epoch(second, 2)) == len(whole)  # the next epoch is complete


def test_random_generator_states_are_restored():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with preserve_rng_state():
        seed_all(7)
        random.random(), np.random.rand(), torch.rand(1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_script_with_open_loader_exits(tmp_path):
    """Workers ignore the SIGTERM that Python sends at exit."""
    script = """
if __name__ == "__main__":
    from crossformer_vision import ClassificationData
    data = ClassificationData(train_images=64, val_images=8, image_size=32, batch_size=4, num_workers=1)
    loader = data.train_dataloader()
    for batch in loader:
        break
"""
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True, timeout=120)
