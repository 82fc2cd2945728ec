"""Interfaces of a destination: where finished files of a result go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from nemotron_fp8.planning.receipt import ShardReceipt


@dataclass(frozen=True, slots=True)
class Staged:
    """A finished file.

    Attributes:
        name: its file name.
        size: its bytes.
        sha256: hexadecimal digest of its bytes; None where digests are off.
    """

    name: str
    size: int
    sha256: str | None


class Sink(Protocol):
    """A shard in the making. Leaving its context without `finish` discards it."""

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write_at(self, offset: int, data: memoryview) -> None:
        """Put bytes at their place; from any thread, in any order, every byte once."""

    def finish(self) -> Staged:
        """Take all of it and say what it is. It is durable once it is recorded (`Destination.record`)."""


class Staging(Protocol):
    """Where shards are staged. Picklable: workers in other processes stage through it too."""

    def stage(self, name: str, size: int) -> Sink:
        """Begin a shard of ``size`` bytes."""


class Destination(Protocol):
    """Where the result goes. Shards are staged, by whoever makes them, and recorded in one place; then all appears."""

    @property
    def staging(self) -> Staging:
        """Where its shards are staged until they are published."""

    def finished(self) -> Mapping[str, ShardReceipt]:
        """Receipts of the shards that an earlier run staged and that are what they were then, by name."""

    def record(self, receipt: ShardReceipt) -> None:
        """Note that a shard is staged, so that a later run need not make it again.

        Durable when `publish` begins at the latest; errors in making it so may be raised by any later call.
        """

    def wait(self) -> None:
        """Wait until everything that was recorded is durable."""

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """Let the staged shards and the small files appear, all at once; called once, at the end.

        Args:
            receipts: of all shards, by name.
            documents: small files by name.
            copies: files taken over from the source by name, each as a function that gives its bytes in
                pieces.
        """
