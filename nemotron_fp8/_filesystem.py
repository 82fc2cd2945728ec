"""Sync, rename and remove files, measure free space, and keep private temporary folders."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.errors import NemotronFp8Error, WriteError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


LOCK, JOURNAL, OUT, OLD, SAVED, WORK = "lock", "journal.jsonl", "out", "old", "source", "work-"
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""What a file system answers that knows no hard links, or none from one folder to another."""
own_temporaries: set[str] = set()
"""Names of the folders of temporaries that runs of this very process work in."""


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
def as_write_error(path: Path) -> Iterator[None]:
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


def space_needed_and_free(path: Path, sizes: Iterable[int], small_blocks: int = SMALL_BLOCKS) -> tuple[int, int]:
    """Bytes that files of these sizes take on the file system of ``path``, and bytes that this user has left there.

    In whole blocks, and with some for the small files beside them. ``path`` need not be there yet.
    """
    while not path.exists():
        path = path.parent
    info = os.statvfs(path)
    block = max(1, info.f_frsize)
    needed = sum(-(-size // block) for size in sizes) + small_blocks
    return needed * block, info.f_bavail * info.f_frsize
