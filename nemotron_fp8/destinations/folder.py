"""A local folder as destination: staged beside the final path, published by one rename.

``<destination>.partial`` holds the journal, a lock, ``out/`` with the finished shards, and a folder of temporaries for
each run. At the end the finished shards are linked into a folder of this run, beside the small files, and verified
there. Even if another process ignores the lock and changes ``out/``, only the files that were verified are published.

The rename of that folder is the commit point; until then the destination is unchanged. An interruption (a kill, a full
disk, an unreadable source) leaves the partial folder, from which the same command resumes. A source that can never be
converted leaves no partial folder.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import (
    NO_LINKS,
    OLD,
    SMALL_BLOCKS,
    as_write_error,
    names_in,
    remove,
    space_needed_and_free,
    sync_folder,
)
from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.checkpoint.local_files import FileDigest, check_files
from nemotron_fp8.destinations.differences import contents_of
from nemotron_fp8.destinations.file_sink import commit_file, write_file
from nemotron_fp8.destinations.folder_staging import FolderStaging
from nemotron_fp8.destinations.journal import Journal, dated, first_entry
from nemotron_fp8.destinations.partial_folder import PartialFolder
from nemotron_fp8.documents.manifest import manifest_bytes, parse_manifest
from nemotron_fp8.errors import (
    DestinationBusyError,
    DestinationExistsError,
    MalformedManifestError,
    OverlapError,
    WriteError,
    is_permanent,
)
from nemotron_fp8.errors.destination import DamagedJournalError, DiskSpaceError, OtherRunError
from nemotron_fp8.planning.receipt import receipt_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.planning.receipt import ShardReceipt


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class FolderDestination:
    """A checkpoint folder that is published all at once. A context manager.

    Args:
        path: the final folder.
        source: folder of the source, which must neither contain the destination nor lie in it; None if the source is
            not a local folder.
        terms: identity that an unfinished run must have to be resumed.
        sizes: planned bytes of every file of the result, by name.
        overwrite: whether to replace an existing folder.
        restart: whether to discard an unfinished run.
        digests: whether receipts carry SHA-256 digests. Shards without a digest cannot be verified, so a later run
            converts them again.
        label: name of the source, for `status`.
        shards: names and bytes of the shards of the result, for `status`.
        threads: finished shards to verify at the same time; with one thread, a shard is synced before the next one
            starts.

    Raises:
        OverlapError: source and destination contain each other.
        DestinationExistsError: the destination is a file, or a folder with files and ``overwrite`` is off.
        DestinationBusyError: another process is writing to the same destination.
        OtherRunError, DamagedJournalError: an unfinished run cannot be resumed.
        DiskSpaceError: the disk has too little free space for the remaining files.
        WriteError: a file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        source: Path | None,
        terms: RunIdentity,
        sizes: Mapping[str, int],
        *,
        overwrite: bool = False,
        restart: bool = False,
        digests: bool = True,
        threads: int = 1,
        label: str = "",
        shards: Mapping[str, int] | None = None,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.overwrite, self.digests = overwrite, digests
        self._terms, self._sizes, self._restart, self._threads = terms, sizes, restart, threads
        if source is not None:
            refuse_overlap(source, self.path)
        if self.occupied() and (not overwrite or not self.path.is_dir()):
            raise DestinationExistsError(str(self.path), contents_of(self.path, terms.recipe))
        self._label, self._shards = label, dict(shards or {})
        self._receipts: dict[str, ShardReceipt] = {}
        self._published = False
        self._recording: Future[None] | None = None
        self.bytes_published = 0

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def complete(self) -> bool:
        return False  # a complete folder is compared instead (`ComparingDestination`)

    def occupied(self) -> bool:
        """Return True if the destination exists and is not an empty folder."""
        return is_occupied(self.path)

    def __enter__(self) -> FolderDestination:
        self._partial = PartialFolder(partial_path(self.path))
        fresh = False
        try:
            if self._restart:
                self._partial.restart()
            journal = Journal.open(self._partial.journal)
            fresh = journal is None
            if journal is not None:
                self._terms.check(journal.entries[0], str(journal.path))
                self._receipts = self._trusted(journal)
            self._clear_out()
            self._check_space()
            self._partial.begin()
            if journal is not None:
                journal.append(dated({"kind": "run"}))
            self._journal = journal or self._new_journal()
        except BaseException as error:
            self._partial.discard_work()
            if fresh:
                self._partial.discard_unused()
            self._partial.close(error)
            self._raise_if_full(error)
            with as_write_error(self._partial.path):
                raise
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync") if self._threads > 1 else None
        return self

    def _new_journal(self) -> Journal:
        path = self._partial.journal
        try:
            with as_write_error(path):
                journal = Journal.create(
                    path, self._partial.work / path.name, first_entry(self._terms.entry(), self._label, self._shards)
                )
                sync_folder(path.parent)
                return journal
        except WriteError as error:
            # On a file system that grants every lock, another run may have started in the meantime.
            journal_now = Journal.open(path) if error.errno == errno.EEXIST else None
            if journal_now is None:
                raise
            self._terms.check(journal_now.entries[0], str(path))
            return journal_now

    def _trusted(self, journal: Journal) -> dict[str, ShardReceipt]:
        """Return the receipts of an earlier run whose shards exist with the digests of the receipts."""
        receipts = {
            name: receipt
            for name, receipt in journal.receipts().items()
            if receipt.sha256 is not None and name in self._sizes
        }
        files = {name: FileDigest(r.size, r.sha256) for name, r in receipts.items()}
        self._partial.relink_finished(files)
        wrong = check_files(self._partial.out, files, self._threads)
        return {name: receipt for name, receipt in receipts.items() if name not in wrong}

    def _clear_out(self) -> None:
        """Remove every file that is not a verified shard: small files, and incomplete or damaged shards."""
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in names_in(self._partial.out):
                if name not in self._receipts:
                    remove(self._partial.out / name)

    def _check_space(self) -> None:
        needed, free = self._room()
        if needed > free:
            raise DiskSpaceError(str(self.path), needed, free)

    def _room(self, small_blocks: int = SMALL_BLOCKS) -> tuple[int, int]:
        """Return the remaining bytes to write, and the free bytes."""
        sizes = [size for name, size in self._sizes.items() if name not in self._receipts]
        return space_needed_and_free(self._partial.path, sizes, small_blocks)

    def _raise_if_full(self, error: BaseException | None) -> None:
        """Raise DiskSpaceError with the missing bytes if the disk or a quota is full."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            if isinstance(error, DiskSpaceError):
                return
            # Slightly more than the check of the next run requires, which might otherwise fail for one block.
            needed, free = self._room(2 * SMALL_BLOCKS)
            raise DiskSpaceError(str(self.path), needed, free, error.errno) from error

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._journal.close()
        if self._published or is_permanent(error):
            self._partial.discard()
        else:
            self._partial.relink_finished(self._receipts)
            self._partial.discard_work()
        self._partial.close(error)
        self._raise_if_full(error)

    def finished(self) -> Mapping[str, ShardReceipt]:
        return dict(self._receipts)

    @property
    def staging(self) -> FolderStaging:
        return FolderStaging(self._partial.work, self.digests)

    def record(self, receipt: ShardReceipt) -> None:
        self.wait()
        if self._pool is None:
            self._record(receipt)
        else:  # synced while the next shard is written
            self._recording = self._pool.submit(self._record, receipt)

    def _record(self, receipt: ShardReceipt) -> None:
        commit_file(self._partial.work / receipt.name, receipt.size, self._partial.out / receipt.name)
        with as_write_error(self._journal.path):
            self._journal.append(dated(receipt_entry(receipt)))
        self._receipts[receipt.name] = receipt

    def wait(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.result()

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        self.wait()
        with as_write_error(self._partial.path):
            result = self._gather(receipts)
            for name, data in documents.items():
                write_file(result / name, iter([data]), self._partial.work / name)
            for name, pieces in copies.items():
                write_file(result / name, pieces(), self._partial.work / name)
            small = sum((result / name).stat().st_size for name in (*documents, *copies))
            _check_result(result, receipts, {*documents, *copies})
            sync_folder(result)
            manifest = documents.get(MANIFEST, b"")
            self._journal.append(dated({"kind": "publish", "manifest": hashlib.sha256(manifest).hexdigest()}))
            occupied = self.occupied()
            if occupied and not self.overwrite:
                raise DestinationExistsError(str(self.path), "received files during this run")
            self._unlink_staged(result, receipts)
            if occupied:
                _exchange(result, self.path, self._partial.path / OLD)
                sync_folder(self._partial.path)
            else:
                os.rename(result, self.path)
            sync_folder(self.path.parent)
        self._published = True
        self.bytes_published = sum(receipt.size for receipt in receipts.values()) + small

    def _gather(self, receipts: Mapping[str, ShardReceipt]) -> Path:
        """Link the finished shards into a folder of this run, and return the folder.

        Without hard links, return the shared folder of finished shards, which only the lock protects.
        """
        out, result = self._partial.out, self._partial.result
        result.mkdir()
        try:
            for name in receipts:
                os.link(out / name, result / name)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            remove(result)
            return out
        return result

    def _unlink_staged(self, result: Path, receipts: Mapping[str, ShardReceipt]) -> None:
        """Remove the staged links, so that no leftover of a killed run shares an inode with a published shard."""
        if result != self._partial.out:
            for name in receipts:
                remove(self._partial.out / name)


def _check_result(result: Path, receipts: Mapping[str, ShardReceipt], small: set[str]) -> None:
    """Check that a folder holds exactly the files of the result, before it is published."""
    for name, receipt in receipts.items():
        differs = existing_files(result / name, receipt.size)
        if differs:
            raise WriteError(str(result / name), differs)
    if strange := sorted(set(names_in(result)) - receipts.keys() - small):
        raise WriteError(str(result / strange[0]), "does not belong to this conversion; remove it and rerun")


def existing_files(path: Path, size: int) -> str | None:
    """Return the difference between a file and a staged shard of ``size`` bytes; None without a difference."""
    return check_files(path.parent, {path.name: FileDigest(size, None)}, 1).get(path.name)


def partial_path(path: Path) -> Path:
    """Return the path of a destination's partial folder."""
    return path.with_name(path.name + ".partial") if path.name else path / ".partial"


