"""Measure whether training is input-bound: throughput of data loading and of training steps."""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from crossformer_vision.data.images import error_summary
from crossformer_vision.data.loader import SeededLoader
from crossformer_vision.data.module import BaseDataModule
from crossformer_vision.data.randomness import preserve_rng_state
from crossformer_vision.devices import count_cores
from crossformer_vision.errors import UserError
from crossformer_vision.files import write_json, write_text
from crossformer_vision.plotting import visualize
from crossformer_vision.training.build import RunObjects
from crossformer_vision.training.run import environment_info
from crossformer_vision.types import JsonObject

SAMPLES = 64  # images whose steps are timed one by one


def worker_counts(configured: int) -> list[int]:
    """Numbers of workers to try: 0, powers of two up to the number of cores, and the configured one."""
    cores = count_cores()
    return sorted({0, configured, *(2**k for k in range(8) if 2**k <= cores)})


def measure_loading(data: BaseDataModule, workers: int, seconds: float) -> float:
    """Training images per second from the DataLoader, without its first batch.

    Args:
        data: Data module.
        workers: Number of worker processes.
        seconds: Duration of the measurement.
    """
    data.num_workers = workers
    loader: SeededLoader = data.train_dataloader()
    count, start, epoch = 0, 0.0, 0
    try:
        while True:
            loader.batches.set_epoch(epoch)
            for batch in loader:
                now = time.perf_counter()
                if start:
                    count += len(batch[0])
                    if now - start > seconds:
                        return count / (now - start)
                else:
                    start = now
            epoch += 1
    finally:
        loader.close()


def measure_sample_steps(data: BaseDataModule) -> dict[str, float]:
    """Milliseconds per training image in one process, for reading with decoding and for augmentation.

    Raises:
        UserError: If an image cannot be read and ``skip_corrupt`` is off.
    """
    images = data.open("train")
    totals = {"read and decode": 0.0, "augment": 0.0}
    count = 0
    with preserve_rng_state():
        for n in range(SAMPLES):
            index = n * len(images) // SAMPLES
            start = time.perf_counter()
            try:
                image, target = images.read(index)
            except UserError:  # invalid labels
                raise
            except Exception as error:  # decoders raise errors of any kind
                if data.skip_corrupt:
                    continue
                name = images.source.name(index)
                raise UserError(f"{name}: cannot read this image ({error_summary(error)})") from None
            middle = time.perf_counter()
            images.transform(image, target)
            totals["read and decode"] += middle - start
            totals["augment"] += time.perf_counter() - middle
            count += 1
    return {name: 1e3 * total / max(1, count) for name, total in totals.items()}


class RepeatedBatch:
    """Loader that repeats one batch.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: object) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1_000_000  # schedules need a length

    def __iter__(self) -> Iterator[object]:
        return itertools.repeat(self.batch, len(self))


class StepTimer(Callback):
    """Times training steps from the third on, and stops training after some seconds.

    Args:
        seconds: Duration of the measurement.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps = -2
        self.start = self.elapsed = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        """Count a step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.start = now if self.steps < 0 else self.start
        self.steps += 1
        self.elapsed = now - self.start
        trainer.should_stop = self.steps > 0 and self.elapsed > self.seconds


def measure_training(objects: RunObjects, seconds: float) -> float:
    """Images per second of training steps on one device, with a batch that is in memory.

    Args:
        objects: Task, data module and Trainer of a training run.
        seconds: Duration of the measurement.
    """
    objects.data.num_workers = 0
    batch = next(iter(objects.data.train_dataloader()))
    timer = StepTimer(seconds)
    trainer = L.Trainer(
        accelerator=objects.trainer.accelerator,
        devices=1,
        precision=objects.trainer.precision,
        gradient_clip_val=objects.trainer.gradient_clip_val,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timer],
        default_root_dir="runs",
    )
    trainer.fit(objects.task, RepeatedBatch(batch))
    return timer.steps * len(batch[0]) / timer.elapsed


def verdict(loading: dict[int, float], training: float, steps: dict[str, float]) -> list[str]:
    """Describe whether training is input-bound or compute-bound.

    Args:
        loading: Images per second by number of workers.
        training: Images per second of training steps.
        steps: Milliseconds per image by step of loading.
    """
    sufficient = [workers for workers, rate in loading.items() if rate >= training]
    if sufficient:
        count = sufficient[0]
        needed = "no worker is" if count == 0 else "one worker is" if count == 1 else f"{count} workers are"
        return [f"compute-bound: {needed} needed to keep the network busy"]
    best = max(loading, key=lambda workers: loading[workers])
    slowest = max(steps, key=lambda name: steps[name])
    advice = {
        "augment": "most of the time is augmentation: use smaller images on disk or a lighter policy",
        "read and decode": "most of the time is reading and decoding: use smaller images on disk, or shards",
    }
    return [
        f"input-bound: {best} workers deliver {loading[best] / training:.0%} of what the network can process",
        advice[slowest],
    ]


def run(
    objects: RunObjects, output_dir: Path, seconds: float = 5.0, counts: Sequence[int] | None = None
) -> JsonObject:
    """Measure, print, and write ``data.json``, ``data.md`` and ``data.png``.

    Args:
        objects: Task, data module and Trainer of a training run.
        output_dir: Existing directory to write to.
        seconds: Duration of each measurement.
        counts: Numbers of workers to try. ``None`` for those of ``worker_counts``.

    Returns:
        Content of ``data.json``.
    """
    data = objects.data
    counts = counts or worker_counts(data.num_workers)
    steps = measure_sample_steps(data)
    loading = {workers: measure_loading(data, workers, seconds) for workers in counts}
    training = measure_training(objects, seconds)
    result = {
        "images_per_second_by_workers": loading,
        "images_per_second_trained": training,
        "ms_of_a_sample": steps,
        "images": len(data.open("train")),
        "model": objects.task.name,
        **environment_info(),
    }
    titles = ["workers", "images/s", "relative to network"]
    rows = [[str(workers), f"{rate:.1f}", f"{rate / training:.2f}"] for workers, rate in loading.items()]
    rows.append(["network", f"{training:.1f}", ""])
    durations = ", ".join(f"{name} {ms:.1f} ms" for name, ms in steps.items())
    notes = [f"one image in one process: {durations}", *verdict(loading, training, steps)]
    lines = ["| " + " | ".join(row) + " |" for row in [titles, ["---"] * 3, *rows]]
    write_json(output_dir / "data.json", result)
    write_text(output_dir / "data.md", "\n".join([*lines, "", *notes]) + "\n")
    plot(loading, training, output_dir / "data.png")
    table = Table(box=None)
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print("\n".join([*notes, f"data.md, .json and .png in {output_dir}"]))
    return result


def plot(loading: dict[int, float], training: float, path: Path) -> None:
    """Plot images per second by number of workers, with a line for the network.

    Args:
        loading: Images per second of data loading, by number of workers.
        training: Images per second of the network.
        path: PNG file to write.
    """
    figure, [[axis]] = visualize.subplots(5.5, 3.6)
    axis.bar([str(workers) for workers in loading], list(loading.values()), color="#56b4e9", label="loading")
    axis.axhline(training, color="#d55e00", lw=2, label=f"network: {training:.0f}")
    axis.set(xlabel="workers", ylabel="images per second", ylim=(0, 1.2 * max(training, *loading.values())))
    axis.legend()
    visualize.save_figure(figure, path)
