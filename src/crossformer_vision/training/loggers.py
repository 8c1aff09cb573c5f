"""Experiment trackers by name, through Lightning's loggers."""

import importlib.util
import os
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from crossformer_vision.errors import UserError

LoggerName = Literal["tensorboard", "wandb", "mlflow", "comet"]
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet-ml"}
PROJECT = "crossformer"
"""Project or experiment in which trackers list the runs, unless an environment variable names another one."""


def check_logger(name: LoggerName) -> None:
    """Check that the library of a logger is installed.

    Raises:
        UserError: If it is not.
    """
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise UserError(
            f"--run.logger {name}: needs the library {package}. Install it: pip install {package}"
        )


def create_logger(name: LoggerName, run_dir: Path) -> Logger:
    """Create a logger for a run. Servers and accounts are those of the library's own settings.

    Args:
        name: Name of the logger.
        run_dir: Run directory, whose name becomes the name of the run.
    """
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return WandbLogger(run_dir.name, save_dir=run_dir, project=project)
    if name == "mlflow":
        return MLFlowLogger(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), run_dir.name)
    if name == "comet":
        return CometLogger(project=os.environ.get("COMET_PROJECT_NAME", PROJECT), name=run_dir.name)
    return TensorBoardLogger(run_dir, name=None, version="tensorboard")
