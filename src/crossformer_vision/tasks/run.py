"""A run and its folder: the same for every task.

config.yaml       the resolved configuration
metrics.csv       one row an epoch; curves.png draws it
tensorboard/      the same for TensorBoard
best.ckpt         the epoch with the best validation, EMA weights if there are any; last.ckpt to resume from
results.json      what came out, and on what
*.png             what a validation of the task shows
"""

import csv
import json
import os
import platform
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger

from crossformer_vision import visualize
from crossformer_vision.errors import UserError
from crossformer_vision.tasks.base import Task


@dataclass
class Run:
    """Where a run is kept, and how.

    Args:
        folder: of the run; null for `runs/<task>-<model>`, numbered if there is one.
        ema: decay of an exponential moving average of the weights, which is then validated and kept; 0 for
            none.
        patience: stop after so many epochs without a better validation; 0 to go on to the end.
        save_every: also save `last.ckpt` every so many steps; 0 for at each epoch's end alone.
    """

    folder: str | None = None
    ema: float = 0.0
    patience: int = 0
    save_every: int = 0

    def trainer_parts(self, task: Task, config: str, resumed: bool) -> dict[str, Any]:
        """Callbacks, plugins and loggers for Lightning's Trainer."""
        folder = Path(str(self.folder))
        callbacks: list[Callback] = [EMAWeightAveraging(decay=self.ema)] if self.ema else []
        callbacks += [
            RunFolder(folder, config, resumed),
            LearningRateMonitor("epoch"),
            BestCheckpoint(  # before `last`, which keeps what the best one is
                folder,
                "best",
                monitor=task.monitor,
                mode=task.monitor_mode,
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            ),
            ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=False),
        ]
        if self.save_every:
            callbacks.append(
                ModelCheckpoint(
                    folder, "last", enable_version_counter=False, every_n_train_steps=self.save_every
                )
            )
        if self.patience:
            callbacks.append(EarlyStopping(task.monitor, mode=task.monitor_mode, patience=self.patience))
        if sys.stdout.isatty():
            callbacks.append(Progress())
        return {
            "callbacks": callbacks,
            "plugins": [AtomicCheckpoints()],
            "logger": TensorBoardLogger(folder, name=None, version="tensorboard"),
        }


def new_folder(name: str) -> Path:
    """`runs/<name>`, or `runs/<name>-2`, … if there is one."""
    base = Path("runs") / name
    folder, n = base, 1
    while folder.exists():
        n += 1
        folder = base.with_name(f"{base.name}-{n}")
    return folder


class BestCheckpoint(ModelCheckpoint):
    """The best validation's weights; of equal scores those of the lower `val_loss`, then the later ones.

    What it knows does not depend on where the run's folder lies: it may be renamed or copied before a resume.
    """

    best_loss: float | None = None

    @property
    def state_key(self) -> str:  # that of version 0.1's checkpoints
        return super().state_key.replace(type(self).__qualname__, "ModelCheckpoint", 1)

    def check_monitor_top_k(self, trainer: L.Trainer, current: torch.Tensor | None = None) -> bool:
        better = super().check_monitor_top_k(trainer, current)
        loss = trainer.callback_metrics.get("val_loss")
        if not better and current is not None and self.best_model_score is not None:
            equal = float(current) == float(self.best_model_score)
            lower = loss is None or self.best_loss is None or float(loss) <= self.best_loss
            better = trainer.strategy.reduce_boolean_decision(equal and lower)
        if better:
            self.best_loss = None if loss is None else float(loss)
        return better

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = str(Path(str(self.dirpath)) / f"{self.filename}.ckpt")
        score = state_dict["best_model_score"]
        here = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
        super().load_state_dict(
            {**state_dict, **here, "best_k_models": {} if score is None else {path: score}}
        )
        self.best_loss = state_dict.get("best_loss")


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints under their name only when whole: a full disk or a kill leaves the one before untouched."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            raise UserError(
                f"{path}: cannot save the checkpoint ({_reason(error)}); the one before is untouched. "
                f"Free some disk space and go on with --resume {path.parent}"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        from crossformer_vision.checkpoints import read_checkpoint

        return read_checkpoint(path)


def _reason(error: BaseException) -> str:
    """What the system said: torch hides an OSError behind its own."""
    while not isinstance(error, OSError) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Progress(RichProgressBar):
    """A bar for the epoch, with images a second and the time left to the end of the run."""

    def get_metrics(self, trainer: Any, pl_module: L.LightningModule) -> dict[str, Any]:
        folder = next(c for c in trainer.callbacks if isinstance(c, RunFolder))
        return {"images/s": f"{folder.images_per_second():.0f}", "left": folder.time_left(trainer)}


