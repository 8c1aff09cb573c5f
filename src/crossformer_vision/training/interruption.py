"""Callbacks that end a run early: signals and non-finite losses."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from crossformer_vision.compat import is_accumulating_gradients
from crossformer_vision.errors import UserError
from crossformer_vision.training.cluster import requeue
from crossformer_vision.training.run_directory import RunDirectory

CHECK_EVERY = 50  # batches between checks of the loss on a GPU, where each check waits for the device
AGREE_EVERY = 10  # optimizer steps between collective checks for a signal in distributed runs


class Stopped(Exception):
    """A signal has ended a run, after its state was saved.

    Attributes:
        exit_code: Exit code of the command, 128 plus the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopOnNonFiniteLoss(Callback):
    """End the run with an error when the loss is NaN or infinite."""

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Check the loss: of each batch on a CPU, of every 50th elsewhere.

        Raises:
            UserError: If the loss is not finite.
        """
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, torch.Tensor) or (loss.device.type != "cpu" and batch_idx % CHECK_EVERY):
            return
        if not torch.isfinite(loss):
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            raise UserError(
                f"the loss is {float(loss)} at step {trainer.global_step}, learning rate {lr:.3g}. Earlier "
                "checkpoints are kept. Try a lower --model.lr, a longer --model.warmup_epochs, "
                "--trainer.gradient_clip_val 1, or --trainer.precision 32"
            )


class StopOnSignal(Callback):
    """Stop a run on Ctrl-C and SIGTERM after the current step or validation, and save its state.

    A second Ctrl-C stops at once. In a SLURM job SIGUSR1, the warning before the time limit, requeues the
    job.

    Args:
        run_directory: Callback that holds the run directory.
    """

    def __init__(self, run_directory: RunDirectory) -> None:
        self.run_directory = run_directory
        self.signal = 0
        self.is_validating = False
        self.previous_handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if "SLURM_JOB_ID" in os.environ:
            numbers.append(signal.SIGUSR1)
        for number in numbers:
            self.previous_handlers[number] = signal.signal(number, self._handle)

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.is_validating:
            print("stopping after this validation; Ctrl-C again stops at once, without it", flush=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that a validation is running, which delays a stop until its end."""
        self.is_validating = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the validation has ended."""
        self.is_validating = False

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save and stop after an optimizer step if a signal has arrived."""
        if self._should_stop(trainer):
            trainer.save_checkpoint(self.run_directory.path / "last.ckpt")
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop after an epoch, which is saved already."""
        if self.signal and trainer.world_size == 1 and self.run_directory.has_trained:
            self._stop(trainer)

    def _should_stop(self, trainer: L.Trainer) -> bool:
        """Whether to stop at this batch, the same answer in all processes."""
        if is_accumulating_gradients(trainer):
            return False
        if trainer.world_size == 1:
            return bool(self.signal)
        if trainer.global_step % AGREE_EVERY:
            return False
        return trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        number = self.signal or signal.SIGINT
        message = f"stopped after step {trainer.global_step}; "
        is_requeued = False
        if number == getattr(signal, "SIGUSR1", None) and trainer.is_global_zero:
            is_requeued = requeue()
        message += "SLURM has requeued the job" if is_requeued else self.run_directory.resume_hint()
        raise Stopped(message, number)
