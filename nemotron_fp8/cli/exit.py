"""Turn exceptions and signals into one ``error:`` line and an exit code."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from threading import Event
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import click


def silence_numpy() -> None:
    """Suppress torch's warning about missing NumPy, here and in worker processes: this package does not need NumPy."""
    words = "Failed to initialize NumPy"
    warnings.filterwarnings("ignore", message=words)
    kept = os.environ.get("PYTHONWARNINGS", "")
    if words not in kept:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [kept, f"ignore:{words}"]))


def again() -> str:
    """Return the advice after an interruption; only commands that write a checkpoint can be resumed."""
    if sys.argv[1:2] and sys.argv[1] in ("quantize", "convert", "dequantize"):
        # --restart would discard the finished shards.
        without = ", without --restart," if "--restart" in sys.argv else ""
        return f"run the same command again{without} to resume"
    return "run the command again"


def usage(error: click.UsageError) -> str:
    """Return the message of a usage error, with the command that prints the usage."""
    command = error.ctx.command_path if error.ctx else "nemotron-fp8"
    return f"{error.format_message().removesuffix('.')} (see {command} --help)"


def fail(message: str, code: int = 1) -> None:
    """Print one ``error:`` line and exit."""
    from nemotron_fp8.cli.output import note

    note("error: " + " ".join(message.split()))
    sys.exit(code)


def run(command: click.Command) -> None:
    """Run a command; end the process with one ``error:`` line and an exit code if it fails."""
    import click

    from nemotron_fp8.errors import NemotronFp8Error

    # The Hub's client reads this on import: its progress bars would interfere with the progress line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Ray reads this on import: it would report ended workers on stdout, among the results.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    silence_numpy()
    # A plan of 100,000 tensors creates a million objects and frees none: frequent collections cost a fifth of its time.
    gc.set_threshold(100_000)
    terminated = Event()

    def terminate(_signal: int, _frame: object) -> NoReturn:
        """Interrupt the command like Ctrl-C: schedulers send SIGTERM before they reclaim a machine."""
        terminated.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        stopped = command(standalone_mode=False)  # an exit code, if click itself ends the command
    except click.UsageError as error:
        fail(usage(error), 2)
    except click.ClickException as error:
        fail(error.message)
    except (click.Abort, KeyboardInterrupt):
        # The exception does not show the signal: click replaces it, and so does Ray when it interrupts its C++ code.
        if terminated.is_set():
            fail(f"terminated by SIGTERM; {again()}", 143)
        fail(f"interrupted; {again()}", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except NemotronFp8Error as error:
        fail(str(error))
    except OSError as error:  # from a path argument: a name that is too long, or a folder without permission
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    else:
        if stopped:
            sys.exit(stopped)
