"""Staging in a local folder, and on storage that several machines share."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import uuid4

from nemotron_fp8._filesystem import remove
from nemotron_fp8.destinations.base import Staging
from nemotron_fp8.destinations.file_sink import FileSink, refused

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.destinations.base import Staged
    from nemotron_fp8.planning.receipt import ShardReceipt


class SharedSink(FileSink):
    """A `FileSink` whose finished file is on the shared storage, not only in this machine's page cache."""

    def finish(self) -> Staged:
        # The driver syncs too, but another machine cannot sync this machine's page cache.
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise refused(self.path, error) from error
        return super().finish()


@dataclass(frozen=True, slots=True)
class AttemptStaging(Staging):
    """Staging of one attempt at a shard, in a folder of its own inside the folder of the staging.

    Alone in its folder, an attempt cannot touch the file of another attempt. Only the driver gives a shard its final
    name, by a rename.

    Attributes:
        folder: folder of the attempt; the worker creates it.
        digests: whether receipts carry SHA-256 digests.
    """

    folder: Path
    digests: bool

    @property
    def in_order(self) -> bool:
        return self.digests

    @property
    def is_file(self) -> bool:
        return True

    def stage(self, name: str, size: int) -> SharedSink:
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise refused(self.folder, error) from error
        return SharedSink(self.folder, name, size, self.digests)

    def probe(self) -> None:
        # All nodes probe at the same time, and the remains of a killed probe must not fail the next one.
        own = replace(self, folder=self.folder.with_name(f"probe-{uuid4().hex}"))
        with own.stage("probe", 0):
            pass
        own.folder.rmdir()

    def accept(self, receipt: ShardReceipt) -> None:
        made = self.folder / receipt.name
        try:
            os.rename(made, self.folder.parent / receipt.name)
        except OSError as error:
            raise refused(made, error) from error
        self.discard()

    def discard(self) -> None:
        remove(self.folder)


@dataclass(frozen=True, slots=True)
class FolderStaging(Staging):
    """Staging in a local folder of temporaries.

    Attributes:
        folder: the folder; no other run works in it.
        digests: whether receipts carry SHA-256 digests.
        uses_cache: whether the folder is in the cache folder, beside prefetched source shards.
    """

    folder: Path
    digests: bool
    uses_cache: bool = False

    @property
    def in_order(self) -> bool:
        return self.digests

    @property
    def is_file(self) -> bool:
        return True

    def stage(self, name: str, size: int) -> FileSink:
        return FileSink(self.folder, name, size, self.digests)

    def for_attempt(self, tag: str) -> AttemptStaging:
        return AttemptStaging(self.folder / tag, self.digests)
