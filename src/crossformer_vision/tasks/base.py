"""Base class of the tasks: optimizer and schedule, reproducible steps, resume, initial weights."""

import math
import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from numpy.typing import NDArray
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from typing_extensions import Self, override

from crossformer_vision.compat import batch_progress, epochs_started, get_trainer, setup_fit_data
from crossformer_vision.data.randomness import RandomStates, get_rng_state, mix_seed, seed_all, set_rng_state
from crossformer_vision.errors import UserError, check_choice, check_names, check_range
from crossformer_vision.models import find_model
from crossformer_vision.models.dense.base import DenseModel
from crossformer_vision.models.dense.detectors import normalization_kwargs
from crossformer_vision.plotting.drawing import denormalize, stretch
from crossformer_vision.tasks.finetuning import (
    Freeze,
    add_lora,
    describe_frozen,
    freeze_parameters,
    learning_rate_scales,
    merge_lora,
    set_frozen_to_eval,
)
from crossformer_vision.tasks.image_counts import images_in, images_in_steps, rescale_progress
from crossformer_vision.tasks.optimizers import DecayOn, ScheduleOptions, check_optimizer, create_optimizer
from crossformer_vision.types import Checkpoint, JsonObject, Kwargs


class Task(L.LightningModule):
    """Base of the tasks. Subclasses set ``name``, ``net`` and ``monitor`` and implement steps and ``plot``.

    Args:
        optimizer: timm name of an optimizer, such as ``adamw`` or ``nmuon`` (Muon with Nesterov momentum).
        lr: Peak learning rate for the global batch size. It is not rescaled.
        weight_decay: Weight decay of the parameters that ``decay_on`` selects.
        decay_on: ``weights`` exempts norms, biases and parameters that the model names; ``all_but_norms``
            exempts norms and those; ``all`` exempts nothing, as some published recipes.
        schedule: ``cosine`` and ``poly``, (1 - progress) ** ``power``, fall from ``lr`` to ``min_lr``;
            ``step`` divides the rate by 10 at each of ``milestones``.
        milestones: Epochs after which ``step`` lowers the rate.
        power: Exponent of ``poly``.
        warmup_epochs: Length of the linear warm-up in epochs, may be fractional.
        warmup_steps: Length of the warm-up in optimizer steps, instead of ``warmup_epochs``.
        warmup_lr: Learning rate of the first step.
        min_lr: Learning rate at the end of ``cosine`` and ``poly``.
        freeze: Number of stages of the backbone to freeze, in addition to the stem; ``all`` for everything
            except the classifier or the heads. Frozen norms stay in evaluation mode.
        layer_decay: Layer-wise learning-rate decay, as in timm: factor from one layer of the backbone to the
            previous one; 1 for none.
        backbone_lr_scale: Factor of the learning rate of the backbone.
        lora: Rank of adapters (LoRA, arXiv 2106.09685) that are trained instead of the backbone's weights,
            and merged into these for prediction; 0 for none.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Use ``torch.compile`` in training and validation; for dense models, on the backbone.
        seed: Seed of the random numbers of a step; ``None`` for the seed of ``seed_everything``.
        classes: Class names for checkpoints, if the data module is not one of this library.

    Raises:
        UserError: If an argument is invalid.
    """

    name: str
    """Name of the task in options and checkpoints."""
    monitor: str
    """Validation metric that selects the best checkpoint."""
    monitor_mode: Literal["max", "min"] = "max"
    printed_metrics: tuple[str, ...] = ("val_loss",)
    """Metrics that are printed each epoch in addition to ``monitor``."""
    net: Any
    initial_weights = ""
    """Description of the initial weights in one line."""

    def __init__(
        self,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        decay_on: DecayOn = "weights",
        schedule: Literal["cosine", "poly", "step"] = "cosine",
        milestones: tuple[float, ...] = (8, 11),
        power: float = 1.0,
        warmup_epochs: float = 1.0,
        warmup_steps: int | None = None,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
        freeze: Freeze = 0,
        layer_decay: float = 1.0,
        backbone_lr_scale: float = 1.0,
        lora: int = 0,
        grad_checkpointing: bool = False,
        compile: bool = False,
        seed: int | None = None,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__()
        check_choice("decay_on", decay_on, ("weights", "all_but_norms", "all"))
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            check_range(name, value, 0)
        check_optimizer(optimizer)
        if freeze != "all":
            check_range("freeze", freeze, 0)
        check_range("layer_decay", layer_decay, 0, 1)
        check_range("backbone_lr_scale", backbone_lr_scale, 0)
        check_range("lora", lora, 0)
        if lora and freeze:
            raise UserError("--model.lora freezes the backbone itself. Leave --model.freeze at 0")
        check_names("classes", classes or ())
        self.optimizer, self.lr = optimizer, lr
        self.weight_decay, self.decay_on = weight_decay, decay_on
        self.schedule = ScheduleOptions(
            schedule, milestones, power, warmup_epochs, warmup_steps, warmup_lr, min_lr
        )
        self.freeze_stages, self.layer_decay, self.backbone_lr_scale = freeze, layer_decay, backbone_lr_scale
        self.lora = lora
        self.grad_checkpointing, self.use_compile, self.seed = grad_checkpointing, compile, seed
        self.class_names = classes
        self.images_seen = 0  # in training; counts batches if the data module is not of this library
        self._rng_state: RandomStates
        self._resumed: Checkpoint = {}  # checkpoint that training resumes from
        self._group_options: list[Kwargs] = []  # of the optimizer's parameter groups
        self._configured_lr = lr

    def _set_up_finetuning(self) -> None:
        """Freeze the first stages, or add adapters. Subclasses call it when ``net`` has its weights."""
        if self.freeze_stages:
            freeze_parameters(self.net, self.freeze_stages, *self._backbone_options)
        elif self.lora:
            add_lora(self.net, self.lora)
        self.train(self.training)

    def merge_adapters(self) -> None:
        """Merge the adapters of ``lora`` into the weights, which cannot be trained afterwards."""
        merge_lora(self.net)

    def describe_frozen(self) -> str:
        """How many parameters are frozen, in one line; empty without ``freeze`` and ``lora``."""
        return describe_frozen(self.net) if self.freeze_stages or self.lora else ""

    def model_names(self) -> dict[str, str]:
        """Names of the detector or segmenter, if there is one, and of the model or backbone."""
        names = {key: self.hparams[key] for key in ("detector", "segmenter") if key in self.hparams}
        return {**names, "model": self.hparams["backbone"]}

    def setup(self, stage: str) -> None:
        """Check the number of classes, and apply gradient checkpointing and compilation.

        Raises:
            UserError: If the data have another number of classes than the model.
        """
        own, count = self.hparams["num_classes"], getattr(self._data_module, "num_classes", None)
        if count not in (None, own):
            raise UserError(f"the task has num_classes={own}, but the data has {count} classes")
        if stage == "fit":  # a checkpoint is loaded after this
            self.images_seen, self._resumed = 0, {}
        body = self.net.body if isinstance(self.net, DenseModel) else self.net
        if self.grad_checkpointing:
            # timm's features_only wrapper contains the model.
            getattr(body, "model", body).set_grad_checkpointing(True)
        if self.use_compile:
            body.compile()

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and (self.freeze_stages or self.lora):
            set_frozen_to_eval(self.net)
        return self

    @property
    def _backbone_options(self) -> tuple[str, Kwargs]:
        return self.hparams["backbone"], self.hparams["model_args"] or {}

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, by which images are normalized."""
        options = self.hparams
        own = normalization_kwargs(find_model(options["backbone"]), options["in_chans"])
        return options["image_mean"] or own["image_mean"], options["image_std"] or own["image_std"]

    def to_display(self, image: Tensor, is_normalized: bool = True) -> NDArray[np.float32]:
        """An image of a batch for plots, ``(H, W, 3)`` with values from 0 to 1.

        Args:
            image: Shape ``(C, H, W)``.
            is_normalized: Whether it is normalized.
        """
        data, pixels = self._data_module, image.float().cpu().numpy()
        is_rgb = len(pixels) == 3 and getattr(getattr(data, "pixel_format", None), "is_rgb", True)
        if not is_rgb:
            return stretch(pixels, getattr(data, "display_channels", None))
        return denormalize(pixels, *(self.normalization if is_normalized else ([0.0] * 3, [1.0] * 3)))

    @property
    def _data_module(self) -> object:
        return getattr(self.trainer, "datamodule", None)

    @property
    def _global_batch(self) -> int:
        return getattr(self._data_module, "global_batch", 1)

    # Reproducible steps

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Seed the step, so that a resumed run draws the same random numbers."""
        self.images_seen += self._global_batch
        self._rng_state = get_rng_state()
        seed_all(mix_seed(self.seed or 0, self.current_epoch, batch_idx, self.global_rank))

    @override
    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Restore the global random state, which callbacks of the user may draw from."""
        set_rng_state(self._rng_state)

    # Optimizer and schedule

    def configure_optimizers(self) -> Any:
        """Create the optimizer and a schedule that is updated each step."""
        optimizer = self.create_optimizer()
        groups = optimizer.param_groups
        # Saved because loading a checkpoint restores the options of the earlier run.
        self._group_options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self._configured_lr = self.lr
        setup_fit_data(self.trainer)
        if self._resumed:
            rescale_progress(self._resumed, self.trainer, self._batches_done())
        schedule = self._create_schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def create_optimizer(self) -> Optimizer:
        """Create the optimizer from the task's options. Override it to use another one."""
        scales = None
        if (self.layer_decay, self.backbone_lr_scale) != (1, 1):
            scales = learning_rate_scales(
                self.net, *self._backbone_options, self.layer_decay, self.backbone_lr_scale
            )
        return create_optimizer(
            self.net, self.optimizer, self.lr, self.weight_decay, self.decay_on, self.device, scales
        )

    def _create_schedule(self, optimizer: Optimizer) -> Scheduler:
        images_per_step = self.trainer.accumulate_grad_batches * self._global_batch
        return self.schedule.create(
            optimizer,
            images_per_step,
            images_in(self.trainer, self._global_batch, epochs=1),
            self._images_in_run(),
        )

    def _images_in_run(self) -> int:
        """Number of images until the last step, including those seen before a resume.

        Raises:
            UserError: If the length of the run is unknown and the schedule depends on it.
        """
        trainer = self.trainer
        if not 0 < trainer.estimated_stepping_batches < math.inf:
            if self.schedule.name == "step":
                return sys.maxsize
            raise UserError(
                f"schedule '{self.schedule.name}' depends on the length of the run: give the Trainer "
                "max_steps, or max_epochs and, for a loader without a length, limit_train_batches"
            )
        steps = int(trainer.estimated_stepping_batches)
        total = images_in_steps(trainer, self._global_batch, steps)
        if self._resumed:  # perhaps with another batch size
            if steps == trainer.max_steps:
                before = images_in_steps(trainer, self._global_batch, self._resumed["global_step"])
            else:
                before = images_in(
                    trainer, self._global_batch, epochs_started(self._resumed) - 1, self._batches_done()
                )
            total += self.images_seen - before
        return total

    def on_train_start(self) -> None:
        """Apply this run's options to a restored optimizer, and the result of a learning rate finder."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**31
        optimizer, schedule = self.trainer.optimizers[0], self.lr_schedulers()
        # Lightning's LearningRateFinder changes self.lr after the optimizer was created.
        is_lr_found = bool(self._group_options) and self.lr != self._configured_lr
        for group, options in zip(optimizer.param_groups, self._group_options):
            group.update(options)
            if is_lr_found:
                group["lr"] = group["initial_lr"] = options["lr"] * self.lr / self._configured_lr
        if isinstance(schedule, Scheduler):  # else one of a callback
            if is_lr_found:
                schedule = self._create_schedule(optimizer)
                self.trainer.lr_scheduler_configs[0].scheduler = schedule
            schedule.step_update(self.images_seen)
        self._resumed = {}

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: object) -> None:
        """Update timm's schedules by the number of images seen."""
        if isinstance(scheduler, Scheduler):
            scheduler.step_update(self.images_seen)
        else:  # of a callback
            super().lr_scheduler_step(scheduler, metric)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients; under FSDP by the norm over all shards, which Lightning leaves to the module."""
        model = self.trainer.strategy.model
        if isinstance(model, FullyShardedDataParallel) and gradient_clip_algorithm in (None, "norm"):
            if gradient_clip_val:
                model.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Add metadata for prediction and resuming."""
        checkpoint["task"] = self.name
        checkpoint["images_seen"] = self.images_seen
        checkpoint["batches_per_epoch"] = self.trainer.num_training_batches
        checkpoint["seed"] = self.seed
        data = self._data_module
        checkpoint.update(data.describe() if hasattr(data, "describe") else self.describe())

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Restore seed and position. The schedule follows from the images seen and the current options."""
        trainer = get_trainer(self)
        if trainer is None or trainer.state.fn != "fit":  # only the weights are loaded
            return
        batches = batch_progress(checkpoint)["total"]["processed"]
        self.seed = checkpoint.get("seed", self.seed)
        self.images_seen = checkpoint.get("images_seen", batches * self._global_batch)
        checkpoint["lr_schedulers"] = []
        self._resumed = checkpoint

    def _batches_done(self) -> int:
        """Completed batches of the resumed epoch, in the current batch size; all batches at its end."""
        start = getattr(self._data_module, "start", None)
        if start is None:
            return int(batch_progress(self._resumed)["current"]["ready"])
        return int(start or self.trainer.num_training_batches)

    def describe(self) -> JsonObject:
        """Metadata for checkpoints if the data module has no ``describe``."""
        count = self.hparams["num_classes"]
        return {"classes": self.class_names or [str(k) for k in range(count)]}

    # Validation and test

    @property
    def evaluation_batches(self) -> int:
        """Number of batches of the current validation or test."""
        trainer = self.trainer
        return sum(map(int, trainer.num_test_batches if trainer.testing else trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Prepare as for validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: object, batch_idx: int) -> None:
        """Validate a batch. Metrics are named ``test_*`` instead of ``val_*``."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log metrics as after validation."""
        self.on_validation_epoch_end()

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Log a metric, as ``test_*`` during a test."""
        trainer = get_trainer(self)
        is_test = bool(trainer and trainer.testing)
        super().log(
            f"test_{name.removeprefix('val_')}" if is_test and name.startswith("val_") else name,
            *args,
            **kwargs,
        )

    def use_thresholds(self, thresholds: list[float]) -> None:
        """Validate at the thresholds of a checkpoint instead of choosing them. Does nothing by default."""

    def plot(self, plot_dir: Path, classes: list[str]) -> None:
        """Plot the results of the last validation.

        Args:
            plot_dir: Directory to write to.
            classes: Class names.
        """
        raise NotImplementedError
