"""Signals that end the command: a clean stop, and a hard one where the clean stop takes too long.

Python runs a handler between two instructions of the main thread, which may be in a call of a library for minutes. The
C code of Python therefore writes the number of each signal into a pipe, and a thread reads it. That thread sets
`stopping`, so that other threads stop their work, and ends the process if the main thread has not done so in time or
if a second signal comes. An end at any moment is safe: journals and results are those of a killed run.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nemotron_fp8._process import stopping
from nemotron_fp8.cli.streams import silence

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


STOP_SECONDS = 7.5
"""Longest clean stop. Schedulers kill 10 s to 30 s after SIGTERM."""
BURST_SECONDS = 0.5
"""Signals within this time are one: a terminal that closes sends several, and ``timeout`` sends each twice."""
SAY_SECONDS = 0.5
"""Longest time for logs and metrics to record a hard end."""
SIGNALS = {signal.SIGINT: "", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
"""Signals that end the command: Ctrl-C; schedulers send SIGTERM before they reclaim a machine, and a terminal sends
SIGHUP when it closes."""


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C ended the command."""


def word_of(number: int) -> str:
    """Return what a signal did to the command."""
    return "interrupted" if number == signal.SIGINT else f"terminated by {SIGNALS[signal.Signals(number)]}"


class Signals:
    """The signals of one command.

    Args:
        say: prints the last words of a hard end: the number of the signal. It must not wait for another thread.

    Attributes:
        first: number of the first signal; None before.
    """

    def __init__(self, say: Callable[[int], None]) -> None:
        self.first: int | None = None
        self._say = say
        self._raised = False
        self._claimed = threading.Lock()
        self._before: dict[int, Any] = {}
        self._over = False
        self._writer = -1

    def watch(self) -> None:
        """Let the signals interrupt the command; signals that are ignored, as under nohup, stay ignored."""
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = before
                signal.signal(number, self._interrupt)
        reader, self._writer = os.pipe()
        try:
            threading.Thread(target=self._wait, args=(reader,), name="signals", daemon=True).start()
        except RuntimeError:  # the system allows no more threads: signals still interrupt, without a hard end
            os.close(reader)
            os.close(self._writer)
            self._writer = -1
            return
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def close(self) -> None:
        """Restore the handlers: the command is done. After a signal they are without effect, and the end is watched."""
        self._over = True
        if self.first is None:
            for number, before in self._before.items():
                signal.signal(number, before)
            if self._writer >= 0:
                signal.set_wakeup_fd(-1)
                os.close(self._writer)

    def claim(self) -> None:
        """Take over the last words; return never if a hard end has begun."""
        if not self._claimed.acquire(blocking=False):
            while True:  # the process ends
                time.sleep(STOP_SECONDS)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Raise the exception of the first signal in the main thread; the other thread handles further ones."""
        if self._over:
            return
        self.first = self.first or number
        stopping.set()
        if _is_importing(frame):
            # Libraries that import others in C++ drop the exception, or are left half imported.
            self.end()
        if self._raised:
            return
        self._raised = True
        raise KeyboardInterrupt if self.first == signal.SIGINT else Terminated

    def _wait(self, reader: int) -> None:
        """Wait for the first signal, then for the end of the process, of the time, or for another signal."""
        numbers: set[int] = set()
        while not numbers:
            data = os.read(reader, 64)
            if not data:
                os.close(reader)
                return
            numbers = self._before.keys() & set(data)
        begun = time.monotonic()
        self.first = self.first or min(numbers)
        stopping.set()
        while (left := begun + STOP_SECONDS - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0]:
                again = self._before.keys() & set(os.read(reader, 64))
                if again and time.monotonic() - begun > BURST_SECONDS:
                    break
        self.end()

    def leave(self, code: int) -> NoReturn:
        """Exit after the last words; threads that wait for a server are left behind."""
        silence(sys.stdout)
        if self.first is not None:
            for number in self._before:  # Python's own end would give them their default actions again
                signal.signal(number, signal.SIG_IGN)
            if any(not each.daemon for each in threading.enumerate() if each is not threading.main_thread()):
                end_process(code)
        sys.exit(code)

    def end(self) -> NoReturn:
        """End the process and its children now, with the last words unless they are printed already."""
        number = self.first or signal.SIGTERM
        if self._claimed.acquire(blocking=False):
            speaker = threading.Thread(target=self._say, args=(number,), daemon=True)
            speaker.start()
            speaker.join(SAY_SECONDS)
        end_process(128 + number)


def end_process(code: int) -> NoReturn:
    """End this process and its children at once; no thread is waited for."""
    for child in _children():
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
    os._exit(code)


def _children() -> list[int]:
    """Return the numbers of the child processes; empty where the system does not list them."""
    found: list[int] = []
    with suppress(OSError, ValueError):
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                found += map(int, (task / "children").read_bytes().split())
    return found


def _is_importing(frame: FrameType | None) -> bool:
    """Return True if a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
