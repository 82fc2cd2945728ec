"""Second implementations of the seams: files, destinations and openers that live in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8.destinations.base import Staged
from nemotron_fp8.errors import SourceReadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Self

    from nemotron_fp8.planning.receipt import ShardReceipt


@dataclass
class MemoryFile:
    """A source file in memory, with the counts of what was asked of it.

    Attributes:
        data: its bytes.
        mapped: whether it can be mapped; a remote file cannot.
        windows: bytes given out in windows.
        released: bytes given back.
        closed: whether it was closed.
    """

    data: bytearray
    mapped: bool = True
    windows: int = 0
    released: int = 0
    closed: bool = False
    lock: Lock = field(default_factory=Lock)

    def window(self, offset: int, length: int) -> memoryview | None:
        """See `nemotron_fp8.sources.reader.SourceFile.window`."""
        if not self.mapped or offset + length > len(self.data) or not length:
            return None
        with self.lock:
            self.windows += length
        return memoryview(self.data)[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `nemotron_fp8.sources.reader.SourceFile.read_into`."""
        if offset + len(buffer) > len(self.data):
            raise SourceReadError("memory", f"ends before byte {offset + len(buffer)}")
        buffer[:] = self.data[offset : offset + len(buffer)]

    def release(self, offset: int, length: int) -> None:
        """See `nemotron_fp8.sources.reader.SourceFile.release`."""
        with self.lock:
            self.released += length

    def close(self) -> None:
        """See `nemotron_fp8.sources.reader.SourceFile.close`."""
        self.closed = True


class MemoryOpener:
    """Opens files of a dictionary. Picklable, as an opener must be."""

    def __init__(self, files: Mapping[str, bytes], mapped: bool = True) -> None:
        self.files, self.mapped = dict(files), mapped
        self.opened: list[MemoryFile] = []

    def open(self, file: str) -> MemoryFile:
        """See `nemotron_fp8.sources.reader.Opener.open`."""
        if file not in self.files:
            raise SourceReadError(file, "no such file")
        opened = MemoryFile(bytearray(self.files[file]), self.mapped)
        self.opened.append(opened)
        return opened

    def __reduce__(self) -> tuple[type[MemoryOpener], tuple[dict[str, bytes], bool]]:
        return MemoryOpener, (self.files, self.mapped)


class MemorySink:
    """A shard in memory; every byte must be written, and once only."""

    def __init__(self, destination: MemoryDestination, name: str, size: int) -> None:
        self.destination, self.name = destination, name
        self.data, self.times = bytearray(size), bytearray(size)
        self.finished = False
        self.lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.finished:
            self.destination.discarded.append(self.name)

    def write_at(self, offset: int, data: memoryview) -> None:
        """See `nemotron_fp8.destinations.base.Sink.write_at`."""
        data = data.cast("B")
        end = offset + len(data)
        assert end <= len(self.data), f"{self.name}: bytes {offset} to {end} of {len(self.data)}"
        with self.lock:
            self.data[offset:end] = data
            self.times[offset:end] = bytes(count + 1 for count in self.times[offset:end])

    def finish(self) -> Staged:
        """See `nemotron_fp8.destinations.base.Sink.finish`."""
        assert set(self.times) <= {1}, f"{self.name}: bytes were written {sorted(set(self.times))} times"
        self.finished = True
        self.destination.staged[self.name] = bytes(self.data)
        return Staged(self.name, len(self.data), hashlib.sha256(self.data).hexdigest())


class MemoryDestination:
    """A destination in memory.

    Attributes:
        staged: finished shards by name.
        discarded: names of shards that were begun and not finished.
        recorded: receipts in the order in which they came.
        published: everything, once it is published.
    """

    in_order = False
    upload_waits = ()

    def __init__(self) -> None:
        self.staged: dict[str, bytes] = {}
        self.discarded: list[str] = []
        self.recorded: list[ShardReceipt] = []
        self.published: dict[str, bytes] | None = None
        self.label, self.complete, self.digests, self.bytes_published, self.uses_cache = "memory", False, True, 0, False

    @property
    def staging(self) -> MemoryDestination:
        """Shards are staged in it directly."""
        return self

    def finished(self) -> dict[str, ShardReceipt]:
        """Nothing is left of an earlier run."""
        return {}

    def record(self, receipt: ShardReceipt) -> None:
        """See `nemotron_fp8.destinations.base.OpenDestination.record`."""
        assert self.published is None, "recorded after all was published"
        self.recorded.append(receipt)

    def wait(self) -> None:
        """See `nemotron_fp8.destinations.base.OpenDestination.wait`."""

    def stage(self, name: str, size: int) -> MemorySink:
        """See `nemotron_fp8.destinations.base.Staging.stage`."""
        return MemorySink(self, name, size)

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """See `nemotron_fp8.destinations.base.OpenDestination.publish`."""
        assert self.published is None, "published twice"
        assert receipts.keys() == self.staged.keys()
        assert sorted(receipts) == sorted(receipt.name for receipt in self.recorded)
        for name, receipt in receipts.items():
            data = self.staged[name]
            digest = hashlib.sha256(data).hexdigest()
            assert (receipt.name, receipt.size, receipt.sha256) == (name, len(data), digest)
        copied = {name: b"".join(pieces()) for name, pieces in copies.items()}
        self.published = {**self.staged, **documents, **copied}
