"""Progress line of a conversion: redrawn on a terminal, printed at intervals elsewhere."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, TextIO

from nemotron_fp8._utils import format_bytes
from nemotron_fp8.cli import monitor, streams
from nemotron_fp8.cli.streams import write_aside

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from nemotron_fp8.progress import Direction, Progress


LIVE_SECONDS = 0.1
"""Minimum seconds between two updates on a terminal."""
PLAIN_SECONDS = 10.0
"""Minimum seconds between two lines in a pipe or a file."""
WINDOW_SECONDS = 20.0
"""Seconds over which the rate is averaged: a slow start affects it only for that long."""
WAYS: dict[Direction, str] = {"download": "down", "upload": "up"}
CLEAR = "\r\x1b[K"
SHARD_NUMBER = re.compile(r"-(\d+)-of-\d+\.safetensors$")


OF_PROGRAMS = ("run.started", "run.notice", "run.finished", "run.failed", "run.interrupted", "request.retried")
"""Events whose content the command prints in another place."""


class _Messages(logging.Handler):
    """Prints messages of the library as notes: warnings, or with ``level`` others too."""

    def __init__(self, note: Callable[[str], None], level: int = logging.WARNING) -> None:
        super().__init__(level)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        # The command itself prints notices, errors and waits.
        if getattr(record, "event", "") not in OF_PROGRAMS:
            self._note(record.getMessage())


class ProgressLine:
    """Prints the progress of a conversion on a stream: one line redrawn on a terminal, else plain lines.

    Warnings of the library are printed in between, as notes.

    Args:
        stream: usually standard error.
        quiet: print nothing.
        verbose: print what the library does, too: shards and stages as they finish, and requests that wait.
        clock: source of seconds, for the interval between lines.

    Attributes:
        seconds: time of the work so far, without its start; 0 if nothing was reported.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        verbose: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        quiet = quiet or streams.redirect is not None  # then the log has all of it
        self._stream, self._quiet, self._verbose, self._clock = stream, quiet, verbose and not quiet, clock
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = Lock()
        self._drawn = False
        self._last = clock()
        self.seconds = 0.0
        self._waiting = ""
        self._history: deque[tuple[float, int]] = deque()
        self._stage: Progress | None = None
        self._before = (0, 0.0)
        self._messages = _Messages(self._note, logging.INFO if self._verbose else logging.WARNING)
        self._level = logging.NOTSET

    def __enter__(self) -> Self:
        logger = logging.getLogger("nemotron_fp8")
        self._level = logger.level
        if not self._quiet:
            logger.addHandler(self._messages)
        if self._verbose and logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("nemotron_fp8")
        logger.removeHandler(self._messages)
        logger.setLevel(self._level)
        if self._verbose:
            self._finish_stage()
        if self._drawn and self._live:
            write_aside(self._stream, CLEAR)

    def update(self, progress: Progress) -> None:
        """Show the state of a conversion; may be called from any thread."""
        monitor.observe(progress)
        now = self._clock()
        self.seconds = max(self.seconds, progress.seconds)
        # While a transfer waits, no other update may come for half an hour.
        news = bool(progress.waiting) and progress.waiting != self._waiting
        early = now - self._last < (LIVE_SECONDS if self._live else PLAIN_SECONDS)
        if self._verbose:
            self._tell(progress, news and self._live)
        if self._quiet or (early and not news):
            return
        with self._lock:
            # Threads call in any order: skip a state that is older than the displayed one.
            if now <= self._last or (self._history and progress.seconds <= self._history[-1][0] < progress.seconds + 1):
                return
            if self._history and progress.seconds < self._history[-1][0]:
                self._history.clear()  # the count has restarted
            self._last, self._drawn, self._waiting = now, True, progress.waiting
            text = describe(progress, self._rate(progress))
            if self._live:
                text = f"\r{text[: columns_of(self._stream) - 1]}\x1b[K"
            write_aside(self._stream, text if self._live else f"{text}\n")

    def _tell(self, progress: Progress, waits: bool) -> None:
        """Print a stage that has finished, and on a terminal a wait, which the next update would overwrite."""
        with self._lock:
            stage = self._stage
            new = stage is not None and stage.stage != progress.stage
            if not new and (stage is None or progress.done >= stage.done):
                self._stage = progress
        if new:
            self._finish_stage(progress)
        if waits:
            self._note(f"retrying in {progress.waiting}")

    def _finish_stage(self, following: Progress | None = None) -> None:
        """Print the bytes, the time and the speed of the last stage, if it has a name."""
        with self._lock:
            stage, self._stage = self._stage, following
            (done, seconds), self._before = self._before, (0, 0.0)
            # The counts of an evaluation do not restart.
            if stage and following and following.done >= stage.done and following.seconds >= stage.seconds:
                self._before = stage.done, stage.seconds
        if stage is not None and stage.stage and stage.total:
            size = stage.source_bytes * (stage.done - done) / stage.total
            took = stage.seconds - seconds
            speed = f", {format_bytes(size / took)}/s" if took > 0 else ""
            self._note(f"{stage.stage}: {format_bytes(size)} in {took:.2f} s{speed}")

    def _note(self, text: str) -> None:
        """Print a note on a separate line."""
        with self._lock:
            clear = CLEAR if self._drawn and self._live else ""
            write_aside(self._stream, f"{clear}note: {ascii(text)[1:-1]}\n")

    def _rate(self, progress: Progress) -> float:
        """Return the recent rate in work bytes a second."""
        worked = progress.done - progress.skipped
        history = self._history
        if not worked:  # the start of workers and connections is not part of the rate
            history.clear()
        history.append((progress.seconds, worked))
        while len(history) > 2 and progress.seconds - history[0][0] > WINDOW_SECONDS:
            history.popleft()
        since, before = (0.0, 0) if len(history) == 1 else history[0]
        return (worked - before) / (progress.seconds - since) if progress.seconds > since else 0.0


