"""Open regular files only, without blocking.

Opening a pipe waits for a writer, and reading a device may never end. The kind of a file is therefore checked on its
open descriptor: a check by name could see another file than the one that is read.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.errors import SourceError, SourceReadError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator


KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
}


MISSING = "is missing"
"""End of the description of a link to nowhere."""


def kind_of(mode: int) -> str:
    """Return the name of a kind of file, by ``st_mode``."""
    return KINDS.get(stat.S_IFMT(mode), "a regular file" if stat.S_ISREG(mode) else "a special file")


def is_file(entry: os.DirEntry[str]) -> bool:
    """Return True if an entry of a folder is a regular file, or a link to one; False also for a link to itself."""
    try:
        return entry.is_file()
    except OSError:
        return False


def why_unreadable(path: Path) -> str | None:
    """Return what a path is, if it is no regular file; None for a regular file, or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            why = MISSING if error.errno == errno.ENOENT else f"cannot be followed: {error.strerror}"
            return f"a link to {printable(str(path.readlink()))}, which {why}"
        return error.strerror or str(error)
    return None if stat.S_ISREG(mode) else f"{kind_of(mode)}, not a regular file"


def descriptor_of(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """Open a regular file for reading; return its descriptor, which the caller closes.

    Args:
        path: the file.
        follow: follow a link at the end of the path.

    Raises:
        OSError: the file cannot be opened, or is not a regular file (``EINVAL``, with the kind in the text).
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            raise OSError(errno.EINVAL, "a socket or a device, not a regular file", os.fspath(path)) from None
        link = Path(path)
        if error.errno == errno.ENOENT and follow and link.is_symlink():
            raise OSError(
                errno.ENOENT, f"a link to {printable(str(link.readlink()))}, which {MISSING}", str(path)
            ) from None
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise OSError(errno.EINVAL, f"{kind_of(mode)}, not a regular file", os.fspath(path))
    return fd


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Open a regular file for reading until the context ends, and yield its descriptor.

    Raises:
        SourceReadError: the file is not a regular file, or the operating system reports an error, also in the body of
            the context.
    """
    try:
        fd = descriptor_of(path)
        try:
            yield fd
        finally:
            os.close(fd)
    except SourceError:
        raise
    except OSError as error:
        raise SourceReadError(str(path), error.strerror or str(error)) from error


PIPE_SECONDS = 30.0
"""Seconds that a pipe may stay silent."""


def read_start_or_pipe(path: Path, most: int) -> bytes:
    """Return the first bytes of a regular file, at most ``most``, or those of a pipe up to its end.

    A shell passes the output of a command as a pipe: ``--recipe <(command)``.

    Raises:
        SourceReadError: the file cannot be read; a pipe has no writer or no bytes, or is silent for `PIPE_SECONDS`.
    """
    try:
        piped = stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        piped = False
    if not piped:
        return read_start(path, most)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            data = _piped(fd, most)
        finally:
            os.close(fd)
    except OSError as error:
        raise SourceReadError(str(path), error.strerror or str(error)) from error
    if not data:
        raise SourceReadError(str(path), "a pipe without data")
    return data


def _piped(fd: int, most: int) -> bytes:
    """Return the bytes of a pipe up to its end, at most ``most``."""
    data = b""
    while len(data) < most:
        if not select.select([fd], [], [], PIPE_SECONDS)[0]:
            raise OSError(errno.ETIMEDOUT, f"a pipe without data for {PIPE_SECONDS:.0f} s")
        try:
            part = os.read(fd, most - len(data))
        except BlockingIOError:  # another reader was faster
            continue
        if not part:
            break
        data += part
    return data


def read_start(path: Path, most: int) -> bytes:
    """Return the first bytes of a regular file, at most ``most``.

    Raises:
        SourceReadError: the file cannot be read.
    """
    with open_regular(path) as fd:
        return read_descriptor(fd, most)


def read_descriptor(fd: int, most: int) -> bytes:
    """Return the first bytes of an open file, at most ``most``; its position is neither used nor moved."""
    parts: list[bytes] = []
    done = 0
    while done < most and (part := os.pread(fd, min(most - done, 1 << 20), done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)
