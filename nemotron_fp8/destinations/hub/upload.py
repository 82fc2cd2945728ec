"""Uploads from the workers of a cluster, whose commits the driver makes.

An uploaded object belongs to no branch until a commit names it. Uploads of a worker that was declared lost are
therefore harmless, and the driver's commits form one chain.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import temporaries
from nemotron_fp8.destinations.base import Staging
from nemotron_fp8.destinations.file_sink import FileSink
from nemotron_fp8.destinations.hub.commit import Uploaded, add_operation, upload_reported, uploaded
from nemotron_fp8.errors.hub import UnusableAnswerError
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
    """Staging that uploads each shard from the worker that makes it. Picklable.

    Attributes:
        client: the client; each node has the token, under the same variable or by its own login.
        repo, ref: the destination and the branch that the shards will be committed to.
        parent: folder in which each shard gets a private folder.
        transfers: receives upload progress; None without a listener.
        uses_cache: True, because each shard is written into the cache folder before its upload.
    """

    client: HubClient
    repo: str
    ref: str
    parent: Path
    transfers: TransferTracker | None = None
    uses_cache: bool = True

    @property
    def is_file(self) -> bool:
        return True

    def reporting_to(self, transfers: TransferTracker) -> UploadStaging:
        return replace(self, client=self.client.with_options(on_wait=transfers.waits), transfers=transfers)

    def stage(self, name: str, size: int) -> UploadSink:
        return UploadSink(self, name, size)

    def upload(self, name: str, path: Path) -> Uploaded:
        """Upload a file so that a commit from any machine can name it.

        Raises:
            HubError: the upload failed; the class names the reason.
        """
        client, transfers = self.client, self.transfers or TransferTracker(None)

        def attempt(_progressed: Callable[[], None]) -> Uploaded:
            with upload_reported(transfers, client, path, path.stat().st_size) as sent:
                operation = add_operation(name, path, sent)
                client.api().preupload_lfs_files(self.repo, [operation], revision=self.ref, free_memory=True)
            if operation.path_or_fileobj != b"":  # the client keeps the content of files that it did not upload
                problem = "the Hub stores this file in git, not as an object"
                raise UnusableAnswerError(self.repo, f"upload {name}", problem)
            return uploaded(operation)

        return client.retry(client.context(self.repo, f"upload {name}", self.ref, name), attempt)

    def probe(self) -> None:
        # Reads the repository with the token of this node.
        self.client.listing(self.repo, self.ref)


def upload_staging(job: HubStaging, parent: Path) -> UploadStaging:
    """Return the staging of an opened job for workers on other machines."""
    return UploadStaging(job.client, job.repo, job.branch.ref, parent)


class UploadSink(FileSink):
    """A `FileSink` in a private folder that uploads its file when it is finished."""

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
