"""Interfaces of a destination: where shards are staged, recorded and published."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.progress import Progress, TransferTracker
    from nemotron_fp8.sources.base import Source


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one conversion.

    Attributes:
        hub: options for reading from the Hub and writing to it.
        max_memory: bytes for the working buffers of all workers together; on a cluster, of each task.
        max_device_memory: bytes on each CUDA device; None for the default share of the free bytes.
        threads: threads of this machine, for all workers together.
        digests: whether receipts and manifest carry SHA-256 digests.
        restart: whether to discard an unfinished run instead of resuming it.
        overwrite: whether to replace another folder, or the weights of a repository, at the destination.
        progress: called with the progress of the run, from any thread.
        started: time of the call on the monotonic clock, in seconds.
    """

    hub: HubOptions
    max_memory: int
    max_device_memory: int | None = None
    threads: int = 1
    digests: bool = True
    restart: bool = False
    overwrite: bool = False
    progress: Callable[[Progress], None] | None = None
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Staged:
    """A finished shard.

    Attributes:
        name: file name.
        size: bytes of the file.
        sha256: hexadecimal digest of the file; None if digests are off.
        upload: handle of the uploaded file, if the shard was uploaded from where it was written.
    """

    name: str
    size: int
    sha256: str | None
    upload: object = None


class Sink(Protocol):
    """Shard in progress. Leaving its context without `finish` discards the shard."""

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset; from any thread, in any order, every byte once."""

    def finish(self) -> Staged:
        """Close the complete shard and return its description; `OpenDestination.record` makes the shard durable."""


class Staging(ABC):
    """Place where shards are staged. Picklable: workers in other processes and on other machines stage through it.

    Only `stage` is abstract: the defaults of the other methods fit a staging without attempts, transfers and probes.

    Attributes:
        uses_cache: whether shards are written into the cache folder, beside prefetched source shards.
    """

    __slots__ = ()
    uses_cache: bool = False

    @property
    def in_order(self) -> bool:
        """True if writes in the order of the bytes cost less, because a digest follows them."""
        return True

    @property
    def upload_waits(self) -> tuple[float, ...]:
        """Seconds to wait before each further attempt at a shard whose upload broke while it was made."""
        return ()

    @property
    def is_file(self) -> bool:
        """True if a shard is a file here, which takes writes in any order and can be read back."""
        return False

    @abstractmethod
    def stage(self, name: str, size: int) -> Sink:
        """Return the sink of a new shard of ``size`` bytes."""

    def reporting_to(self, transfers: TransferTracker) -> Staging:
        """Return this staging with uploads and waits reported to ``transfers``."""
        return self

    def for_attempt(self, tag: str) -> Staging:
        """Return the staging of one attempt at a shard on another machine.

        A worker that is presumed lost may still be running, so attempts must not share files.

        Args:
            tag: unique name of the attempt.
        """
        return self

    def probe(self) -> None:  # noqa: B027  (a default: without effect)
        """Check that this machine can stage shards here.

        Raises:
            NemotronFp8Error, OSError: this machine cannot.
        """

    def accept(self, receipt: ShardReceipt) -> None:  # noqa: B027  (a default: without effect)
        """Move the finished shard of this attempt to the place where the destination expects it.

        Raises:
            WriteError: the file cannot be moved.
        """

    def discard(self) -> None:  # noqa: B027  (a default: without effect)
        """Remove the files of this attempt that are visible to this machine."""


class OpenDestination(Protocol):
    """A destination during one conversion. A context manager.

    Workers stage shards; one process records them; then everything is published at once.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def label(self) -> str:
        """Name of the result in messages: a path, or the address of the published result on the Hub."""

    @property
    def complete(self) -> bool:
        """True if an earlier run of the same conversion has already published the result."""

    @property
    def digests(self) -> bool:
        """True if the manifest carries SHA-256 digests."""

    @property
    def bytes_published(self) -> int:
        """Bytes of all files that this run has published."""

    @property
    def staging(self) -> Staging:
        """Place where shards are staged until they are published."""

    def finished(self) -> Mapping[str, ShardReceipt]:
        """Return the receipts of shards that an earlier run has staged and that are still intact, by name."""

    def record(self, receipt: ShardReceipt) -> None:
        """Record a staged shard, so that a later run does not convert the shard again.

        The record is durable when `publish` begins at the latest; any later call may raise its errors.
        """

    def wait(self) -> None:
        """Wait until every recorded shard is durable."""

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """Publish the staged shards and the small files all at once; called once, at the end.

        Args:
            receipts: receipts of all shards, by name.
            documents: contents of small files, by name.
            copies: files copied from the source, by name; each function returns the file in pieces.
        """


class Destination(Protocol):
    """A place for a result, as the user named it; nothing is opened or written yet.

    Attributes:
        mode: kind of destination; a later run resumes only into the same kind.
    """

    @property
    def mode(self) -> str: ...

    def check_source(self, source: Source) -> None:
        """Reject a source that this destination would overwrite.

        Raises:
            OverlapError: source and destination contain each other.
        """

    def existing(self, plan: Plan, identity: RunIdentity) -> OpenDestination | None:
        """Return a destination that compares the result with the files that are already there.

        The returned destination raises `DifferentError` at the first difference and writes nothing. Return None if
        there are no files.
        """

    def open(
        self,
        plan: Plan,
        identity: RunIdentity,
        source: Source,
        transfers: TransferTracker,
        *,
        workers: int,
        shares_disk: bool,
    ) -> OpenDestination:
        """Return the destination for one conversion; its context resumes an unfinished run.

        Args:
            plan: plan of the conversion.
            identity: identity that an unfinished run must have to be resumed.
            source: source of the conversion.
            transfers: tracks uploads.
            workers: shards in progress at the same time.
            shares_disk: whether workers write to the disk of this machine.

        Raises:
            DestinationError: the result cannot be written there.
        """
