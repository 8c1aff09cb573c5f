"""Command-line arguments as lists of strings, before they are parsed."""

from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path

from crossformer_vision.errors import UserError

# Aliases of common options, as in other trainers.
SHORT_OPTIONS = {
    "--data": "--data.root",
    "--epochs": "--trainer.max_epochs",
    "--batch-size": "--data.batch_size",
    "--lr": "--model.lr",
    "--seed-everything": "--seed_everything",
    "--print-config": "--print_config",
    "-c": "--config",
}
DATA_FILES = ("data.yaml", "dataset.yaml")  # of data sets in YOLO's format
ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "auto")


def normalize(arguments: Sequence[str]) -> list[str]:
    """Spell the arguments of ``train`` and ``validate`` in the long form that the parser expects.

    ``my_images --epochs 3 --data.batch-size 8`` becomes
    ``--data.root my_images --trainer.max_epochs 3 --data.batch_size 8``.

    Args:
        arguments: Arguments after the name of the command.

    Returns:
        The same arguments, each option separate from its value and spelled with underscores.
    """
    result: list[str] = []
    for argument in arguments:
        if argument.startswith("-") and not is_number(argument):
            name, equals, value = argument.partition("=")
            result += [_long_name(name), value] if equals else [_long_name(name)]
        else:
            result.append(argument)
    if result and not result[0].startswith("-"):
        first = Path(result[0])
        if first.is_dir() or (first.is_file() and (first.name in DATA_FILES or first.suffix == ".csv")):
            result.insert(0, "--data.root")
    return _expand_device(result)


def _expand_device(arguments: list[str]) -> list[str]:
    """Replace ``--device`` by Lightning's options: the accelerator, and the index if there is one."""
    device = option_value(arguments, "--device")
    if device is None:
        return arguments
    kind, _, index = device.partition(":")
    if kind.isdecimal():
        kind, index = "gpu", kind
    if kind not in ACCELERATORS or (index and not index.isdecimal()):
        raise UserError(f"--device {device}: not a device. Use cpu, gpu, mps, or the index of a GPU")
    expanded = [*without_option(arguments, "--device"), "--trainer.accelerator", kind]
    return [*expanded, "--trainer.devices", f"{index},"] if index else expanded


def _long_name(name: str) -> str:
    """The option in the parser's spelling."""
    hyphenated = name.replace("_", "-")
    if hyphenated in SHORT_OPTIONS:
        return SHORT_OPTIONS[hyphenated]
    is_dotted = name.startswith("--") and "." in name
    return "--" + name.removeprefix("--").replace("-", "_") if is_dotted else name


def is_number(argument: str) -> bool:
    """Whether an argument that starts with a hyphen is a negative number."""
    try:
        float(argument)
    except ValueError:
        return False
    return True


def option_value(arguments: Sequence[str], option: str) -> str | None:
    """Value of an option, the last one if it is given repeatedly.

    Args:
        arguments: Normalized arguments.
        option: Name with hyphens, such as ``--task``.

    Raises:
        ArgumentError: If the option is the last argument, without a value.
    """
    values = option_values(arguments, option)
    return values[-1] if values else None


def option_values(arguments: Sequence[str], option: str) -> list[str]:
    """All values of an option, in their order. See ``option_value``."""
    values = []
    for index, argument in enumerate(arguments):
        if argument == option:
            if index + 1 == len(arguments):
                raise ArgumentError(None, f"{option} needs a value")
            values.append(arguments[index + 1])
    return values


def without_option(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments without an option and its values."""
    skipped = {i for i, argument in enumerate(arguments) if argument == option}
    skipped |= {i + 1 for i in skipped}
    return [argument for i, argument in enumerate(arguments) if i not in skipped]


def has_option(arguments: Sequence[str], *options: str) -> bool:
    """Whether one of the options is given."""
    return any(argument in options for argument in arguments)
