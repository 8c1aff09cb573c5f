"""What all tasks share: a timm optimizer and schedule, reproducible steps, loading weights to start from."""

import difflib
import math
import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from timm.optim import Lookahead, create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from crossformer_vision.compat import is_muon_matrix
from crossformer_vision.data.loading import generators, mix_seed, restore_generators, seed_all
from crossformer_vision.errors import UserError, check_choice, check_names, check_range, counted
from crossformer_vision.models import find_model
from crossformer_vision.models.crossformer import LongShortAttention
from crossformer_vision.models.dense.backbones import DenseModel
from crossformer_vision.tasks.muon import BatchedMuon
from crossformer_vision.training.devices import computes_fast
from crossformer_vision.weights.checkpoints import LoadReport
from crossformer_vision.weights.published import at_hand


def starts_from_published(model: str, pretrained: bool | None, checkpoint: str | None) -> bool:
    """Whether to build a model with its published weights; None takes them where they are at hand."""
    if checkpoint:
        return False
    return at_hand(model) if pretrained is None else pretrained


def describe_initial_weights(
    model: str, num_classes: int, pretrained: bool, checkpoint: str | None, report: LoadReport | None
) -> str:
    """A line that tells what training starts from.

    Args:
        model: timm name of the model or backbone.
        num_classes: Classes of the task.
        pretrained: Whether the model was built with its published weights.
        checkpoint: File of weights that were loaded, if any.
        report: What loading them reported.
    """
    if checkpoint:
        return f"weights: {checkpoint}: {report}"
    if not pretrained:
        return "weights: none, training from scratch (--model.pretrained or --model.checkpoint loads some)"
    cfg = find_model(model)
    place = "bundled" if cfg.file else cfg.hf_hub_id or cfg.url or "published"
    new = (
        ""
        if cfg.num_classes == num_classes
        else f"; the classifier is new, for {counted(num_classes, 'class', 'classes')}"
    )
    return f"weights: {model} ({place}){new}"


