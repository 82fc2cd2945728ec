"""Output of ``help environment``: the variables of the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.cli.environment import PREFIX
from nemotron_fp8.cli.output import print_table, put

if TYPE_CHECKING:
    from collections.abc import Mapping

INTRO = """\
Every option has two variables of the environment: one for all commands that
have the option, and one for a single command, which goes before:

  NEMOTRON_FP8_MAX_MEMORY=1GiB            --max-memory 1GiB of all commands
  NEMOTRON_FP8_QUANTIZE_MAX_MEMORY=1GiB   that of quantize alone

The options --activations and --max-memory of evaluate and --max-memory of
calibrate have the variable of their command only, because their values differ.

Flags take 1, 0, true or false. Values of a repeatable option are separated by
spaces. An empty variable counts as none. The command line goes before the
environment, the environment before a recipe file. The command notes the
variables that it takes, and one that resembles the variable of an option.
"""


def shared_variables(variables: Mapping[str, list[tuple[str, str]]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the variables for all commands, each with its option and the commands that have the option.

    Args:
        variables: all variables, as `nemotron_fp8.cli.commands.Commands.variables` returns them.
    """
    return {
        name: (uses[0][1], tuple(command for command, _ in uses))
        for name, uses in sorted(variables.items())
        if name == PREFIX + uses[0][1].lstrip("-").replace("-", "_").upper()
    }


def show_variables(variables: Mapping[str, list[tuple[str, str]]]) -> None:
    """Print the variables for all commands."""
    put(INTRO)
    print_table(
        [("variable", "option"), *((name, option) for name, (option, _) in shared_variables(variables).items())]
    )
