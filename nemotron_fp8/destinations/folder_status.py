"""State of a folder: a result, a conversion into it or in place, or the saved state of an evaluation.

Runs go on while their state is read. A working folder may therefore vanish between two steps: then the state is read
again.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8._filesystem import JOURNAL, LOCK, OUT, WORK, WORKING, is_stale, names_in
from nemotron_fp8._secrets import masked
from nemotron_fp8.checkpoint.inventory import MANIFEST, MARKER, is_plain_name
from nemotron_fp8.destinations.folder import partial_path
from nemotron_fp8.destinations.journal import Terms, read_journal
from nemotron_fp8.destinations.lock_record import read_record, time_of
from nemotron_fp8.destinations.partial_folder import RESULT
from nemotron_fp8.destinations.status import (
    Finished,
    Pace,
    Status,
    advice_for,
    complete_status,
    in_future,
    life_of,
    total_of,
)
from nemotron_fp8.documents.manifest import manifest_bytes, parse_manifest
from nemotron_fp8.errors import excerpt
from nemotron_fp8.errors.destination import DamagedJournalError
from nemotron_fp8.planning.receipt import LARGEST_COUNT, entry_receipt
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nemotron_fp8.destinations.lock_record import LockRecord
    from nemotron_fp8.destinations.status import Kind

TRIES = 5
"""Readings of a working folder that vanishes while it is read."""
MAX_ACTIVE = 1000
"""Most names of shards in progress."""


def folder_status(path: Path, named: str) -> Status:
    """Return the state of a local folder.

    Args:
        path: the destination, the folder of a conversion in place, or a working folder.
        named: the destination as it was named.

    Raises:
        DamagedJournalError: the journal is damaged.
        MalformedManifestError: the manifest is damaged.
        OSError: the folder cannot be read.
    """
    path = Path(os.path.realpath(path))
    if path.name.endswith(".partial") and os.path.lexists(path / LOCK):
        path = path.with_name(path.name.removesuffix(".partial"))
    for _ in range(TRIES):
        beside, inside = partial_path(path), path / WORKING
        if _is_folder(beside):
            found = _unfinished(beside, path, named, "folder")
        elif _is_folder(inside) or os.path.lexists(path / MARKER):
            found = _unfinished(inside, path, named, "in-place")
        else:
            return _published(path, named) or Status(named, advice=_advice_for_none(path))
        if found is not None:
            return found
    return _published(path, named) or Status(named, notices=("the folder changes while it is read; run status again",))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _advice_for_none(path: Path) -> str:
    if not os.path.lexists(path):
        return "no such folder, and no unfinished conversion beside it"
    if not path.is_dir():
        return "not a folder"
    return f"the folder holds no result of this library ({MANIFEST}), and no conversion is unfinished"


def _published(path: Path, named: str) -> Status | None:
    """Return the state of a complete result; None without a manifest."""
    data = manifest_bytes(path) if path.is_dir() else None
    if data is None:
        return None
    return complete_status(named, "folder", parse_manifest(data), lambda name: _size_of(path / name))


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _unfinished(working: Path, path: Path, named: str, kind: Kind) -> Status | None:
    """Return the state of a conversion with a working folder; None if the folder has vanished meanwhile."""
    record = read_record(working / LOCK)
    entries = read_journal(working / JOURNAL)
    marked = kind == "in-place" and os.path.lexists(path / MARKER)
    if entries is None and not marked and not _is_folder(working):
        return None
    if not entries:
        return _without_journal(working, path, named, kind, record, marked)
    found = _of_journal(working / JOURNAL, entries)
    state, process = life_of(record)
    if _is_published(path, entries) and (done := _published(path, named)) is not None:
        notice = f"the conversion is published, and {working.name} is left over: the same command removes it"
        return replace(done, notices=(*done.notices, *((notice,) if state != "running" else ())))
    status = replace(
        found,
        destination=named,
        kind=kind,
        state=state,
        process=process,
        active=_active(working, found) if state != "stopped" else (),
        command=record.command if record else "",
        error=record.error if record and state == "stopped" else "",
        last=found.last if found.last is not None else _changed(working / JOURNAL),
    )
    pace = _pace(entries)
    return replace(
        status,
        seconds=pace.seconds,
        bytes_per_second=pace.bytes_per_second,
        recent_bytes_per_second=pace.recent,
        seconds_left=pace.left(
            status.shards_left, status.bytes_left, status.idle_seconds if state == "running" else None
        ),
        advice=advice_for(status, record),
        notices=_notices(working, path, status, entries),
    )


def _without_journal(
    working: Path, path: Path, named: str, kind: Kind, record: LockRecord | None, marked: bool
) -> Status | None:
    """Return the state of a working folder without a journal: its run prepares, or was stopped before."""
    if marked:
        raise DamagedJournalError(str(working / JOURNAL), 1, "the journal of a conversion in place is missing")
    state, process = life_of(record)
    if state == "stopped" and (done := _published(path, named)) is not None:
        notice = f"{working.name} is left over from a run that finished nothing; the next run removes it"
        return replace(done, notices=(*done.notices, notice))
    status = Status(named, kind, state, process, last=record.since if record else None)
    command, error = (record.command, record.error) if record else ("", "")
    status = replace(status, command=command, error=error if state == "stopped" else "")
    size = _size_of(working / JOURNAL)
    notice = "the journal does not exist yet"
    if size is not None:
        notice = (
            f"the journal ({size:,} bytes) has no complete entry: nothing is finished, and the next run begins it anew"
        )
    return replace(status, advice=advice_for(status, record), notices=(notice,))


def _of_journal(path: Path, entries: Sequence[Mapping[str, Any]]) -> Status:
    """Return what the journal says; a field that another version did not write is unknown."""
    terms = Terms.of(entries[0], str(path))
    damaged = partial(_damaged, str(path))
    with guarded(partial(damaged, 1)):
        source = entries[0].get("from", "")
        shards = entries[0].get("shards", {})
        if type(source) is not str or type(shards) is not dict:
            raise TypeError(f"{excerpt(shards)} is not a table of shards")
        sizes = {_plain(name): _count(size) for name, size in shards.items()}
    done: dict[str, int] = {}
    measured: set[str] = set()
    last: float | None = None
    for number, entry in enumerate(entries, 1):
        with guarded(partial(damaged, number)):
            last = max(filter(None, (last, time_of(entry.get("time")))), default=None)
            if entry.get("kind") == "shard":
                receipt = entry_receipt(entry)
                done[receipt.name] = receipt.size
            elif entry.get("kind") == "amax":
                measured.add(_plain(entry["name"]))
    names = sizes.keys() or {name for name in terms.saved if name.endswith(".safetensors")}
    if names:
        done = {name: size for name, size in done.items() if name in names}
    return Status(
        "",
        shards_done=len(done),
        shards_total=len(names) or total_of(done),
        bytes_done=sum(done.values()),
        bytes_total=sum(sizes.values()) if sizes else None,
        measured=0 if done else len(measured),
        last=last,
        source=masked(source),
        recipe=dict(terms.recipe),
        plan=terms.plan,
        version=terms.version,
    )


def _damaged(path: str, number: int, _problem: str) -> DamagedJournalError:
    return DamagedJournalError(path, number)


def _plain(value: object) -> str:
    if type(value) is not str or not is_plain_name(value):
        raise ValueError(f"{excerpt(value)} is not a plain file name")
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < LARGEST_COUNT:
        raise ValueError(f"{excerpt(value)} is not a number of bytes")
    return value


def _pace(entries: Sequence[Mapping[str, Any]]) -> Pace:
    """Return the speed of the newest run: in place, that of the replacement, before which all shards are measured."""
    begun = (number for number, entry in enumerate(entries) if not number or entry.get("kind") in ("run", "amax"))
    start = max(begun)
    shards = (entry for entry in entries[start:] if entry.get("kind") == "shard")
    return Pace.of(
        time_of(entries[start].get("time")),
        [Finished(entry["name"], entry["size"], time_of(entry.get("time"))) for entry in shards],
    )


def _is_published(path: Path, entries: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if the destination holds the result that the journal says is published."""
    last = next((entry for entry in reversed(entries) if entry.get("kind") == "publish"), None)
    if last is None or not path.is_dir():
        return False
    data = manifest_bytes(path)
    return data is not None and hashlib.sha256(data).hexdigest() == last.get("manifest")


