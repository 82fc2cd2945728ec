"""Journal of an unfinished conversion, from which the same command resumes.

The journal is a file of JSON lines, appended and synced one by one. The checksum of a line covers all lines before it,
so a changed, dropped or moved line is detected. An incomplete last line comes from an interrupted append and is
dropped: no later step has relied on it. Readers hash the recorded files again before they trust a journal.
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
        path: file of the journal.
        entries: entries so far, with verified checksums; the first is the identity of the run.
    """

    path: Path
    entries: list[dict[str, Any]]
    _fd: int
    _sum: bytes = field(default=b"", repr=False)
    _broken: bool = False

    @classmethod
    def open(cls, path: Path) -> Journal | None:
        """Open a journal and drop an incomplete last line; return None without a journal, or without a first entry.

        Raises:
            DamagedJournalError: a line before the last fails its checksum, or the file is a link.
            OSError: the journal cannot be read.
        """
        try:
            fd = os.open(path, _FLAGS)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # no run creates a link: the journal counts as damaged
                raise DamagedJournalError(str(path), 1, "the journal is a link") from error
            raise
        try:
            data = _read(fd)
            entries, total, good = parse(data, str(path))
            if not entries:  # interrupted before the first line was complete
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
        """Create a journal atomically with its first entry.

        Args:
            path: path of the journal.
            temporary: unused path of this run on the same file system.
            first: the first entry.

        Raises:
            FileExistsError: another run has created a journal in the meantime.
            OSError: the journal cannot be created.
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
        """Append an entry; it is durable on return.

        Raises:
            OSError: the entry cannot be written. Every later append fails, too.
        """
        if self._broken:
            raise OSError(
                errno.EIO, "an earlier write to the journal failed; rerun the command to resume", str(self.path)
            )
        payload = compact_json(entry)
        total = _chain(self._sum, payload)
        line = memoryview(_HEAD + total + _MIDDLE + payload + _TAIL)
        self._broken = True  # until the line is complete: a line after an incomplete one would be lost
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)
        self._broken = False
        self._sum = total
        self.entries.append(dict(entry))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the entries of one kind, in order."""
        return [entry for entry in self.entries if entry.get("kind") == kind]

    def receipts(self) -> dict[str, ShardReceipt]:
        """Return the receipts by shard; the last receipt of a shard counts.

        Raises:
            DamagedJournalError: an entry is not a receipt.
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
    """Parse a journal.

    Returns:
        The entries, the checksum of the last, and the bytes of all complete lines.

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
    """Return the entry of a line; None if the line is not exactly as it was written."""
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
    """Rename a file atomically unless the name is taken; without hard links, rename it in any case."""
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
