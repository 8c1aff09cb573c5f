"""Callback that chooses, locks and prepares the directory of a run."""

import logging
import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TextIO

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from typing_extensions import override

from crossformer_vision.errors import UserError
from crossformer_vision.files import create_run_dir, write_text
from crossformer_vision.tasks.base import Task
from crossformer_vision.training.cluster import LOCK, current_job
from crossformer_vision.training.command import command_name
from crossformer_vision.training.loggers import LoggerName, create_logger

log = logging.getLogger("crossformer_vision")

fcntl: ModuleType | None = None
with suppress(ImportError):  # not on Windows
    import fcntl

# Files that a run writes beside config.yaml. In a directory without config.yaml they belong to the user.
RUN_FILES = {
    "best.ckpt", "last.ckpt", "results.json", "metrics.csv", "classes.csv", "curves.png", "predictions.png",
    "confusion_matrix.png", "precision_recall.png", "class_ap.png", "class_iou.png",
}  # fmt: skip
VAL_LIST = "val_list.txt"  # in a run directory: validation images held out from an unsplit folder


class RunDirectory(Callback):
    """Chooses the directory of a run, locks it, and writes its configuration and validation list.

    Args:
        path: Run directory. ``None`` for a new ``runs/<task>-<backbone>``, numbered if it exists.
        config: Configuration to save, as YAML.
        is_resumed: Whether the run is resumed in an existing directory.
        logger: Name of the logger. ``None`` for none.

    Attributes:
        path: Run directory, known after ``setup``.
        has_trained: Whether a batch has been trained on in this process.
    """

    def __init__(
        self,
        path: str | None,
        config: str,
        is_resumed: bool = False,
        logger: LoggerName | None = "tensorboard",
    ) -> None:
        self.chosen_path = path
        self.config, self.is_resumed, self.logger = config, is_resumed, logger
        self.path = Path()
        self.has_trained = False
        self.is_created = False
        self.earlier_files: set[str] = set()  # in the directory before this run
        self.lock: TextIO | None = None
        self.validated_step = -1

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create the directory in the first process; broadcast its path to all processes and callbacks.

        Raises:
            UserError: If the directory cannot be used, or is not visible on all machines.
        """
        if stage != "fit":
            return
        assert isinstance(pl_module, Task)
        taken: str | UserError = ""
        if trainer.is_global_zero:
            try:
                taken = str(self._take(pl_module))
            except UserError as error:
                taken = error
        taken = trainer.strategy.broadcast(taken)
        if isinstance(taken, UserError):
            raise taken
        self.path = Path(taken)
        self._check_shared(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.path)
        if self.logger is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.loggers = [create_logger(self.logger, self.path), *trainer.loggers]

    def _check_shared(self, trainer: L.Trainer) -> None:
        """Check that a resumed run has the same ``last.ckpt`` on all machines."""
        own = (self.is_resumed, (self.path / "last.ckpt").is_file())
        first = trainer.strategy.broadcast(own)
        if not trainer.strategy.reduce_boolean_decision(first in ((False, False), own)):
            raise UserError(
                f"{self.path}: not visible on every machine. Resume in a directory that all machines share"
            )

    def _take(self, task: Task) -> Path:
        """Create and lock the directory and write the configuration."""
        if self.chosen_path is None:
            path = create_run_dir(Path("runs") / f"{task.name}-{task.hparams['backbone']}")
            self.is_created = True
        else:
            path = Path(self.chosen_path)
        try:
            if not path.exists():
                path.mkdir(parents=True)
                self.is_created = True
            self.earlier_files = {file.relative_to(path).as_posix() for file in _run_paths(path)}
            if not os.access(path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            self._check_unused(path)
            self._acquire_lock(path)
        except BlockingIOError:
            raise UserError(f"{path}: another process is training in it") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        write_text(path / "config.yaml", self.config)
        return path

    def _check_unused(self, path: Path) -> None:
        """Refuse a directory whose files the run would overwrite."""
        if self.is_resumed:
            return
        if (path / "config.yaml").exists():
            raise UserError(f"{path}: contains a run. Continue it with --resume, or choose another --run.dir")
        if files := sorted(RUN_FILES & self.earlier_files):
            raise UserError(f"{path}: a run would overwrite {files[0]}. Choose another --run.dir")

    def _acquire_lock(self, path: Path) -> None:
        """Lock the directory until the run ends.

        The lock belongs to this process alone: forked processes may outlive it by some seconds.

        Raises:
            BlockingIOError: If another process has the lock.
        """
        self.lock = (path / LOCK).open("a+", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError as error:  # Lustre without flock, some NFS and FUSE mounts
                log.warning(
                    "%s: this file system has no locks (%s); make sure that no other process trains here",
                    self.lock.name,
                    error.strerror,
                )
        self.lock.truncate(0)
        self.lock.write(current_job() or "")
        self.lock.flush()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the directory and save the list of held-out images."""
        if not trainer.is_global_zero:
            return
        print(f"run directory: {self.path}", flush=True)
        if trainer.world_size > 1:
            report_dead_processes(self.resume_hint())
        data = getattr(trainer, "datamodule", None)
        if held_out := getattr(data, "held_out", None):
            names = "".join(f"{name}\n" for name in held_out)
            write_text(self.path / VAL_LIST, names, errors="surrogateescape")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print where a resumed run continues."""
        if self.is_resumed and trainer.is_global_zero:
            images = f", {pl_module.images_seen} images seen" if isinstance(pl_module, Task) else ""
            print(f"resuming after step {trainer.global_step}{images}", flush=True)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Record that a batch was trained on."""
        self.has_trained = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step, whose state ``LastCheckpoint`` saves after validation."""
        self.validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save ``last.ckpt`` at the end of an epoch without validation."""
        if self.has_trained and self.validated_step != trainer.global_step:
            trainer.save_checkpoint(self.path / "last.ckpt")

    def resume_hint(self) -> str:
        """How to continue the run, for messages."""
        return f"continue with: {command_name()} train --resume {shlex.quote(str(self.path))}"

    def release_lock(self) -> None:
        """Release the lock of the directory."""
        if self.lock is not None:
            self.lock.close()

    def remove_unused(self) -> None:
        """Remove the files of a run that ended before its first step. Other files are kept."""
        if self.path == Path() or self.is_resumed or self.has_trained or (self.path / "last.ckpt").exists():
            return
        if self.is_created:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for path in reversed(_run_paths(self.path)):
            if path.relative_to(self.path).as_posix() not in self.earlier_files:
                path.rmdir() if path.is_dir() else path.unlink()


def _run_paths(run_dir: Path) -> list[Path]:
    """Everything in a directory that a run may have written; folders before their content."""
    names = ("config.yaml", LOCK, VAL_LIST, *RUN_FILES)
    logs = run_dir / "tensorboard"
    below = sorted(logs.rglob("*")) if logs.is_dir() else []
    return [run_dir / name for name in names if (run_dir / name).exists()] + [logs] * logs.is_dir() + below


def report_dead_processes(resume_hint: str) -> None:
    """Replace Lightning's message about a dead process by one with the command to resume."""
    launcher = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")

    def reword(record: logging.LogRecord) -> bool:
        if "terminated with code" not in record.getMessage():
            return False
        record.msg, record.args = f"a process of this run died, so all of them end; {resume_hint}", ()
        return True

    launcher.setLevel(logging.INFO)
    launcher.filters[:] = [reword]
