"""Callbacks that report a run: throughput, metrics.csv, learning curves, one line per epoch, progress bar."""

import math
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from typing_extensions import override

from crossformer_vision.files import read_csv, write_csv
from crossformer_vision.plotting import visualize
from crossformer_vision.tasks.base import Task
from crossformer_vision.training.run_directory import RunDirectory

PLOT_INTERVAL = 10.0  # minimum seconds between two plots of the curves
FIRST_REPORT = 10.0  # seconds of training after which the speed is printed for the first time


class Throughput(Callback):
    """Measures images per second of the current epoch, the training time, and the time left."""

    def __init__(self) -> None:
        self.images, self.batches, self.seconds = 0, 0, 1e-9
        self.earlier_seconds = 0.0  # before the run was resumed
        self.start: float | None = None
        self.epoch_start = 0.0
        self.is_reported = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.start = time.time()
        self.on_train_epoch_start(trainer, pl_module)  # not called if a run is resumed within an epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the counters."""
        self.images, self.batches, self.seconds = 0, 0, 1e-9
        self.epoch_start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, and print the speed once if no progress bar shows it."""
        self.batches += 1
        self.images += len(batch[0]) * trainer.world_size
        self.seconds = time.perf_counter() - self.epoch_start
        if self.is_reported or not trainer.is_global_zero:
            return
        if time.time() - (self.start or 0) >= FIRST_REPORT:
            self.is_reported = True
            if trainer.progress_bar_callback is None:
                steps = int(trainer.estimated_stepping_batches)
                print(f"step {trainer.global_step}/{steps}  {self.describe(trainer)}", flush=True)

    def images_per_second(self) -> float:
        """Images per second of all processes in the current epoch."""
        return self.images / self.seconds

    def time_left(self, trainer: L.Trainer) -> str:
        """Time to the end of the run, as ``h:mm:ss``."""
        total = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        left = total - (trainer.fit_loop.epoch_loop.total_batch_idx + 1)
        return str(timedelta(seconds=round(max(0.0, left * self.seconds / max(1, self.batches)))))

    def describe(self, trainer: L.Trainer) -> str:
        """Speed and time left, for a line of output."""
        speed = self.images_per_second()
        return f"{speed:.{0 if speed >= 10 else 1}f} images/s  {self.time_left(trainer)} left"

    def minutes(self) -> float:
        """Training time, including that before the run was resumed."""
        return (self.earlier_seconds + (time.time() - self.start if self.start else 0)) / 60

    def state_dict(self) -> dict[str, float]:
        """The training time so far."""
        return {"minutes": self.minutes()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue the training time of a resumed run."""
        self.earlier_seconds = 60 * state_dict["minutes"]


class MetricsWriter(Callback):
    """Writes ``metrics.csv`` and ``curves.png`` and prints one line per epoch.

    Args:
        run_directory: Callback that holds the run directory.
        throughput: Callback that measures the speed.
    """

    def __init__(self, run_directory: RunDirectory, throughput: Throughput) -> None:
        self.run_directory, self.throughput = run_directory, throughput
        self.rows: list[dict[str, float]] = []
        self.plot_time = -math.inf
        self.unplotted: Task | None = None  # task whose last epoch is not in the plot
        self.has_validated = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the metrics of a resumed run."""
        metrics = self.run_directory.path / "metrics.csv"
        if trainer.is_global_zero and self.run_directory.is_resumed and metrics.exists():
            self.rows = read_csv(metrics)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the learning rate."""
        self.has_validated = False
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        for logger in trainer.loggers:
            logger.log_metrics({"lr": lr}, step=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that this epoch has validation metrics."""
        self.has_validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the row of the epoch, and plot and print it."""
        if not trainer.is_global_zero or not self.throughput.batches:  # none: resumed at an epoch's end
            return
        assert isinstance(pl_module, Task)
        # Without a validation, metrics of an earlier epoch are still there.
        prefixes = ("train_", "val_") if self.has_validated else ("train_",)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefixes)}
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": self.throughput.images_per_second(),
            **metrics,
        }
        self.rows = [*(r for r in self.rows if r["epoch"] < row["epoch"]), row]
        write_csv(self.run_directory.path / "metrics.csv", self.rows)
        self.unplotted = pl_module
        if time.monotonic() - self.plot_time > PLOT_INTERVAL:
            self.plot()
        print(self._epoch_line(trainer, pl_module, metrics), flush=True)
        if skipped := getattr(getattr(trainer, "datamodule", None), "skipped", 0):
            print(f"{skipped} unreadable images skipped so far", flush=True)

    def plot(self) -> None:
        """Plot the curves if the plot lacks the last epoch."""
        if self.unplotted is None:
            return
        with suppress(OSError):  # a full disk is already reported elsewhere
            visualize.plot_curves(self.rows, self.run_directory.path / "curves.png", self.unplotted.monitor)
        self.plot_time, self.unplotted = time.monotonic(), None

    def _epoch_line(self, trainer: L.Trainer, task: Task, metrics: dict[str, float]) -> str:
        """Monitored metric, losses, speed and time left; all others are in ``metrics.csv``."""
        if trainer.max_steps > 0:
            position = f"step {trainer.global_step}/{trainer.max_steps}"
        else:
            position = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        names = [name for name in (task.monitor, *task.printed_metrics, "train_loss") if name in metrics]
        parts = [f"{visualize.metric_label(n)} {metrics[n]:.{3 if 'loss' in n else 4}f}" for n in names]
        parts.append(self.throughput.describe(trainer))
        return "  ".join((position, *parts))


class ProgressBar(RichProgressBar):
    """Progress of the epoch, with the time left in the run."""

    def get_metrics(self, trainer: Any, pl_module: L.LightningModule) -> dict[str, Any]:
        """The time left instead of logged metrics, which the line per epoch shows."""
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)
        return {"left": throughput.time_left(trainer)} if throughput and throughput.batches else {}
