"""Options of ``crossformer train`` and ``crossformer validate``.

The parser is Lightning's: every option is an argument of the task, the data module, ``RunOptions`` or
Lightning's Trainer, documented there.
"""

import glob
from argparse import SUPPRESS, ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import lightning as L
import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from crossformer_vision.compat import dump_config, parser_actions
from crossformer_vision.errors import UserError
from crossformer_vision.training.arguments import has_option, normalize, option_values
from crossformer_vision.training.option_errors import explain
from crossformer_vision.training.precision import Precision, resolve_precision
from crossformer_vision.training.recipes import (
    TASKS,
    as_argument,
    choose_recipe,
    choose_task,
    find_config,
    has_base,
    read_config,
)
from crossformer_vision.training.run import RunOptions
from crossformer_vision.training.trainer_options import (
    TRAINER_DEFAULTS,
    UNSUPPORTED,
    check_trainer_options,
    reset_unsupported,
)
from crossformer_vision.types import JsonObject

Command = Literal["train", "validate", "benchmark-data"]

USAGE = {
    "train": "crossformer train [FOLDER] [--epochs N] [--batch-size N] [--lr RATE] [--OPTION VALUE …]\n"
    "       crossformer train --config FILE [--data.root FOLDER] [--OPTION VALUE …]\n"
    "       crossformer train --resume RUN [--OPTION VALUE …]\n"
    "       crossformer train --resume auto [--run.dir RUN] [--OPTION VALUE …]",
    "validate": "crossformer validate RUN [--checkpoint FILE] [--OPTION VALUE …]\n"
    "       crossformer validate --config FILE --checkpoint FILE --data.root FOLDER",
    "benchmark-data": "crossformer benchmark-data [FOLDER] [--output FOLDER] [--OPTION VALUE …]",
}
DESCRIPTION = {
    "train": "Train a model. FOLDER holds your images (--data.root). RUN is a run directory, such as "
    "runs/classification-crossformer_nano: --resume continues it, with changed options if any are given; "
    "--resume auto starts a run or continues it. --debug shows the traceback of an error.",
    "validate": "Evaluate a checkpoint and plot its results. RUN is a run directory, whose best.ckpt is "
    "evaluated unless --checkpoint names another file. --debug shows the traceback of an error.",
    "benchmark-data": "Check whether a training run is input-bound. The options are those of "
    "train. --debug shows the traceback of an error.",
}


@dataclass(frozen=True)
class Options:
    """Parsed options of a training or validation run.

    Attributes:
        command: Name of the command.
        task: Name of the task.
        parser: Parser that produced ``config``.
        config: Values of all options.
        overrides: Values that replace those of ``config`` when objects are built, and are not saved with
            the run, such as the class names in a checkpoint.
        notes: Lines for the user on how options were chosen.
        is_auto_precision: Whether the precision was chosen for this machine.
    """

    command: Command
    task: str
    parser: LightningArgumentParser
    config: Namespace
    overrides: JsonObject = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_auto_precision: bool = False

    def to_yaml(self) -> str:
        """The configuration as saved in a run directory, without the directory's own path."""
        config = self.config.clone()
        config.run.dir = None
        return dump_config(self.parser, config)

    def flat(self) -> JsonObject:
        """Saved values by dotted option name."""
        return flatten(yaml.safe_load(self.to_yaml()))

    def built_config(self) -> Namespace:
        """Values to build objects from: the configuration with the overrides that the task has."""
        config = self.config.clone()
        for name, value in self.overrides.items():
            if name in config:
                config[name] = value
        return config


def parse_options(command: Command, arguments: Sequence[str], overrides: JsonObject | None = None) -> Options:
    """Parse command-line arguments.

    Args:
        command: Name of the command.
        arguments: Arguments after the name of the command.
        overrides: See ``Options``.

    Returns:
        The options. No data is read and no object is built.

    Raises:
        ArgumentError: If an option is unknown or has a wrong value; the message says what to do.
        UserError: If a configuration, task or combination of options is invalid.
    """
    arguments = normalize(arguments)
    configs = [
        config if config.startswith("{") else find_config(config)
        for config in option_values(arguments, "--config")
    ]
    task, task_note = choose_task(arguments, configs)
    recipe, recipe_note = choose_recipe(task, arguments)
    defaults = [find_config(recipe)] if not configs else []
    if has_option(arguments, "--help", "-h"):
        defaults = defaults or configs
    parser = _build_parser(command, task, defaults)
    try:
        config = parser.parse_args(_with_configs(arguments, configs))
    except ArgumentError as error:
        message = explain(str(error), parser, arguments, configs or defaults)
        raise ArgumentError(None, message) from error
    precision = config.trainer.precision
    _check(config)
    prefer_fast = command == "validate" and not has_option(arguments, "--trainer.precision")
    config.trainer.precision = resolve_precision(precision, config.trainer.accelerator, prefer_fast)
    notes = (task_note, None if configs else recipe_note)
    return Options(
        command, task, parser, config, overrides or {}, tuple(filter(None, notes)), precision == "auto"
    )


