"""Journal of an unfinished conversion, from which the same command resumes.

The journal is a file of JSON lines, appended and synced one by one. The checksum of a line covers all lines before it,
so a changed, dropped or moved line is detected. An incomplete last line comes from an interrupted append and is
dropped: no later step has relied on it. Readers hash the recorded files again before they trust a journal.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from nemotron_fp8._filesystem import NO_LINKS
from nemotron_fp8.checkpoint.inventory import is_plain_name
from nemotron_fp8.checkpoint.json_text import compact_json
from nemotron_fp8.destinations.lock_record import now
from nemotron_fp8.errors import excerpt
from nemotron_fp8.errors.destination import DamagedJournalError
from nemotron_fp8.planning.receipt import ShardReceipt, entry_receipt
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded
from nemotron_fp8.untrusted.regular_files import kind_of, read_descriptor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_HEAD, _MIDDLE, _TAIL = b'{"sum":"', b'","entry":', b"}\n"
_SUM_DIGITS = 32
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
MAX_BYTES = 1 << 30
"""Size cap of a journal, in bytes; a receipt takes some hundred bytes for each tensor."""


@dataclass(frozen=True, slots=True)
class Terms:
    """First entry of a journal: the identity of its run, and the files that a conversion in place has saved.

    Attributes:
        schema, version, mode, plan, recipe: as in `nemotron_fp8.destinations.run_identity.RunIdentity`.
        source: fingerprint of each source file, by name.
        saved: size of each saved file, and SHA-256 of its saved bytes.
        side: name and bytes of each side file.
        notices: notices for the user.
    """

    schema: int
    version: str
    mode: str
    plan: str
    recipe: Mapping[str, Any]
    source: Mapping[str, str]
    saved: Mapping[str, tuple[int, str]]
    side: tuple[tuple[str, int], ...]
    notices: tuple[str, ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any], path: str) -> Terms:
        """Parse an entry that `RunIdentity.entry` made.

        Args:
            entry: the entry.
            path: path of the journal, for the message.

        Raises:
            DamagedJournalError: the entry is malformed.
        """
        with guarded(partial(_damaged, 1, path)):
            return cls._parse(entry)

    @classmethod
    def _parse(cls, entry: Mapping[str, Any]) -> Terms:
        return cls(
            _typed(entry["schema"], int),
            _typed(entry["version"], str),
            _typed(entry["mode"], str),
            _typed(entry["plan"], str),
            _typed(entry["recipe"], dict),
            {name: _typed(stamp, str) for name, stamp in _typed(entry["source"], dict).items()},
            {
                _file_name(name): (_typed(size, int), _typed(digest, str))
                for name, (size, digest) in _typed(entry.get("saved", {}), dict).items()
            },
            tuple((_file_name(name), _typed(size, int)) for name, size in _typed(entry.get("side", []), list)),
            tuple(_typed(notice, str) for notice in _typed(entry.get("notices", []), list)),
        )


V = TypeVar("V")


def _typed(value: object, kind: type[V]) -> V:
    """Return a value of exactly this type."""
    if type(value) is not kind:
        raise TypeError(f"{excerpt(value)} is not {kind.__name__}")
    return value


def _file_name(value: object) -> str:
    """Return a name that stays in its folder."""
    name = _typed(value, str)
    if not is_plain_name(name):
        raise ValueError(f"{excerpt(name)} is not a plain file name")
    return name


def dated(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with the time, in seconds since 1970; only `status` reads it."""
    return {**entry, "time": now()}


def first_entry(identity: Mapping[str, Any], source: str, shards: Mapping[str, int]) -> dict[str, Any]:
    """Return the first entry of a journal, with what only `status` reads.

    Args:
        identity: the identity of the run (`RunIdentity.entry`).
        source: name of the source.
        shards: bytes of each shard of the result, by name.
    """
    return dated({**identity, "from": source, "shards": dict(shards)})


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
            data = _read(fd, str(path))
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
                with guarded(partial(_damaged, number, str(self.path))):
                    receipt = entry_receipt(entry)
                found[receipt.name] = receipt
        return found

    @property
    def terms(self) -> Terms:
        """The first entry.

        Raises:
            DamagedJournalError: it is malformed.
        """
        return Terms.of(self.entries[0], str(self.path))

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_journal(path: Path) -> list[dict[str, Any]] | None:
    """Return the entries of a journal that a run may be appending to; None without a journal.

    Nothing is locked or changed. An incomplete last line is left out.

    Raises:
        DamagedJournalError: a line before the last fails its checksum, or the file is not a regular file.
        OSError: the journal cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedJournalError(str(path), 1, "the journal is a link") from error
        if error.errno == errno.ENXIO:
            raise DamagedJournalError(str(path), 1, "the journal is a socket") from error
        raise
    try:
        return parse(_read(fd, str(path)), str(path))[0]
    finally:
        os.close(fd)


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
        with guarded(partial(_damaged, number, path)):
            payload = _payload(line, total)
        if payload is None:
            if number < len(lines):
                raise DamagedJournalError(path, number)
            break
        entries.append(strict_json.load_object(payload, path, partial(_damaged, number), max_bytes=MAX_BYTES))
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


def _read(fd: int, path: str) -> bytes:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise DamagedJournalError(path, 1, f"the journal is {kind_of(info.st_mode)}")
    if info.st_size > MAX_BYTES:
        raise DamagedJournalError(path, 1, f"{info.st_size:,} bytes; the limit is {MAX_BYTES:,}")
    return read_descriptor(fd, MAX_BYTES)


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
