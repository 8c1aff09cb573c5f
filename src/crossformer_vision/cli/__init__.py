"""The ``crossformer`` command: one module per subcommand, which parses options and calls one function."""

import os
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable
from importlib import import_module

import crossformer_command
from crossformer_vision.cli.process import keep_freed_memory, replace_unencodable_characters
from crossformer_vision.errors import did_you_mean, error_line

COMMANDS = (
    "check",
    "train",
    "validate",
    "predict",
    "inspect",
    "compare",
    "export",
    "share",
    "benchmark",
    "benchmark-data",
    "demo",
    "info",
    "download",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command-line arguments after the program. ``None`` for ``sys.argv[1:]``.

    Returns:
        Exit code: 0, 1 for an error, 2 for wrong usage, 128 plus its number for a signal.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if crossformer_command.print_help_or_version(arguments):
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        hint = (
            did_you_mean(command, [*COMMANDS, "--version", "--help"])
            or f". Choose from {', '.join(COMMANDS)}"
        )
        print(f"crossformer: error: unknown command '{command}'{hint}", file=sys.stderr)
        return 2
    keep_freed_memory()
    replace_unencodable_characters()
    run_command: Callable[[list[str]], None] = import_module(f"{__name__}.{command.replace('-', '_')}").main
    try:
        run_command(rest)
    except BrokenPipeError:  # the process that reads the output has ended, such as ``head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("crossformer: stopped", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        return report_error(error)
    return 0


def report_error(error: Exception) -> int:
    """Print an error as one line.

    Returns:
        Exit code: that of a stopped run, 2 for wrong usage, else 1.
    """
    code = getattr(error, "exit_code", None)
    line = error_line(error)
    if isinstance(code, int):  # training.interruption.Stopped
        print(f"\n{line}", file=sys.stderr)
        return code
    if "torchvision::nms does not exist" in line:
        line = (
            "torchvision does not match torch. Install the two together: "
            "pip install --force-reinstall torch torchvision"
        )
    print(f"crossformer: error: {line}", file=sys.stderr)
    return 2 if isinstance(error, ArgumentError) else 1
