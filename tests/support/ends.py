"""Run the command in a process, tell it to end, and judge how it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.doubles import alive, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

BOUND = 10.0
"""Seconds from the signal to the end, whatever the command does: the shortest notice of schedulers is ten seconds."""
MAIN = "from nemotron_fp8.cli.main import main; main()"
DEFAULTS = """import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
"""Handlers of a terminal; a test run in the background, or under nohup, ignores these signals."""


def descendants(pid: int) -> set[int]:
    """Return the numbers of all live processes below a process."""
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with suppress(OSError, IndexError):
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level} - found
        found |= level
    return found


@dataclass
class Command:
    """A running command.

    Attributes:
        process: its process, the leader of a group of its own.
    """

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, *words: object, program: str = MAIN, env: Mapping[str, str] | None = None) -> Command:
        """Start the command line; ``program`` may change the package before."""
        return cls(
            subprocess.Popen(
                [sys.executable, "-c", DEFAULTS + program, *map(str, words)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )

    def end(self, number: signal.Signals = signal.SIGTERM, *, group: bool = False, again: float | None = None) -> float:
        """Send a signal, and check the end: code, one line on stderr, no process left; return the seconds.

        Args:
            number: the signal.
            group: send it to every process of the group, as service managers do.
            again: send it once more after so many seconds.
        """
        below = descendants(self.process.pid)
        begun = time.monotonic()
        send = os.killpg if group else os.kill
        send(self.process.pid, number)
        if again is not None:
            time.sleep(again)
            send(self.process.pid, number)
        out, err = self.process.communicate(timeout=60)
        seconds = time.monotonic() - begun
        word = "interrupted" if number == signal.SIGINT else f"terminated by {number.name}"
        lines = [line for line in err.splitlines() if line]
        assert self.process.returncode == 128 + number, err
        assert lines[-1].startswith(f"error: {word}; run the "), err
        assert sum(line.startswith("error:") for line in lines) == 1, err
        assert "Traceback" not in err
        assert out == ""
        assert seconds < BOUND
        wait_until(lambda: not any(map(alive, below)), BOUND)
        return seconds
