"""The working folder of an unfinished conversion: its lock, its temporaries, its removal.

Nothing here trusts the lock: some network file systems grant it to everyone. Every run has temporaries under
names of its own, made exclusively, and gives them their final name only when they are complete; two runs
that work side by side then write the same bytes under the same names, or one of them fails.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.errors import DestinationBusyError, NemotronFp8Error, WriteError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

LOCK, JOURNAL, OUT, OLD, SAVED, WORK = "lock", "journal.jsonl", "out", "old", "source", "work-"
RESULT = ".result"
"""What the name of a run's folder of temporaries is followed by in that of the folder it publishes."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""What a file system answers that knows no hard links, or none from one folder to another."""
_LOCK_TRIES = 20
own_temporaries: set[str] = set()
"""Names of the folders of temporaries that runs of this very process work in."""


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
        with typed(path):
            self._lock = self._take()
            if os.path.lexists(self.out) and not stat.S_ISDIR(self.out.lstat().st_mode):
                self.out.unlink()  # a link, as a rule: what it leads to is none of ours
        self.work = path / temporary_name()
        self.result = self.work.with_name(f"{self.work.name}{RESULT}")

    def begin(self) -> None:
        """Make the folders that a run works in; remove the temporaries of runs that are no more."""
        with typed(self.path):
            remove_stale(self.path)
            own_temporaries.update((self.work.name, self.result.name))
            self.work.mkdir()
            _folder(self.out)
            sync_folder(self.path)
            sync_folder(self.path.parent)

    def restart(self) -> None:
        """Remove what runs have left: the journal first, so that nothing of it is believed afterwards."""
        with typed(self.path):
            for name in (JOURNAL, OUT, OLD, SAVED):
                remove(self.path / name)
            remove_stale(self.path)

    def take_back(self, names: Collection[str]) -> None:
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
            with typed(self.path):
                _folder(self.path)
            try:
                lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # the folder went: its run has just ended
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = (self.path / LOCK).stat(follow_symlinks=False)
                if os.path.samestat(os.fstat(lock), there):
                    _say_who(lock)
                    return lock
            except BlockingIOError:
                who = _who(lock)
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


def _say_who(lock: int) -> None:
    """Write down who holds the lock; for people, nothing reads it but a message."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode("ascii"), 0)


def _who(lock: int) -> str:
    try:
        record = json.loads(os.pread(lock, 4096, 0))
        return f"process {int(record['pid'])} on {ascii(str(record['host'])[:100])[1:-1]}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def temporaries(parent: Path) -> Iterator[Path]:
    """Make a private folder of temporaries in ``parent`` and remove it at the end, with those of runs that are no more.

    Raises:
        WriteError: the system refuses.
    """
    work = parent / temporary_name()
    own_temporaries.add(work.name)
    try:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            remove_stale(parent)
            work.mkdir(mode=0o700)
        except OSError as error:
            problem = f"{error.strerror or error}; name another folder for shards on their way (--cache-dir)"
            raise WriteError(str(parent), problem, error.errno) from error
        yield work
    finally:
        remove(work)
        own_temporaries.discard(work.name)


def owner() -> str:
    """A name of this process: of the running system, its process namespace and the process in it."""
    return f"{_system()}-{os.getpid()}-{_start_of(os.getpid()) or 0}"


def temporary_name() -> str:
    """A name that no other folder of temporaries has, and that tells whose it is."""
    return f"{WORK}{owner()}-{os.urandom(4).hex()}"


def remove_stale(parent: Path) -> None:
    """Remove the folders of temporaries of runs that are no more."""
    for name in names_in(parent):
        if name.startswith(WORK) and is_stale(name):
            remove(parent / name)


def is_stale(work: str) -> bool:
    """Whether the process that made a folder of temporaries is known to be gone."""
    fields = work.removeprefix(WORK).split("-")
    if len(fields) != 4 or fields[0] != _system() or not (fields[1] + fields[2]).isdecimal():
        return False
    pid, start = int(fields[1]), int(fields[2])
    if pid == os.getpid():
        return work not in own_temporaries
    return (_start_of(pid) or 0) != start or (not start and not _alive(pid))


def _system() -> str:
    """A digest that tells systems and process namespaces apart; it changes at every start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        space = os.fsencode(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot, space = socket.gethostname().encode(), b""
    return hashlib.sha256(boot + space).hexdigest()[:8]


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks; None where it is not there or the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, as far as the system lets us; links are not followed.

    A folder is given a name of this run's first: another run, that the lock did not keep out, may be about to publish
    it. Then one of the two finds it gone, and nobody publishes what is being emptied.
    """
    with suppress(OSError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            path.unlink()
            return
        going = path.with_name(temporary_name())
        try:
            os.rename(path, going)
        except FileNotFoundError:
            return
        except OSError:  # a layered file system may not rename what lies in a lower layer
            going = path
        shutil.rmtree(going, ignore_errors=True)


def names_in(path: Path) -> list[str]:
    """Names of what is in a folder."""
    return sorted(entry.name for entry in os.scandir(path))


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def typed(path: Path) -> Iterator[None]:
    """Turn what the system refuses into an error of ours."""
    try:
        yield
    except NemotronFp8Error:
        raise
    except OSError as error:
        problem = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            problem += "; choose a destination that can be written to"
        elif error.errno == errno.ENOENT:  # a folder that can hold none, or one that went
            problem += "; choose a destination in a folder that stays"
        raise WriteError(str(error.filename or path), problem, error.errno) from error


SMALL_BLOCKS = 16
"""Blocks that journal, lock and folders take beside the files of a result."""


def room(path: Path, sizes: Iterable[int], small_blocks: int = SMALL_BLOCKS) -> tuple[int, int]:
    """Bytes that files of these sizes take on the file system of ``path``, and bytes that this user has left there.

    In whole blocks, and with some for the small files beside them. ``path`` need not be there yet.
    """
    while not path.exists():
        path = path.parent
    info = os.statvfs(path)
    block = max(1, info.f_frsize)
    needed = sum(-(-size // block) for size in sizes) + small_blocks
    return needed * block, info.f_bavail * info.f_frsize
