"""How a command ends that does not end well: one ``error:`` line, an exit code, and no word of anybody else's."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import click


def silence_numpy() -> None:
    """Keep torch from warning, here and in worker processes, that NumPy is missing: nothing here needs it."""
    words = "Failed to initialize NumPy"
    warnings.filterwarnings("ignore", message=words)
    kept = os.environ.get("PYTHONWARNINGS", "")
    if words not in kept:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [kept, f"ignore:{words}"]))


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: whatever ends in order at Ctrl-C does so here too."""


def terminate(_signal: int, _frame: object) -> NoReturn:
    """Handle SIGTERM."""
    raise TerminatedError


def again() -> str:
    """What to do after an interruption: only what writes a checkpoint has anything to carry on with."""
    if sys.argv[1:2] and sys.argv[1] in ("quantize", "convert", "dequantize"):
        without = ", without --restart," if "--restart" in sys.argv else ""  # which would discard what is there
        return f"run the same command again{without} to carry on"
    return "run it again"


def usage(error: click.UsageError) -> str:
    """What is wrong with a command's words, and where to read which are right."""
    command = error.ctx.command_path if error.ctx else "nemotron-fp8"
    return f"{error.format_message().removesuffix('.')} (see {command} --help)"


def fail(message: str, code: int = 1) -> None:
    """Print one ``error:`` line and exit."""
    from nemotron_fp8.show import note

    note("error: " + " ".join(message.split()))
    sys.exit(code)
