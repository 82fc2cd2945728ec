"""Downloads source shards one step ahead of their use, and never holds more of them than that."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from nemotron_fp8.hub.errors import LocalDiskError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from nemotron_fp8.hub.source import HubOpener


class _StoppedError(Exception):
    """The prefetch was closed in the middle of a download."""


class Prefetch:
    """Fetches the shards of each step while the step before is worked on. Use it as a context manager.

    At most the shards of ``ahead + 1`` steps are on the disk.

    Args:
        opener: whose files are fetched, and which is told where they are.
        folder: a private folder for them.
        steps: the source shards that each step reads whole, in order.
        ahead: how many steps to be ahead.
        check: called with name and path of each shard whose digest was right, for a further check.
        progress: called with name and bytes of each piece that arrived.
    """

    def __init__(
        self,
        opener: HubOpener,
        folder: Path,
        steps: Sequence[frozenset[str]],
        *,
        ahead: int = 1,
        check: Callable[[str, Path], None] | None = None,
        progress: Callable[[str, int], None] | None = None,
    ) -> None:
        self.opener, self.folder, self.steps, self.ahead = opener, folder, steps, ahead
        self._check, self._progress = check, progress
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="download")
        self._waiting: dict[str, Future[None]] = {}
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        for name in list(self._waiting):
            self._drop(name)

    def step(self, number: int) -> None:
        """Let go of what is not needed any more, begin what comes next, wait for what step ``number`` needs.

        Steps may be left out; they only go forward.

        Raises:
            DigestError, LocalDiskError, HubError: a download failed; the class says why.
        """
        wanted: dict[str, None] = {}
        for names in self.steps[number : number + 1 + self.ahead]:
            wanted |= dict.fromkeys(sorted(names))
        for name in [name for name in self._waiting if name not in wanted]:
            self._drop(name)
        for name in wanted:
            if name not in self._waiting:
                self._waiting[name] = self._pool.submit(self._fetch, name)
        for name in sorted(self.steps[number]):
            self._waiting[name].result()
            self.opener.local[name] = self._path(name)

    def _path(self, name: str) -> Path:
        """The local file: named by content, so that no name from elsewhere becomes a path here."""
        file = self.opener.listing.file(name)
        return self.folder / f"{file.sha256 or file.blob}.safetensors"

    def _fetch(self, name: str) -> None:
        def progress(count: int) -> None:
            if self._stopped:
                raise _StoppedError
            if self._progress is not None:
                self._progress(name, count)

        path = self._path(name)
        self.opener.client.download(self.opener.listing, name, path, progress)
        if self._check is not None:
            self._check(name, path)

    def _drop(self, name: str) -> None:
        future = self._waiting.pop(name)
        if not future.cancel():
            future.exception()
        self.opener.local.pop(name, None)
        path = self._path(name)
        if path not in self.opener.local.values():  # two shards of one content share a file
            path.unlink(missing_ok=True)


def check_space(repo: str, folder: Path, sources: Sequence[int], outputs: Sequence[int], ahead: int = 1) -> int:
    """Check before the start that a work folder can hold what a job needs at any one time.

    ``(ahead + 1) * largest source shard + 2 * largest output shard``: one output is made while the one before
    is uploaded.

    Args:
        repo: for the message.
        folder: the work folder.
        sources: bytes of the source shards; empty where the source is local.
        outputs: bytes of the output shards; empty where the destination is local.
        ahead: steps that the download is ahead.

    Returns:
        The bytes needed.

    Raises:
        LocalDiskError: fewer are free.
    """
    needed = (ahead + 1) * max(sources, default=0) + 2 * max(outputs, default=0)
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        problem = f"{needed:,} bytes are needed in {folder}, {free:,} are free, {needed - free:,} short"
        raise LocalDiskError(repo, "begin", problem)
    return needed
