"""Record in the lock file of a working folder: the process of the newest run, and how the run ended.

The record is for messages and for `status`; nothing depends on it. It is replaced in place, so that a full disk does
not matter, and a reader may see a mixture of two records, which is no JSON.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8._process import ProcessRecord, command
from nemotron_fp8.errors import excerpt, printable
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded
from nemotron_fp8.untrusted.regular_files import descriptor_of, read_descriptor

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 1 << 16
MAX_COMMAND, MAX_ERROR = 2000, 500
"""Most characters of a command and of an error in a record."""
_LATEST = 1e11
"""A time in seconds that no clock shows."""


@dataclass(frozen=True, slots=True)
class LockRecord:
    """The newest run in a working folder.

    Attributes:
        process: its process.
        since: time of its start, in seconds since 1970; None if it was not recorded.
        ended: time of its end; None while it runs, and after a kill.
        error: class and message of the error that ended it; empty without an error.
        command: the command that began it; empty if a program called the library.
    """

    process: ProcessRecord
    since: float | None = None
    ended: float | None = None
    error: str = ""
    command: str = ""

    @classmethod
    def begun(cls) -> LockRecord:
        """Return the record of a run that this process begins."""
        line = command.line if len(command.line) <= MAX_COMMAND else ""
        return cls(ProcessRecord.own(), now(), command=line)

    def over(self, error: BaseException | None) -> LockRecord:
        """Return the record after the end of the run."""
        if error is None:
            text = ""
        elif isinstance(error, Exception):
            text = f"{type(error).__name__}: {' '.join(str(error)[:MAX_ERROR].split())}"
        else:
            text = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        return replace(self, ended=now(), error=text)

    def entry(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        more = {"since": self.since, "ended": self.ended, "error": self.error, "command": self.command}
        return {**self.process.entry(), **more}

    @classmethod
    def parse(cls, data: bytes) -> LockRecord | None:
        """Return the record that a lock file holds; None for any other content."""
        with suppress(OSError, ValueError), guarded(ValueError):
            entry = strict_json.load_object(data, "lock", lambda _, problem: ValueError(problem))
            since, ended = (time_of(entry.get(key)) for key in ("since", "ended"))
            error, line = (str(entry.get(key, ""))[:MAX_COMMAND] for key in ("error", "command"))
            return cls(ProcessRecord.parse(entry), since, ended, error, line)
        return None

    @property
    def owner(self) -> str:
        """The process in words."""
        return f"process {excerpt(self.process.pid)} on {printable(self.process.host, 100)[1:-1]}"


def now() -> float:
    """Return the time in seconds since 1970, to the millisecond."""
    return round(time.time(), 3)


def time_of(value: object) -> float | None:
    """Return a recorded time in seconds since 1970; None for None.

    Raises:
        ValueError: the value is not a time.
    """
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < _LATEST:  # type: ignore[operator]  # a number
        raise ValueError("not a time")
    return float(value)  # type: ignore[arg-type]  # a number


def write_record(fd: int, record: LockRecord) -> None:
    """Replace the record of a lock file; a record that cannot be written is left out."""
    data = json.dumps(record.entry()).encode("ascii")
    with suppress(OSError):
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))


def record_in(fd: int) -> LockRecord | None:
    """Return the record of an open lock file."""
    with suppress(OSError):
        return LockRecord.parse(read_descriptor(fd, MAX_BYTES))
    return None


def read_record(path: Path) -> LockRecord | None:
    """Return the record of a lock file, which is not locked; None without a readable record."""
    try:
        fd = descriptor_of(path, follow=False)
    except OSError:
        return None
    try:
        return record_in(fd)
    finally:
        os.close(fd)
