"""How a command ends that does not end well: one ``error:`` line, an exit code, and no word of anybody else's."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from threading import Event
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
    from nemotron_fp8.cli.output import note

    note("error: " + " ".join(message.split()))
    sys.exit(code)


def run(command: click.Command) -> None:
    """Run a command of the command line; whatever goes wrong ends as this module says."""
    import click

    from nemotron_fp8.errors import NemotronFp8Error

    # Read when the Hub's client is imported: its bars would run through ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Read when Ray is imported: it tells of workers that end on stdout, where our results go.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    silence_numpy()
    told = Event()

    def terminate(_signal: int, _frame: object) -> NoReturn:
        """Machines that are taken away say so by SIGTERM first: that is an end like Ctrl-C, not one without a word."""
        told.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        stopped = command(standalone_mode=False)  # an exit code, where click ends a command by itself
    except click.UsageError as error:
        fail(usage(error), 2)
    except click.ClickException as error:
        fail(error.message)
    except (click.Abort, KeyboardInterrupt):
        # Not told by the exception: click makes another of it, and so does Ray where it interrupts its C++ code.
        if told.is_set():
            fail(f"told to end (SIGTERM); {again()}", 143)
        fail(f"interrupted; {again()}", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except NemotronFp8Error as error:
        fail(str(error))
    except OSError as error:  # of a path that was given: a name too long, a folder on the way that is closed to us
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    else:
        if stopped:
            sys.exit(stopped)
