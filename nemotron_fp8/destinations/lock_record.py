"""Record in the lock file of a working folder: the process of the newest run, and how the run ended.

The record is for messages and for `status`; nothing depends on it. It is replaced in place, so that a full disk does
not matter, and a reader may see a mixture of two records, which is no JSON.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8._process import PREFIX, RESTART, ProcessRecord, command
from nemotron_fp8._secrets import masked, masked_words
from nemotron_fp8.errors import excerpt, printable
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded
from nemotron_fp8.untrusted.regular_files import descriptor_of, read_descriptor

if TYPE_CHECKING:
    from collections.abc import Mapping


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
        folder: the current folder of the command; empty if it was not recorded.
        variables: variables of the environment that set its options.
    """

    process: ProcessRecord
    since: float | None = None
    ended: float | None = None
    error: str = ""
    command: str = ""
    folder: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def begun(cls) -> LockRecord:
        """Return the record of a run that this process begins."""
        parts = [command.line, command.folder, *command.variables, *command.variables.values()]
        if not command.line or sum(map(len, parts)) > MAX_COMMAND:  # a part of it would be another command
            return cls(ProcessRecord.own(), now())
        return cls(
            ProcessRecord.own(),
            now(),
            command=command.line,
            folder=command.folder,
            variables=dict(command.variables),
        )

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
        return {**self.process.entry(), **more, "folder": self.folder, "variables": dict(self.variables)}

    @classmethod
    def parse(cls, data: bytes) -> LockRecord | None:
        """Return the record that a lock file holds; None for any other content."""
        with suppress(OSError, ValueError), guarded(ValueError):
            entry = strict_json.load_object(data, "lock", lambda _, problem: ValueError(problem))
            since, ended = (time_of(entry.get(key)) for key in ("since", "ended"))
            error, line, folder = (str(entry.get(key, ""))[:MAX_COMMAND] for key in ("error", "command", "folder"))
            variables = entry.get("variables", {})
            if type(variables) is not dict or not all(
                type(value) is str and name.startswith(PREFIX) and name.isidentifier()
                for name, value in variables.items()
            ):
                variables = {}
            return cls(ProcessRecord.parse(entry), since, ended, error, _shown(line), folder, variables)
        return None

    def again(self) -> str:
        """Return what a shell takes to resume: folder, variables and command, without `RESTART`; empty if unknown.

        The folder is left out if it is the current one.
        """
        words = [word for word in shlex.split(self.command) if word != RESTART]
        if not words:
            return ""
        settings = [
            f"{name}={shlex.quote(masked(value))}"
            for name, value in self.variables.items()
            if not name.endswith(RESTART.removeprefix("--").upper())
        ]
        line = " ".join([*settings, shlex.join(words)])
        return line if self.folder in ("", _here()) else f"cd {shlex.quote(self.folder)} && {line}"

    @property
    def owner(self) -> str:
        """The process in words."""
        return f"process {excerpt(self.process.pid)} on {printable(self.process.host, 100)[1:-1]}"


def _shown(line: str) -> str:
    """Return a recorded command without what may be a credential; empty if it is not one command of this package."""
    with suppress(ValueError):
        words = shlex.split(line)
        if words[:1] == ["nemotron-fp8"] and shlex.join(words) == line:
            return shlex.join(masked_words(words, {}))
    return ""


def _here() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return ""


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