def published_receipts(path: Path, terms: RunIdentity, threads: int) -> dict[str, ShardReceipt] | None:
    """Clean up after a run that was interrupted between publishing and its cleanup, and return its receipts.

    Return None without such a run, or if the destination has changed since.
    """
    with _leftover(path, terms) as (partial, journal):
        published = journal.of_kind("publish") if journal else []
        if partial is None or journal is None or not published:
            return None
        try:
            data = manifest_bytes(path)
            if data is None or hashlib.sha256(data).hexdigest() != published[-1].get("manifest"):
                return None
            manifest = parse_manifest(data)
        except MalformedManifestError:
            return None
        if not manifest.has_digests or check_files(path, manifest.files, threads):
            return None
        partial.discard()
        return journal.receipts()


def discard_leftover(path: Path, terms: RunIdentity) -> None:
    """Remove the partial folder of the same conversion beside a complete destination."""
    with _leftover(path, terms) as (partial, _):
        if partial is not None:
            partial.discard()


@contextmanager
def _leftover(path: Path, terms: RunIdentity) -> Iterator[tuple[PartialFolder | None, Journal | None]]:
    """Lock the partial folder beside a destination, and open its journal.

    Yield None without a partial folder, if another run has locked it, or if it belongs to another conversion.
    """
    place = partial_path(path)
    try:
        partial = PartialFolder(place) if place.is_dir() and not place.is_symlink() else None
    except DestinationBusyError:
        partial = None
    if partial is None:
        yield None, None
        return
    journal = None
    try:
        try:
            with as_write_error(partial.journal):
                journal = Journal.open(partial.journal)
            if journal is not None:
                terms.check(journal.entries[0], str(journal.path))
        except (OtherRunError, DamagedJournalError):
            yield None, None
            return
        yield partial, journal
    finally:
        if journal is not None:
            journal.close()
        partial.close()


def is_occupied(path: Path) -> bool:
    """Return True if ``path`` exists and is not an empty folder."""
    with as_write_error(path):  # the name may be too long, or its parent may be unreadable
        if not path.is_dir():
            return os.path.lexists(path)
        return any(os.scandir(path))


def refuse_overlap(source: Path, destination: Path) -> None:
    """Raise OverlapError if a source and a destination, or its partial folder, contain each other; follow links."""
    a, b = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
    if a == b or a in b.parents or b in a.parents:
        raise OverlapError(str(a), str(b))
    partial = b.with_name(f"{b.name}.partial")  # removed at the end
    if a == partial or partial in a.parents:
        raise OverlapError(str(a), str(partial))


def _exchange(new: Path, old: Path, aside: Path) -> None:
    """Exchange two folders atomically; without ``renameat2``, move ``old`` to ``aside`` first."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        with suppress(AttributeError):  # a C library without renameat2
            if not libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE):
                return
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(code, os.strerror(code), str(old))
    # Two renames: the destination is absent for a moment, but never incomplete.
    os.rename(old, aside)
    os.rename(new, old)
