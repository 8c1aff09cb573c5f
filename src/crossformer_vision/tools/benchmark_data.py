"""How fast the images of a run are read, how fast its network takes them, and which of the two waits."""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from crossformer_vision.data.images import reason, to_rgb
from crossformer_vision.data.loading import ResumableData, kept_generators
from crossformer_vision.errors import UserError
from crossformer_vision.plotting import visualize

SAMPLES = 64  # that are taken apart


def worker_counts(configured: int) -> list[int]:
    """None, one, and on by doubling up to the cores; and as many as the run would have."""
    cores = os.cpu_count() or 1
    return sorted({0, configured, *(2**k for k in range(8) if 2**k <= cores)})


def images_read(data: ResumableData, workers: int, seconds: float) -> float:
    """Training images a second that a number of workers bring, from the second batch on."""
    data.num_workers = workers
    loader: Any = data.train_dataloader()
    count, began, epoch = 0, 0.0, 0
    try:
        while True:
            loader.batches.set_epoch(epoch)
            for batch in loader:
                now = time.perf_counter()
                if began:
                    count += len(batch[0])
                    if now - began > seconds:
                        return count / (now - began)
                else:
                    began = now
            epoch += 1
    finally:
        loader.close()


def parts_of_a_sample(data: ResumableData) -> dict[str, float]:
    """Milliseconds of a training image in one process: to read and decode it, and to augment it."""
    images: Any = data.open("train")
    spent = {"read and decode": 0.0, "augment": 0.0}
    read = 0
    with kept_generators():
        for n in range(SAMPLES):
            index = n * len(images) // SAMPLES
            start = time.perf_counter()
            try:
                image, target = images.source.read(index)
                image = to_rgb(image)
            except UserError:  # of its labels
                raise
            except Exception as error:  # decoders raise errors of any kind
                if data.skip_corrupt:
                    continue
                name = images.source.name(index)
                raise UserError(f"{name}: cannot read this image ({reason(error)})") from None
            middle = time.perf_counter()
            images.transform(image, target)
            spent["read and decode"] += middle - start
            spent["augment"] += time.perf_counter() - middle
            read += 1
    return {name: 1e3 * total / max(1, read) for name, total in spent.items()}


class Repeated:
    """One batch, over and over; an epoch has a length, which the schedule asks for."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1_000_000

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch, len(self))


class Clock(L.Callback):
    """Stops training after some seconds; counts from the third step on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps, self.began, self.taken = seconds, -2, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.began = now if self.steps < 0 else self.began
        self.steps += 1
        self.taken = now - self.began
        trainer.should_stop = self.steps > 0 and self.taken > self.seconds


def images_trained(cli: Any, seconds: float) -> float:
    """Images a second that the training step of a run takes, on one device, of a batch that is there."""
    cli.datamodule.num_workers = 0
    batch = next(iter(cli.datamodule.train_dataloader()))
    given, clock = cli.config_init.trainer, Clock(seconds)
    trainer = L.Trainer(
        accelerator=given.accelerator,
        devices=1,
        precision=given.precision,
        gradient_clip_val=given.gradient_clip_val,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
        default_root_dir="runs",
    )
    trainer.fit(cli.model, Repeated(batch))
    return clock.steps * len(batch[0]) / clock.taken


def verdict(read: dict[int, float], trained: float, parts: dict[str, float]) -> list[str]:
    """Which of the two waits, in words."""
    enough = [workers for workers, rate in read.items() if rate >= trained]
    if enough:
        how_many = (
            "no worker is" if not enough[0] else "one worker is" if enough[0] == 1 else f"{enough[0]} are"
        )
        return [f"the network is what one waits for: {how_many} needed to bring what it takes"]
    best = max(read, key=lambda workers: read[workers])
    slower = max(parts, key=lambda name: parts[name])
    lines = [
        f"the data are what one waits for: {best} workers bring {read[best] / trained:.0%} of what it takes"
    ]
    if slower == "augment":
        lines.append(
            "most of an image's time is augmentation: smaller images on disk, or a lighter policy, help"
        )
    else:
        lines.append(
            "most of an image's time is reading and decoding: smaller images on disk help, and shards"
        )
    return lines


def run(cli: Any, out: Path, seconds: float = 5.0, counts: Sequence[int] | None = None) -> dict[str, Any]:
    """Measure, print, and write `data.json`, `data.md` and `data.png` to `out`.

    Args:
        cli: task, data and trainer, as `options.parse` builds them.
        out: folder.
        seconds: of each measurement.
        counts: of workers.
    """
    from crossformer_vision.files import make_folder, write_json, write_text
    from crossformer_vision.training.run import about

    make_folder(out)
    data = cli.datamodule
    counts = counts or worker_counts(data.num_workers)
    parts = parts_of_a_sample(data)
    read = {workers: images_read(data, workers, seconds) for workers in counts}
    trained = images_trained(cli, seconds)
    found = {
        "images_per_second_by_workers": read,
        "images_per_second_trained": trained,
        "ms_of_a_sample": parts,
        "images": len(data.open("train")),
        "model": cli.model.name,
        **about(),
    }
    head = ["workers", "images/s", "times what the network takes"]
    rows = [[str(w), f"{rate:.1f}", f"{rate / trained:.2f}"] for w, rate in read.items()]
    rows.append(["network", f"{trained:.1f}", ""])
    of_a_sample = ", ".join(f"{name} {ms:.1f} ms" for name, ms in parts.items())
    said = [f"an image in one process: {of_a_sample}", *verdict(read, trained, parts)]
    table = [head, ["---"] * 3, *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    write_json(out / "data.json", found)
    write_text(out / "data.md", "\n".join([*lines, "", *said]) + "\n")
    plot(read, trained, out / "data.png")
    shown = Table(box=None)
    for name in head:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    print("\n".join([*said, f"data.md, .json and .png in {out}"]))
    return found


def plot(read: dict[int, float], trained: float, path: Path) -> None:
    """Images a second by workers, and the line that the network takes."""
    figure, axes = visualize.subplots(5.5, 3.6)
    axis = axes[0, 0]
    axis.bar([str(workers) for workers in read], list(read.values()), color="#56b4e9", label="read")
    axis.axhline(trained, color="#d55e00", lw=2, label=f"the network takes {trained:.0f}")
    axis.set(xlabel="workers", ylabel="images a second", ylim=(0, 1.2 * max(trained, *read.values())))
    axis.legend()
    visualize.save_figure(figure, path)
