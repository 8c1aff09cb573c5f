"""What all tasks share: a timm optimizer and schedule, reproducible steps, loading weights to start from."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from crossformer_vision.data.loading import mix_seed, seed_all
from crossformer_vision.models.backbones import DenseModel
from crossformer_vision.models.crossformer import LongShortAttention


class Task(L.LightningModule):
    """Base of the tasks. A subclass sets `name`, `net`, `monitor`, and writes the two steps and `pictures`.

    Args:
        optimizer: timm's name of it.
        lr: peak learning rate, for the global batch as it is.
        weight_decay: of the weights that `decay_on` names.
        decay_on: `weights` spares norms and biases, and what a model names itself; `all_but_norms` spares
            norms alone; `all` spares nothing, as in some published recipes.
        schedule: `cosine` falls from `lr` to `min_lr`, `poly` too, as (1 - progress) ** `power`; `step` falls
            to a tenth at each of `milestones`.
        milestones: epochs after which `step` goes down.
        power: of `poly`.
        warmup_epochs: linear warm-up from `warmup_lr`; may be a fraction.
        warmup_steps: its length in optimizer steps, in place of `warmup_epochs`.
        warmup_lr: learning rate of the first step.
        min_lr: learning rate at the end of `cosine` and `poly`.
        grad_checkpointing: recompute activations in the backward pass, for memory.
        compile: train and validate through `torch.compile`; of a dense model, the backbone.
        seed: of everything random in a step.
    """

    name: str  # as the command and checkpoints have it
    monitor: str  # the validation metric that picks the best checkpoint
    monitor_mode: Literal["max", "min"] = "max"
    net: Any

    def __init__(
        self,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        decay_on: Literal["weights", "all_but_norms", "all"] = "weights",
        schedule: Literal["cosine", "poly", "step"] = "cosine",
        milestones: tuple[float, ...] = (8, 11),
        power: float = 1.0,
        warmup_epochs: float = 1.0,
        warmup_steps: int | None = None,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
        grad_checkpointing: bool = False,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.optimizer, self.lr = optimizer, lr
        self.weight_decay, self.decay_on = weight_decay, decay_on
        self.schedule, self.milestones, self.power = schedule, milestones, power
        self.warmup_epochs, self.warmup_steps = warmup_epochs, warmup_steps
        self.warmup_lr, self.min_lr = warmup_lr, min_lr
        self.grad_checkpointing, self.compile_net, self.seed = grad_checkpointing, compile, seed

    def setup(self, stage: str) -> None:
        body = self.net.body if isinstance(self.net, DenseModel) else self.net
        if self.grad_checkpointing:
            getattr(body, "model", body).set_grad_checkpointing(True)  # `model` in a features_only wrapper
        if self.compile_net:
            body.compile()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout, stochastic depth and mixup follow from the step alone, so a resumed run repeats none of the
        # past.
        seed_all(mix_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer()
        if self.trainer.train_dataloader is None:  # where only steps are given, Lightning has not looked yet
            self.trainer.fit_loop.setup_data()
        steps = int(self.trainer.estimated_stepping_batches)
        epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup = round(self.warmup_epochs * epoch) if self.warmup_steps is None else self.warmup_steps
        common: dict[str, Any] = dict(
            warmup_t=min(warmup, steps - 1),
            warmup_lr_init=min(self.warmup_lr, self.lr),
            warmup_prefix=False,
            t_in_epochs=False,
        )
        if self.schedule == "cosine":
            schedule: Scheduler = CosineLRScheduler(
                optimizer, t_initial=steps, lr_min=min(self.min_lr, self.lr), **common
            )
        elif self.schedule == "poly":
            schedule = PolyLRScheduler(
                optimizer, t_initial=steps, power=self.power, lr_min=min(self.min_lr, self.lr), **common
            )
        else:  # timm's goes down one step before its milestones
            down = [round(milestone * epoch) + 1 for milestone in self.milestones]
            schedule = MultiStepLRScheduler(optimizer, decay_t=down, decay_rate=0.1, **common)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimizer(self) -> Optimizer:
        options: dict[str, Any] = dict(opt=self.optimizer, lr=self.lr, weight_decay=self.weight_decay)
        if self.decay_on != "all_but_norms":
            return create_optimizer_v2(self.net, filter_bias_and_bn=self.decay_on == "weights", **options)
        kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
        spared = {id(p) for m in self.net.modules() if isinstance(m, kinds) for p in m.parameters()}
        norms = [p for p in self.net.parameters() if id(p) in spared]
        others = [p for p in self.net.parameters() if id(p) not in spared]
        groups: Any = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
        return create_optimizer_v2(groups, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = self.name
        spans = [m.lda_span for m in self.net.modules() if isinstance(m, LongShortAttention)]
        checkpoint["lda_span"] = spans[0] if spans else None
        checkpoint.update(self.trainer.datamodule.describe())  # type: ignore[attr-defined]

    def pictures(self, folder: Path, classes: list[str]) -> None:
        """Draw what the last validation saw."""
        raise NotImplementedError

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:  # type: ignore[override]
        scheduler.step_update(self.global_step)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        model: Any = self.trainer.strategy.model
        if isinstance(model, FullyShardedDataParallel) and gradient_clip_algorithm in (None, "norm"):
            if gradient_clip_val:  # a norm over all shards, which Lightning leaves to the module
                model.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
