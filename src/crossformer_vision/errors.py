"""Errors that users can fix, and helpers for their messages."""

import difflib
import math
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path


class UserError(ValueError):
    """Invalid input, described in one line that names the file or value and says what to do.

    The command prints it without a traceback. If a DataLoader worker raised the error, only the original
    message is kept.

    Args:
        message: Error message. Unprintable characters, as in file names, are escaped.
    """

    def __init__(self, message: str) -> None:
        own = message.rsplit("UserError: ", 1)[-1].strip()
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in own))


class MissingExtra(UserError):
    """An optional dependency is not installed."""


class NoSuchSplit(UserError):
    """The folder or file of a split does not exist."""


_collected: ContextVar["list[UserError] | None"] = ContextVar("collected", default=None)


@contextmanager
def collect_label_errors() -> Iterator[list[UserError]]:
    """Within the block, readers skip invalid labels and collect their errors instead of raising the first.

    Yields:
        List that the errors are added to.
    """
    errors: list[UserError] = []
    token = _collected.set(errors)
    try:
        yield errors
    finally:
        _collected.reset(token)


def raise_or_collect(error: UserError) -> None:
    """Raise the error of one label, or add it to the list of ``collect_label_errors``."""
    errors = _collected.get()
    if errors is None:
        raise error
    errors.append(error)


def error_line(error: BaseException) -> str:
    """The message of an error in one line, or its type if it has none.

    Args:
        error: Any error. For an error from a DataLoader worker, the original message is returned.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, ArgumentError):
        return " ".join(lines)
    return lines[-1 if "Original Traceback" in str(error) else 0]


def did_you_mean(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """A suggestion for a misspelled name.

    Args:
        name: What the user typed.
        known: Valid names.
        cutoff: Required similarity, from 0 to 1.

    Returns:
        ``. Did you mean 'X'?``, or an empty string if nothing is similar.
    """
    close = difflib.get_close_matches(name, known, 1, cutoff)
    return f". Did you mean '{close[0]}'?" if close else ""


def missing_extra(error: ImportError, extra: str) -> MissingExtra:
    """The error to raise if an optional dependency is not installed.

    Args:
        error: What the import raised.
        extra: Extra of this package that installs the dependency.
    """
    return MissingExtra(f"{error.name} is not installed: pip install 'crossformer-vision[{extra}]'")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that an argument is one of several values.

    Args:
        name: Name of the argument.
        value: Its value.
        choices: Valid values.

    Raises:
        UserError: If it is not, with a suggestion.
    """
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise UserError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}{hint}")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Check that an argument is a number in a range.

    Args:
        name: Name of the argument.
        value: Its value.
        low: Smallest valid value.
        high: Largest valid value.

    Raises:
        UserError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UserError(f"{name}={value!r}: must be a number {bounds}")


def check_names(source: object, names: Sequence[str]) -> None:
    """Check that class names are not empty and unique.

    Args:
        source: Where the names are from, for the message.
        names: Class names.

    Raises:
        UserError: If they are not.
    """
    if not all(str(name).strip() for name in names):
        raise UserError(f"{source}: a class has no name")
    if repeated := [name for n, name in enumerate(names) if name in names[:n]]:
        raise UserError(f"{source}: two classes have the name '{repeated[0]}'")


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
        number: Count.
        noun: Singular.
        plural: Plural, if it is not the singular with an s.
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
