"""Build the task, data module and Trainer that parsed options describe."""

import logging
import sys
from dataclasses import dataclass

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ModelSummary, StochasticWeightAveraging
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.io import CheckpointIO

from crossformer_vision.compat import instantiate
from crossformer_vision.data.module import BaseDataModule
from crossformer_vision.errors import UserError
from crossformer_vision.files import AtomicCheckpoints
from crossformer_vision.tasks.base import Task
from crossformer_vision.training.options import Options
from crossformer_vision.training.progress import ProgressBar
from crossformer_vision.training.run import run_callbacks, silence_lightning


@dataclass
class RunObjects:
    """Objects of a run.

    Attributes:
        task: Task with its model.
        data: Data module.
        trainer: Lightning's Trainer, with the callbacks of a run if it is for training.
    """

    task: Task
    data: BaseDataModule
    trainer: L.Trainer


def build(options: Options, is_resumed: bool = False) -> RunObjects:
    """Build the objects of a run. Reads the data to find the number of classes.

    Args:
        options: Parsed options.
        is_resumed: Whether the run is resumed in an existing run directory.

    Raises:
        UserError: If the data or weights cannot be read, or options do not fit together.
    """
    silence_lightning()
    config = options.built_config()
    L.seed_everything(config.seed_everything, workers=True)
    objects = instantiate(options.parser, config)
    callbacks: list[Callback] = []
    if options.command == "train":
        use_logger = objects.trainer.logger is not False
        callbacks = run_callbacks(objects.run, objects.model, options.to_yaml(), is_resumed, use_logger)
    return RunObjects(objects.model, objects.data, build_trainer(objects.trainer, callbacks))


def build_trainer(options: Namespace, callbacks: list[Callback]) -> L.Trainer:
    """Build Lightning's Trainer.

    Args:
        options: The Trainer's arguments, with callbacks, plugins and loggers of the user.
        callbacks: Further callbacks.

    Raises:
        UserError: If a callback of the user would make the run save other weights than it validates.
    """
    user_callbacks = _as_list(options.callbacks)
    if any(isinstance(c, StochasticWeightAveraging) for c in user_callbacks):
        raise UserError(
            "StochasticWeightAveraging: its weights would not be in best.ckpt. Use --run.ema, or Lightning's "
            "WeightAveraging"
        )
    has_bar = any(isinstance(c, LightningProgressBar) for c in user_callbacks)
    wants_bar = sys.stdout.isatty() if options.enable_progress_bar is None else options.enable_progress_bar
    if wants_bar and not has_bar:
        callbacks = [*callbacks, ProgressBar()]
    plugins = _as_list(options.plugins)
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpoints())
    if options.profiler:  # reports through a logger that silence_lightning hides
        logging.getLogger("lightning.fabric.utilities.rank_zero").setLevel(logging.INFO)
    arguments = dict(vars(options))
    if any(isinstance(plugin, Precision) for plugin in plugins):  # Lightning accepts only one of them
        arguments["precision"] = None
    has_summary = any(isinstance(c, ModelSummary) for c in user_callbacks)
    arguments |= {
        "callbacks": [*user_callbacks, *callbacks],
        "plugins": plugins,
        "logger": _as_list(options.logger) or False,
        "enable_progress_bar": wants_bar or has_bar,
        "enable_model_summary": options.enable_model_summary or has_summary,
    }
    return L.Trainer(**arguments)


def _as_list(value: object) -> list[object]:
    """An option that Lightning takes as one object or several, as a new list."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list) else [value]