def columns_of(stream: TextIO) -> int:
    """Return the current width of the terminal in columns."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def describe(progress: Progress, rate: float) -> str:
    """Return a state as text: share, retry, bytes of the source, rate, time left, shards in progress and in transfer.

    Args:
        progress: the state.
        rate: work bytes a second.
    """
    part = progress.done / progress.total if progress.total else 1.0
    # Work bytes count a byte that is read twice as two; users expect the size of the source.
    scale = progress.source_bytes / progress.total if progress.total else 1.0
    bytes_done = f"{format_bytes(part * progress.source_bytes)} of {format_bytes(progress.source_bytes)}"
    words = [*([progress.stage] if progress.stage else []), f"{int(part * 100):3d}%"]
    if progress.waiting:  # first, because a narrow terminal truncates the rest
        words.append(f"retrying in {ascii(progress.waiting)[1:-1]}")
    words.append(bytes_done)
    if progress.done >= progress.total:
        words.append("finishing")
    elif rate > 0:
        words += [f"{format_bytes(rate * scale)}/s", f"{clock_time((progress.total - progress.done) / rate)} left"]
    making = ", ".join(f"{_short(s.name)} {s.done / max(s.total, 1):.0%}" for s in progress.active)
    words += [making] if making else []
    for t in progress.transfers:
        share = "" if t.done is None else f" {t.done / max(t.total, 1):.0%}"
        words.append(f"{WAYS[t.direction]} {_short(t.name)}{share}")
    return "  ".join(words)


def _short(shard: str) -> str:
    """Return the number of a shard if its name has one, else a short form of the name."""
    found = SHARD_NUMBER.search(shard)
    name = f"#{int(found.group(1))}" if found else ascii(shard.removesuffix(".safetensors"))[1:-1]
    return name if len(name) <= 16 else f"{name[:6]}...{name[-7:]}"


def clock_time(seconds: float) -> str:
    """Format a time like a clock: ``0:07``, ``12:34``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