class Task(L.LightningModule):
    """Base of the tasks. A subclass sets `name`, `net`, `monitor`, and writes the two steps and `pictures`.

    Args:
        optimizer: timm name of an optimizer, such as `adamw` or `nmuon` (Muon with Nesterov momentum).
        lr: peak learning rate, for the global batch as it is.
        weight_decay: of the weights that `decay_on` names.
        decay_on: `weights` spares norms and biases, and what a model names itself; `all_but_norms` spares
            norms and what a model names; `all` spares nothing, as in some published recipes.
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
        seed: of everything random in a step; None takes the one that `seed_everything` was given.
        classes: names of the classes, for checkpoints, where no data module of this library knows them.
    """

    name: str  # as the command and checkpoints have it
    monitor: str  # the validation metric that picks the best checkpoint
    monitor_mode: Literal["max", "min"] = "max"
    in_line: tuple[str, ...] = ("val_loss",)  # metrics that stand beside it in an epoch's line
    shown_channels: tuple[int, int, int] = (0, 1, 2)  # red, green and blue of pictures, of more than three
    net: Any
    initial_weights = ""  # what training starts from, a line

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
        seed: int | None = None,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__()
        check_choice("schedule", schedule, ("cosine", "poly", "step"))
        check_choice("decay_on", decay_on, ("weights", "all_but_norms", "all"))
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("warmup_epochs", warmup_epochs)):
            check_range(name, value, 0)
        if optimizer.lower().removeprefix("lookahead_") not in list_optimizers():
            close = difflib.get_close_matches(optimizer, list_optimizers(), 1)
            raise UserError(
                f"unknown optimizer '{optimizer}'{f'; did you mean {close[0]}?' if close else ''}"
            )
        check_names("classes", classes or ())
        if list(milestones) != sorted(milestones) or any(milestone <= 0 for milestone in milestones):
            raise UserError(f"milestones={list(milestones)}: they are epochs above 0 in ascending order")
        self.class_names = classes
        self._states: Any = None
        self.images_seen = 0  # in training; of loaders that are not ours, the batches
        self._resumed: dict[str, Any] = {}  # the checkpoint that training goes on from
        self._options: list[dict[str, Any]] = []  # of the optimizer's groups; of a subclass's own, none
        self.optimizer, self.lr = optimizer, lr
        self.weight_decay, self.decay_on = weight_decay, decay_on
        self.schedule, self.milestones, self.power = schedule, milestones, power
        self.warmup_epochs, self.warmup_steps = warmup_epochs, warmup_steps
        self.warmup_lr, self.min_lr = warmup_lr, min_lr
        self.grad_checkpointing, self.compile_net, self.seed = grad_checkpointing, compile, seed

    def setup(self, stage: str) -> None:
        count = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if count not in (None, self.hparams["num_classes"]):
            own = self.hparams["num_classes"]
            raise UserError(f"the task has num_classes={own}, its data {count} classes")
        if stage == "fit":  # begins anew, unless a checkpoint is loaded after this
            self.images_seen, self._resumed = 0, {}
        body = self.net.body if isinstance(self.net, DenseModel) else self.net
        if self.grad_checkpointing:
            getattr(body, "model", body).set_grad_checkpointing(True)  # `model` in a features_only wrapper
        if self.compile_net:
            body.compile()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.images_seen += self._batch
        # Dropout, stochastic depth and mixup follow from the step alone, so a resumed run repeats none of the
        # past; what others draw goes on after it as if nothing had been drawn.
        self._states = generators()
        seed_all(mix_seed(self.seed or 0, self.current_epoch, batch_idx, self.global_rank))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        restore_generators(self._states)

    @property
    def _batch(self) -> int:
        """Images of a batch, of all processes together."""
        return getattr(getattr(self.trainer, "datamodule", None), "global_batch", 1)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer()
        # As the options have it now: what a checkpoint says of these is of the run before.
        self._options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._configured_lr = self.lr
        if (
            getattr(self.trainer, "train_dataloader", ()) is None
        ):  # where only steps are given, Lightning has not looked yet
            self.trainer.fit_loop.setup_data()
        if self._resumed:
            self._fit_loops()
        schedule = self._build_schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _build_schedule(self, optimizer: Optimizer) -> Scheduler:
        """The schedule that the options describe, over the images of the run."""
        epoch = self._images_of(epochs=1)
        accumulated = self.trainer.accumulate_grad_batches * self._batch
        total = self._images_of_the_run()
        warmup = (
            round(self.warmup_epochs * epoch)
            if self.warmup_steps is None
            else self.warmup_steps * accumulated
        )
        common: dict[str, Any] = dict(
            warmup_t=min(warmup, total - accumulated),
            warmup_lr_init=min(self.warmup_lr, self.lr),
            warmup_prefix=False,
            t_in_epochs=False,
        )
        if self.schedule == "cosine":
            return CosineLRScheduler(optimizer, t_initial=total, lr_min=min(self.min_lr, self.lr), **common)
        if self.schedule == "poly":
            lr_min = min(self.min_lr, self.lr)
            return PolyLRScheduler(optimizer, t_initial=total, power=self.power, lr_min=lr_min, **common)
        # timm's goes down one before its milestones
        down = [round(milestone * epoch) + 1 for milestone in self.milestones]
        return MultiStepLRScheduler(optimizer, decay_t=down, decay_rate=0.1, **common)

    def _images_of(self, epochs: int = 0, batches: int = 0) -> int:
        per_epoch = self.trainer.num_training_batches
        return (epochs * (1 if per_epoch == float("inf") else int(per_epoch)) + batches) * self._batch

    def _images_of_steps(self, steps: int) -> int:
        accumulate, per_epoch = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        if per_epoch == float("inf"):
            return self._images_of(batches=steps * accumulate)
        epochs, more = divmod(steps, -(-int(per_epoch) // accumulate))
        return self._images_of(epochs, min(more * accumulate, int(per_epoch)))

    def _images_of_the_run(self) -> int:
        """Images until the last step; of a resumed run with other batches, those seen and those to come.

        Raises:
            UserError: nobody knows how long the run is.
        """
        trainer, resumed = self.trainer, self._resumed
        if not 0 < trainer.estimated_stepping_batches < math.inf:
            if self.schedule == "step":  # follows from epochs
                return sys.maxsize
            raise UserError(
                f"schedule '{self.schedule}' needs to know how long the run is: give the Trainer max_steps, "
                "or max_epochs and, for a loader without a length, limit_train_batches"
            )
        steps = int(trainer.estimated_stepping_batches)
        total = self._images_of_steps(steps)
        if resumed:
            epochs = resumed["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"] - 1
            by_steps, by_epochs = resumed["global_step"], self._images_of(epochs, self._batches_done())
            total += self.images_seen - (
                self._images_of_steps(by_steps) if steps == trainer.max_steps else by_epochs
            )
        return total

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is None or self.trainer.state.fn != "fit":  # of its weights alone
            return
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        self.seed = checkpoint.get("seed", self.seed)
        self.images_seen = checkpoint.get("images_seen", batches * self._batch)
        checkpoint["lr_schedulers"] = []  # it follows from the images seen, and from the options of now
        self._resumed = checkpoint

    def _fit_loops(self) -> None:
        """Lightning counts the batches of an epoch: where they are of another size now, count those."""
        if self._resumed.get("batches_of_an_epoch") != self.trainer.num_training_batches:
            progress = self._resumed["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            done, before = self._batches_done(), progress["current"]
            # A count may be one behind, where the checkpoint is of a batch's end.
            progress["current"] = {k: done - (before["ready"] - n) for k, n in before.items()}

    def _batches_done(self) -> int:
        """Of the epoch in which the resumed run was saved, counted in batches of now: all, at its end."""
        start = getattr(getattr(self.trainer, "datamodule", None), "start", None)
        if start is None:
            progress = self._resumed["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            return int(progress["current"]["ready"])
        return int(start or self.trainer.num_training_batches)

    def on_train_start(self) -> None:
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**31
        optimizer, schedule = self.trainer.optimizers[0], self.lr_schedulers()
        found = bool(self._options) and self.lr != self._configured_lr  # by Lightning's LearningRateFinder
        for group, options in zip(optimizer.param_groups, self._options):
            group.update(options)
            if found:
                group["lr"] = group["initial_lr"] = options["lr"] * self.lr / self._configured_lr
        if isinstance(schedule, Scheduler):  # or else one of a callback's
            if found:
                schedule = self._build_schedule(optimizer)
                self.trainer.lr_scheduler_configs[0].scheduler = schedule  # type: ignore[assignment]
            schedule.step_update(self.images_seen)
        self._resumed = {}

    def _optimizer(self) -> Optimizer:
        groups = self._parameter_groups()
        options: dict[str, Any] = dict(lr=self.lr, weight_decay=self.weight_decay)
        name = self.optimizer.lower().removeprefix("lookahead_")
        if "muon" not in name:
            return create_optimizer_v2(groups, opt=self.optimizer, **options)
        if not any(is_muon_matrix(p) for p in self.net.parameters()):
            raise UserError(
                f"--model.optimizer {self.optimizer}: this model has no matrix for Muon. Use adamw"
            )
        if name not in ("muon", "nmuon"):
            if not computes_fast(self.device, torch.bfloat16):
                raise UserError(
                    f"--model.optimizer {self.optimizer}: computes in bfloat16, which this device emulates. "
                    "Use nmuon"
                )
            return create_optimizer_v2(groups, opt=self.optimizer, **options)
        optimizer = BatchedMuon(groups, nesterov=name == "nmuon", **options)
        return optimizer if name == self.optimizer.lower() else Lookahead(optimizer)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters with and without weight decay, as ``decay_on`` says."""
        named = self.net.no_weight_decay() if hasattr(self.net, "no_weight_decay") else ()
        if self.decay_on == "weights":
            return param_groups_weight_decay(self.net, self.weight_decay, no_weight_decay_list=named)
        if self.decay_on == "all":
            return [{"params": [p for p in self.net.parameters() if p.requires_grad]}]
        kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
        spared = {id(p) for m in self.net.modules() if isinstance(m, kinds) for p in m.parameters()}
        spared |= {id(p) for name, p in self.net.named_parameters() if name in named}
        norms = [p for p in self.net.parameters() if id(p) in spared]
        others = [p for p in self.net.parameters() if id(p) not in spared]
        return [{"params": others}, {"params": norms, "weight_decay": 0.0}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = self.name
        checkpoint["images_seen"] = self.images_seen
        checkpoint["batches_of_an_epoch"] = self.trainer.num_training_batches
        spans = [m.lda_span for m in self.net.modules() if isinstance(m, LongShortAttention)]
        checkpoint["lda_span"] = spans[0] if spans else None
        checkpoint["seed"] = self.seed
        data: Any = getattr(self.trainer, "datamodule", None)
        checkpoint.update(data.describe() if hasattr(data, "describe") else self.describe())

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of its classes and images, where no data module of this library does."""
        count = self.hparams["num_classes"]
        return {"classes": self.class_names or [str(k) for k in range(count)]}

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As in validation; the metrics are called `test_` where those are called `val_`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        testing = bool(self._trainer and self.trainer.testing)
        super().log(name.replace("val_", "test_", 1) if testing else name, *args, **kwargs)

    @property
    def batches_evaluated(self) -> int:
        """Of the validation or the test that runs."""
        return sum(
            map(int, self.trainer.num_test_batches if self.trainer.testing else self.trainer.num_val_batches)
        )

    def pictures(self, folder: Path, classes: list[str]) -> None:
        """Draw what the last validation saw."""
        raise NotImplementedError

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, Scheduler):
            scheduler.step_update(self.images_seen)
        else:  # of a callback or a tuner
            super().lr_scheduler_step(scheduler, metric)

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