def _active(working: Path, found: Status) -> tuple[str, ...]:
    """Return the names of the shards in the folders of live runs, and of attempts at shards on other machines."""
    names: set[str] = set()
    with suppress(OSError):
        for folder in names_in(working):
            if folder.startswith(WORK) and not folder.endswith(RESULT) and not is_stale(folder):
                for name in names_in(working / folder):
                    inner = [name] if name.endswith(".safetensors") else []
                    if not inner and _is_folder(working / folder / name):
                        inner = names_in(working / folder / name)
                    names.update(each for each in inner if each.endswith(".safetensors"))
    return tuple(sorted(names)[:MAX_ACTIVE])


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _notices(working: Path, path: Path, status: Status, entries: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return what a run that resumes will find besides the journal."""
    notices = []
    if in_future(status.last):
        notices.append("the journal has a time that is still to come: a clock is wrong, so the speed is unknown")
    if any(entry.get("kind") == "publish" for entry in entries):
        notices.append("all shards are finished, and the publication has begun")
    if status.state == "stopped":
        receipts = {entry["name"]: entry for entry in entries if entry.get("kind") == "shard"}
        folders = [working / OUT, *([path] if status.kind == "in-place" else [])]
        lost = [n for n, e in receipts.items() if all(_size_of(folder / n) != e["size"] for folder in folders)]
        if lost:
            notices.append(f"{len(lost):,} finished shards are missing or have another size, and will be made again")
        if status.kind == "folder" and any(entry.get("sha256") is None for entry in receipts.values()):
            notices.append("finished shards without a digest (--no-digests) will be made again")
    if status.kind == "folder" and path.is_dir() and (path / MANIFEST).exists():
        notices.append(f"{path.name} holds another result until this one is published")
    return tuple(notices)
