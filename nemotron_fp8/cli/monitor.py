"""Log and metrics of the running command, for other programs: ``--log-json`` and ``--metrics``."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING

from nemotron_fp8._process import command
from nemotron_fp8._version import __version__
from nemotron_fp8.cli import streams
from nemotron_fp8.events import logger

if TYPE_CHECKING:
    from nemotron_fp8.cli.json_log import JsonLog
    from nemotron_fp8.cli.metrics import MetricsFile
    from nemotron_fp8.progress import Progress

PROGRESS_SECONDS = 10.0
"""Seconds between two events of progress."""


class Monitor:
    """Log and metrics of one command."""

    def __init__(self) -> None:
        self.log: JsonLog | None = None
        self.metrics: MetricsFile | None = None
        self._level = logging.NOTSET
        self._told = time.monotonic()
        self._ended = False

    def start_log(self, name: str) -> None:
        """Log to a file, or with ``-`` to stderr, which then holds JSON lines alone.

        Raises:
            WriteError: the file cannot be opened.
        """
        from nemotron_fp8.cli.json_log import JsonLog

        self.log = JsonLog(name)
        self._listen(self.log)
        if name == "-":
            streams.redirect = self._aside
        fields = {"command": command.line, "version": __version__, "pid": os.getpid(), "host": socket.gethostname()}
        self.log.write("command.started", "info", command.line, fields, time.time())

    def start_metrics(self, name: str) -> None:
        """Write metrics to a file.

        Raises:
            WriteError: the file cannot be written.
        """
        from nemotron_fp8.cli.metrics import MetricsFile

        self.metrics = MetricsFile(name)
        self._listen(self.metrics)

    def _listen(self, handler: logging.Handler) -> None:
        logger.addHandler(handler)
        if logger.getEffectiveLevel() > logging.INFO:
            self._level = logger.level
            logger.setLevel(logging.INFO)

    def _aside(self, text: str) -> None:
        """Log a line that would be printed on stderr."""
        if self.log is not None:
            kind, _, rest = text.partition(": ")
            known = kind in ("error", "note")
            level = "error" if kind == "error" else "info"
            self.log.write(f"command.{kind if known else 'output'}", level, rest if known else text, {}, time.time())

    def observe(self, progress: Progress) -> None:
        """Take over the progress of a task; called from any thread."""
        if self.metrics is not None:
            self.metrics.observe(progress)
        now = time.monotonic()
        if self.log is not None and now - self._told >= PROGRESS_SECONDS:
            self._told = now
            share = progress.done / progress.total if progress.total else 1.0
            fields = {
                "stage": progress.stage,
                "bytes": round(share * progress.source_bytes),
                "bytes_total": progress.source_bytes,
                "seconds": round(progress.seconds, 3),
                "shards": [shard.name for shard in progress.active],
                "waiting": progress.waiting,
            }
            self.log.write("run.progress", "info", f"{share:.1%}", fields, time.time())

    def end(self, code: int, text: str = "") -> None:
        """Record the end of the command; later calls do nothing.

        Args:
            code: exit code.
            text: the message of its ``error:`` line; empty without an error.
        """
        if self._ended:
            return
        self._ended = True
        if self.metrics is not None:
            self.metrics.end(code)
            logger.removeHandler(self.metrics)
        if self.log is not None:
            level = "error" if code else "info"
            self.log.write("command.ended", level, text or "done", {"exit": code}, time.time())
            logger.removeHandler(self.log)
        if self.log is not None or self.metrics is not None:
            streams.redirect = None
            logger.setLevel(self._level)


current = Monitor()
"""Monitor of the running command; a new one for each."""


def begin() -> Monitor:
    """Return the monitor of a new command."""
    global current  # noqa: PLW0603  (one command at a time)
    current = Monitor()
    return current


def observe(progress: Progress) -> None:
    """Pass a progress to the monitor of the running command."""
    current.observe(progress)
