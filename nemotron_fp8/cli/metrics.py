"""Metrics of a command as a text file for Prometheus: the textfile collector of its node exporter reads ``*.prom``.

The file is replaced in one step, so that the collector never reads half of it. Source of the format: "Exposition
formats" and "Metric and label naming" of the documentation of Prometheus.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from nemotron_fp8._version import __version__
from nemotron_fp8.cli.streams import write_error
from nemotron_fp8.errors import WriteError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nemotron_fp8.progress import Progress

SECONDS = 5.0
"""Seconds between two writes."""
PREFIX = "nemotron_fp8_"
STATES = ("running", "succeeded", "failed", "interrupted")


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a command.

    Attributes:
        task: name of the task: ``quantize``, ``verify`` and so on.
        target: destination of the task, or its source.
        shards: shards of the result; None before they are known.
        finished: finished shards.
        retries: requests that were repeated.
        progress: progress of the task, or of its stage; None before the first.
        state: one of `STATES`.
        exit: exit code; None while the command runs.
    """

    task: str = ""
    target: str = ""
    shards: int | None = None
    finished: int = 0
    retries: int = 0
    progress: Progress | None = None
    state: str = "running"
    exit: int | None = None


class MetricsFile(logging.Handler):
    """Counts the events of the library, and writes the figures every `SECONDS`, and at the end.

    Args:
        name: the file.

    Raises:
        WriteError: the file cannot be written.
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.INFO)
        self._path = Path(name)
        self._started = time.time()
        self._figures = Figures()
        self._changing, self._writing = Lock(), Lock()
        self._over = Event()
        self._noted = False
        if not name.endswith(".prom"):
            raise WriteError(name, "the collector of Prometheus reads files with the ending .prom (--metrics)")
        try:
            self._write()
        except OSError as error:
            problem = f"{error.strerror or error}; choose another file for the metrics (--metrics)"
            raise WriteError(name, problem, error.errno) from error
        Thread(target=self._repeat, name="metrics", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        event = getattr(record, "event", "")
        with self._changing:
            now = self._figures
            if event == "run.started":
                target = fields.get("destination") or fields.get("source") or ""
                named = target if isinstance(target, str) else " ".join(target)
                now = replace(now, task=str(fields.get("task", "")), target=named, shards=None, finished=0)
            elif event == "run.planned":
                now = replace(now, shards=fields["shards"])
            elif event in ("shard.finished", "shard.resumed"):
                now = replace(now, finished=now.finished + 1)
            elif event == "request.retried":
                now = replace(now, retries=now.retries + 1)
            self._figures = now

    def observe(self, progress: Progress) -> None:
        """Take over the progress of a task."""
        with self._changing:
            self._figures = replace(self._figures, progress=progress)

    def end(self, code: int) -> None:
        """Write the file for the last time, with the exit code."""
        state = "succeeded" if not code else "interrupted" if code > 128 else "failed"
        with self._changing:
            self._figures = replace(self._figures, state=state, exit=code)
        self._over.set()
        self._try()

    def _repeat(self) -> None:
        while not self._over.wait(SECONDS):
            self._try()

    def _try(self) -> None:
        """Write the file; the first failure is noted, and the disk may have room again later."""
        try:
            self._write()
        except OSError as error:
            if not self._noted:
                self._noted = True

                name = printable(str(self._path))[1:-1]
                write_error(f"note: {name}: the metrics cannot be written: {error.strerror or error} (--metrics)\n")

    def _write(self) -> None:
        with self._writing:
            data = render(self._figures, self._started, time.time()).encode()
            beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            try:
                fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                beside.replace(self._path)
            except BaseException:
                with suppress(OSError):
                    beside.unlink()
                raise


def render(figures: Figures, started: float, now: float) -> str:
    """Return the text of the file.

    Args:
        figures: the figures.
        started: time of the start of the command, in seconds since 1970.
        now: time of the text.
    """
    labels = {"task": figures.task, "target": figures.target}
    lines: list[str] = []
    for name, kind, text, values in _families(figures, started, now):
        lines += [f"# HELP {PREFIX}{name} {_escaped(text, quotes=False)}", f"# TYPE {PREFIX}{name} {kind}"]
        for more, value in values:
            shown = ",".join(f'{key}="{_escaped(each)}"' for key, each in (labels | more).items())
            lines.append(f"{PREFIX}{name}{{{shown}}} {value!r}")
    return "\n".join(lines) + "\n"


Family = tuple[str, str, str, list[tuple[dict[str, str], float]]]


def _families(figures: Figures, started: float, now: float) -> Iterator[Family]:
    """Yield name, type, help, and labels and value of each sample."""

    def one(name: str, text: str, value: float, kind: str = "gauge") -> Family:
        return name, kind, text, [({}, value)]

    yield "info", "gauge", "Version of nemotron_fp8; always 1.", [({"version": __version__}, 1)]
    states: list[tuple[dict[str, str], float]] = [({"state": state}, int(state == figures.state)) for state in STATES]
    yield "state", "gauge", "State of the command: 1 for the present one.", states
    yield one("start_time_seconds", "Start of the command, in seconds since 1970.", round(started, 3))
    yield one("last_update_time_seconds", "Time of these figures, in seconds since 1970.", round(now, 3))
    yield one("retries_total", "Requests to the Hub or a store that were repeated.", figures.retries, "counter")
    yield one("shards_finished", "Finished shards, those of earlier runs included.", figures.finished)
    if figures.shards is not None:
        yield one("shards", "Shards of the result.", figures.shards)
    if (progress := figures.progress) is not None:
        share = progress.done / progress.total if progress.total else 1.0
        yield one("source_bytes", "Bytes of the source that the task or its stage reads.", progress.source_bytes)
        yield one("processed_bytes", "Bytes of the source that are processed.", round(share * progress.source_bytes))
        yield one("elapsed_seconds", "Time since the task or its stage began.", round(progress.seconds, 3))
        worked = progress.done - progress.skipped
        if worked > 0 and progress.seconds > 0:
            left = (progress.total - progress.done) * progress.seconds / worked
            yield one("left_seconds", "Estimated time left, by the mean speed.", round(left, 3))
    if figures.exit is not None:
        yield one("exit_code", "Exit code of the command, once it has ended.", figures.exit)


def _escaped(text: str, *, quotes: bool = True) -> str:
    """Escape a label value, or without quotes a help text; what UTF-8 cannot encode is replaced."""
    text = text.encode("utf-8", "replace").decode().replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text
