"""Downloads source shards one step ahead of their use, and never holds more of them than that."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import check_space, temporaries
from nemotron_fp8.planning.tasks import files_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.hub.listing import Listing
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.progress import TransferTracker
    from nemotron_fp8.sources.base import Prefetcher, PrefetcherFactory
    from nemotron_fp8.sources.hub import HubOpener, HubSource


class Prefetch:
    """Fetches the shards of each unit while the one before is worked on. See `nemotron_fp8.sources.base.Prefetcher`.

    On the disk are at most the shards of the units in the making and of ``ahead`` more.

    Args:
        source: where they come from.
        opener: is told where they are.
        parent: where to make a private folder for them.
        transfers: is told what is on its way.
        ahead: how many units to be ahead.
        workers: how many units are in the making at a time.
        largest_output: bytes of the largest output shard that goes through the same disk; 0 where none does.
    """

    def __init__(
        self,
        source: HubSource,
        opener: HubOpener,
        parent: Path,
        transfers: TransferTracker,
        *,
        ahead: int = 1,
        workers: int = 1,
        largest_output: int = 0,
    ) -> None:
        self.source, self.opener = source, opener
        self.ahead, self.workers, self.largest_output = ahead, workers, largest_output
        self._parent, self._transfers = parent, transfers
        self._stack = ExitStack()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="download")
        self._waiting: dict[str, Future[None]] = {}
        self._making: dict[str, frozenset[str]] = {}
        self.opener.client.patience.stop = self._stop = Event()

    def __enter__(self) -> Self:
        self.folder = self.opener.folder = self._stack.enter_context(temporaries(self._parent))
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.opener.client.patience.stop = None
        self.opener.forget()
        self._stack.close()

    def shard_tasks(self, left: Sequence[ShardTask]) -> Iterator[ShardTask]:
        """See `nemotron_fp8.sources.base.Prefetcher.shard_tasks`: in order, each once its shards are here.

        Raises:
            LocalDiskError: the disk has no room for what is needed at any one time.
            DigestError, HubError: a download failed; the class says why.
        """
        listing = self.opener.listing
        steps = [fetched_for(listing, shard_task) for shard_task in left]
        check_space(listing.repo, self.folder, space_for(listing, steps, self.largest_output, self.workers, self.ahead))
        for number, shard_task in enumerate(left):
            self._making[shard_task.name] = steps[number]
            self._want(steps[number : number + 1 + self.ahead])
            for name in sorted(steps[number]):
                self._waiting[name].result()
                self.opener.local[name] = self._path(name)
            yield shard_task

    def done(self, name: str) -> None:
        """See `nemotron_fp8.sources.base.Prefetcher.done`. What the next unit needs too stays."""
        self._making.pop(name, None)

    def _want(self, coming: Sequence[frozenset[str]]) -> None:
        """Let go of what is not needed any more, begin what comes next."""
        wanted: dict[str, None] = {}
        for names in (*self._making.values(), *coming):
            wanted |= dict.fromkeys(sorted(names))
        for name in [name for name in self._waiting if name not in wanted]:
            self._drop(name)
        if self.workers == 1:
            self.opener.drop_fetched()
        for name in wanted:
            if name not in self._waiting:
                self._waiting[name] = self._pool.submit(self._fetch, name)

    def _path(self, name: str) -> Path:
        """The local file: named by content, so that no name from elsewhere becomes a path here."""
        file = self.opener.listing.file(name)
        return self.folder / f"{file.sha256 or file.blob}.safetensors"

    def _fetch(self, name: str) -> None:
        done, total = 0, self.opener.listing.file(name).size

        def progress(count: int) -> None:
            nonlocal done
            self.opener.client.patience.check()
            done += count
            self._transfers.moved("download", name, done, total)

        path = self._path(name)
        try:
            progress(0)
            self.opener.client.download(self.opener.listing, name, path, progress)
            if name in self.source.starts:
                self.source.check_start(name, path)
        finally:
            self._transfers.ended("download", name)

    def _drop(self, name: str) -> None:
        future = self._waiting.pop(name)
        if not future.cancel():
            future.exception()
        self.opener.local.pop(name, None)
        path = self._path(name)
        if path not in self.opener.local.values():  # two shards of one content share a file
            path.unlink(missing_ok=True)


def fetched_for(listing: Listing, shard_task: ShardTask) -> frozenset[str]:
    """The listed files that a unit needs whole. A key that is not listed stands for a part, which is read by range."""
    return frozenset(name for name in files_of(shard_task) if name in listing.files)


def space_for(
    listing: Listing, steps: Sequence[frozenset[str]], largest_output: int, workers: int, ahead: int = 1
) -> int:
    """`space_needed` for units that need these files of a listing, in order."""
    sizes = [sum(listing.files[name].size for name in names) for names in steps]
    return space_needed(sizes, largest_output, workers, ahead)


def space_needed(sources: Sequence[int], largest_output: int, workers: int = 1, ahead: int = 1) -> int:
    """Bytes that a work folder holds at any one time.

    ``(workers + ahead) * largest source shard + (workers + 1) * largest output shard``: each worker makes one output
    while the one before is uploaded. With several workers one more of each, that waits to be recorded.

    Args:
        sources: bytes that each unit needs of the source; empty where that is local.
        largest_output: bytes of the largest output shard; 0 where the destination is local.
        workers: units in the making at a time.
        ahead: units that the download is ahead.
    """
    held = workers + (workers > 1)
    return (held + ahead) * max(sources, default=0) + (held + 1) * largest_output


class WorkerFetch:
    """The supply of a source that workers fetch for themselves: every unit can be made at once.

    Args:
        here: the supply for this process, which needs the small files.
    """

    def __init__(self, here: Prefetcher) -> None:
        self._here = here

    def __enter__(self) -> Self:
        self._here.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._here.__exit__(*error)

    def shard_tasks(self, left: Sequence[ShardTask]) -> Sequence[ShardTask]:
        """See `nemotron_fp8.sources.base.Prefetcher.shard_tasks`: all."""
        return left

    def done(self, name: str) -> None:
        """See `nemotron_fp8.sources.base.Prefetcher.done`: nothing was fetched here."""


def for_workers(supplier: PrefetcherFactory | None) -> PrefetcherFactory | None:
    """A supplier without what workers do not need: the inventory would travel with every shard."""
    if not isinstance(supplier, HubPrefetcherFactory):
        return supplier
    bare = replace(supplier.source.inventory, shards=(), index_metadata=None, side_files=(), made=(), card=None)
    return replace(supplier, source=replace(supplier.source, inventory=bare))


@dataclass(frozen=True, slots=True)
class HubPrefetcherFactory:
    """Makes the supply of a source on the Hub. See `nemotron_fp8.sources.base.PrefetcherFactory`.

    Attributes:
        source, opener: what is fetched, and by what.
        parent: where shards on their way are kept.
    """

    source: HubSource
    opener: HubOpener
    parent: Path

    def supply(self, largest_output: int, workers: int, transfers: TransferTracker) -> Prefetch:
        """See `nemotron_fp8.sources.base.PrefetcherFactory.supply`."""

        self.opener.client.patience.on_wait = transfers.waits
        return Prefetch(
            self.source, self.opener, self.parent, transfers, workers=workers, largest_output=largest_output
        )

    def room(self, shard_tasks: Sequence[ShardTask], largest_output: int, workers: int) -> int:
        """See `nemotron_fp8.sources.base.PrefetcherFactory.room`."""

        listing = self.source.listing
        return space_for(
            listing, [fetched_for(listing, shard_task) for shard_task in shard_tasks], largest_output, workers
        )
