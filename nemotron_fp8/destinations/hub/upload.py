"""The Hub from many machines: each worker fetches its own shards and uploads what it makes; the driver commits.

What is uploaded belongs to nothing until a commit names it, so an upload of a worker that was taken for lost does no
harm, and commits follow one another as those of one machine do.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import temporaries
from nemotron_fp8.destinations.base import Staging
from nemotron_fp8.destinations.file_sink import FileSink
from nemotron_fp8.destinations.hub.commit import Uploaded, addition, uploaded
from nemotron_fp8.errors.hub import UnusableAnswerError
from nemotron_fp8.hub.progress_bars import without_bars
from nemotron_fp8.hub.upload_progress import upload_told
from nemotron_fp8.progress import TransferTracker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from nemotron_fp8.destinations.base import Staged
    from nemotron_fp8.destinations.hub.staging import HubStaging
    from nemotron_fp8.hub.client import HubClient


@dataclass(frozen=True, slots=True)
class UploadStaging(Staging):
    """Stages shards by uploading them from where they are made. Picklable.

    Attributes:
        client: the client; the node has the token, under the same variable or by its own login.
        repo, ref: the destination, and its branch that the shards will be committed to.
        parent: where to make a private folder for a shard in the making.
        transfers: is told what goes up; None where nobody listens, and on the way to another process.
    """

    client: HubClient
    repo: str
    ref: str
    parent: Path
    transfers: TransferTracker | None = None
    uses_cache: bool = True

    def tracked(self, transfers: TransferTracker) -> UploadStaging:
        self.client.patience.on_wait = transfers.waits
        return replace(self, transfers=transfers)

    def stage(self, name: str, size: int) -> UploadSink:
        return UploadSink(self, name, size)

    def upload(self, name: str, path: Path) -> Uploaded:
        """Upload a file so that a commit can name it, from any machine.

        Raises:
            HubError: the class says why not.
        """

        transfers, patience = self.transfers or TransferTracker(None), self.client.patience

        def attempt(_progressed: Callable[[], None]) -> Uploaded:
            with upload_told(transfers, path, path.stat().st_size, patience.check) as sent, without_bars():
                operation = addition(name, path, sent)
                self.client.api().preupload_lfs_files(self.repo, [operation], revision=self.ref, free_memory=True)
            if operation.path_or_fileobj != b"":  # the client keeps what it did not upload
                problem = "the Hub wants this file inside a commit, not as an object of its own"
                raise UnusableAnswerError(self.repo, f"upload {name}", problem)
            return uploaded(operation)

        return patience.run(self.client.context(self.repo, f"upload {name}", self.ref, name), attempt)

    def probe(self) -> None:
        # With this node's token.
        self.client.listing(self.repo, self.ref)


def upload_staging(job: HubStaging, parent: Path) -> UploadStaging:
    """The staging of a job for other machines; its branch is there."""
    return UploadStaging(job.client, job.repo, job.branch.ref, parent)


class UploadSink(FileSink):
    """A `FileSink` in a folder of its own, uploaded when it is finished."""

    def __init__(self, staging: UploadStaging, name: str, size: int) -> None:
        self._staging = staging
        self._stack = ExitStack()
        folder = self._stack.enter_context(temporaries(staging.parent))
        try:
            super().__init__(folder, name, size, digests=True)
        except BaseException:
            self._stack.close()
            raise

    def finish(self) -> Staged:
        return replace(super().finish(), upload=self._staging.upload(self.name, self.path))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._stack.close()
