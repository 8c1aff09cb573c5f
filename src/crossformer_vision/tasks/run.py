"""A run and its folder: the same for every task.

config.yaml       the resolved configuration; val_list.txt the validation images, where they were held out
metrics.csv       one row an epoch; curves.png draws it
tensorboard/      the same for TensorBoard
best.ckpt         the epoch with the best validation, EMA weights if there are any; last.ckpt to resume from
results.json      what came out, and on what
*.png             what a validation of the task shows
"""

import csv
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from contextlib import suppress
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
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger

from crossformer_vision import visualize
from crossformer_vision.errors import UserError
from crossformer_vision.tasks.base import Task


class Stopped(Exception):
    """A run that a signal has ended, after what was trained is saved.

    Attributes:
        code: exit code of the command, 128 and the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


fcntl: Any = None
with suppress(ImportError):  # not on Windows
    import fcntl

VAL_LIST = "val_list.txt"  # in a run's folder: the validation images that were held out of one folder


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

    def callbacks(self, task: Task, config: str, resumed: bool, tensorboard: bool = True) -> list[Callback]:
        """What Lightning's Trainer needs for a run; `RunFolder` chooses the folder of the others."""
        callbacks: list[Callback] = [EMAWeightAveraging(decay=self.ema)] if self.ema else []
        callbacks += [
            RunFolder(self, config, resumed, tensorboard),
            BestCheckpoint(  # before `last`, which keeps what the best one is
                None,
                "best",
                monitor=task.monitor,
                mode=task.monitor_mode,
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            ),
            ModelCheckpoint(None, "last", enable_version_counter=False, save_on_train_epoch_end=False),
        ]
        if self.save_every:
            callbacks.append(
                ModelCheckpoint(
                    None, "last", enable_version_counter=False, every_n_train_steps=self.save_every
                )
            )
        if self.patience:
            callbacks.append(Patience(self.patience, task))
        return callbacks


def new_folder(base: Path) -> Path:
    """Makes a folder of this name, or with `-2`, … behind it: no two processes make the same."""
    for n in itertools.count(1):
        folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror}); --run.folder names another"
            ) from None
        return folder
    raise AssertionError


class Patience(EarlyStopping):
    """Stops after so many epochs without a better validation, however many validations those have."""

    def __init__(self, epochs: int, task: Task) -> None:
        super().__init__(task.monitor, mode=task.monitor_mode, patience=epochs)
        self.epochs = epochs

    def count(self, trainer: L.Trainer) -> None:
        """Set how many validations that is."""
        per_epoch = trainer.num_training_batches / trainer.val_check_batch  # type: ignore[operator]
        per_epoch /= trainer.check_val_every_n_epoch or 1  # several in an epoch, or one in several
        self.patience = max(1, round(self.epochs * per_epoch))


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
                f"Make room for it, and go on with --resume {path.parent}"
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
    """A bar for the epoch, with the time left to the end of the run."""

    def get_metrics(self, trainer: Any, pl_module: L.LightningModule) -> dict[str, Any]:
        folder = next((c for c in trainer.callbacks if isinstance(c, RunFolder)), None)
        if folder is None or not folder.batches:
            return {}
        return {"left": folder.time_left(trainer)}

    def _get_train_description(self, current_epoch: int) -> str:  # Lightning counts from 0
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"


