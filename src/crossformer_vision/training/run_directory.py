"""The folder of a run as it goes: what Lightning calls at each step and epoch, and at a signal."""

import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger

from crossformer_vision.errors import UserError
from crossformer_vision.files import new_folder, read_csv, write_csv, write_text
from crossformer_vision.plotting import visualize
from crossformer_vision.tasks.base import Task

if TYPE_CHECKING:
    from crossformer_vision.training.run import Run

log = logging.getLogger("crossformer_vision")

fcntl: Any = None
with suppress(ImportError):  # not on Windows
    import fcntl

# Files of a run; those that are in a directory without a config.yaml are somebody else's.
RUN_FILES = {
    "best.ckpt", "last.ckpt", "results.json", "metrics.csv", "classes.csv", "curves.png", "predictions.png",
    "confusion_matrix.png", "precision_recall.png", "class_iou.png",
}  # fmt: skip
PLOTS = 10.0  # seconds from one drawing of the curves to the next, at least; and at the end
FIRST_SPEED = 10.0  # seconds of training after which the speed is printed for the first time
LOCK = ".lock"  # in a run's folder: locked while it runs; names the job that started it
VAL_LIST = "val_list.txt"  # in a run's folder: the validation images that were held out of one folder


class Stopped(Exception):
    """A run that a signal has ended, after what was trained is saved.

    Attributes:
        code: exit code of the command, 128 and the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


class Patience(EarlyStopping):
    """Stops after so many epochs without a better validation, however many validations those have.

    It decides at the end of a validation, before checkpoints are saved: `last.ckpt` then tells that the run
    has stopped, and a resumed run does not ask for metrics of an epoch that was over before.

    Args:
        epochs: Epochs without an improvement after which training stops.
        task: Task whose monitored metric counts.
    """

    def __init__(self, epochs: int, task: Task) -> None:
        super().__init__(
            task.monitor, mode=task.monitor_mode, patience=epochs, check_on_train_epoch_end=False
        )
        self.epochs = epochs

    def count(self, trainer: L.Trainer) -> None:
        """Set how many validations that is."""
        per_epoch = trainer.num_training_batches / trainer.val_check_batch  # type: ignore[operator]
        per_epoch /= trainer.check_val_every_n_epoch or 1  # several in an epoch, or one in several
        self.patience = max(1, round(self.epochs * per_epoch))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epochs": self.epochs}

    def has_stopped(self, checkpoint: dict[str, Any]) -> bool:
        """Whether a checkpoint is of a run that stopped early, after no fewer epochs than wanted now."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        exhausted = state.get("wait_count", 0) >= state.get("patience", math.inf)
        return exhausted and self.epochs <= state.get("epochs", 0)


