"""A destination that writes nothing and compares the result with an existing folder."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import CARD
from nemotron_fp8.checkpoint.local_files import digest_of_file, read_small
from nemotron_fp8.destinations.base import Staged, Staging
from nemotron_fp8.destinations.folder import discard_leftover, published_receipts
from nemotron_fp8.documents.evaluation_section import carded, is_evaluation_section, split_evaluation
from nemotron_fp8.documents.manifest import has_digests
from nemotron_fp8.errors import NemotronFp8Error, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import ShardReceipt


class DifferentError(NemotronFp8Error):
    """The folder holds another result. Internal: aborts a comparison at the first difference."""

    problem: str
    message = "{problem}"


class ComparingDestination:
    """Compares a result with the files of a folder, instead of writing it. A context manager.

    Args:
        path: the folder.
        plan: plan of the conversion.
        identity: identity of a run that may have published the folder and was stopped before its cleanup.
        threads: files to hash at the same time.
    """

    bytes_published = 0

    def __init__(self, path: Path, plan: Plan, identity: RunIdentity, threads: int) -> None:
        self.label, self.digests = str(path), has_digests(path)
        self._path, self._plan, self._identity, self._threads = path, plan, identity, threads
        # A shard with a non-finite value may be started with the wrong layout, so its size is not known in advance.
        self._keeps_nonfinite = plan.recipe.nonfinite == "keep"
        self._published: dict[str, ShardReceipt] | None = None

    def __enter__(self) -> Self:
        """Finish an interrupted cleanup, then compare the sizes of the shards.

        Raises:
            DifferentError: a shard has another size.
        """
        self._published = published_receipts(self._path, self._identity, self._threads)
        if not self.complete and not self._keeps_nonfinite:
            with _os_errors_as_different():
                for shard_task in self._plan.shard_tasks:
                    _must_be_file(self._path / shard_task.name, shard_task.layout.file_size)
        return self

    def __exit__(self, *_: object) -> None: ...

    @property
    def complete(self) -> bool:
        return self._published is not None

    def finished(self) -> Mapping[str, ShardReceipt]:
        return self._published or {}  # receipts only if the result was published; otherwise every shard is compared

    @property
    def staging(self) -> ComparingStaging:
        return ComparingStaging(self._path, self.digests, self._keeps_nonfinite)

    def record(self, receipt: ShardReceipt) -> None: ...

    def wait(self) -> None: ...

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        with _os_errors_as_different():
            there = {entry.name for entry in os.scandir(self._path)}
        if there != receipts.keys() | documents.keys() | copies.keys():
            raise DifferentError(f"{self._path}: the names of the files differ")
        documents = self._carded(documents)
        for name, data in documents.items():
            _compare(self._path / name, iter([data]))
        for name, pieces in copies.items():
            _compare(self._path / name, pieces())
        discard_leftover(self._path, self._identity)

    def _carded(self, documents: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Return the documents with the evaluation that was put into the card of the folder after the conversion."""
        with suppress(SourceError):  # a card that cannot be read differs
            _, lines = split_evaluation(read_small(self._path / CARD))
            if lines is not None and is_evaluation_section(lines):
                return carded(documents, lines)
        return documents


@dataclass(frozen=True, slots=True)
class ComparingStaging(Staging):
    """Compares shards with the files of a folder.

    Attributes:
        path: the folder.
        digests: whether receipts carry SHA-256 digests.
        defer_mismatch: report a mismatch only when the shard is finished, because a non-finite value may restart it
            with another layout.
    """

    path: Path
    digests: bool
    defer_mismatch: bool

    def stage(self, name: str, size: int) -> ComparingSink:
        return ComparingSink(self.path / name, size, self.digests, self.defer_mismatch)

    def probe(self) -> None:
        os.scandir(self.path).close()


@contextmanager
def _os_errors_as_different() -> Iterator[None]:
    """Turn a file that cannot be read into a difference."""
    try:
        yield
    except NemotronFp8Error:  # some of them are OSErrors too
        raise
    except OSError as error:
        raise DifferentError(str(error)) from error


def _must_be_file(path: Path, size: int | None = None) -> None:
    if path.is_symlink() or not path.is_file() or size not in (None, path.stat().st_size):
        raise DifferentError(str(path))


def _compare(path: Path, pieces: Iterator[bytes]) -> None:
    _must_be_file(path)
    with _os_errors_as_different(), path.open("rb") as file:
        if any(file.read(len(piece)) != piece for piece in pieces) or file.read(1):
            raise DifferentError(str(path))


class ComparingSink:
    """Compares every byte of a shard with an existing file.

    Args:
        path: the existing file.
        size: bytes of the shard.
        digests: whether to return the SHA-256 digest of the existing file.
        defer_mismatch: as in `ComparingStaging`.

    Raises:
        DifferentError: the file differs.
    """

    def __init__(self, path: Path, size: int, digests: bool, defer_mismatch: bool) -> None:
        self._path, self._size, self._digests, self._defer_mismatch = path, size, digests, defer_mismatch
        self._different = False
        with _os_errors_as_different():
            _must_be_file(path)
            if path.stat().st_size != size:
                self._mismatch()
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _mismatch(self) -> None:
        if not self._defer_mismatch:
            raise DifferentError(str(self._path))
        self._different = True

    def write_at(self, offset: int, data: memoryview) -> None:
        data = data.cast("B")
        if os.pread(self._fd, len(data), offset) != data:
            self._mismatch()

    def finish(self) -> Staged:
        if self._different:
            raise DifferentError(str(self._path))
        sha256 = digest_of_file(self._fd) if self._digests else None
        return Staged(self._path.name, self._size, sha256)
