"""Command lines and configurations as they are, before anything is parsed."""

import difflib
import math
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from crossformer_vision.errors import UserError


def find_config(name: str) -> str:
    """A configuration file: a path, or a name among those that come with the library."""
    if Path(name).is_file():
        return name
    here = Path(__file__).parents[1]
    below = name.split("configs/", 1)[-1]
    known: list[str] = []
    for folder in (here / "configs", here.parents[1] / "configs"):  # installed, or a checkout
        if below and (folder / below).is_file():
            return str(folder / below)
        known += [path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")]
    raise UserError(f"{name}: no such configuration file{suggest(name, known)}")


def suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def take(args: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from `args` and return the value."""
    for i, arg in enumerate(args):
        if arg == option:
            if i + 1 == len(args):
                raise ArgumentError(None, f"{option} needs a value")
            del args[i]
            return args.pop(i)
        if arg.startswith(option + "="):
            return args.pop(i).split("=", 1)[1]
    return None


def has(args: Sequence[str], *options: str) -> bool:
    """Whether one of the options is given."""
    return any(arg.split("=", 1)[0] in options for arg in args)


def in_utf8(config: str) -> str:
    """A configuration's path, or where it is not of ASCII alone its content, escaped, in a line.

    The parser takes either, but reads files in the system's encoding, which need not be that of the file.
    """
    try:
        text = Path(config).read_text(encoding="utf-8-sig")
        content = {} if text.isascii() else get_loader("yaml")(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # the parser will say it
        return config
    return yaml.safe_dump(content, default_flow_style=True, width=math.inf) if content else config


def content_of(config: str) -> dict[str, Any]:
    """Of a configuration; empty where it cannot be read, which the parser will say."""
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}
    return content if isinstance(content, dict) else {}
