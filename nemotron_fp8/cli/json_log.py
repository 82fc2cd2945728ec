"""Log of a command as JSON lines: one object a line, for programs that collect logs."""

from __future__ import annotations

import json
import logging
import math
import os
from datetime import datetime, timezone
from threading import Lock
from typing import Any

from nemotron_fp8.cli.streams import write_error
from nemotron_fp8.errors import WriteError, printable

FIELDS = ("time", "level", "event", "text")
"""Keys of every line, before those of its event."""
NO_EVENT = "message"
"""Event of a record without one, as of another library."""


class JsonLog(logging.Handler):
    """Writes records as JSON lines, each with one write; a failing disk ends the log, not the work.

    Args:
        name: file to append to; ``-`` for stderr.

    Raises:
        WriteError: the file cannot be opened.
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.INFO)
        self._writing = Lock()
        self._fd, self._name = 2, name
        if name != "-":
            try:
                # Opening a pipe without a reader would wait for one.
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
                self._fd = os.open(name, flags, 0o666)
                os.set_blocking(self._fd, True)
            except OSError as error:
                problem = f"{error.strerror or error}; choose another file for the log (--log-json)"
                raise WriteError(name, problem, error.errno) from error

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", NO_EVENT)
        self.write(event, record.levelname, record.getMessage(), getattr(record, "fields", {}), record.created)

    def write(self, event: str, level: str, text: str, fields: dict[str, Any], at: float) -> None:
        """Write a line.

        Args:
            event: name of the event.
            level: name of the level.
            text: the message.
            fields: JSON values.
            at: time in seconds since 1970.
        """
        line = line_of(event, level, text, fields, at)
        with self._writing:
            try:
                while self._fd >= 0 and line:
                    line = line[os.write(self._fd, line) :]
            except OSError as error:
                self._fd = -1
                failure = error.strerror or str(error)
            else:
                return
        if self._name != "-":
            write_error(f"note: {printable(self._name)[1:-1]}: the log ends here: {failure} (--log-json)\n")


def line_of(event: str, level: str, text: str, fields: dict[str, Any], at: float) -> bytes:
    """Return a line of the log, as ASCII."""
    moment = datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    values = dict(zip(FIELDS, (moment, level.lower(), event, text), strict=True))
    values |= {key: _plain(value) for key, value in fields.items() if key not in ("time", "level", "event")}
    return json.dumps(values, allow_nan=False).encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: no NaN or infinity, and texts of everything else."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
