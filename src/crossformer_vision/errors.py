"""The one error that a person, not a programmer, can put right."""

import difflib
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Bad input: one line that names the file or value and says what to do.

    The command prints it without a traceback. A data loader's worker hands an error on as text with its
    traceback; only the last line, this error's own, is kept.
    """

    def __init__(self, message: str) -> None:
        own = message.rsplit("UserError: ", 1)[-1].strip()
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in own))  # of a file, say


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises a UserError with what may be meant, unless the value is one of the choices."""
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, 1)
        meant = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"{name}={value!r}: it is one of {', '.join(map(repr, choices))}{meant}")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises a UserError unless the value is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        upper = "" if high == math.inf else f" to {high}"
        raise UserError(f"{name}={value!r}: it is a number from {low}{upper}")


def check_names(source: Any, names: Sequence[str]) -> None:
    """Raises a UserError if a class has no name, or two have the same."""
    if len(set(names)) < len(names) or not all(str(name).strip() for name in names):
        shown = ", ".join(map(repr, names[:5]))
        raise UserError(f"{source}: a class without a name, or two of one name: {shown}")


def check_output(option: str, output: str | PathLike[str], *inputs: str | PathLike[str] | None) -> None:
    """Refuse an output path that is also an input, so that no input is overwritten.

    Args:
        option: Option that names the output, for the message.
        output: File to be written.
        inputs: Files that are read. ``None`` and paths that do not exist are skipped.

    Raises:
        UserError: If the output is one of the inputs, under any spelling or link.
    """
    path = Path(output)
    for source in inputs:
        if source is None or not Path(source).exists():
            continue
        same = path.exists() and path.samefile(source)
        if same or path.resolve() == Path(source).resolve():
            raise UserError(f"{option} {output}: is an input of this command. Choose another path")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: ``1 image``, ``2 images``, ``3 boxes``.

    Args:
        number: How many.
        noun: Singular.
        plural: Plural, if it is not the singular with an s.
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


class NoSuchSplit(UserError):
    """The folder or file of a split is not there; without training images, validation may do by itself."""
