"""Scripts of the completion, one for each shell."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

PROGRAM = "nemotron-fp8"
VARIABLE = "_NEMOTRON_FP8_COMPLETE"
"""Variable through which a script asks the command for words."""


def script_of(command: click.Command, shell: str) -> str:
    """Return the script that makes a shell complete the command.

    Args:
        command: the command.
        shell: ``bash``, ``zsh`` or ``fish``.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    made = kind(command, {}, PROGRAM, VARIABLE)
    # The method `source` of bash also looks for the version of the bash here; the script may be for another machine.
    return made.source_template % made.source_vars()