class AverageWeights(WeightAveraging):
    """Exponential moving average of the weights, whose decay rises to its final value.

    After n updates the decay is at most (1 + n) / (10 + n), as in timm's `ModelEmaV3` with a warm-up: the
    average of a short run is not that of its first steps.

    Args:
        decay: Final decay.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: torch.Tensor, current: torch.Tensor, updates: torch.Tensor | int) -> Any:
            if not averaged.is_floating_point():  # counters of batch normalization
                return current
            weight = 1 - torch.clamp((1 + torch.as_tensor(updates)) / (10 + updates), max=decay)
            return torch.lerp(averaged, current, weight.to(averaged))

        super().__init__(avg_fn=average)


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

    def __init__(self, run: "Run", config: str, resumed: bool, tensorboard: bool = True) -> None:
        self.run, self.config, self.resumed, self.tensorboard = run, config, resumed, tensorboard
        self.folder = Path()
        self.rows: list[dict[str, Any]] = []
        self.images, self.batches, self.seconds = 0, 0, 1e-9
        self.before = 0.0  # seconds that the run took before it was resumed
        self.began: float | None = None
        self.drawn = -math.inf  # when the curves were, at the last time
        self.undrawn: Task | None = None  # whose last epoch they do not have yet
        self.printed_speed = False
        self.made = False
        self.files_before: set[str] = set()  # in the directory, before this run
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
        first = trainer.strategy.broadcast((self.resumed, (self.folder / "last.ckpt").is_file()))
        seen = first == (False, False) or first == (self.resumed, (self.folder / "last.ckpt").is_file())
        if not trainer.strategy.reduce_boolean_decision(seen):
            raise UserError(
                f"{self.folder}: not every machine sees what it holds; a run goes on in a shared folder"
            )
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
        config = folder / "config.yaml"
        try:
            if not folder.exists():
                folder.mkdir(parents=True)
                self.made = True
            self.files_before = {path.relative_to(folder).as_posix() for path in _run_paths(folder)}
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
            if config.exists() and not self.resumed:
                raise UserError(
                    f"{folder}: there is a run in it; --resume it, or choose another --run.folder"
                )
            if taken := sorted(RUN_FILES & self.files_before) if not self.resumed else []:
                raise UserError(
                    f"{folder}: holds {taken[0]}, which a run would overwrite. Choose another --run.folder"
                )
            # Held open and locked until the run ends: of two that resume it, one is told. The lock is of this
            # process alone: those that it forks live on for some seconds where it is killed.
            self.lock = (folder / LOCK).open("a+", encoding="utf-8")
            if fcntl is not None:
                self._lock_file()
            self.lock.truncate(0)
            self.lock.write(job() or "")
            self.lock.flush()
        except BlockingIOError:
            raise UserError(f"{folder}: another process is training in it") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        write_text(config, self.config)
        return str(folder)

    def _lock_file(self) -> None:
        """Lock the directory for this process.

        Raises:
            BlockingIOError: If another process has the lock.
        """
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # Lustre without flock, some NFS and FUSE mounts
            log.warning(
                "%s: this disk has no file locks (%s); make sure that no other process trains in it",
                self.lock.name,
                error.strerror,
            )

    def remove_unused(self) -> None:
        """Remove what a run without a step has created, and nothing else."""
        if self.folder == Path() or self.resumed or self.batches or (self.folder / "last.ckpt").exists():
            return
        if self.made:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            for path in reversed(_run_paths(self.folder)):
                if path.relative_to(self.folder).as_posix() not in self.files_before:
                    path.rmdir() if path.is_dir() else path.unlink()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        print(f"run folder: {self.folder}", flush=True)
        if trainer.world_size > 1:
            name_dead_processes(self.how_to_go_on())
        data: Any = getattr(trainer, "datamodule", None)
        if held_out := getattr(data, "held_out", None):
            names = "".join(f"{name}\n" for name in held_out)
            write_text(self.folder / VAL_LIST, names, errors="surrogateescape")  # `_listed` reads it so
        metrics = self.folder / "metrics.csv"
        if self.resumed and metrics.exists():
            self.rows = read_csv(metrics)

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
        self._print_first_speed(trainer)
        if self._stops(trainer):
            trainer.save_checkpoint(self.folder / "last.ckpt")
            self._stop(trainer)

    def _print_first_speed(self, trainer: L.Trainer) -> None:
        """One line after the first seconds of training, where no progress bar shows the speed."""
        if self.printed_speed or not trainer.is_global_zero or time.time() - (self.began or 0) < FIRST_SPEED:
            return
        self.printed_speed = True
        if trainer.progress_bar_callback is None:
            steps = int(trainer.estimated_stepping_batches)
            speed = f"{self.images_per_second():.0f} images/s  {self.time_left(trainer)} left"
            print(f"step {trainer.global_step}/{steps}  {speed}", flush=True)

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
            numbers = [signal.SIGINT, signal.SIGTERM]
            if "SLURM_JOB_ID" in os.environ:  # its warning that time is up; Lightning would save elsewhere
                numbers.append(signal.SIGUSR1)
            for number in numbers:
                self.handlers[number] = signal.signal(number, self._caught)

    def _caught(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.validating:
            print("stops after this validation; Ctrl-C again stops at once, without it", flush=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validating = True

    def _stops(self, trainer: L.Trainer) -> bool:
        """Whether to stop here: at an optimizer's step, and several processes all at once."""
        if trainer.fit_loop._should_accumulate():
            return False
        if trainer.world_size == 1:
            return bool(self.signal)
        if trainer.global_step % 10:  # asking all processes takes time
            return False
        return trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        said = f"stopped after step {trainer.global_step}; {self.how_to_go_on()}"
        number = self.signal or signal.SIGINT
        if number == getattr(signal, "SIGUSR1", None):
            if trainer.is_global_zero and requeue():
                said = f"stopped after step {trainer.global_step}; SLURM has it in its queue again"
        raise Stopped(said, number)

    def how_to_go_on(self) -> str:
        return f"go on with: {command()} train --resume {shlex.quote(str(self.folder))}"

    def close(self) -> None:
        """Give signals back to whom they belonged, and the folder free, with the curves of all epochs."""
        with suppress(OSError):  # a full disk has been said before
            self._draw()
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
        self.undrawn = pl_module
        if time.monotonic() - self.drawn > PLOTS:
            self._draw()
        print(self._line(trainer, pl_module, values), flush=True)
        skipped = getattr(getattr(trainer, "datamodule", None), "skipped", 0)
        if skipped:
            print(f"{skipped} unreadable images left out so far", flush=True)
        if self.signal and trainer.world_size == 1:
            self._stop(trainer)

    def _draw(self) -> None:
        if self.undrawn is not None:
            visualize.curves(self.rows, self.folder / "curves.png", self.undrawn.monitor)
            self.drawn, self.undrawn = time.monotonic(), None

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


def _run_paths(folder: Path) -> list[Path]:
    """Everything in a directory that a run may have written there; folders before what is in them."""
    names = ("config.yaml", LOCK, VAL_LIST, *RUN_FILES)
    logs = folder / "tensorboard"
    below = sorted(logs.rglob("*")) if logs.is_dir() else []
    return [folder / name for name in names if (folder / name).exists()] + [logs] * logs.is_dir() + below


def name_dead_processes(how_to_go_on: str) -> None:
    """Let Lightning, which ends all processes of a run when one has died, say so in a line of ours."""
    launcher = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")

    def reword(record: logging.LogRecord) -> bool:
        if "terminated with code" not in record.getMessage():
            return False
        record.msg, record.args = f"a process of this run died, so all end; {how_to_go_on}", ()
        return True

    launcher.setLevel(logging.INFO)
    launcher.filters[:] = [reword]


def job() -> str | None:
    """A name of what started this process and will start the same command again: a SLURM job, or torchrun."""
    if number := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {number}"
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        return f"torchrun {run}"
    return None


def of_this_job(folder: Path) -> bool:
    """Whether this job has started the run in a folder."""
    try:
        return job() is not None and (folder / LOCK).read_text(encoding="utf-8") == job()
    except OSError:
        return False


def restarted() -> bool:
    """Whether SLURM has put this job into its queue again, or torchrun has started its processes anew."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


def requeue() -> bool:
    """Ask SLURM to run this job again; whether it will."""
    try:
        asked = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True)
    except OSError:
        return False
    return asked.returncode == 0


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
