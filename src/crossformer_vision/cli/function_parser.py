"""Run a typed function with options from the command line.

Positional-only parameters become positional arguments and keyword-only parameters become options. Types,
defaults and help come from the signature and the Google-style docstring.
"""

import inspect
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

from crossformer_vision.training.arguments import is_number
from crossformer_vision.training.option_errors import explain
from crossformer_vision.types import Kwargs


def run_function(function: Callable[..., None], command: str, arguments: Sequence[str]) -> None:
    """Parse arguments for a function and call it.

    Args:
        function: Function with positional-only and keyword-only parameters.
        command: Name of the command, for help and messages.
        arguments: Arguments after the name of the command. Options are spelled with hyphens or underscores.

    Raises:
        ArgumentError: If an argument is missing, unknown or has a wrong value.
    """
    parser = build_parser(function, command)
    arguments = [_hyphenate(argument) for argument in arguments]
    try:
        values = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise ArgumentError(None, explain(str(error), parser, arguments, [])) from error
    positional = [
        values.pop(name)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind == parameter.POSITIONAL_ONLY
    ]
    function(*positional, **values)


def _hyphenate(argument: str) -> str:
    """Spell an option with hyphens: ``--score_threshold=0.5`` becomes ``--score-threshold=0.5``."""
    if not argument.startswith("--") or is_number(argument):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def build_parser(function: Callable[..., None], command: str) -> ArgumentParser:
    """Parser for the parameters of a function."""
    documentation = docstring_parser.parse(inspect.getdoc(function) or "")
    helps = {parameter.arg_name: parameter.description or "" for parameter in documentation.params}
    descriptions = (documentation.short_description, documentation.long_description)
    parser = ArgumentParser(
        prog=f"crossformer {command}",
        description="\n\n".join(filter(None, descriptions)),
        exit_on_error=False,
    )
    hints = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        _add_argument(parser, parameter, hints[name], " ".join(helps[name].split()))
    return parser


def _add_argument(parser: ArgumentParser, parameter: inspect.Parameter, kind: object, help: str) -> None:
    """Add the argument of one parameter."""
    is_required = parameter.default is parameter.empty
    options: Kwargs = {"help": help}
    if get_origin(kind) in (Union, UnionType):  # X | None
        alternatives = [alternative for alternative in get_args(kind) if alternative is not NoneType]
        kind = alternatives[0] if len(alternatives) == 1 else kind
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        options["nargs"] = "+" if is_required or parameter.kind == parameter.KEYWORD_ONLY else "*"
    if not is_required:
        options["default"] = parameter.default
    if parameter.kind == parameter.POSITIONAL_ONLY:
        parser.add_argument(parameter.name, type=kind, **options)
        return
    flag = "--" + parameter.name.replace("_", "-")
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=help)
    else:
        parser.add_argument(flag, type=kind, required=is_required, **options)
