"""The journal: what an unfinished conversion has done so far, so that the same command can carry on.

A file of JSON lines, appended and synced one by one. Every line carries a checksum that covers the lines
before it too, so that a line that was changed, dropped or moved is noticed. A last line that is not whole is
that of an append which was cut short, and is dropped: nothing was built on it. The journal is a hint: whoever
reads it hashes the files again before trusting them.
"""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from nemotron_fp8._filesystem import NO_LINKS
from nemotron_fp8.checkpoint import strict_json
from nemotron_fp8.checkpoint.strict_json import compact_json
from nemotron_fp8.errors.destination import DamagedJournalError
from nemotron_fp8.planning.receipt import ShardReceipt, entry_receipt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_HEAD, _MIDDLE, _TAIL = b'{"sum":"', b'","entry":', b"}\n"
_SUM_DIGITS = 32
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
MAX_LINE = 1 << 30
"""Size cap of one line, in bytes."""


@dataclass(slots=True)
class Journal:
    """An open journal. Only one thread may append at a time.

    Attributes:
        path: its file.
        entries: its lines so far, checksums checked, the first being the terms.
    """

    path: Path
    entries: list[dict[str, Any]]
    _fd: int
    _sum: bytes = field(default=b"", repr=False)
    _broken: bool = False

    @classmethod
    def open(cls, path: Path) -> Journal | None:
        """Open a journal and drop a last line that is not whole; None where there is none to go by.

        Raises:
            DamagedJournalError: a line before the last fails its checksum, or a link stands there.
            OSError: the system refuses.
        """
        try:
            fd = os.open(path, _FLAGS)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # not of our making, and to be discarded like what is damaged
                raise DamagedJournalError(str(path), 1, "a link stands in its place") from error
            raise
        try:
            data = _read(fd)
            entries, total, good = parse(data, str(path))
            if not entries:  # cut short before its first line was whole: it says nothing
                path.unlink()
                os.close(fd)
                return None
            if good < len(data):
                os.ftruncate(fd, good)
                os.fsync(fd)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        return cls(path, entries, fd, total)

    @classmethod
    def create(cls, path: Path, temporary: Path, first: Mapping[str, Any]) -> Journal:
        """Make a journal that is there with its first line or not at all.

        Args:
            path: where it shall be.
            temporary: a name of this run's own on the same file system, that is not there.
            first: its first line.

        Raises:
            FileExistsError: another run has made one in between.
            OSError: the system refuses.
        """
        fd = os.open(temporary, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
        journal = cls(path, [], fd)
        try:
            journal.append(first)
            _move(temporary, path)
        except BaseException:
            journal.close()
            with suppress(OSError):
                temporary.unlink()
            raise
        return journal

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append a line; it is durable on return.

        Raises:
            OSError: the system refuses. Nothing can be appended after that.
        """
        if self._broken:
            raise OSError(errno.EIO, "the journal could not be written before", str(self.path))
        payload = compact_json(entry)
        total = _chain(self._sum, payload)
        line = memoryview(_HEAD + total + _MIDDLE + payload + _TAIL)
        self._broken = True  # until all of it is there: what follows half a line would be lost with it
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)
        self._broken = False
        self._sum = total
        self.entries.append(dict(entry))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind, in order."""
        return [entry for entry in self.entries if entry.get("kind") == kind]

    def receipts(self) -> dict[str, ShardReceipt]:
        """The receipts, by shard; the last one counts.

        Raises:
            DamagedJournalError: a line is no receipt.
        """
        found: dict[str, ShardReceipt] = {}
        for number, entry in enumerate(self.entries, 1):
            if entry.get("kind") == "shard":
                try:
                    receipt = entry_receipt(entry)
                except (KeyError, TypeError, ValueError):
                    raise DamagedJournalError(str(self.path), number) from None
                found[receipt.name] = receipt
        return found

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _chain(before: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(before + payload).hexdigest()[:_SUM_DIGITS].encode("ascii")


def parse(data: bytes, path: str) -> tuple[list[dict[str, Any]], bytes, int]:
    """Take a journal apart.

    Returns:
        Its lines, the checksum of the last, and the bytes that they take: less than all where the last line
        is not whole.

    Raises:
        DamagedJournalError: a line before the last fails its checksum.
    """
    entries: list[dict[str, Any]] = []
    total, good = b"", 0
    *whole, rest = data.split(b"\n")
    lines = [line + b"\n" for line in whole] + [rest] * bool(rest)
    for number, line in enumerate(lines, 1):
        payload = _payload(line, total)
        if payload is None:
            if number < len(lines):
                raise DamagedJournalError(path, number)
            break
        entries.append(strict_json.load_object(payload, path, partial(_damaged, number), max_bytes=MAX_LINE))
        total, good = _chain(total, payload), good + len(line)
    return entries, total, good


def _damaged(number: int, path: str, _problem: str) -> DamagedJournalError:
    return DamagedJournalError(path, number)


def _payload(line: bytes, before: bytes) -> bytes | None:
    """The entry of a line, None where the line is not exactly what was written."""
    start = len(_HEAD) + _SUM_DIGITS
    if not (line.startswith(_HEAD) and line[start:].startswith(_MIDDLE) and line.endswith(_TAIL)):
        return None
    payload = line[start + len(_MIDDLE) : -len(_TAIL)]
    return payload if line[len(_HEAD) : start] == _chain(before, payload) else None


def _read(fd: int) -> bytes:
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.read()


def _move(temporary: Path, path: Path) -> None:
    """Give a file its name unless that is taken, in one step; where links are unknown, by renaming."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.rename(temporary, path)
        return
    temporary.unlink()
