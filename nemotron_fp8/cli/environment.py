"""Environment variables of the options: their names, and errors and notes about their values."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

PREFIX = "NEMOTRON_FP8_"
OTHERS = frozenset(("NEMOTRON_FP8_TRACEBACK", "NEMOTRON_FP8_NATIVE"))
"""Variables of this package that belong to no option."""
OWN = frozenset((("evaluate", "--activations"), ("evaluate", "--max-memory"), ("calibrate", "--max-memory")))
"""Options that share their name with another one but not its values: they have the variable of their command only."""
SIMILARITY = 0.85
"""Least similarity, from 0 to 1, of an unknown variable to the one that it may stand for."""


def variables_of(command: str, option: click.Option) -> list[str]:
    """Return the variables of an option: the one of its command, which goes before, and the one of all commands.

    Args:
        command: name of the command.
        option: the option; its longest name counts.
    """
    longest = max(option.opts, key=len)
    word = longest.lstrip("-")
    words = (f"{command}_{word}",) if (command, longest) in OWN else (f"{command}_{word}", word)
    return [PREFIX + re.sub(r"\W", "_", each).upper() for each in words]


def name_variables(command: str, params: Iterable[click.Parameter]) -> None:
    """Give every option of a command its variables."""
    for param in params:
        if isinstance(param, click.Option) and param.envvar is None and not param.is_eager:
            param.envvar = variables_of(command, param)


def taken(ctx: click.Context) -> Iterator[tuple[click.Option, str, str]]:
    """Yield every option of the running command whose value is of the environment, with its variable and the text."""
    for param in ctx.command.get_params(ctx):
        if isinstance(param, click.Option) and ctx.get_parameter_source(str(param.name)) is ParameterSource.ENVIRONMENT:
            for name in param.envvar or ():
                if value := os.environ.get(name):
                    yield param, name, value
                    break


def origin_of(ctx: click.Context, message: str, arguments: Iterable[str] = ()) -> str:
    """Return the end of an error message: the variables that set what the message is about; empty if none does.

    Args:
        ctx: context of the command.
        message: the message.
        arguments: names of the wrong options.
    """
    wrong = set(arguments)
    names = [
        name
        for param, name, value in taken(ctx)
        if wrong & {param.name}
        or any(re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", message) for option in param.opts)
        or (len(value) > 1 and not param.is_flag and repr(value) in message)
    ]
    return f" ({', '.join(names)} of the environment)" if names else ""


def unknown_variables(known: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """Return a note about every variable that looks like a misspelled one of an option.

    Args:
        known: variables of the options.
        environment: variables that are set.
    """
    names = sorted(known)
    notes = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in OTHERS and name not in names:
            found = get_close_matches(name.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in names], 1)
            near = get_close_matches(name, [PREFIX + each for each in found], 1, SIMILARITY)
            if near:
                notes.append(f"{name} of the environment belongs to no option; did you mean {near[0]}?")
    return notes


def has_unknown(known: Iterable[str], environment: Mapping[str, str]) -> bool:
    """Return True if a variable with the prefix of this command is not among the known ones."""
    return any(name.startswith(PREFIX) for name in environment.keys() - OTHERS - set(known))
