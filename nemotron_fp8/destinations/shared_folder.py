"""Staging on storage that several machines share, where any of them may die and come back from the dead."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import uuid4

from nemotron_fp8._filesystem import remove
from nemotron_fp8.destinations.comparison import ComparingDestination
from nemotron_fp8.destinations.file_sink import FileSink, FolderStaging, refused
from nemotron_fp8.destinations.hub.upload import UploadStaging

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nemotron_fp8.destinations.base import Staged, Staging
    from nemotron_fp8.destinations.hub.commit import Uploaded


class SharedSink(FileSink):
    """A `FileSink` that is on the storage, not in this machine's cache, when it is finished."""

    def finish(self) -> Staged:
        """See `FileSink.finish`."""
        # The driver syncs too, but on another machine, which cannot sync what only this one's cache holds.
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise refused(self.path, error) from error
        return super().finish()


@dataclass(frozen=True, slots=True)
class SharedStaging:
    """Stages one attempt at a shard into a folder of the attempt's own.

    A worker that was taken for lost may still be at work. Alone in its folder it meets no other attempt's
    file; and it never gives a shard its name, the driver does.

    Attributes:
        folder: the attempt's folder; made by the worker.
        digests: whether receipts carry the SHA-256.
    """

    folder: Path
    digests: bool

    def stage(self, name: str, size: int) -> SharedSink:
        """See `nemotron_fp8.destinations.base.Staging.stage`."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise refused(self.folder, error) from error
        return SharedSink(self.folder, name, size, self.digests)


def attempt_of(staging: Staging, tag: str) -> Staging:
    """The staging of one attempt, which ``tag`` names; staging that makes no files is any attempt's."""
    if isinstance(staging, UploadStaging):
        return replace(staging, uploads={})
    return SharedStaging(staging.folder / tag, staging.digests) if isinstance(staging, FolderStaging) else staging


def reach(staging: Staging) -> None:
    """Try on a node whether shards could be staged.

    Raises:
        WriteError, OSError: they could not.
    """
    if isinstance(staging, SharedStaging):
        # All nodes look at the same time, and what a look that died has left is no obstacle to the next.
        own = replace(staging, folder=staging.folder.with_name(f"look-{uuid4().hex}"))
        with own.stage("look", 0):
            pass
        own.folder.rmdir()
    elif isinstance(staging, ComparingDestination):
        os.scandir(staging.path).close()
    elif isinstance(staging, UploadStaging):
        staging.reach()


def handed_over(attempt: Staging) -> dict[str, Uploaded]:
    """What an attempt has uploaded, to go to the driver with the receipt."""
    return dict(attempt.uploads) if isinstance(attempt, UploadStaging) else {}


def accept(staging: Staging, attempt: Staging, name: str, uploads: Mapping[str, Uploaded]) -> None:
    """Give a shard that an attempt has made its place in the staging.

    Args:
        staging, attempt: the staging of all, and that of the attempt.
        name: the shard's.
        uploads: what the attempt has handed over.

    Raises:
        WriteError: the system refuses.
    """
    if isinstance(staging, UploadStaging):
        staging.uploads.update(uploads)
    if isinstance(staging, FolderStaging) and isinstance(attempt, SharedStaging):
        try:
            os.rename(attempt.folder / name, staging.folder / name)
        except OSError as error:
            raise refused(attempt.folder / name, error) from error
    discard(attempt)


def discard(attempt: Staging) -> None:
    """Remove what a lost attempt has left, as far as it can be seen by now."""
    if isinstance(attempt, SharedStaging):
        remove(attempt.folder)
