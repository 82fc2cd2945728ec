"""Prefetch source shards from the Hub, one task ahead, with bounded disk space."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import check_space, temporaries
from nemotron_fp8.planning.tasks import files_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.hub.listing import Listing
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.progress import TransferTracker
    from nemotron_fp8.sources.hub import HubOpener, HubSource


class HubPrefetch:
    """Downloads the source shards of each task while the previous task is in progress.

    At most the source shards of the tasks in progress, and of ``ahead`` more, are on the disk.

    Args:
        source: inventory and listing of the repository.
        opener: opens the files; it learns the path of each downloaded shard.
        parent: cache folder; a private folder is made in it.
        transfers: tracks the downloads.
        ahead: tasks to prefetch for.
        workers: tasks in progress at the same time.
        largest_output: bytes of the largest output shard in the same cache folder; 0 if shards go elsewhere.
        whole_shards: whether shards are fetched here; False if workers on other machines fetch their own, so that
            only side files are fetched here.
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
        whole_shards: bool = True,
    ) -> None:
        self.source, self.opener, self.whole_shards = source, opener, whole_shards
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

    def shard_tasks(self, left: Sequence[ShardTask]) -> Iterable[ShardTask]:
        """Return the tasks in order, each as soon as its source shards are downloaded.

        Raises:
            LocalDiskError: the disk has too little free space for the shards in progress.
            DigestError, HubError: a download failed; the class says why.
        """
        return self._as_they_arrive(left) if self.whole_shards else left

    def _as_they_arrive(self, left: Sequence[ShardTask]) -> Iterator[ShardTask]:
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
        # Files that a later task needs too are dropped with that task.
        self._making.pop(name, None)

    def _want(self, coming: Sequence[frozenset[str]]) -> None:
        """Drop the files that no task needs any more, and start the downloads of the coming tasks."""
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
        """Return the local path of a file: its digest, so that no name of the repository becomes a path here."""
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
    """Return the listed files that a task needs whole; an unlisted key is a part of a file, which is read by range."""
    return frozenset(name for name in files_of(shard_task) if name in listing.files)


def space_for(
    listing: Listing, steps: Sequence[frozenset[str]], largest_output: int, workers: int, ahead: int = 1
) -> int:
    """Return `space_needed` for tasks that each need the files of one step."""
    sizes = [sum(listing.files[name].size for name in names) for names in steps]
    return space_needed(sizes, largest_output, workers, ahead)


def space_needed(sources: Sequence[int], largest_output: int, workers: int = 1, ahead: int = 1) -> int:
    """Return the most bytes that the work folder holds at any one time.

    ``(workers + ahead) * largest source shard + (workers + 1) * largest output shard``: each worker writes one output
    shard while the previous one is uploaded. Several workers need one more of each, which waits to be recorded.

    Args:
        sources: bytes of the source files of each task; empty for a local source.
        largest_output: bytes of the largest output shard; 0 for a local destination.
        workers: tasks in progress at the same time.
        ahead: tasks to prefetch for.
    """
    held = workers + (workers > 1)
    return (held + ahead) * max(sources, default=0) + (held + 1) * largest_output


@dataclass(frozen=True, slots=True)
class HubPrefetcher:
    """Prefetcher of a source on the Hub.

    Attributes:
        source: inventory and listing of the repository.
        opener: opens the repository's files, and reads the shards that were downloaded.
        parent: cache folder; each run makes a private folder in it.
    """

    source: HubSource
    opener: HubOpener
    parent: Path

    def start(
        self, transfers: TransferTracker, workers: int = 1, largest_output: int = 0, *, whole_shards: bool = True
    ) -> HubPrefetch:
        self.opener.client.patience.on_wait = transfers.waits
        return HubPrefetch(
            self.source,
            self.opener,
            self.parent,
            transfers,
            workers=workers,
            largest_output=largest_output,
            whole_shards=whole_shards,
        )

    def disk_bytes(self, shard_tasks: Sequence[ShardTask], largest_output: int, workers: int) -> int:
        listing = self.source.listing
        return space_for(
            listing, [fetched_for(listing, shard_task) for shard_task in shard_tasks], largest_output, workers
        )

    def for_workers(self) -> HubPrefetcher:
        # Without the inventory, which would travel with every shard.
        bare = replace(self.source.inventory, shards=(), index_metadata=None, side_files=(), made=(), card=None)
        return replace(self, source=replace(self.source, inventory=bare))
