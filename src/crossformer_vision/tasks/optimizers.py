"""Optimizers and learning-rate schedules of the tasks, from timm."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from timm.optim import Lookahead, create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from crossformer_vision.compat import BATCH_NORM_BASE, is_muon_matrix
from crossformer_vision.devices import computes_fast
from crossformer_vision.errors import UserError, check_choice, check_range, did_you_mean
from crossformer_vision.tasks.muon import BatchedMuon
from crossformer_vision.types import Kwargs

DecayOn = Literal["weights", "all_but_norms", "all"]
ScheduleName = Literal["cosine", "poly", "step"]


def check_optimizer(name: str) -> None:
    """Check that timm has an optimizer.

    Raises:
        UserError: If not, with a suggestion.
    """
    known = [str(option) for option in list_optimizers()]
    if name.lower().removeprefix("lookahead_") not in known:
        raise UserError(f"unknown optimizer '{name}'{did_you_mean(name, known)}")


def create_optimizer(
    net: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    decay_on: DecayOn,
    device: torch.device,
    lr_scales: dict[str, float] | None = None,
) -> Optimizer:
    """Create an optimizer for the trainable parameters of a network.

    Args:
        net: Network. Its ``no_weight_decay()``, if it has one, names parameters without weight decay.
        name: timm name of the optimizer.
        lr: Learning rate.
        weight_decay: Weight decay.
        decay_on: Parameters with weight decay, see ``parameter_groups``.
        device: Device of the network.
        lr_scales: Factor of the learning rate by parameter name, which timm's schedules apply.

    Raises:
        UserError: If there are no parameters for the optimizer, or the device would emulate its dtype.
    """
    groups = parameter_groups(net, weight_decay, decay_on)
    if not any(group["params"] for group in groups):
        raise UserError("every parameter is frozen, so there is nothing to train. Lower --model.freeze")
    if lr_scales is not None:
        groups = split_by_scale(groups, {id(p): lr_scales[name] for name, p in net.named_parameters()})
    options: Kwargs = {"lr": lr, "weight_decay": weight_decay}
    base_name = name.lower().removeprefix("lookahead_")
    if "muon" not in base_name:
        return create_optimizer_v2(groups, opt=name, **options)
    if not any(is_muon_matrix(p) for p in net.parameters()):
        raise UserError(f"--model.optimizer {name}: this model has no matrix for Muon. Use adamw")
    if base_name not in ("muon", "nmuon"):
        if not computes_fast(device, torch.bfloat16):
            raise UserError(
                f"--model.optimizer {name}: computes in bfloat16, which this device emulates. Use nmuon"
            )
        return create_optimizer_v2(groups, opt=name, **options)
    optimizer = BatchedMuon(groups, nesterov=base_name == "nmuon", **options)
    return optimizer if base_name == name.lower() else Lookahead(optimizer)


def parameter_groups(net: nn.Module, weight_decay: float, decay_on: DecayOn) -> list[Kwargs]:
    """Trainable parameters with and without weight decay.

    Args:
        net: Network.
        weight_decay: Weight decay.
        decay_on: ``weights`` exempts norms, biases and the parameters in ``net.no_weight_decay()``;
            ``all_but_norms`` exempts norms and the parameters in ``net.no_weight_decay()``; ``all`` exempts
            nothing.
    """
    exempt_names: Collection[str] = getattr(net, "no_weight_decay", tuple)()
    if decay_on == "weights":
        return param_groups_weight_decay(net, weight_decay, no_weight_decay_list=exempt_names)
    trainable = [p for p in net.parameters() if p.requires_grad]
    if decay_on == "all":
        return [{"params": trainable}]
    norms = (nn.LayerNorm, nn.GroupNorm, BATCH_NORM_BASE)
    exempt = {id(p) for m in net.modules() if isinstance(m, norms) for p in m.parameters()}
    exempt |= {id(p) for name, p in net.named_parameters() if name in exempt_names}
    return [
        {"params": [p for p in trainable if id(p) not in exempt]},
        {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0},
    ]


def split_by_scale(groups: list[Kwargs], scales: dict[int, float]) -> list[Kwargs]:
    """Split parameter groups so that the parameters of a group share the factor of their learning rate.

    Args:
        groups: Parameter groups.
        scales: Factor by the ``id`` of a parameter.

    Returns:
        Groups with ``lr_scale``, the largest first.
    """
    split: list[Kwargs] = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(scales[id(parameter)], []).append(parameter)
        split += [{**group, "params": members, "lr_scale": scale} for scale, members in by_scale.items()]
    return sorted(split, key=lambda group: -group["lr_scale"])


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of a learning-rate schedule, see ``Task``.

    Raises:
        UserError: If a value is invalid.
    """

    name: ScheduleName
    milestones: tuple[float, ...]
    power: float
    warmup_epochs: float
    warmup_steps: int | None
    warmup_lr: float
    min_lr: float

    def __post_init__(self) -> None:
        check_choice("schedule", self.name, ("cosine", "poly", "step"))
        for name in ("power", "warmup_epochs", "warmup_lr", "min_lr"):
            check_range(name, getattr(self, name), 0)
        if self.warmup_steps is not None:
            check_range("warmup_steps", self.warmup_steps, 0)
        milestones = list(self.milestones)
        if milestones != sorted(milestones) or any(milestone <= 0 for milestone in milestones):
            raise UserError(f"milestones={milestones}: must be epochs above 0 in ascending order")

    def create(
        self, optimizer: Optimizer, images_per_step: int, images_per_epoch: int, images: int
    ) -> Scheduler:
        """Create the schedule, which counts images so that it does not depend on the batch size.

        Args:
            optimizer: Optimizer whose current learning rate is the peak.
            images_per_step: Images of an optimizer step of all processes.
            images_per_epoch: Images of an epoch.
            images: Images of the whole run.
        """
        lr = optimizer.param_groups[0]["lr"]
        if self.warmup_steps is None:
            warmup = round(self.warmup_epochs * images_per_epoch)
        else:
            warmup = self.warmup_steps * images_per_step
        common: Kwargs = {
            "warmup_t": min(warmup, images - images_per_step),
            "warmup_lr_init": min(self.warmup_lr, lr),
            "warmup_prefix": False,
            "t_in_epochs": False,
        }
        lr_min = min(self.min_lr, lr)
        if self.name == "cosine":
            return CosineLRScheduler(optimizer, t_initial=images, lr_min=lr_min, **common)
        if self.name == "poly":
            return PolyLRScheduler(optimizer, t_initial=images, power=self.power, lr_min=lr_min, **common)
        # timm lowers the rate one update before each milestone.
        decay_t = [round(milestone * images_per_epoch) + 1 for milestone in self.milestones]
        return MultiStepLRScheduler(optimizer, decay_t=decay_t, decay_rate=0.1, **common)
