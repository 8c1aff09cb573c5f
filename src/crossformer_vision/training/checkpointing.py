"""Callbacks that decide which weights a run keeps: best and last checkpoint, averaging, early stopping."""

import math
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch import Tensor

from crossformer_vision.tasks.base import Task
from crossformer_vision.types import Checkpoint


class PatienceInEpochs(EarlyStopping):
    """Early stopping with a patience in epochs, for any number of validations per epoch.

    The decision is made at the end of a validation, before checkpoints are saved, so ``last.ckpt`` records
    that the run has stopped.

    Args:
        epochs: Epochs without an improvement after which training stops.
        task: Task whose monitored metric counts.
    """

    def __init__(self, epochs: int, task: Task) -> None:
        super().__init__(
            task.monitor, mode=task.monitor_mode, patience=epochs, check_on_train_epoch_end=False
        )
        self.epochs = epochs

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Convert the patience to a number of validations."""
        super().on_train_start(trainer, pl_module)
        per_epoch = trainer.num_training_batches / trainer.val_check_batch  # type: ignore[operator]
        per_epoch /= trainer.check_val_every_n_epoch or 1
        self.patience = max(1, round(self.epochs * per_epoch))

    def state_dict(self) -> dict[str, object]:
        """State of Lightning's callback and the patience in epochs."""
        return {**super().state_dict(), "epochs": self.epochs}

    def has_stopped(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is of a run that stopped early, with a patience of at least ``epochs``."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        exhausted = state.get("wait_count", 0) >= state.get("patience", math.inf)
        return exhausted and self.epochs <= state.get("epochs", 0)


class AverageWeights(WeightAveraging):
    """Exponential moving average (EMA) of the weights with decay warm-up.

    After n updates the decay is at most (1 + n) / (10 + n), as in timm's ``ModelEmaV3`` with warm-up, so the
    average of a short run is not dominated by the initial weights.

    Args:
        decay: Final decay.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            if not averaged.is_floating_point():  # counters of batch normalization
                return current
            weight = 1 - torch.clamp((1 + torch.as_tensor(updates)) / (10 + updates), max=decay)
            return torch.lerp(averaged, current, weight.to(averaged))

        super().__init__(avg_fn=average)


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: the best validation. Ties are broken by lower ``val_loss``, then by the later epoch.

    Restoring its state keeps the current run directory, which may have been renamed or copied since.

    Args:
        task: Task whose monitored metric counts.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(
            None,
            "best",
            monitor=task.monitor,
            mode=task.monitor_mode,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.best_loss: float | None = None

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Whether the last validation is the best so far."""
        better = super().check_monitor_top_k(trainer, current)
        loss = trainer.callback_metrics.get("val_loss")
        if not better and current is not None and self.best_model_score is not None:
            equal = float(current) == float(self.best_model_score)
            lower = loss is None or self.best_loss is None or float(loss) <= self.best_loss
            better = trainer.strategy.reduce_boolean_decision(equal and lower)
        if better:
            self.best_loss = None if loss is None else float(loss)
        return better

    def state_dict(self) -> dict[str, object]:
        """State of Lightning's callback and the loss of the best validation."""
        return {**super().state_dict(), "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: Checkpoint) -> None:
        """Restore the state, with paths in the current run directory."""
        path = str(Path(str(self.dirpath)) / f"{self.filename}.ckpt")
        score = state_dict["best_model_score"]
        paths = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
        best = {} if score is None else {path: score}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best})
        self.best_loss = state_dict.get("best_loss")


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt``: saved after each validation, to resume from.

    Args:
        every_n_steps: Save every n steps instead.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(
            None,
            "last",
            enable_version_counter=False,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=None if every_n_steps else False,
        )
