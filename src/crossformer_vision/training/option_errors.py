"""Error messages for options: the option or file, a suggestion, and the expected type."""

import difflib
import re
from argparse import SUPPRESS
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from crossformer_vision.compat import argument_types, parser_actions
from crossformer_vision.errors import error_line
from crossformer_vision.training.arguments import has_option
from crossformer_vision.training.recipes import read_config

# Option names of other trainers, and the equivalent options here. The first that exists is suggested.
ALIASES = {
    "max_epochs": ("trainer.max_epochs",),
    "steps": ("trainer.max_steps",),
    "batch": ("data.batch_size", "batch_size"),
    "bs": ("data.batch_size", "batch_size"),
    "imgsz": ("data.crop_size", "model.min_size", "data.image_size"),
    "img_size": ("data.crop_size", "model.min_size", "data.image_size"),
    "image_size": ("data.crop_size", "model.min_size", "data.image_size"),
    "lr0": ("model.lr",),
    "learning_rate": ("model.lr",),
    "weight_decay": ("model.weight_decay",),
    "optimizer": ("model.optimizer",),
    "opt": ("model.optimizer",),
    "workers": ("data.num_workers",),
    "num_workers": ("data.num_workers",),
    "model": ("model.backbone",),
    "arch": ("model.backbone",),
    "backbone": ("model.backbone",),
    "weights": ("model.checkpoint",),
    "checkpoint": ("model.checkpoint",),
    "pretrained": ("model.pretrained",),
    "patience": ("run.patience",),
    "output": ("run.dir",),
    "out": ("run.dir", "output"),
    "output_dir": ("run.dir", "output"),
    "project": ("run.dir", "output"),
    "seed": ("seed_everything",),
    "amp": ("trainer.precision",),
    "classes": ("data.classes",),
    "root": ("data.root",),
    "data_dir": ("data.root",),
    "data_path": ("data.root",),
    "conf": ("score_threshold",),
    "score": ("score_threshold",),
    "tile": ("tile_size",),
}
TYPE_NAMES: dict[object, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    dict: "a mapping such as {name: value}",
}


def explain(message: str, parser: ArgumentParser, arguments: Sequence[str], configs: Sequence[str]) -> str:
    """Reword an error of the parser.

    Args:
        message: The parser's message.
        parser: The parser.
        arguments: Arguments that were parsed.
        configs: Configuration files that were read.
    """
    message = " ".join(message.split())
    options = [action.dest for action in parser_actions(parser) if action.help != SUPPRESS]
    if match := re.search(r'Parser key "(data|model|run|trainer)": Unable to load config', message):
        return f"no option --{match[1]}{suggest_option(match[1], options, '--')}"
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        return _explain_unrecognized(match[1], options)
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        return _explain_unknown(f"{match[1]}.{match[2]}", options, configs)
    if match := re.search(r"Option '(\S+)' is not accepted", message):
        return _explain_unknown(match[1], options, configs)
    if match := re.search(r'Parser key "([^"]+)":.*?(?:Got|Given) value: (.*)$', message):
        return _explain_value(match[1], match[2].strip(), parser, arguments, configs)
    if "Unexpected config" in message and configs:
        return f"{configs[-1]}: not a configuration, which has options such as 'data: {{root: images}}'"
    if (("Problem" in message and "pars" in message) or "can't decode" in message) and configs:
        return f"{configs[-1]}: not a configuration ({message})"
    return message


def _explain_unrecognized(word: str, options: Sequence[str]) -> str:
    """Message for an argument that no option takes."""
    name = word.removeprefix("--").split("=")[0]
    if word.startswith("-"):
        return f"no option --{name}{suggest_option(name, options, '--')}"
    if Path(word).exists():
        hint = f". Did you mean --data.root {word}?" if "data.root" in options else ""
        return f"unexpected argument '{word}'{hint}"
    return f"unexpected argument '{word}', which is no existing folder. Name a folder, or an option with --"


def _explain_unknown(name: str, options: Sequence[str], configs: Sequence[str]) -> str:
    """Message for an unknown option in a configuration."""
    return f"{_config_with(name, configs)}: no option {name}{suggest_option(name, options, '')}"


def _explain_value(
    name: str, value: str, parser: ArgumentParser, arguments: Sequence[str], configs: Sequence[str]
) -> str:
    """Message for a value of the wrong type."""
    if name == "data.augmentation" and (reason := _import_problem(value)):
        return f"--data.augmentation {value}: {reason}"
    flags = (f"--{name}", f"--{name.replace('_', '-')}")
    is_argument = has_option([argument.split("=")[0] for argument in arguments], *flags)
    flag = flags["." not in name]
    place = flag if is_argument else f"{_config_with(name, configs)}: {name}"
    expected = describe_type(argument_types(parser).get(name))
    return f"{place}: '{value}' is not {expected or 'a valid value'}"


def suggest_option(name: str, options: Sequence[str], prefix: str) -> str:
    """A suggestion for an unknown option.

    Args:
        name: What the user typed, without hyphens in front.
        options: Names of the options.
        prefix: ``--`` on the command line, nothing in a configuration.
    """
    if name in ("devices", "gpus") and "trainer.devices" in options:
        return ". Did you mean --device cpu (or gpu), or --trainer.devices N?"
    close = [option for option in ALIASES.get(name.replace("-", "_"), ()) if option in options][:1]
    close = close or difflib.get_close_matches(name, options, 1, 0.75)
    last = name.rsplit(".", 1)[-1]
    close = close or [option for option in options if option.rsplit(".", 1)[-1] == last]
    close = close or difflib.get_close_matches(name, options, 1, 0.6)
    if not close:
        return ". --help lists all"
    option = close[0].replace("_", "-") if prefix and "." not in close[0] else close[0]
    return f". Did you mean {prefix}{option}?"


def _config_with(name: str, configs: Sequence[str]) -> str:
    """Configuration file that sets an option; the last one if none does."""
    for config in configs:
        content: object = read_config(config)
        for part in name.split("."):
            content = content.get(part, SUPPRESS) if isinstance(content, dict) else SUPPRESS
        if content is not SUPPRESS:
            return config
    return configs[-1] if configs else "the options"


def describe_type(kind: object) -> str:
    """Describe a type in words, such as ``an integer or null`` for ``int | None``; empty if unknown."""
    if kind in TYPE_NAMES:
        return TYPE_NAMES[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(describe_type, arguments))))
    if origin is Literal:
        return f"one of {', '.join(dict.fromkeys(map(str, arguments)))}"
    if origin in (list, tuple):
        return "a list such as [1, 2]"
    if origin is dict:
        return TYPE_NAMES[dict]
    return ""


def _import_problem(path: str) -> str | None:
    """Reason why a dotted path cannot be imported; ``None`` if it can, or if it is not a dotted path."""
    module, _, name = path.strip("'\"").rpartition(".")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", module):
        return None
    try:
        imported = import_module(module)
    except ModuleNotFoundError as error:
        return f"no module '{error.name}'. Run the command in its folder, or add that to PYTHONPATH"
    except Exception as error:  # of the user's code
        return f"cannot import '{module}' ({type(error).__name__}: {error_line(error)})"
    return None if hasattr(imported, name) else f"module '{module}' has no '{name}'"
