"""The parser's errors in words: the option, the file, what was meant or is wanted."""

import difflib
import re
from argparse import SUPPRESS
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from crossformer_vision.cli.arguments import content_of, has

# What other trainers call an option -> ours, the first that the task has.
ALIASES = {
    "epochs": ("trainer.max_epochs",),
    "max_epochs": ("trainer.max_epochs",),
    "steps": ("trainer.max_steps",),
    "batch": ("data.batch_size",),
    "batch_size": ("data.batch_size",),
    "bs": ("data.batch_size",),
    "imgsz": ("data.crop_size", "model.min_size", "data.image_size"),
    "img_size": ("data.crop_size", "model.min_size", "data.image_size"),
    "image_size": ("data.crop_size", "model.min_size", "data.image_size"),
    "lr": ("model.lr",),
    "lr0": ("model.lr",),
    "learning_rate": ("model.lr",),
    "weight_decay": ("model.weight_decay",),
    "optimizer": ("model.optimizer",),
    "opt": ("model.optimizer",),
    "workers": ("data.num_workers",),
    "num_workers": ("data.num_workers",),
    "model": ("model.model",),
    "arch": ("model.model",),
    "weights": ("model.checkpoint",),
    "checkpoint": ("model.checkpoint",),
    "pretrained": ("model.pretrained",),
    "patience": ("run.patience",),
    "output": ("run.folder",),
    "out": ("run.folder",),
    "output_dir": ("run.folder",),
    "project": ("run.folder",),
    "seed": ("seed_everything",),
    "amp": ("trainer.precision",),
    "classes": ("data.classes",),
    "root": ("data.root",),
    "data_dir": ("data.root",),
    "data_path": ("data.root",),
}


def explain(message: str, parser: Any, args: Sequence[str], configs: Sequence[str]) -> str:
    """The parser's message as a person would put it: the option, the file, what was meant or is wanted."""
    message = " ".join(message.split())
    types = {action.dest: getattr(action, "_typehint", None) or action.type for action in parser._actions}
    shown = [action.dest for action in parser._actions if action.help != SUPPRESS]
    if 'Parser key "data": Unable to load config' in message:
        return (
            "--data is no file here: --data.root names the folder of your images. A data.yaml is YOLO's, "
            "whose labels are converted to COCO first"
        )
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        word = found[1]
        name = word.removeprefix("--").split("=")[0]
        if not word.startswith("-"):
            if Path(word).exists():
                return f"'{word}' is not understood; did you mean --data.root {word}?"
            return f"'{word}' is not understood; options are given as --data.root FOLDER"
        return f"no option --{name}{_suggest_option(name, shown, '--')}"
    if found := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        return _unknown(f"{found[1]}.{found[2]}", shown, configs)
    if found := re.search(r"Option '(\S+)' is not accepted", message):
        return _unknown(found[1], shown, configs)
    if found := re.search(r'Parser key "([^"]+)":.*?(?:Got|Given) value: (.*)$', message):
        name, value = found[1], found[2].strip()
        if name == "data.augmentation" and (reason := _why_not_importable(value)):
            return f"--data.augmentation {value}: {reason}"
        wanted = _in_words(types.get(name))
        place = f"--{name}" if has(args, f"--{name}") else f"{_file_of(name, configs)}: {name}"
        return (
            f"{place}: '{value}' is not {wanted}" if wanted else f"{place}: '{value}' is not a value for it"
        )
    if "Unexpected config" in message and configs:
        return f"{configs[-1]}: not a configuration, which has options such as 'data: {{root: images}}'"
    if (("Problem" in message and "pars" in message) or "can't decode" in message) and configs:
        return f"{configs[-1]}: not a configuration ({message})"
    return message


def _unknown(name: str, shown: Sequence[str], configs: Sequence[str]) -> str:
    return f"{_file_of(name, configs)}: no option {name}{_suggest_option(name, shown, '')}"


def _suggest_option(name: str, shown: Sequence[str], dashes: str) -> str:
    close = [option for option in ALIASES.get(name.replace("-", "_"), ()) if option in shown][:1]
    if name in ("device", "devices", "gpus"):
        return "; did you mean --trainer.accelerator cpu (or gpu), or --trainer.devices N?"
    close = close or difflib.get_close_matches(name, shown, 1, 0.75)
    last = name.rsplit(".", 1)[-1]
    close = close or [option for option in shown if option.rsplit(".", 1)[-1] == last]
    close = close or difflib.get_close_matches(name, shown, 1, 0.6)
    return f"; did you mean {dashes}{close[0]}?" if close else "; --help shows all"


def _file_of(name: str, configs: Sequence[str]) -> str:
    """The configuration that has a key."""
    for config in configs:
        content: Any = content_of(config)
        for part in name.split("."):
            content = content.get(part, SUPPRESS) if isinstance(content, dict) else SUPPRESS
        if content is not SUPPRESS:
            return config
    return configs[-1] if configs else "the options"


def _in_words(kind: Any) -> str:
    """What a type wants: `int | None` is an integer or null."""
    plain = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
        NoneType: "null",
        dict: "a mapping such as {name: value}",
    }
    if kind in plain:
        return plain[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(_in_words, inner))))
    if origin is Literal:
        return f"one of {', '.join(dict.fromkeys(map(str, inner)))}"
    if origin in (list, tuple):
        return "a list such as [1, 2]"
    if origin is dict:
        return plain[dict]
    return ""


def _why_not_importable(path: str) -> str | None:
    """Why a function cannot be imported by its dotted path; None if it can, or the value is no such path."""
    module, _, name = path.strip("'\"").rpartition(".")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", module):
        return None
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        return f"no module '{error.name}'. Call the command where it lies, or add its folder to PYTHONPATH"
    except Exception as error:  # of the user's code
        return f"cannot import '{module}' ({type(error).__name__}: {error})"
    return None if hasattr(found, name) else f"module '{module}' has no '{name}'"