class RunFolder(Callback):
    """Chooses the folder and writes it as the run goes, and a line an epoch; ends a run that is interrupted.

    Ctrl-C and SIGTERM end it after the step or the validation that it is at, which is saved; a second Ctrl-C
    ends it at once.
    """

    def __init__(self, run: Run, config: str, resumed: bool, tensorboard: bool = True) -> None:
        self.run, self.config, self.resumed, self.tensorboard = run, config, resumed, tensorboard
        self.folder = Path()
        self.rows: list[dict[str, Any]] = []
        self.images, self.batches, self.seconds = 0, 0, 1e-9
        self.before = 0.0  # seconds that the run took before it was resumed
        self.began: float | None = None
        self.made = False
        self.lock: Any = None
        self.signal = 0
        self.validating = False
        self.handlers: dict[int, Any] = {}

    # The folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        assert isinstance(pl_module, Task)
        taken: Any = None
        if trainer.is_global_zero:
            try:
                taken = self._take(pl_module)
            except UserError as error:
                taken = error
        taken = trainer.strategy.broadcast(taken)
        if isinstance(taken, UserError):
            raise taken
        self.folder = Path(taken)
        self.run.folder = str(self.folder)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder)
        if self.tensorboard and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            ours = TensorBoardLogger(self.folder, name=None, version="tensorboard")
            trainer.loggers = [ours, *trainer.loggers]

    def _take(self, task: Task) -> str:
        """Make the folder, and put the configuration into it: nobody else can take it then."""
        if self.run.folder is None:
            folder, self.made = new_folder(Path("runs") / f"{task.name}-{task.hparams['model']}"), True
        else:
            folder = Path(self.run.folder)
        try:
            if not folder.exists():
                folder.mkdir(parents=True)
                self.made = True
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
            # Held open and locked until the run ends: of two that resume it, one is told.
            self.lock = (folder / "config.yaml").open("a" if self.resumed else "x", encoding="utf-8")
            if fcntl is not None:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lock.truncate(0)
            self.lock.write(self.config)
            self.lock.flush()
        except FileExistsError:
            raise UserError(
                f"{folder}: there is a run in it; --resume it, or choose another --run.folder"
            ) from None
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training in it") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        return str(folder)

    def remove_unused(self) -> None:
        """A run that made no step leaves nothing; one that was given no folder touches none."""
        if self.folder == Path() or self.resumed or self.batches or (self.folder / "last.ckpt").exists():
            return
        if self.made:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            (self.folder / "config.yaml").unlink(missing_ok=True)
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        print(f"run folder: {self.folder}", flush=True)
        data: Any = getattr(trainer, "datamodule", None)
        if held_out := getattr(data, "held_out", None):
            (self.folder / VAL_LIST).write_text("".join(f"{name}\n" for name in held_out), encoding="utf-8")
        metrics = self.folder / "metrics.csv"
        if self.resumed and metrics.exists():
            with metrics.open(encoding="utf-8") as file:
                self.rows = [
                    {k: int(v) if v.isdigit() else float(v) for k, v in row.items() if v}
                    for row in csv.DictReader(file)
                ]

    # Time

    def images_per_second(self) -> float:
        return self.images / self.seconds

    def time_left(self, trainer: L.Trainer) -> str:
        steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches - self._batches(trainer)
        per_batch = self.seconds / max(1, self.batches)
        return str(timedelta(seconds=round(max(0.0, steps * per_batch))))

    def minutes(self) -> float:
        """Of training, with those before a resume."""
        return (self.before + (time.time() - self.began if self.began else 0)) / 60

    def state_dict(self) -> dict[str, Any]:
        return {"minutes": self.minutes()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = 60 * state_dict["minutes"]

    @staticmethod
    def _batches(trainer: L.Trainer) -> int:
        return trainer.fit_loop.epoch_loop.total_batch_idx + 1

    # Training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = time.time()
        self._catch_signals()
        if self.resumed and trainer.is_global_zero:
            images = f", {pl_module.images_seen} images seen" if isinstance(pl_module, Task) else ""
            print(f"goes on after step {trainer.global_step}{images}", flush=True)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Patience):
                callback.count(trainer)
        self.on_train_epoch_start(trainer, pl_module)  # not called where a run goes on inside an epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images, self.seconds, self.batches = 0, 1e-9, 0
        self.validated, self.validated_step = False, -1
        self.epoch_began = time.perf_counter()
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        for logger in trainer.loggers:
            logger.log_metrics({"lr": lr}, step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_at_nan(trainer, outputs, batch_idx)
        self.batches += 1
        self.images += len(batch[0]) * trainer.world_size
        self.seconds = time.perf_counter() - self.epoch_began
        if self._stops(trainer, batch_idx):
            trainer.save_checkpoint(self.folder / "last.ckpt")
            self._stop(trainer)

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

    # Interruptions

    def _catch_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._caught)

    def _caught(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.validating:
            print("stops after this validation; Ctrl-C again stops at once, without it", flush=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validating = True

    def _stops(self, trainer: L.Trainer, batch_idx: int) -> bool:
        """Whether to stop here: at an optimizer's step, and several processes all at once."""
        if trainer.fit_loop._should_accumulate():
            return False
        if trainer.world_size == 1:
            return bool(self.signal)
        return batch_idx % 10 == 0 and trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        said = f"stopped after step {trainer.global_step}; {self.how_to_go_on()}"
        raise Stopped(said, self.signal or signal.SIGINT)

    def how_to_go_on(self) -> str:
        return f"go on with: {command()} train --resume {shlex.quote(str(self.folder))}"

    def close(self) -> None:
        """Give signals back to whom they belonged, and the folder free."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
        if self.lock is not None:
            self.lock.close()

    # Epochs

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validating = False
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
        assert isinstance(pl_module, Task)
        visualize.curves(self.rows, self.folder / "curves.png", pl_module.monitor)
        print(self._line(trainer, pl_module, values), flush=True)
        skipped = getattr(getattr(trainer, "datamodule", None), "skipped", 0)
        if skipped:
            print(f"{skipped} unreadable images left out so far", flush=True)
        if self.signal and trainer.world_size == 1:
            self._stop(trainer)

    def _line(self, trainer: L.Trainer, task: Task, values: dict[str, float]) -> str:
        """What counts first, then the losses; all else is in metrics.csv. Two lines of 80 columns at most."""
        if trainer.max_steps > 0:
            done = f"step {trainer.global_step}/{trainer.max_steps}"
        else:
            done = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        shown = [k for k in (task.monitor, *task.in_line, "train_loss") if k in values]
        parts = [f"{visualize.called(k)} {values[k]:.{3 if 'loss' in k else 4}f}" for k in shown]
        parts += [f"{self.images_per_second():.0f} images/s", f"{self.time_left(trainer)} left"]
        return "  ".join((done, *parts))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows, whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def quiet() -> None:
    """Silence what Lightning says of itself; its errors still come."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What a person has asked for still speaks.
    logging.getLogger("lightning.pytorch.callbacks.model_summary").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of depth-wise convolutions
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


def parts(task: Task) -> dict[str, str]:
    """The names of what is trained: of the model, and of the detector or segmenter on it."""
    return {key: task.hparams[key] for key in ("detector", "segmenter", "model") if key in task.hparams}


def train(trainer: L.Trainer, task: Task, data: Any, run: Run, resume: str | None) -> dict[str, Any]:
    """Train, then validate the best checkpoint and write what it shows; returns what `results.json` holds."""
    params = sum(p.numel() for p in task.net.parameters())
    train, val = (len(data.open(stage)) for stage in ("train", "val"))
    writer: Any = next(c for c in trainer.callbacks if isinstance(c, RunFolder))  # type: ignore[attr-defined]
    if trainer.is_global_zero:
        name = " on ".join(parts(task).values())
        print(
            f"training {name} ({params / 1e6:.1f} M parameters) on {train} images of "
            f"{len(data.classes)} classes, validating on {val}",
            flush=True,
        )
    last = Path(resume) / "last.ckpt" if resume else None
    try:
        trainer.fit(task, data, ckpt_path=str(last) if last and last.exists() else None, weights_only=True)
    except SystemExit as stop:  # Lightning's, of a second Ctrl-C, or of one before the first step
        if not writer.batches and not (writer.folder / "last.ckpt").exists():
            raise KeyboardInterrupt from stop
        raise Stopped(f"stopped; {writer.how_to_go_on()}", signal.SIGINT) from None
    finally:
        writer.close()
        if trainer.is_global_zero:
            writer.remove_unused()
    folder = writer.folder
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
        "images_seen": task.images_seen,
        "minutes": round(writer.minutes(), 2),
        "checkpoint": str(saved[0]) if saved else None,
        **about(),
    }
    if trainer.is_global_zero:
        write_json(folder / "results.json", results)
    return results


def about() -> dict[str, Any]:
    """What figures came from."""
    return {
        "command": " ".join(["crossformer", *sys.argv[1:]]),
        "hardware": hardware(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(path: Path, content: Any) -> None:
    """Write it whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def validate(
    trainer: L.Trainer, task: Task, data: Any, checkpoint: Path | None, folder: Path | None
) -> dict[str, Any]:
    """Validate the weights of a checkpoint, or those that the task has; pictures go to `folder`."""
    from crossformer_vision.checkpoints import load_checkpoint

    if checkpoint is not None:
        load_checkpoint(task.net, checkpoint, adapt_classifier=False)
    found = trainer.validate(task, data, verbose=False)
    metrics = dict(found[0]) if found else {}  # no validation was wanted
    metrics = {**{k: v for k, v in metrics.items() if k == task.monitor}, **metrics}
    if metrics and folder is not None and trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        task.pictures(folder, data.classes)
    return metrics


def evaluate(
    trainer: L.Trainer, task: Task, data: Any, checkpoint: Path | None, folder: Path
) -> tuple[dict[str, Any], Path]:
    """Validate into a folder of its own, of this name or numbered; returns what its `results.json` holds."""
    if len(data.open("val")) and trainer.is_global_zero:
        folder = new_folder(folder)
    try:
        metrics = validate(trainer, task, data, checkpoint, folder)
    finally:
        if trainer.is_global_zero and not any(folder.iterdir()):
            folder.rmdir()
    weights = None if checkpoint is None else str(checkpoint)
    images = {"data": data.root, "images": len(data.open("val"))}
    results = {**parts(task), **metrics, **images, "checkpoint": weights, **about()}
    if trainer.is_global_zero:
        write_json(folder / "results.json", results)
    return results, folder


def is_finished(folder: Path, trainer: L.Trainer) -> bool:
    """Whether a run has its figures, and no step to go."""
    if not all((folder / name).exists() for name in ("results.json", "last.ckpt")):
        return False
    from crossformer_vision.checkpoints import read_checkpoint

    content = read_checkpoint(folder / "last.ckpt")
    if 0 < trainer.max_steps <= content["global_step"]:
        return True
    taken = any(v.get("taken") for k, v in content.items() if k.endswith("Data") and isinstance(v, dict))
    epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"] - bool(taken)
    return 0 < (trainer.max_epochs or -1) <= epochs


def command() -> str:
    """How this command is called where it runs: `crossformer`, where the shell finds that."""
    called = Path(sys.argv[0])
    if called.name not in ("crossformer", "crossformer.exe"):
        return f"{shlex.quote(sys.executable)} -m crossformer_vision"
    found = shutil.which("crossformer")
    if found and Path(found).resolve() == called.resolve():
        return "crossformer"
    try:
        return shlex.quote(str(called.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(called))


def hardware() -> str:
    """The accelerators, or else the processor and its threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"
