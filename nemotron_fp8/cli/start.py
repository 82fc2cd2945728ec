"""Entry point of the ``nemotron-fp8`` command."""

from __future__ import annotations

import signal

from nemotron_fp8.cli import streams


def main() -> None:
    """Prepare the streams, import the command, and run it.

    Until the imports are done, Ctrl-C ends the process at once and without a word: Python would print a traceback.
    """
    streams.prepare()
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from nemotron_fp8.cli.main import main as run

    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    try:
        run()
    finally:  # the process ends: another signal would end in a traceback of Python's own clean-up
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
