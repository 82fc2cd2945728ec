"""Sync, rename and remove files, measure free space, and keep private temporary folders."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from nemotron_fp8._process import is_alive, start_of, system
from nemotron_fp8.errors import NemotronFp8Error, WriteError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


LOCK, JOURNAL, OUT, OLD, WORK = "lock", "journal.jsonl", "out", "old", "work-"
SAVED, AMAXES = "source", "amaxes"
WORKING = ".nemotron_fp8"
"""Working folder inside a folder that is converted in place, so that a rename never leaves the file system."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""Error numbers of a file system without hard links, or without hard links between two folders."""
own_temporaries: set[str] = set()
"""Names of the temporary folders that belong to runs of this process."""


@contextmanager
def temporaries(parent: Path) -> Iterator[Path]:
    """Create a private temporary folder in ``parent`` until the context ends; also remove the folders of ended runs.

    Raises:
        WriteError: the folder cannot be created.
    """
    work = parent / temporary_name()
    own_temporaries.add(work.name)
    try:
        try:
            make_folders(parent)
            remove_stale(parent)
            work.mkdir(mode=0o700)
        except OSError as error:
            problem = f"{error.strerror or error}; choose another folder for downloads and uploads (--cache-dir)"
            raise WriteError(str(parent), problem, error.errno) from error
        yield work
    finally:
        remove(work)
        own_temporaries.discard(work.name)


def make_folders(path: Path) -> None:
    """Create a folder and its missing parents, however many; an existing folder is no error.

    Raises:
        OSError: a folder cannot be created.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)


def owner() -> str:
    """Return a name of this process that is unique across boots, process namespaces and processes."""
    return f"{system()}-{os.getpid()}-{start_of(os.getpid()) or 0}"


def temporary_name() -> str:
    """Return a unique name for a temporary folder; it identifies the process."""
    return f"{WORK}{owner()}-{os.urandom(4).hex()}"


def remove_stale(parent: Path) -> None:
    """Remove the temporary folders of ended runs."""
    for name in names_in(parent):
        if name.startswith(WORK) and is_stale(name):
            remove(parent / name)


def is_stale(work: str) -> bool:
    """Return True if the process of a temporary folder has certainly ended."""
    fields = work.removeprefix(WORK).split("-")
    if len(fields) != 4 or fields[0] != system() or not (fields[1] + fields[2]).isdecimal():
        return False
    pid, start = int(fields[1]), int(fields[2])
    if pid == os.getpid():
        return work not in own_temporaries
    return (start_of(pid) or 0) != start or (not start and not is_alive(pid))


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content; errors are ignored, and links are not followed.

    A folder is renamed before it is deleted. A concurrent run that ignores the lock then finds no folder to publish,
    instead of a half-deleted one.
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
        except OSError:  # a layered file system cannot rename a folder of a lower layer
            going = path
        shutil.rmtree(going, ignore_errors=True)


def names_in(path: Path) -> list[str]:
    """Return the sorted names of a folder's entries."""
    return sorted(entry.name for entry in os.scandir(path))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a pipe or a device gets the bytes as they are.

    Raises:
        OSError: the file cannot be written, or is a pipe without a reader. A file of this name is unchanged.
    """
    if path.exists() and not path.is_file():
        try:  # opening a pipe without a reader would wait for one
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise OSError(errno.ENXIO, "a pipe that nothing reads, or a socket; name a file", str(path)) from None
            raise
        with os.fdopen(fd, "wb", buffering=0) as stream:
            os.set_blocking(fd, True)
            left = memoryview(data)
            while left:
                left = left[stream.write(left) or 0 :]
        return
    whole = path.resolve()
    temporary = whole.with_name(temporary_name())
    try:
        temporary.write_bytes(data)
        temporary.replace(whole)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Sync a folder, so that the names in it are durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def as_write_error(path: Path) -> Iterator[None]:
    """Convert an `OSError` of the block into a `WriteError`."""
    try:
        yield
    except NemotronFp8Error:
        raise
    except OSError as error:
        problem = error.strerror or str(error)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            problem += "; choose a writable destination"
        elif error.errno == errno.ENOENT:  # a folder like /proc, or a removed folder
            problem += "; choose a destination in another folder"
        raise WriteError(str(error.filename or path), problem, error.errno) from error


SMALL_BLOCKS = 16
"""Number of blocks for journal, lock and folders, in addition to the files of a result."""


def space_needed_and_free(path: Path, sizes: Iterable[int], small_blocks: int = SMALL_BLOCKS) -> tuple[int, int]:
    """Return the bytes that files of these sizes need on the file system of ``path``, and the bytes free there.

    Sizes are rounded up to whole blocks, and ``small_blocks`` are added. ``path`` need not exist yet.
    """
    while not path.exists():
        path = path.parent
    info = os.statvfs(path)
    block = max(1, info.f_frsize)
    needed = sum(-(-size // block) for size in sizes) + small_blocks
    return needed * block, info.f_bavail * info.f_frsize
