"""The working folder of an unfinished conversion: its lock, its temporaries, its removal.

Nothing here trusts the lock: some network file systems grant it to everyone. Every run has temporaries under
names of its own, made exclusively, and gives them their final name only when they are complete; two runs
that work side by side then write the same bytes under the same names, or one of them fails.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import (
    JOURNAL,
    LOCK,
    OLD,
    OUT,
    SAVED,
    WORK,
    as_write_error,
    names_in,
    own_temporaries,
    remove,
    remove_stale,
    sync_folder,
    temporary_name,
)
from nemotron_fp8.errors import DestinationBusyError, WriteError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

RESULT = ".result"
"""What the name of a run's folder of temporaries is followed by in that of the folder it publishes."""
_LOCK_TRIES = 20


class PartialFolder:
    """A working folder, locked while this is open.

    Args:
        path: the folder; made where it is missing, never followed where it is a link.

    Raises:
        DestinationBusyError: another process has it.
        WriteError: the system refuses, or something else stands there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.out, self.journal = path / OUT, path / JOURNAL
        self._made = [parent for parent in path.parents if not os.path.lexists(parent)]
        with as_write_error(path):
            self._lock = self._take()
            if os.path.lexists(self.out) and not stat.S_ISDIR(self.out.lstat().st_mode):
                self.out.unlink()  # a link, as a rule: what it leads to is none of ours
        self.work = path / temporary_name()
        self.result = self.work.with_name(f"{self.work.name}{RESULT}")

    def begin(self) -> None:
        """Make the folders that a run works in; remove the temporaries of runs that are no more."""
        with as_write_error(self.path):
            remove_stale(self.path)
            own_temporaries.update((self.work.name, self.result.name))
            self.work.mkdir()
            _folder(self.out)
            sync_folder(self.path)
            sync_folder(self.path.parent)

    def restart(self) -> None:
        """Remove what runs have left: the journal first, so that nothing of it is believed afterwards."""
        with as_write_error(self.path):
            for name in (JOURNAL, OUT, OLD, SAVED):
                remove(self.path / name)
            remove_stale(self.path)

    def relink_finished(self, names: Collection[str]) -> None:
        """Link finished shards into `out` again where a run was stopped when it was about to publish them."""
        with suppress(OSError):  # what cannot be linked will be made again
            for folder in names_in(self.path):
                if folder.endswith(RESULT) and stat.S_ISDIR((self.path / folder).lstat().st_mode):
                    for name in names:
                        with suppress(FileNotFoundError, FileExistsError):
                            os.link(self.path / folder / name, self.out / name)
                    sync_folder(self.out)

    def discard_work(self) -> None:
        """Remove this run's temporaries."""
        for folder in (self.work, self.result):
            remove(folder)
            own_temporaries.discard(folder.name)

    def discard_unused(self) -> None:
        """Remove the folder if there is nothing in it that a later run could use."""
        with suppress(OSError):
            if not self.journal.exists() and not (self.out.is_dir() and any(self.out.iterdir())):
                self.discard()

    def discard(self) -> None:
        """Remove what conversions have made, the journal after what it speaks of, the lock last; and the folder, and
        those that were made for it, where nothing else is in them.
        """
        with suppress(OSError):
            for name in names_in(self.path):
                if name in (OUT, OLD, SAVED) or name.startswith(WORK):
                    remove(self.path / name)
        own_temporaries.difference_update((self.work.name, self.result.name))
        for name in (JOURNAL, LOCK):
            remove(self.path / name)
        with suppress(OSError):
            self.path.rmdir()
            sync_folder(self.path.parent)
            for parent in self._made:
                parent.rmdir()

    def close(self) -> None:
        """Release the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take(self) -> int:
        """Lock the folder's lock file, and make sure that it still is the folder's."""
        for _ in range(_LOCK_TRIES):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                problem = "a file is in its way; choose another destination"
                raise WriteError(str(self.path.parent), problem, error.errno) from error
            with as_write_error(self.path):
                _folder(self.path)
            try:
                lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # the folder went: its run has just ended
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = (self.path / LOCK).stat(follow_symlinks=False)
                if os.path.samestat(os.fstat(lock), there):
                    _write_owner(lock)
                    return lock
            except BlockingIOError:
                who = _read_owner(lock)
                os.close(lock)
                raise DestinationBusyError(str(self.path), who) from None
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    os.close(lock)
                    raise
                return lock  # no locks on this file system; we do without
            os.close(lock)
        raise DestinationBusyError(str(self.path), "")


def _folder(path: Path) -> None:
    """Make a folder unless it is there; refuse anything else under its name, links too."""
    with suppress(FileExistsError):
        path.mkdir()
        return
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "is in the way: not a folder", str(path))


def _write_owner(lock: int) -> None:
    """Write down who holds the lock; for people, nothing reads it but a message."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode("ascii"), 0)


def _read_owner(lock: int) -> str:
    try:
        record = json.loads(os.pread(lock, 4096, 0))
        return f"process {int(record['pid'])} on {ascii(str(record['host'])[:100])[1:-1]}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
