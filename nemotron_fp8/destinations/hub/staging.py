"""Staging of a result on the Hub: shards gather on a staging branch, then one commit publishes them.

Data comes before the commit that refers to it, and one conditional update of a branch publishes all of it, as in restic
and Icechunk. The staging branch is the only record of finished shards, so a job resumes on any machine.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from threading import Lock
from typing import TYPE_CHECKING, Any

from nemotron_fp8.destinations.hub.branch import Branch
from nemotron_fp8.destinations.hub.branch_state import (
    find_pull_request,
    inspect_destination,
    listing_at,
    read_job,
    staged_shards,
    was_published,
)
from nemotron_fp8.destinations.hub.commit import (
    Digest,
    add_operation,
    digest_of,
    first_difference,
    has_shard,
    weight_deletions,
)
from nemotron_fp8.destinations.hub.job import (
    FOLDER,
    JOB_FILE,
    STAGING,
    JobOptions,
    JobRecord,
    Published,
    StagedShard,
    note_path,
)
from nemotron_fp8.errors.hub import (
    DestinationMovedError,
    MissingFileError,
    MissingRepoError,
    MissingRevisionError,
    StagingLostError,
    StagingMismatchError,
    UnusableAnswerError,
)
from nemotron_fp8.hub.address import is_pull_request
from nemotron_fp8.hub.failures import ConflictError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from nemotron_fp8.destinations.hub.branch_state import BranchState
    from nemotron_fp8.destinations.hub.commit import Content, Uploaded
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing, RemoteFile


class HubStaging:
    """Publication of one job: `begin`, then `stage` for each shard that is not staged yet, then `publish`.

    Args:
        client: client with a token that may write; for a pull request, any token.
        options: destination and options of the job.

    Attributes:
        branch: the staging branch, or the pull request.
        state: state of the destination before this run changed it; None before `begin`.
        published: the result, once it is published.
    """

    def __init__(self, client: HubClient, options: JobOptions) -> None:
        self.client, self.options, self.repo = client, options, options.repo
        short = options.plan[:24]
        self.branch = Branch(client, options.repo, f"{STAGING}{short}", f"[job {short}]")
        self.state: BranchState | None = None
        self.published: Published | None = None
        self._lock = Lock()
        self._base = ""
        self._base_files: Mapping[str, RemoteFile] = {}

    def begin(self, ready: Callable[[bool], None] = lambda _new: None) -> dict[str, StagedShard]:
        """Create repository and branches where they are missing; return the shards that are staged already.

        All checks precede the first change on the Hub. If an earlier run published the
        result, `published` is set afterwards and nothing is left to do.

        Args:
            ready: called before the first change, unless nothing is left to do; its argument is True if the job begins
                anew. An exception that it raises aborts the job.

        Raises:
            PublicRepoError: the repository is public and must be private.
            HoldsWeightsError: the branch holds other weights, and ``overwrite`` is off.
            DestinationMovedError: the branch moved since the job began, and ``overwrite`` is off.
            StagingBusyError: another run began the same job at the same moment.
            HubError: the job cannot begin; the class names the reason.
        """
        options, asked = self.options, False
        try:
            state = inspect_destination(self.branch, options)
        except MissingRepoError:
            if options.pull_request or is_pull_request(options.revision):
                raise
            ready(True)
            asked = True
            self._create_repo()
            state = inspect_destination(self.branch, options, staged=False)
        self.state = state
        self.branch.ref = state.pull_request or self.branch.ref
        state.refuse_public(options)
        if state.published is not None:
            self.published = state.published
            return {}
        main, staging = state.main, state.staging
        if staging is None:
            if not options.pull_request and was_published(self.branch, options, state):
                return self._end(state)
            state.refuse_weights(options)
            if not asked:
                ready(True)
            staging = self._create_staging(state)
        job = read_job(self.branch, options, staging)
        self.branch.head, self._base = staging.sha, job.base
        moved = main.sha != job.base
        before = listing_at(self.client, self.repo, job.base, main) if moved else main
        staged = staged_shards(self.client, staging, before)
        self._base_files = before.files
        whole = all(has_shard(main, shard) for shard in staged.values())
        if moved and whole and not options.pull_request and was_published(self.branch, options, state):
            # The run was stopped after its publication, or another run of the job published: remove the staging branch.
            return self._end(state)
        if moved and options.overwrite:
            self._base, self._base_files = main.sha, main.files
        elif moved and not (staged and whole):
            # A branch that holds every staged shard was moved by this job's own commit, which `publish` finds.
            raise DestinationMovedError(self.repo, options.revision, job.base, main.sha)
        if state.staging is not None:
            ready(False)
            self._make_branch(state)
        return staged

    def _end(self, state: BranchState) -> dict[str, StagedShard]:
        """Remove the leftovers of a job whose result is published already."""
        if state.staging is not None or self.options.restart:
            self.branch.delete()
        self._make_branch(state)
        self.published = Published(self.repo, self.options.revision, state.main.sha)
        return {}

    def _create_repo(self) -> None:
        def attempt(_progressed: Callable[[], None]) -> None:
            self.client.api().create_repo(self.repo, private=self.options.private or None, exist_ok=True)

        self.client.retry(self.branch.context("create the repository"), attempt)

    def _make_branch(self, state: BranchState) -> None:
        """Create the branch of the destination if it is missing.

        Raises:
            DestinationMovedError: another process created the branch from another commit meanwhile.
        """
        if not state.exists:
            self.branch.create(self.options.revision, state.main.sha)
            made = self.client.listing(self.repo, self.options.revision)
            if made.sha != state.main.sha:
                raise DestinationMovedError(self.repo, self.options.revision, state.main.sha, made.sha)

    def _create_staging(self, state: BranchState) -> Listing:
        """Create the staging branch, anew with ``restart``; its first commit holds the job file."""
        main, options = state.main, self.options
        job = JobRecord(options.plan, options.source, main.sha, options.revision)
        content = json.dumps(asdict(job), indent=1).encode()
        title = f"Begin FP8 conversion of {options.source}"
        if options.pull_request:
            self._open_pull_request(title, content)
        else:
            self._make_branch(state)
            if options.restart:
                self.branch.delete()
            self.branch.create(self.branch.ref, main.sha)
            self.branch.head = self.client.listing(self.repo, self.branch.ref).sha
            self.branch.commit(title, lambda: [add_operation(JOB_FILE, content)])
        return self.client.listing(self.repo, self.branch.ref)

    def _open_pull_request(self, title: str, content: bytes) -> None:
        """Open the pull request by its first commit; after a lost response, look for it among the open ones."""
        # With ``restart``, an earlier run's pull request with the job's mark does not count.
        mark = self.branch.run_mark if self.options.restart else self.branch.job_mark
        sent = False

        def attempt(_progressed: Callable[[], None]) -> None:
            nonlocal sent
            if sent and (found := find_pull_request(self.branch, mark)) and JOB_FILE in found[1].files:
                self.branch.ref = found[0]
                return
            sent = True
            commit = self.client.api().create_commit(
                self.repo,
                [add_operation(JOB_FILE, content)],
                commit_message=self.branch.title(title),
                revision=self.options.revision,
                create_pr=True,
            )
            if commit.pr_revision is None:
                raise UnusableAnswerError(self.repo, "open a pull request", "no pull request in the response")
            self.branch.ref = commit.pr_revision

        self.client.retry(self.branch.context("open a pull request"), attempt)

    def stage(
        self,
        name: str,
        path: Path | Uploaded,
        sha256: str,
        size: int,
        note: bytes = b"{}",
        sent: Callable[[int], None] | None = None,
    ) -> StagedShard:
        """Commit a finished shard and its note to the staging branch, then check the digest that the Hub reports.

        Thread-safe; commits follow one another.

        Args:
            name: file name in the repository.
            path: the local file, which is not needed afterwards; or an earlier upload.
            sha256: hexadecimal digest of the content.
            size: bytes.
            note: small JSON text that `begin` returns in a later run.
            sent: called with the position up to which the file was sent.

        Raises:
            StagingBusyError: another run of the job moved the branch.
            StagingLostError: the branch was removed.
            StagingMismatchError: the content on the Hub has another digest.
            HubError: the shard could not be staged; the class names the reason.
        """
        with self._lock:
            self.branch.commit(
                f"Stage {name}", lambda: [add_operation(name, path, sent), add_operation(note_path(name), note)]
            )
            found = self.branch.stored_object(name)
        if found != (sha256, size):
            problem = "missing after its commit" if found is None else "not the content that was sent"
            raise StagingMismatchError(self.repo, self.branch.ref, name, problem)
        return StagedShard(name, size, sha256, note)

    def publish(self, shards: Mapping[str, tuple[str, int]], small: Mapping[str, Content]) -> Published:
        """Publish the staged shards and the small files on the destination's branch in one commit.

        After any error the branch is unchanged or complete.

        Args:
            shards: SHA-256 and size of every shard of the result, by name.
            small: all other files by name, as bytes or a local file.

        Raises:
            StagingLostError, StagingMismatchError: the staging branch does not hold the staged shards.
            DestinationMovedError: the destination's branch received another commit.
            HubError: the result could not be published; the class names the reason.
        """
        expected = {name: digest_of(content) for name, content in small.items()}
        expected |= {name: Digest(sha256, None, size) for name, (sha256, size) in shards.items()}
        if self.options.pull_request:
            self._check_staged(shards)
            self.published = self._finish_pull_request(small, expected)
            return self.published
        published = self._moved(expected)
        if published is None:
            try:
                self._check_staged(shards)
                published = self._publish(shards, small, expected)
            except StagingLostError:
                # Another run of the job may have published meanwhile and removed the staging branch.
                published = self._moved(expected)
                if published is None:
                    raise
        self.branch.delete()
        self.published = published
        return published

    def _check_staged(self, shards: Mapping[str, tuple[str, int]]) -> None:
        try:
            staging = self.client.listing(self.repo, self.branch.ref)
        except MissingRevisionError:
            raise StagingLostError(self.repo, self.branch.ref) from None
        for name, (sha256, size) in shards.items():
            file = staging.files.get(name)
            if file is None:
                raise StagingLostError(self.repo, self.branch.ref, name)
            if (file.sha256, file.size) != (sha256, size):
                problem = "not the content that was staged"
                raise StagingMismatchError(self.repo, self.branch.ref, name, problem)

    def _moved(self, expected: Mapping[str, Digest]) -> Published | None:
        """Return the publication if the branch moved by it; None if the branch has not moved.

        Raises:
            DestinationMovedError: the branch moved by another commit.
        """
        main = self.client.listing(self.repo, self.options.revision)
        if main.sha == self._base:
            return None
        if first_difference(main, expected) is not None:
            raise DestinationMovedError(self.repo, self.options.revision, self._base, main.sha)
        return Published(self.repo, self.options.revision, main.sha)

    def _publish(
        self,
        shards: Mapping[str, tuple[str, int]],
        small: Mapping[str, Content],
        expected: Mapping[str, Digest],
    ) -> Published:
        from huggingface_hub import CommitOperationCopy

        sent = False

        def attempt(_progressed: Callable[[], None]) -> None:
            nonlocal sent
            if sent and self._moved(expected) is not None:
                return
            sent = True
            operations: list[Any] = [CommitOperationCopy(name, name, src_revision=self.branch.ref) for name in shards]
            operations += [add_operation(name, content) for name, content in small.items()]
            operations += weight_deletions(self._base_files, expected)
            self.client.api().create_commit(
                self.repo,
                operations,
                commit_message=f"FP8 weights of {self.options.source}",
                commit_description=f"Made by nemotron_fp8. {self.branch.job_mark}",
                revision=self.options.revision,
                parent_commit=self._base,
            )

        try:
            with suppress(ConflictError):  # `_moved` below finds out whose commit it was
                self.client.retry(self.branch.context("publish", self.options.revision), attempt, refusals=True)
        except (RefusedError, MissingFileError) as error:
            # All were listed just before; only the response may name the missing one.
            answer = str(error) if isinstance(error, RefusedError) else ""
            raise StagingLostError(self.repo, self.branch.ref, next(iter(shards), None), answer) from None
        except MissingRevisionError:
            raise StagingLostError(self.repo, self.branch.ref) from None
        published = self._moved(expected)
        if published is None:
            raise UnusableAnswerError(self.repo, "publish", f"{self.options.revision} did not move")
        return published

    def _finish_pull_request(self, small: Mapping[str, Content], expected: Mapping[str, Digest]) -> Published:
        """Complete the pull request: add the small files, delete old weights and the job's own files."""
        from huggingface_hub import CommitOperationDelete

        def operations() -> list[Any]:
            adds = [add_operation(name, content) for name, content in small.items()]
            own = CommitOperationDelete(f"{FOLDER}/", is_folder=True)
            return [*adds, *weight_deletions(self._base_files, expected), own]

        self.branch.commit("Complete the FP8 conversion", operations)
        listing = self.client.listing(self.repo, self.branch.ref)
        if (name := first_difference(listing, expected)) is not None:
            raise StagingMismatchError(self.repo, self.branch.ref, name, "not the content that was sent")
        return Published(self.repo, self.branch.ref, listing.sha)
