"""Turn exceptions and signals into one ``error:`` line and an exit code."""

from __future__ import annotations

import errno
import gc
import os
import re
import shlex
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nemotron_fp8._process import RESTART
from nemotron_fp8._process import command as running
from nemotron_fp8._secrets import masked_words
from nemotron_fp8.cli import monitor, streams
from nemotron_fp8.cli.signals import Signals, word_of
from nemotron_fp8.cli.streams import silence
from nemotron_fp8.errors import printable

if TYPE_CHECKING:
    import click


TRACEBACK = "NEMOTRON_FP8_TRACEBACK"
"""Variable of the environment that shows the traceback of an internal error."""


def silence_numpy() -> None:
    """Suppress torch's warning about missing NumPy, here and in worker processes: this package does not need NumPy."""
    words = "Failed to initialize NumPy"
    warnings.filterwarnings("ignore", message=words)
    kept = os.environ.get("PYTHONWARNINGS", "")
    if words not in kept:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [kept, f"ignore:{words}"]))


def again() -> str:
    """Return the advice after an interruption; other commands have nothing to resume."""
    if sys.argv[1:2] and sys.argv[1] in ("quantize", "convert", "dequantize", "calibrate", "evaluate"):
        given = [RESTART] if RESTART in sys.argv else []
        given += [name for name in running.variables if name.endswith("_RESTART")]
        without = f", without {' and '.join(given)}," if given else ""
        return f"run the same command again{without} to resume"
    return "run the command again"


def usage(error: click.UsageError) -> str:
    """Return the message of a usage error, with the command that prints the usage."""
    command = error.ctx.command_path if error.ctx else "nemotron-fp8"
    return f"{error.format_message().removesuffix('.')} (see {command} --help)"


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one ``error:`` line and exit."""
    from nemotron_fp8.cli.output import note

    text = " ".join(message.split())
    note(f"error: {text}")
    monitor.current.end(code, text)
    silence(sys.stdout)  # the error is the last word, also if results could not be flushed
    sys.exit(code)


def _last_words(number: int) -> None:
    """Write the ``error:`` line of a hard end past the streams, whose locks another thread may hold."""
    text = f"{word_of(number)}; {again()}"
    if streams.redirect is None:
        os.write(2, f"error: {text}\n".encode())
    monitor.current.end(128 + number, text)


def run(command: click.Command) -> None:
    """Run a command; end the process with one ``error:`` line and an exit code if it fails."""
    streams.prepare()
    running.folder, running.variables = "", {}
    running.line = shlex.join(["nemotron-fp8", *masked_words(sys.argv[1:], os.environ)])
    monitor.begin()
    try:
        running.folder = str(Path.cwd())
    except OSError:  # libraries look it up when they are imported
        fail("the current folder was deleted, or is not accessible; change to another folder")
    signals = Signals(_last_words)
    signals.watch()
    try:
        _run(command)
        streams.finish()
        monitor.current.end(0)
    except KeyboardInterrupt:
        # The exception does not show the signal: click replaces it, and so does Ray when it interrupts its C++ code.
        number = signals.first or signal.SIGINT
        signals.claim()
        with suppress(SystemExit):
            fail(f"{word_of(number)}; {again()}", 128 + number)
        signals.leave(128 + number)
    except BrokenPipeError:  # the reader of the results is gone, as in `| head`
        silence(sys.stdout)
        monitor.current.end(1, "the reader of the results is gone")
        sys.exit(1)
    except MemoryError:
        fail("out of memory; lower the limit of the working buffers (--max-memory), or free memory")
    except OSError as error:  # from a path argument: a name that is too long, or a folder without permission
        fail(_system_error(error))
    finally:
        signals.close()
        monitor.current.end(1)
        running.line = ""


def _run(command: click.Command) -> None:
    import click

    from nemotron_fp8.errors import NemotronFp8Error

    # The Hub's client reads this on import: its progress bars would interfere with the progress line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Ray reads this on import: it would report ended workers on stdout, among the results.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    silence_numpy()
    # A plan of 100,000 tensors creates a million objects and frees none: frequent collections cost a fifth of its time.
    gc.set_threshold(100_000)
    try:
        stopped = command(standalone_mode=False)  # an exit code, if click itself ends the command
    except click.UsageError as error:
        fail(usage(error), 2)
    except click.ClickException as error:
        fail(error.message)
    except click.Abort:
        raise KeyboardInterrupt from None
    except NemotronFp8Error as error:
        fail(str(error))
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        if limit := _limit_of(error):
            fail(limit)
        fail(
            f"internal error: {type(error).__name__}: {printable(str(error)[:1000])[1:-1]}; please report it, with the"
            f" output of the same command under {TRACEBACK}=1"
        )
    if stopped:
        streams.finish()
        monitor.current.end(stopped)
        sys.exit(stopped)


def _limit_of(error: Exception) -> str | None:
    """Return the message of an error behind which is a limit of the system; None for any other error."""
    text = str(error)
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return "the system allows no more threads; raise the limit (ulimit -u), or lower --threads"
    if isinstance(error, ImportError) and re.search(r"failed to map|cannot allocate|Cannot allocate", text):
        return "out of memory, or of address space (ulimit -v), while a library was loaded"
    if isinstance(error, ImportError) and "Too many open files" in text:
        return "too many open files; raise the limit (ulimit -n)"
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:
        return "out of memory; lower the limit of the working buffers (--max-memory), or free memory"
    return None


def _system_error(error: OSError) -> str:
    """Return the message of an error of the operating system."""
    what = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        what += "; raise the limit of open files (ulimit -n)"
    place = error.filename if error.filename is not None else None
    return f"{place}: {what}" if place else what
