"""Working folder of an unfinished conversion: its lock, its temporaries, its removal.

The lock alone is not enough, because some network file systems grant it to every process. Each run therefore creates
temporaries exclusively under unique names, and renames them only when they are complete: two concurrent runs write the
same bytes under the same names, or one of them fails.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import (
    AMAXES,
    JOURNAL,
    LOCK,
    OLD,
    OUT,
    SAVED,
    WORK,
    as_write_error,
    make_folders,
    names_in,
    own_temporaries,
    remove,
    remove_stale,
    sync_folder,
    temporary_name,
)
from nemotron_fp8.destinations.lock_record import LockRecord, record_in, write_record
from nemotron_fp8.errors import DestinationBusyError, ForeignFolderError, WriteError
from nemotron_fp8.untrusted.regular_files import kind_of

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

RESULT = ".result"
"""Suffix of the folder that a run publishes, after the name of its folder of temporaries."""
_LOCK_TRIES = 20
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class PartialFolder:
    """A working folder, locked until `close`.

    Args:
        path: the folder, created if it is missing; a link is rejected.

    Raises:
        DestinationBusyError: another process has locked the folder.
        WriteError: the folder cannot be created, or another file has this name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.out, self.journal = path / OUT, path / JOURNAL
        self._record: LockRecord | None = None
        self._made = [parent for parent in path.parents if not os.path.lexists(parent)]
        try:
            self._lock = self._take()
        except (WriteError, OSError) as error:
            self._remove_made()
            with as_write_error(path):
                raise error from None
        with as_write_error(path):
            for name in (OUT, OLD, SAVED, AMAXES):
                folder = path / name
                if os.path.lexists(folder) and not stat.S_ISDIR(folder.lstat().st_mode):
                    folder.unlink()  # usually a link, whose target must not be changed
        self.work = path / temporary_name()
        self.result = self.work.with_name(f"{self.work.name}{RESULT}")

    def begin(self) -> None:
        """Create the folders of this run, and remove the temporaries of dead runs."""
        with as_write_error(self.path):
            remove_stale(self.path)
            own_temporaries.update((self.work.name, self.result.name))
            self.work.mkdir()
            _folder(self.out)
            sync_folder(self.path)
            sync_folder(self.path.parent)

    def restart(self) -> None:
        """Remove the files of earlier runs, the journal first: no journal may be left without its files."""
        with as_write_error(self.path):
            for name in (JOURNAL, OUT, OLD, SAVED, AMAXES):
                remove(self.path / name)
            remove_stale(self.path)

    def relink_finished(self, names: Collection[str]) -> None:
        """Link finished shards into `out` again after a run that was interrupted just before publishing."""
        with suppress(OSError):  # a shard that cannot be linked is converted again
            for folder in names_in(self.path):
                if folder.endswith(RESULT) and stat.S_ISDIR((self.path / folder).lstat().st_mode):
                    for name in names:
                        with suppress(FileNotFoundError, FileExistsError):
                            os.link(self.path / folder / name, self.out / name)
                    sync_folder(self.out)

    def discard_work(self) -> None:
        """Remove the temporaries of this run."""
        for folder in (self.work, self.result):
            remove(folder)
            own_temporaries.discard(folder.name)

    def discard_unused(self) -> None:
        """Remove the folder if it holds nothing that a later run could resume from."""
        with suppress(OSError):
            if not self.journal.exists() and not (self.out.is_dir() and any(self.out.iterdir())):
                self.discard()

    def discard(self) -> None:
        """Remove the files of all runs, the journal after the shards and the lock last.

        The folder, and the parents that were created for it, are removed if they are empty.
        """
        with suppress(OSError):
            for name in names_in(self.path):
                if name in (OUT, OLD, SAVED, AMAXES) or name.startswith(WORK):
                    remove(self.path / name)
        own_temporaries.difference_update((self.work.name, self.result.name))
        for name in (JOURNAL, LOCK):
            remove(self.path / name)
        with suppress(OSError):
            self.path.rmdir()
            sync_folder(self.path.parent)
        self._remove_made()

    def _remove_made(self) -> None:
        """Remove the parents that were created for the folder, if they are empty."""
        with suppress(OSError):
            for parent in self._made:
                parent.rmdir()

    def close(self, error: BaseException | None = None) -> None:
        """Release the lock, and record the end of the run with its error."""
        if self._lock >= 0:
            if self._record is not None:
                write_record(self._lock, self._record.over(error))
            os.close(self._lock)
            self._lock = -1

    def _take(self) -> int:
        """Lock the lock file, and check that the file is still in the folder."""
        for _ in range(_LOCK_TRIES):
            try:
                make_folders(self.path.parent)
            except (FileExistsError, NotADirectoryError) as error:
                problem = "is not a folder, or lies below a file; choose another destination"
                raise WriteError(str(self.path.parent), problem, error.errno) from error
            with as_write_error(self.path):
                _folder(self.path)
                _refuse_foreign(self.path)
            try:
                lock = os.open(
                    self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666
                )
            except FileNotFoundError:  # the run that owned the folder has just ended and removed it
                continue
            if not stat.S_ISREG(mode := os.fstat(lock).st_mode):
                os.close(lock)
                raise WriteError(str(self.path / LOCK), f"{kind_of(mode)}, not a regular file; remove it", errno.EINVAL)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = (self.path / LOCK).stat(follow_symlinks=False)
                if os.path.samestat(os.fstat(lock), there):
                    self._record = LockRecord.begun()
                    write_record(lock, self._record)
                    return lock
            except BlockingIOError:
                found = record_in(lock)
                os.close(lock)
                raise DestinationBusyError(str(self.path), found.owner if found else "") from None
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    os.close(lock)
                    raise
                return lock  # this file system has no locks
            os.close(lock)
        raise DestinationBusyError(str(self.path), "")


def _folder(path: Path) -> None:
    """Create a folder unless it exists; reject any other file of this name, also a link."""
    with suppress(FileExistsError):
        path.mkdir()
        return
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder; remove it, or choose another destination", str(path))


def _refuse_foreign(path: Path) -> None:
    """Check that no other user owns a folder.

    A network file system may show another owner than this user, for every file of this user: an owner that a new
    folder has too is no other user.

    Raises:
        ForeignFolderError: another user owns the folder.
    """
    owner, user = os.lstat(path).st_uid, os.geteuid()
    if owner == user:
        return
    probe = path / temporary_name()
    try:
        probe.mkdir()
        user = os.lstat(probe).st_uid
        probe.rmdir()
    except OSError:
        pass  # not writable, which the next step reports if the folder is ours
    if owner != user:
        raise ForeignFolderError(str(path), owner, user)
