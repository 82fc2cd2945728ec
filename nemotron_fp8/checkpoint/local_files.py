"""Read small local files, follow links safely, and compare files with their digests."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._utils import check_stopping, parallel_for
from nemotron_fp8.progress import ignore_progress
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.regular_files import descriptor_of, read_start

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.progress import Advance

HASH_BYTES = 1 << 20
"""Bytes hashed at a time."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and digest of a file.

    Attributes:
        size: bytes of the file.
        sha256: hexadecimal digest; None if it was not computed.
    """

    size: int
    sha256: str | None

    def wrong_size(self, size: int) -> str | None:
        """Return how a size differs from this one; None if it does not."""
        return None if size == self.size else f"{size:,} bytes instead of {self.size:,}"

    def wrong_sha256(self, sha256: str) -> str | None:
        """Return how a digest differs from this one; None if it does not, or if this one was not computed."""
        return None if self.sha256 in (None, sha256) else f"SHA-256 {sha256} instead of {self.sha256}"


def within(path: Path) -> Path:
    """Resolve a link within its folder or into the blobs of its Hub cache; return any other path unchanged."""
    inside = path.is_symlink() and not links_outside(path.parent, [path.name])
    return Path(os.path.realpath(path)) if inside else path


def what_differs(
    path: Path, expected: FileDigest, *, links: bool = False, advance: Advance = ignore_progress
) -> str | None:
    """Return the difference between a file and its expected size and digest; None if they agree.

    Args:
        path: the file.
        expected: expected size and digest.
        links: follow a link within its folder or into the blobs of its Hub cache; other links are never followed.
        advance: called with the bytes hashed.
    """
    try:
        opened = within(path) if links else path
        fd = descriptor_of(opened, follow=False)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link to another folder; replace it by a copy of the file"
        if error.errno == errno.EINVAL:
            return error.strerror or "not a regular file"
        return f"cannot be read: {error.strerror}"
    with os.fdopen(fd, "rb", buffering=0):
        info = os.fstat(fd)
        if (wrong := expected.wrong_size(info.st_size)) or expected.sha256 is None:
            return wrong
        try:
            found = digest_of_file(fd, advance)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
    return expected.wrong_sha256(found)


def digest_of_file(fd: int, advance: Advance = ignore_progress) -> str:
    """Return the SHA-256 of an open file, hexadecimal; its position is neither used nor moved."""
    hasher, buffer, done = hashlib.sha256(), memoryview(bytearray(HASH_BYTES)), 0
    while got := os.preadv(fd, [buffer], done):
        check_stopping()
        hasher.update(buffer[:got])
        done += got
        advance(got)
    return hasher.hexdigest()


def check_files(
    root: Path,
    files: Mapping[str, FileDigest],
    threads: int,
    names: Iterable[str] | None = None,
    *,
    links: bool = False,
    advance: Advance = ignore_progress,
) -> dict[str, str]:
    """Compare files of a folder with their expected digests, several at a time; return the differences by name.

    ``links`` and ``advance`` are those of `what_differs`.
    """
    wrong: dict[str, str] = {}

    def one(name: str) -> None:
        if problem := what_differs(root / name, files[name], links=links, advance=advance):
            wrong[name] = problem

    chosen = sorted(files if names is None else names)
    parallel_for(max(1, min(threads, len(chosen))), chosen, one)
    return dict(sorted(wrong.items()))


def links_outside(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the links to targets outside the folder and outside the blobs of its Hub cache, with these targets.

    A Hub cache holds ``snapshots/<revision>/<name>``, links into ``blobs`` beside ``snapshots``. Source:
    huggingface_hub, ``guides/manage-cache``.
    """
    home = Path(os.path.realpath(root))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    found: dict[str, str] = {}
    for name in names:
        if (root / name).is_symlink():
            target = Path(os.path.realpath(root / name))
            if not any(folder in target.parents for folder in allowed):
                found[name] = str(target)
    return found


def read_small(path: Path) -> bytes:
    """Read a JSON file up to one byte over the size cap: enough for the parser to reject it.

    Raises:
        SourceReadError: the file cannot be read, or is not a regular file.
    """
    return read_start(path, strict_json.MAX_BYTES + 1)
