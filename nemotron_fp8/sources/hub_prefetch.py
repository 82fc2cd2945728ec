"""Prefetch of source shards, one step ahead of their use, within bounded disk space."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import temporaries
from nemotron_fp8._utils import shut_down
from nemotron_fp8.hub.options import require_space
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
    """Downloads the shards of each task while the task before it runs.

    The disk holds at most the shards of the running tasks and of ``ahead`` more.

    Args:
        source: the source.
        opener: opener of the source; it gets the paths of the downloads.
        parent: folder in which to create a private folder.
        transfers: receives download progress and waits.
        ahead: number of tasks to prefetch beyond the running ones.
        workers: number of tasks that run at the same time.
        largest_output: bytes of the largest output shard on the same disk; 0 if outputs are elsewhere.
        whole_shards: whether to download shards; False if workers on other machines download their own, so that only
            side files are downloaded here.
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
        self._downloads: dict[str, Future[None]] = {}
        self._running: dict[str, frozenset[str]] = {}
        self._cancel = Event()
        self._client = opener.client.with_options(on_wait=transfers.waits, cancel=self._cancel)

    def __enter__(self) -> Self:
        self.folder = self._stack.enter_context(temporaries(self._parent))
        self.opener.attach(self._client, self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel.set()
        shut_down(self._pool)
        self.opener.detach()
        self._stack.close()

    def shard_tasks(self, left: Sequence[ShardTask]) -> Iterable[ShardTask]:
        """Return the tasks in order, each when its shards are downloaded.

        Raises:
            LocalDiskError: the disk has too little free space.
            DigestError, HubError: a download failed; the class names the reason.
        """
        return self._as_they_arrive(left) if self.whole_shards else left

    def _as_they_arrive(self, left: Sequence[ShardTask]) -> Iterator[ShardTask]:
        listing = self.opener.listing
        steps = [files_to_prefetch(listing, shard_task) for shard_task in left]
        needed = space_for(listing, steps, self.largest_output, self.workers, self.ahead)
        require_space(listing.repo, self.folder, needed)
        for number, shard_task in enumerate(left):
            self._running[shard_task.name] = steps[number]
            self._want(steps[number : number + 1 + self.ahead])
            for name in sorted(steps[number]):
                self._downloads[name].result()
                self.opener.local[name] = self._path(name)
            yield shard_task

    def done(self, name: str) -> None:
        """Release the shards of a finished task, except those that the next task needs too."""
        self._running.pop(name, None)

    def _want(self, coming: Sequence[frozenset[str]]) -> None:
        """Remove downloads that are not needed anymore and start those that come next."""
        wanted: dict[str, None] = {}
        for names in (*self._running.values(), *coming):
            wanted |= dict.fromkeys(sorted(names))
        for name in [name for name in self._downloads if name not in wanted]:
            self._drop(name)
        if self.workers == 1:
            self.opener.drop_fetched()
        for name in wanted:
            if name not in self._downloads:
                self._downloads[name] = self._pool.submit(self._fetch, name)

    def _path(self, name: str) -> Path:
        """Return the local path, named by digest: no remote name becomes a local path."""
        file = self.opener.listing.file(name)
        return self.folder / f"{file.sha256 or file.blob}.safetensors"

    def _fetch(self, name: str) -> None:
        done, total = 0, self.opener.listing.file(name).size

        def progress(count: int) -> None:
            nonlocal done
            self._client.check_canceled()
            done += count
            self._transfers.moved("download", name, done, total)

        path = self._path(name)
        try:
            progress(0)
            self._client.download(self.opener.listing, name, path, progress)
            if name in self.source.header_digests:
                self.source.check_header(name, path)
        finally:
            self._transfers.ended("download", name)

    def _drop(self, name: str) -> None:
        future = self._downloads.pop(name)
        if not future.cancel():
            future.exception()
        self.opener.local.pop(name, None)
        path = self._path(name)
        if path not in self.opener.local.values():  # shards of equal content share a file
            path.unlink(missing_ok=True)


def files_to_prefetch(listing: Listing, shard_task: ShardTask) -> frozenset[str]:
    """Return the listed files that a task needs whole. Unlisted names denote parts, which are read by range."""
    return frozenset(name for name in files_of(shard_task) if name in listing.files)


def space_for(
    listing: Listing, steps: Sequence[frozenset[str]], largest_output: int, workers: int, ahead: int = 1
) -> int:
    """Return `space_needed` for tasks that need these files of a listing, in order."""
    sizes = [sum(listing.files[name].size for name in names) for names in steps]
    return space_needed(sizes, largest_output, workers, ahead)


def space_needed(sources: Sequence[int], largest_output: int, workers: int = 1, ahead: int = 1) -> int:
    """Return the peak bytes of a work folder.

    ``(workers + ahead) * largest source shard + (workers + 1) * largest output shard``: each worker makes one output
    while the previous one is uploaded. Several workers need one more of each, which waits to be recorded.

    Args:
        sources: bytes of the source that each task needs; empty for a local source.
        largest_output: bytes of the largest output shard; 0 for a local destination.
        workers: tasks that run at the same time.
        ahead: tasks that are prefetched beyond the running ones.
    """
    held = workers + (workers > 1)
    return (held + ahead) * max(sources, default=0) + (held + 1) * largest_output


@dataclass(frozen=True, slots=True)
class HubPrefetcher:
    """Prefetcher of a source on the Hub.

    Attributes:
        source, opener: the source and its opener.
        parent: cache folder, in which each run makes a private folder.
    """

    source: HubSource
    opener: HubOpener
    parent: Path

    def start(
        self, transfers: TransferTracker, workers: int = 1, largest_output: int = 0, *, whole_shards: bool = True
    ) -> HubPrefetch:
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
            listing, [files_to_prefetch(listing, shard_task) for shard_task in shard_tasks], largest_output, workers
        )

    def for_workers(self) -> HubPrefetcher:
        # Workers do not need these parts of the inventory; without them, jobs are small.
        bare = replace(self.source.inventory, shards=(), index_metadata=None, side_files=(), made=(), card=None)
        return replace(self, source=replace(self.source, inventory=bare))