class RunFolder(Callback):
    """Writes the folder as the run goes, and a line an epoch."""

    def __init__(self, folder: Path, config: str, resumed: bool) -> None:
        self.folder, self.config, self.resumed = folder, config, resumed
        self.rows: list[dict[str, Any]] = []

    def images_per_second(self) -> float:
        return self.images / self.seconds

    def time_left(self, trainer: L.Trainer) -> str:
        steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches - self._batches(trainer)
        per_batch = self.seconds / max(1, self.batches)
        return str(timedelta(seconds=round(max(0.0, steps * per_batch))))

    @staticmethod
    def _batches(trainer: L.Trainer) -> int:
        return trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(self.config)
        metrics = self.folder / "metrics.csv"
        if self.resumed and metrics.exists():
            with metrics.open() as file:
                self.rows = [
                    {k: int(v) if v.isdigit() else float(v) for k, v in row.items() if v}
                    for row in csv.DictReader(file)
                ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # not called where a run goes on inside an epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images, self.seconds, self.batches = 0, 1e-9, 0
        self.validated, self.validated_step = False, -1
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_at_nan(trainer, outputs, batch_idx)
        self.batches += 1
        self.images += len(batch[0]) * trainer.world_size
        self.seconds = time.perf_counter() - self.began

    @staticmethod
    def _stop_at_nan(trainer: L.Trainer, outputs: Any, batch_idx: int) -> None:
        """A loss that is no number never becomes one again; on GPUs, where looking waits, now and then."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor) and (loss.device.type == "cpu" or batch_idx % 50 == 0):
            if not torch.isfinite(loss):
                lr = trainer.optimizers[0].param_groups[0]["lr"]
                raise UserError(
                    f"the loss is {float(loss)} at step {trainer.global_step}, learning rate {lr:.3g}; what "
                    "was saved before is kept. Try a lower --model.lr, a longer --model.warmup_epochs, "
                    "--trainer.gradient_clip_val 1, or --trainer.precision 32"
                )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated, self.validated_step = True, trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.batches and self.validated_step != trainer.global_step:  # validation has not saved this
            trainer.save_checkpoint(self.folder / "last.ckpt")
        if not trainer.is_global_zero or not self.batches:  # none: resumed from this epoch's end
            return
        kinds = ("train_", "val_") if self.validated else ("train_",)  # or else an earlier epoch's are there
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(kinds)}
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        epoch = trainer.current_epoch
        row = {
            "epoch": epoch,
            "step": trainer.global_step,
            "lr": lr,
            "images_per_second": self.images_per_second(),
        }
        row |= values
        self.rows = [*(r for r in self.rows if r["epoch"] < epoch), row]
        write_csv(self.folder / "metrics.csv", self.rows)
        visualize.curves(self.rows, self.folder / "curves.png")
        shown = "  ".join(f"{k} {value:.4f}" for k, value in values.items())
        if trainer.max_steps > 0:
            done = f"step {trainer.global_step}/{trainer.max_steps}"
        else:
            done = f"epoch {epoch + 1}/{trainer.max_epochs}"
        print(
            f"{done}  {shown}  {row['images_per_second']:.0f} images/s  {self.time_left(trainer)} left",
            flush=True,
        )
        skipped = getattr(getattr(trainer, "datamodule", None), "skipped", 0)
        if skipped:
            print(f"{skipped} unreadable images left out so far", flush=True)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows, whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def quiet() -> None:
    """Silence what Lightning says of itself; its errors still come."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of depth-wise convolutions
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


def parts(task: Task) -> dict[str, str]:
    """The names of what is trained: of the model, and of the detector or segmenter on it."""
    return {key: task.hparams[key] for key in ("detector", "segmenter", "model") if key in task.hparams}


def train(trainer: L.Trainer, task: Task, data: Any, run: Run, resume: str | None) -> dict[str, Any]:
    """Train, then validate the best checkpoint and write what it shows; returns what `results.json` holds."""
    folder = Path(str(run.folder))
    params = sum(p.numel() for p in task.net.parameters())
    if trainer.is_global_zero:
        name = " on ".join(parts(task).values())
        print(
            f"training {name} ({params / 1e6:.1f} M parameters) on "
            f"{len(data.images['train'])} images of {len(data.classes)} classes, "
            f"validating on {len(data.images['val'])}; run folder: {folder}",
            flush=True,
        )
    began = time.time()
    trainer.fit(task, data, ckpt_path=str(folder / "last.ckpt") if resume else None, weights_only=True)
    seconds = time.time() - began
    # Without a validation there is no best one, and `fast_dev_run` saves nothing.
    saved = [path for path in (folder / "best.ckpt", folder / "last.ckpt") if path.exists()]
    # It would validate the last epoch's average in place of the best weights.
    kept = [c for c in trainer.callbacks if not isinstance(c, EMAWeightAveraging)]  # type: ignore[attr-defined]
    trainer.callbacks = kept  # type: ignore[attr-defined]
    metrics = validate(trainer, task, data, saved[0] if saved else None, folder)
    results = {
        **parts(task),
        "parameters": params,
        **metrics,
        "epochs": trainer.current_epoch,
        "minutes": round(seconds / 60, 2),
        "checkpoint": str(saved[0]) if saved else None,
        "command": " ".join(["crossformer", *sys.argv[1:]]),
        "hardware": hardware(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if trainer.is_global_zero:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def validate(
    trainer: L.Trainer, task: Task, data: Any, checkpoint: Path | None, folder: Path | None
) -> dict[str, Any]:
    """Validate the weights of a checkpoint, or those that the task has; pictures go to `folder`."""
    from crossformer_vision.checkpoints import load_checkpoint

    if checkpoint is not None:
        load_checkpoint(task.net, checkpoint, adapt_classifier=False)
    found = trainer.validate(task, data, verbose=False)
    metrics = dict(found[0]) if found else {}  # no validation was wanted
    if metrics and folder is not None and trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        task.pictures(folder, data.classes)
    return metrics


def hardware() -> str:
    """The accelerators, or else the processor and its threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"