def _with_configs(arguments: Sequence[str], configs: Sequence[str]) -> list[str]:
    """The arguments with the paths of configurations in place of their names."""
    result = list(arguments)
    positions = [i + 1 for i, argument in enumerate(arguments) if argument == "--config"]
    for position, config in zip(positions, configs, strict=True):
        result[position] = as_argument(config)
    return result


def _build_parser(command: Command, task: str, defaults: Sequence[str]) -> LightningArgumentParser:
    """Parser for a task.

    Args:
        command: Name of the command.
        task: Name of the task.
        defaults: Configuration files whose values are defaults.
    """
    parser = LightningArgumentParser(
        prog=f"crossformer {command}",
        usage=USAGE[command],
        description=DESCRIPTION[command],
        exit_on_error=False,
        default_config_files=[glob.escape(path) for path in defaults if not has_base(path)],
    )
    info = TASKS[task]
    parser.add_argument("--config", action=ActionConfigFile, help="configuration file, or bundled recipe")
    parser.add_argument("--task", default=task, help=f"one of {', '.join(TASKS)}")
    if command == "benchmark-data":
        parser.add_argument("--output", default="runs/benchmark", help="directory for the table and plot")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of all random numbers")
    parser.add_lightning_class_args(info.load_data_class(), "data")
    parser.add_lightning_class_args(info.load_task_class(), "model")
    parser.add_class_arguments(RunOptions, "run")
    _add_trainer_options(parser)
    parser.link_arguments("seed_everything", "data.seed")
    parser.link_arguments("seed_everything", "model.seed")
    for option in info.shared_options:
        parser.link_arguments(f"model.{option}", f"data.{option}")
    if task == "classification":
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("data.is_multi_label", "model.multi_label", apply_on="instantiate")
    for name in ("num_classes", "in_chans", "image_mean", "image_std"):
        parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
    for path in filter(has_base, defaults):  # for --help with such a configuration
        parser.set_defaults(flatten(read_config(path)))
    return parser


def _add_trainer_options(parser: LightningArgumentParser) -> None:
    """Add the options of Lightning's Trainer, hiding those that runs do not support."""
    parser.add_class_arguments(
        L.Trainer, "trainer", skip={"precision"}, fail_untyped=False, instantiate=False, sub_configs=True
    )
    parser.add_argument(
        "--trainer.precision",
        type=Precision,
        default="auto",
        help="auto: bf16-mixed where the device computes bfloat16 natively, 16-mixed on GPUs that only have "
        "float16, else 32-true; or a precision of Lightning's Trainer",
    )
    parser.set_defaults(TRAINER_DEFAULTS)
    for action in parser_actions(parser):
        if action.dest.removeprefix("trainer.") in UNSUPPORTED:
            action.help = SUPPRESS


def _check(config: Namespace) -> None:
    """Reject Trainer options that are unsupported or would make Lightning fail with a traceback."""
    reset_unsupported(config.trainer)
    check_trainer_options(config.trainer)


def flatten(content: JsonObject, prefix: str = "") -> JsonObject:
    """Dotted names for one level of nesting: ``{"model": {"lr": 1}}`` becomes ``{"model.lr": 1}``."""
    flat: JsonObject = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not prefix:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def check_validation_weights(config: Namespace, checkpoint: str | None) -> None:
    """Refuse to validate a model without trained weights.

    Raises:
        UserError: If neither a checkpoint nor pretrained weights are named.
    """
    if not (checkpoint or config.model.pretrained or config.model.checkpoint):
        raise UserError(
            "validate needs weights: a run directory (crossformer validate runs/x), --checkpoint FILE of a "
            "run, --model.checkpoint FILE or --model.pretrained true"
        )
