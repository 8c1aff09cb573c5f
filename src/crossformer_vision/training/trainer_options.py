"""Options of Lightning's Trainer: defaults, unsupported options, and early checks."""

from inspect import signature

import lightning as L
import torch
from jsonargparse import Namespace

from crossformer_vision.devices import count_cores
from crossformer_vision.errors import UserError
from crossformer_vision.training.precision import training_device

# Options that runs do not support, and alternatives.
UNSUPPORTED = {
    "enable_checkpointing": "runs always save checkpoints; --trainer.fast_dev_run true tries one batch",
    "barebones": "use --trainer.profiler, or `crossformer info`",
    "default_root_dir": "use --run.dir",
    "limit_test_batches": "there is no test; use --trainer.limit_val_batches",
    "limit_predict_batches": "use --trainer.limit_val_batches",
    "log_every_n_steps": "runs log once per epoch",
    "use_distributed_sampler": "the data module distributes the images among processes",
    "reload_dataloaders_every_n_epochs": "the data module reloads them itself",
    "model_registry": "runs save checkpoints in the run directory",
}
TRAINER_DEFAULTS = {
    "trainer.max_epochs": 10,
    "trainer.enable_model_summary": False,
    "trainer.use_distributed_sampler": False,
    "trainer.num_sanity_val_steps": 0,
    "trainer.gradient_clip_val": 5.0,
    # In a SLURM job, Lightning searches this directory for checkpoints of earlier jobs.
    "trainer.default_root_dir": "runs",
}


def reset_unsupported(options: Namespace) -> None:
    """Set unsupported options to the values that runs use.

    Args:
        options: Namespace of the Trainer's options, which is changed.

    Raises:
        UserError: If the user has set one of them.
    """
    parameters = signature(L.Trainer).parameters
    for name, instead in UNSUPPORTED.items():
        value = TRAINER_DEFAULTS.get(f"trainer.{name}", parameters[name].default)
        if options[name] not in (value, parameters[name].default):
            raise UserError(f"--trainer.{name} is not supported: {instead}")
        options[name] = value


def check_trainer_options(options: Namespace) -> None:
    """Reject options that would make Lightning fail with a traceback or hang at the start.

    Args:
        options: Namespace of the Trainer's options.

    Raises:
        UserError: If a value is invalid, or a device is not available.
    """
    strategy = str(options.strategy)
    if any(start in strategy for start in ("spawn", "fork", "notebook")):
        raise UserError(
            f"--trainer.strategy {strategy}: results of such processes are lost when they end. Use ddp, "
            "which starts processes of its own"
        )
    if options.accelerator in ("gpu", "cuda", "mps") and not is_available(options.accelerator):
        raise UserError(
            f"--trainer.accelerator {options.accelerator}: torch finds no such device. Use cpu, or install "
            "a torch build for your GPU"
        )
    _check_process_count(options)
    for name, least in (("max_epochs", 1), ("max_steps", 1), ("accumulate_grad_batches", 1)):
        value = getattr(options, name)
        if value is not None and value != -1 and value < least:
            raise UserError(f"--trainer.{name} {value}: trains nothing. Use {least} or more")
    for name in ("limit_train_batches", "val_check_interval"):
        value = getattr(options, name)
        if isinstance(value, (int, float)) and value <= 0:
            raise UserError(f"--trainer.{name} {value}: must be above 0")


def _check_process_count(options: Namespace) -> None:
    """Refuse more processes than CPU cores."""
    device = training_device(options.accelerator)
    cores = count_cores()
    processes = int(options.devices) if str(options.devices).isdecimal() else 1
    if device is not None and device.type == "cpu" and processes > cores:
        raise UserError(
            f"--trainer.devices {processes}: {processes} processes on the CPU need {processes} cores, and "
            f"there are {cores}. Use --trainer.devices {cores} or fewer"
        )


def is_available(accelerator: str) -> bool:
    """Whether torch can use a GPU of a kind: ``gpu``, ``cuda`` or ``mps``."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return {"gpu": cuda or mps, "cuda": cuda, "mps": mps}[accelerator]
