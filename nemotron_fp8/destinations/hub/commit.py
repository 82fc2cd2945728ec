"""What is sent to the Hub, and how a listing must show it afterwards."""

from __future__ import annotations

import hashlib
import io
import pickle
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.inventory import CONFIG, MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nemotron_fp8.destinations.hub.job import StagedShard
    from nemotron_fp8.hub.listing import Listing, RemoteFile

    Content = bytes | Path
    """What a small file is made of."""

REPLACED = (".safetensors", ".safetensors.index.json")
"""Endings of what goes from a branch when its weights are replaced: the rest would be a mixture."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A file that was uploaded already, from this machine or another.

    Attributes:
        operation: the client's operation, marked by the client as uploaded; pickled, for it serves one attempt.
    """

    operation: bytes


@dataclass(frozen=True, slots=True)
class Digest:
    """What a listing must say of a file.

    Attributes:
        sha256: hexadecimal digest of its content, for an object.
        blob: its git blob id, for a file that git holds; None where that cannot be.
        size: its bytes.
    """

    sha256: str
    blob: str | None
    size: int


def digest_of(content: Content) -> Digest:
    """The digests of a small content."""
    data = content.read_bytes() if isinstance(content, Path) else content
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return Digest(hashlib.sha256(data).hexdigest(), blob, len(data))


def difference(listing: Listing, expected: Mapping[str, Digest]) -> str | None:
    """The first file that a listing does not hold as expected, or weights that it should not hold."""
    for name, digest in sorted(expected.items()):
        file = listing.files.get(name)
        if file is None or file.size != digest.size:
            return name
        same = file.blob == digest.blob if file.sha256 is None else file.sha256 == digest.sha256
        if not same:
            return name
    return next((name for name in listing.files if name.endswith(REPLACED) and name not in expected), None)


def addition(name: str, content: Content | Uploaded, sent: Callable[[int], None] | None = None) -> Any:
    """The client's operation that adds a file. It serves one attempt: the client marks what it has sent.

    Args:
        name: path in the repository.
        content: bytes, a local file, or what was uploaded before.
        sent: called with the position up to which a local file was read, where it goes by LFS. Xet reads it by
            itself and does not tell; see `nemotron_fp8.hub.upload_progress`.
    """
    from huggingface_hub import CommitOperationAdd

    if isinstance(content, Uploaded):
        return pickle.loads(content.operation)
    operation = CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
    if sent is not None and isinstance(content, Path):
        path = content

        @contextmanager
        def as_file(with_tqdm: bool = False) -> Iterator[io.BufferedReader]:
            with _Watched(path, sent) as file:
                yield file

        operation.as_file = as_file  # type: ignore[method-assign]  # the client's own draws a bar
    return operation


def uploaded(operation: Any) -> Uploaded:
    """What the client has uploaded, for a commit of another process."""
    operation.__dict__.pop("as_file", None)  # what tells how far it was read serves no more, and cannot travel
    return Uploaded(pickle.dumps(operation))


class _Watched(io.BufferedReader):
    """A file that tells how far it was read."""

    def __init__(self, path: Path, told: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path))
        self._told = told

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size != 0:
            self._told(self.tell())
        return data


def replaced(before: Mapping[str, object], expected: Mapping[str, Digest]) -> list[Any]:
    """The client's operations that delete the weights of ``before`` that ``expected`` does not name."""
    from huggingface_hub import CommitOperationDelete

    old = sorted(path for path in before if path.endswith(REPLACED) and path not in expected)
    return [CommitOperationDelete(path, is_folder=False) for path in old]


def holds(listing: Listing, shard: StagedShard) -> bool:
    """Whether a listing has a shard as it was staged."""
    file = listing.files.get(shard.name)
    return file is not None and (file.sha256, file.size) == (shard.sha256, shard.size)


def result_of(listing: Listing) -> dict[str, RemoteFile]:
    """The files of a listing that make a result: weights, index, config and manifest."""
    return {name: file for name, file in listing.files.items() if name.endswith(REPLACED) or name in (CONFIG, MANIFEST)}
