"""Operations of a commit, upload progress, and checks of the listing afterwards."""

from __future__ import annotations

import hashlib
import io
import pickle
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.inventory import CONFIG, MANIFEST, RECORDS
from nemotron_fp8.checkpoint.stated_quantization import states_quantization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nemotron_fp8.destinations.hub.job import StagedShard
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing, RemoteFile
    from nemotron_fp8.progress import TransferTracker

    Content = bytes | Path
    """Content of a small file."""

REPLACED = (".safetensors", ".safetensors.index.json")
"""Endings of files that are deleted when weights are replaced, so that old and new weights do not mix."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A file that this machine or another has uploaded already.

    Attributes:
        operation: pickled operation of huggingface_hub, marked as uploaded. Each attempt unpickles a fresh copy.
    """

    operation: bytes


@dataclass(frozen=True, slots=True)
class Digest:
    """Expected digests of a file in a listing.

    Attributes:
        sha256: hexadecimal digest of the content.
        blob: git blob id; None for a shard, which git never stores.
        size: bytes.
    """

    sha256: str
    blob: str | None
    size: int


def digest_of(content: Content) -> Digest:
    """Return the digests of a small file."""
    data = content.read_bytes() if isinstance(content, Path) else content
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return Digest(hashlib.sha256(data).hexdigest(), blob, len(data))


def first_difference(listing: Listing, expected: Mapping[str, Digest]) -> str | None:
    """Return the first file that a listing lacks, holds with another digest, or should not hold; None if it agrees."""
    for name, digest in sorted(expected.items()):
        file = listing.files.get(name)
        if file is None or file.size != digest.size:
            return name
        same = file.blob == digest.blob if file.sha256 is None else file.sha256 == digest.sha256
        if not same:
            return name
    return next((name for name in listing.files if name.endswith(REPLACED) and name not in expected), None)


def add_operation(name: str, content: Content | Uploaded, sent: Callable[[int], None] | None = None) -> Any:
    """Return the operation that adds a file. It serves one attempt, because the client marks it as sent.

    Args:
        name: path in the repository.
        content: bytes, a local file, or an earlier upload.
        sent: called with the position up to which a local file was sent. Only an upload by LFS reports positions;
            hf_xet reads the file itself and reports none.
    """
    from huggingface_hub import CommitOperationAdd

    if isinstance(content, Uploaded):
        return pickle.loads(content.operation)
    operation = CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
    if sent is not None and isinstance(content, Path):
        path = content

        @contextmanager
        def as_file(with_tqdm: bool = False) -> Iterator[io.BufferedReader]:
            with _ReportingFile(path, sent) as file:
                yield file

        operation.as_file = as_file  # type: ignore[method-assign]  # the client's own draws a bar
    return operation


def uploaded(operation: Any) -> Uploaded:
    """Return an uploaded operation for a commit in another process."""
    operation.__dict__.pop("as_file", None)  # reports progress, which is over, and cannot be pickled
    return Uploaded(pickle.dumps(operation))


@contextmanager
def upload_reported(
    transfers: TransferTracker, client: HubClient, path: Path, size: int
) -> Iterator[Callable[[int], None]]:
    """Report the upload of a file while the context lasts; yield a function to call with the position sent.

    The position is unknown until the client reports one, and the whole file is reported at the end.

    Args:
        transfers: receives the progress, under the name of ``path``.
        client: its `cancel` ends the upload at the next reported position.
        path: the file.
        size: its bytes.
    """

    def sent(position: int | None) -> None:
        client.check_canceled()
        transfers.moved("upload", path.name, position, size)

    try:
        sent(None)
        yield sent
        sent(size)
    finally:
        transfers.ended("upload", path.name)


class _ReportingFile(io.BufferedReader):
    """A file that reports the position up to which it was read."""

    def __init__(self, path: Path, sent: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path))
        self._sent = sent

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size != 0:
            self._sent(self.tell())
        return data


def weight_deletions(before: Mapping[str, object], expected: Mapping[str, Digest]) -> list[Any]:
    """Return the operations that delete weights of ``before`` that ``expected`` does not name, and what states them.

    Files that state a quantization would let engines read the new weights as the old ones; records of an earlier
    conversion would be of other weights.
    """
    from huggingface_hub import CommitOperationDelete

    old = [path for path in before if path.endswith(REPLACED)]
    if old:
        old += [path for path in before if path in RECORDS or states_quantization(path)]
    return [CommitOperationDelete(path, is_folder=False) for path in sorted(old) if path not in expected]


def has_shard(listing: Listing, shard: StagedShard) -> bool:
    """Return True if a listing has a shard as it was staged."""
    file = listing.files.get(shard.name)
    return file is not None and (file.sha256, file.size) == (shard.sha256, shard.size)


def result_files(listing: Listing) -> dict[str, RemoteFile]:
    """Return the files of a listing that decide a result: weights, index, config and manifest."""
    return {name: file for name, file in listing.files.items() if name.endswith(REPLACED) or name in (CONFIG, MANIFEST)}
