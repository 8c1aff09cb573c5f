"""Options of an existing run: to resume it, or to validate one of its checkpoints."""

import glob
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crossformer_vision.errors import UserError
from crossformer_vision.training.arguments import has_option
from crossformer_vision.training.cluster import LOCK, current_job, is_started_by_this_job
from crossformer_vision.training.command import command_name
from crossformer_vision.training.options import Options, flatten, parse_options
from crossformer_vision.training.recipes import as_argument, as_text, read_config
from crossformer_vision.training.run_directory import VAL_LIST
from crossformer_vision.types import JsonObject
from crossformer_vision.weights.reading import read_checkpoint

# Options that a resumed run cannot change, because weights or optimizer state would not fit.
FIXED = (
    "task",
    "model.backbone",
    "model.model_args",
    "model.detector",
    "model.segmenter",
    "model.width",
    "model.anchor_scale",
    "model.optimizer",
    "model.freeze",
    "model.lora",
    "model.layer_decay",
    "model.backbone_lr_scale",
    "model.decay_on",
)


def resume_options(
    run_dir: str, arguments: Sequence[str]
) -> tuple[Options, dict[str, tuple[object, object]]]:
    """Options to continue a run.

    Args:
        run_dir: Run directory.
        arguments: Further command-line arguments, which change options of the run.

    Returns:
        The options, and the changed ones as ``{name: (before, now)}``.

    Raises:
        UserError: If it is not a run directory, or an option in ``FIXED`` is changed.
    """
    config = _config_path(run_dir)
    overrides: JsonObject = {"run.dir": run_dir, **_validation_list(run_dir)}
    last = Path(run_dir) / "last.ckpt"
    if last.is_file():  # otherwise training restarts from the first epoch
        overrides |= _checkpoint_overrides(last)
    options = parse_options("train", ["--config", as_argument(config), *arguments], overrides)
    changed = _changed_options(options, run_dir)
    for name, (before, now) in changed.items():
        if name in FIXED:
            weights = "best" if (Path(run_dir) / "best.ckpt").exists() else "last"
            raise UserError(
                f"--resume keeps the run's {name}: it is {before}, not {now}. To start a new run from its "
                f"weights: {command_name()} train --model.checkpoint {shlex.quote(run_dir)}/{weights}.ckpt"
            )
    return replace(options, notes=()), changed


def validation_options(run_dir: str, checkpoint: str, arguments: Sequence[str]) -> Options:
    """Options to validate a checkpoint of a run.

    Args:
        run_dir: Run directory.
        checkpoint: Checkpoint file.
        arguments: Further command-line arguments.

    Raises:
        UserError: If it is not a run directory, or the checkpoint does not exist.
    """
    config = _config_path(run_dir)
    if not Path(checkpoint).is_file():
        raise UserError(f"{checkpoint}: no such checkpoint. Train first, or pass --checkpoint")
    overrides = _validation_list(run_dir) | _checkpoint_overrides(Path(checkpoint))
    if has_option(arguments, "--data.root"):  # other data: validate on all images if there are no splits
        overrides.pop("data.val_list", None)
        if not has_option(arguments, "--data.val_share"):
            overrides["data.val_share"] = 1.0
    config = _without_augmentation(config)
    return parse_options("validate", ["--config", config, *arguments], overrides)


def _config_path(run_dir: str) -> str:
    config = Path(run_dir) / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run_dir}: not a run directory, it has no config.yaml")
    return str(config)


def _validation_list(run_dir: str) -> JsonObject:
    """The list of held-out validation images, if the run has one."""
    path = Path(run_dir) / VAL_LIST
    return {"data.val_list": str(path)} if path.is_file() else {}


def _checkpoint_overrides(checkpoint: Path) -> JsonObject:
    """Overrides that take weights, class names and normalization from the checkpoint."""
    return {"model.pretrained": False, "model.checkpoint": None, **data_options(checkpoint)}


def data_options(checkpoint: Path) -> JsonObject:
    """Class names and normalization in a checkpoint of a run, as options of the data module."""
    content = read_checkpoint(checkpoint)
    names = ("classes", "mean", "std", "display_channels")
    options = {f"data.{name}": content[name] for name in names if content.get(name)}
    if content.get("thresholds") and content.get("task") == "classification":
        options["data.multi_label"] = True
    if content.get("pixel_format"):
        options["data.channels"] = content["pixel_format"]["channels"]
    return options


def _without_augmentation(config: str) -> str:
    """The configuration without the user's augmentation, whose module may not be importable here."""
    content = read_config(config)
    data = content.get("data")
    if not (isinstance(data, dict) and data.get("augmentation")):
        return as_argument(config)
    return as_text({**content, "data": {**data, "augmentation": None}})


def _changed_options(options: Options, run_dir: str) -> dict[str, tuple[object, object]]:
    """Options that differ from those of the run, as ``{name: (before, now)}``."""
    before = flatten(read_config(f"{run_dir}/config.yaml"))
    return {
        name: (before[name], value)
        for name, value in options.flat().items()
        if name != "run.dir" and name in before and before[name] != value
    }


def default_run_dir(options: Options) -> Path:
    """Run directory for these options, before numbering."""
    return Path(options.config.run.dir or f"runs/{options.task}-{options.config.model.backbone}")


def find_run(options: Options) -> Path | None:
    """The run that ``--resume auto`` continues.

    Returns:
        Its directory, or ``None`` if there is no run yet.

    Raises:
        UserError: If the directory holds a run with other options.
    """
    run_dir = default_run_dir(options)
    if not (run_dir / "config.yaml").is_file():
        return None
    for name, (before, now) in _changed_options(options, str(run_dir)).items():
        if name == "trainer.precision" and options.is_auto_precision:  # resolved on another machine
            continue
        raise UserError(
            f"{run_dir}: holds a run with another configuration: {name} is {before} there, {now} here. "
            f"Continue it with --resume {run_dir}, or choose another --run.dir"
        )
    return run_dir


def find_run_of_job(options: Options) -> Path | None:
    """Run directory that this SLURM or torchrun job created before it was restarted."""
    if current_job() is None:
        return None
    run_dir = default_run_dir(options)
    found = [run_dir]
    if not options.config.run.dir:  # numbered if it exists
        found += run_dir.parent.glob(f"{glob.escape(run_dir.name)}-[0-9]*")
    started = [path for path in found if (path / "config.yaml").is_file() and is_started_by_this_job(path)]
    # The newest, because torchrun gives all its launches the same id unless --rdzv-id is set.
    return max(started, key=lambda path: (path / LOCK).stat().st_mtime, default=None)
