"""Bundled recipes, and the choice of task and recipe for a command line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jsonargparse import get_loader

from crossformer_vision.data.layout import infer_task
from crossformer_vision.errors import UserError, did_you_mean
from crossformer_vision.training.arguments import has_option, option_value
from crossformer_vision.types import JsonObject
from crossformer_vision.weights import published

if TYPE_CHECKING:
    from crossformer_vision.data.module import BaseDataModule
    from crossformer_vision.tasks.base import Task

PACKAGE = Path(__file__).parents[1]
CONFIG_DIRS = (PACKAGE / "configs", PACKAGE.parents[1] / "configs")  # in a wheel; in a source checkout


@dataclass(frozen=True)
class TaskInfo:
    """Metadata of a task for the command line.

    Attributes:
        module: Module of the task's classes, below ``tasks`` and ``data``.
        task_class: Name of the LightningModule.
        data_class: Name of the LightningDataModule.
        quickstart: Recipe that runs on bundled data.
        shared_options: Model options that the data module takes as well.
        own_option: Model option that no other task has.
    """

    module: str
    task_class: str
    data_class: str
    quickstart: str
    shared_options: tuple[str, ...]
    own_option: str | None = None

    def load_task_class(self) -> "type[Task]":
        """Import the LightningModule."""
        return getattr(import_module(f"crossformer_vision.tasks.{self.module}"), self.task_class)

    def load_data_class(self) -> "type[BaseDataModule]":
        """Import the LightningDataModule."""
        return getattr(import_module(f"crossformer_vision.data.{self.module}"), self.data_class)


TASKS = {
    "classification": TaskInfo(
        "classification",
        "Classification",
        "ClassificationData",
        "quickstart/classification.yaml",
        ("backbone",),
    ),
    "detection": TaskInfo(
        "detection",
        "Detection",
        "DetectionData",
        "quickstart/detection.yaml",
        ("detector", "min_size", "max_size"),
        "detector",
    ),
    "segmentation": TaskInfo(
        "segmentation",
        "Segmentation",
        "SegmentationData",
        "quickstart/semantic_segmentation.yaml",
        ("backbone", "test_scales"),
        "segmenter",
    ),
}


def find_config(name: str) -> str:
    """Find a configuration file.

    Args:
        name: Path of a file, or name of a bundled recipe such as ``default/detection.yaml``.

    Returns:
        Path of the file.

    Raises:
        UserError: If there is no such file.
    """
    if Path(name).is_file():
        return name
    below = name.removeprefix("configs/")
    known: list[str] = []
    for folder in CONFIG_DIRS:
        if below and (folder / below).is_file():
            return str(folder / below)
        known += [path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")]
    raise UserError(f"{name}: no such configuration file{did_you_mean(name, known)}")


def read_config(config: str) -> JsonObject:
    """Content of a configuration, given as a path or as YAML text, with the options of its ``base``.

    Returns:
        The content, empty if it cannot be read. The parser reports the error later.

    Raises:
        UserError: If the base does not exist or cannot be read.
    """
    content = _read_yaml(config)
    if "base" not in content:
        return content
    name = str(content.pop("base"))
    beside = Path(config).parent / name
    try:
        base = str(beside) if beside.is_file() else find_config(name)
    except UserError as error:
        raise UserError(f"{config}: base {error}") from None
    merged = _read_yaml(base)
    if not merged or "base" in merged:
        raise UserError(f"{base}: cannot be a base: it is empty, not valid YAML, or has a base itself")
    for key, value in content.items():
        section = merged.get(key)
        if isinstance(section, dict) and isinstance(value, dict):
            section.update(value)
        else:
            merged[key] = value
    return merged


def _read_yaml(config: str) -> JsonObject:
    """Content of a YAML file or text, empty if it is no mapping."""
    try:
        text = config if config.startswith("{") else Path(config).read_text(encoding="utf-8-sig")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def as_argument(config: str) -> str:
    """Return a configuration as the parser takes it: without a base, and readable in any system encoding.

    jsonargparse takes a path or YAML text, but reads files in the system's encoding.

    Args:
        config: Path of a configuration file in UTF-8.

    Returns:
        YAML text if there is a base or a character beyond ASCII, else the configuration as given. The parser
        reports a file that cannot be read.
    """
    if has_base(config):
        return as_text(read_config(config))
    if config.startswith("{"):
        return config
    try:
        text = Path(config).read_text(encoding="utf-8-sig")
        content = {} if text.isascii() else get_loader("yaml")(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return config
    return as_text(content) if content else config


def has_base(config: str) -> bool:
    """Whether a configuration file has a ``base``."""
    return "base" in _read_yaml(config)


def as_text(content: JsonObject) -> str:
    """A configuration as YAML text in one line."""
    return yaml.safe_dump(content, default_flow_style=True, width=math.inf)


def choose_task(arguments: Sequence[str], configs: Sequence[str]) -> tuple[str, str | None]:
    """The task of a command line.

    Order of precedence: ``--task``, ``task`` in a configuration, an option that only one task has, the layout
    of the data (without ``--config``), classification.

    Args:
        arguments: Command-line arguments.
        configs: Configurations among them.

    Returns:
        Name of the task, and a note for the user if it was inferred from the data.

    Raises:
        UserError: If there is no such task.
    """
    contents = [read_config(config) for config in configs]
    name = option_value(arguments, "--task")
    for content in contents:
        name = name or content.get("task")
    name = name or _task_with_own_option(arguments, contents)
    if name is None and not configs and (root := option_value(arguments, "--data.root")) is not None:
        if Path(root).exists():
            task, reason = infer_task(Path(root))
            note = f"task: {task} ({root}: {reason}). Override with --task."
            return task, None if task == "classification" else note
    name = name or "classification"
    if name not in TASKS:
        raise UserError(
            f"unknown task '{name}'. Choose from {', '.join(TASKS)}{did_you_mean(str(name), list(TASKS))}"
        )
    return name, None


def _task_with_own_option(arguments: Sequence[str], contents: Sequence[JsonObject]) -> str | None:
    """Task whose own option, such as ``detector``, is given."""
    models = [content.get("model") for content in contents]
    for name, info in TASKS.items():
        option = info.own_option
        in_config = any(isinstance(model, dict) and option in model for model in models)
        if option and (in_config or has_option(arguments, f"--model.{option}")):
            return name
    return None


def choose_recipe(task: str, arguments: Sequence[str]) -> tuple[str, str | None]:
    """The recipe of a command line without ``--config``.

    Without data it is the quickstart. With data it is the task's default recipe for GPUs, or the one for CPUs
    if there is no GPU or the ImageNet weights that the former starts from cannot be downloaded.

    Args:
        task: Name of the task.
        arguments: Command-line arguments.

    Returns:
        Name of the recipe, and a note for the user unless it is the quickstart.
    """
    if not has_option(arguments, "--data.root", "--data.dataset"):
        return TASKS[task].quickstart, None
    import torch

    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    gpu = gpu and option_value(arguments, "--trainer.accelerator") != "cpu"
    reason = "for a GPU" if gpu else "for a CPU"
    if gpu and not has_option(arguments, "--model.backbone", "--model.checkpoint"):
        if not published.is_available("crossformer_small"):
            gpu, reason = False, "since the ImageNet weights of crossformer_small cannot be downloaded"
    name = f"default/{task}.yaml" if gpu else f"default/{task}_cpu.yaml"
    return name, f"options start from {name}, {reason}. Choose another recipe with --config."
