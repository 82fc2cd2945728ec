"""A repository on the Hub as destination: shards gather on a staging branch, then appear in one commit.

The order is that of restic and Icechunk: data before what refers to it, then one conditional update of a
reference. The staging branch is the only record of what is done, so a job goes on from any machine.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nemotron_fp8.destinations.hub.branch_state import BranchState
from nemotron_fp8.destinations.hub.commit import Digest, addition, difference, digest_of, holds, replaced
from nemotron_fp8.destinations.hub.job import FOLDER, JOB_FILE, Job, Published, StagedShard, note_path
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

    from nemotron_fp8.destinations.hub.branch_state import Found
    from nemotron_fp8.destinations.hub.commit import Content, Uploaded
    from nemotron_fp8.hub.listing import Listing


class HubStaging(BranchState):
    """One job's way to the Hub: `open`, then `stage` for each shard that is not staged, then `publish`.

    Args: those of `nemotron_fp8.destinations.hub.branch_state.BranchState`.
    """

    def open(self, ready: Callable[[bool], None] = lambda _new: None) -> dict[str, StagedShard]:
        """Make repository and branch where they are missing; return the shards that are staged already.

        Whatever can be refused is refused before anything is made, moved or removed on the Hub. Afterwards
        `published` is set if an earlier run got as far as that, and nothing is left to do.

        Args:
            ready: called before that too, unless nothing is left to do, with whether the job begins anew; what it
                raises ends the job.

        Raises:
            PublicRepoError: the repository is public, and a private one was asked for.
            HoldsWeightsError: the branch holds other weights, and ``overwrite`` is off.
            DestinationMovedError: it moved since the job began, and ``overwrite`` is off.
            StagingBusyError: another run began the same job at the same moment.
            HubError: the class says why not.
        """
        asked = False
        try:
            found = self.look()
        except MissingRepoError:
            if self.pull_request or is_pull_request(self.revision):
                raise
            ready(True)
            asked = True
            self._create_repo()
            found = self.look_at_destination(None)
        self.refuse_public(found)
        if self.published is not None:
            return {}
        main, staging = found.main, found.staging
        if staging is None:
            if not self.pull_request and self.was_published(found):
                return self._end(found)
            self.refuse_weights(found)
            if not asked:
                ready(True)
            staging = self._begin(found)
        job = self.read_job(staging)
        self.branch.head, self._base = staging.sha, job.base
        moved = main.sha != job.base
        before = self.listing_of(job.base, main) if moved else main
        staged = self.staged_on(staging, before)
        self._base_files = before.files
        whole = all(holds(main, shard) for shard in staged.values())
        if moved and whole and not self.pull_request and self.was_published(found):
            # A run that was stopped right after it, or one that came late to another's end, left the branch.
            return self._end(found)
        if moved and self.overwrite:
            self._base, self._base_files = main.sha, main.files
        elif moved and not (staged and whole):
            # If it holds every staged shard, it moved by this job's own commit, and `publish` will find that.
            raise DestinationMovedError(self.repo, self.revision, job.base, main.sha)
        if found.staging is not None:
            ready(False)
            self._make_branch(found)
        return staged

    def _end(self, found: Found) -> dict[str, StagedShard]:
        """Take the job for finished, and clear away what it has left."""
        if found.staging is not None or self.restart:
            self.branch.delete()
        self._make_branch(found)
        self.published = Published(self.repo, self.revision, found.main.sha)
        return {}

    def _create_repo(self) -> None:
        def attempt(_progressed: Callable[[], None]) -> None:
            self.client.api().create_repo(self.repo, private=self.private or None, exist_ok=True)

        self.client.patience.run(self.branch.context("create the repository"), attempt)

    def _make_branch(self, found: Found) -> None:
        """Make the destination's branch where it is missing.

        Raises:
            DestinationMovedError: somebody else has just made it, of another commit.
        """
        if not found.there:
            self.branch.create(self.revision, found.main.sha)
            made = self.client.listing(self.repo, self.revision)
            if made.sha != found.main.sha:
                raise DestinationMovedError(self.repo, self.revision, found.main.sha, made.sha)

    def _begin(self, found: Found) -> Listing:
        """Make the staging branch, anew with `restart`; its first commit carries the job file."""
        main = found.main
        job = Job(self.plan, self.source, main.sha, self.revision)
        content = json.dumps(asdict(job), indent=1).encode()
        title = f"Begin FP8 conversion of {self.source}"
        if self.pull_request:
            self._open_pull_request(title, content)
        else:
            self._make_branch(found)
            if self.restart:
                self.branch.delete()
            self.branch.create(self.branch.ref, main.sha)
            self.branch.head = self.client.listing(self.repo, self.branch.ref).sha
            self.branch.commit(title, lambda: [addition(JOB_FILE, content)])
        return self.client.listing(self.repo, self.branch.ref)

    def _open_pull_request(self, title: str, content: bytes) -> None:
        """Open the pull request by its first commit; a lost answer is looked up among the open ones."""
        # With `restart` an earlier run's is none of it.
        mark = self.branch.own if self.restart else self.branch.mark
        sent = False

        def attempt(_progressed: Callable[[], None]) -> None:
            nonlocal sent
            if sent and self.find_pull_request(mark) is not None:
                return
            sent = True
            commit = self.client.api().create_commit(
                self.repo,
                [addition(JOB_FILE, content)],
                commit_message=self.branch.title(title),
                revision=self.revision,
                create_pr=True,
            )
            if commit.pr_revision is None:
                raise UnusableAnswerError(self.repo, "open a pull request", "no pull request in the answer")
            self.branch.ref = commit.pr_revision

        self.client.patience.run(self.branch.context("open a pull request"), attempt)

    def stage(
        self,
        name: str,
        path: Path | Uploaded,
        sha256: str,
        size: int,
        note: bytes = b"{}",
        sent: Callable[[int], None] | None = None,
    ) -> StagedShard:
        """Put a finished shard on the staging branch, with a note, in one commit; check what the Hub has.

        From any thread; commits follow one another.

        Args:
            name: its file name in the repository.
            path: the local file, not needed afterwards; or what was uploaded before.
            sha256: hexadecimal digest of its content.
            size: its bytes.
            note: a small JSON text to get back from `open` in a later run.
            sent: called with the position up to which the file was read.

        Raises:
            StagingBusyError: another run of the job moved the branch.
            StagingLostError: somebody removed it.
            StagingMismatchError: the Hub has other content than ``sha256``.
            HubError: the class says why not.
        """
        with self._lock:
            self.branch.commit(f"Stage {name}", lambda: [addition(name, path, sent), addition(note_path(name), note)])
            found = self.branch.look_up(name)
        if found != (sha256, size):
            problem = "not there after its commit" if found is None else "not the content that was sent"
            raise StagingMismatchError(self.repo, self.branch.ref, name, problem)
        return StagedShard(name, size, sha256, note)

    def publish(self, shards: Mapping[str, tuple[str, int]], small: Mapping[str, Content]) -> Published:
        """Let the staged shards and the small files appear on the destination's branch in one commit.

        Args:
            shards: SHA-256 and size of every shard of the result, by name.
            small: everything beside them, by name: bytes, or a local file.

        Raises:
            StagingLostError, StagingMismatchError: the staging branch is not what was staged.
            DestinationMovedError: somebody moved the destination's branch.
            HubError: the class says why not. Whatever is raised, the branch is as it was or complete.
        """
        expected = {name: digest_of(content) for name, content in small.items()}
        expected |= {name: Digest(sha256, None, size) for name, (sha256, size) in shards.items()}
        if self.pull_request:
            self._check_staged(shards)
            self.published = self._finish_pull_request(small, expected)
            return self.published
        published = self._moved(expected)
        if published is None:
            try:
                self._check_staged(shards)
                published = self._publish(shards, small, expected)
            except StagingLostError:
                # Another run of the job may have published in the meantime, and cleaned up.
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
        """The publication, if the branch moved by it; None while it has not moved."""
        main = self.client.listing(self.repo, self.revision)
        if main.sha == self._base:
            return None
        if difference(main, expected) is not None:
            raise DestinationMovedError(self.repo, self.revision, self._base, main.sha)
        return Published(self.repo, self.revision, main.sha)

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
            operations += [addition(name, content) for name, content in small.items()]
            operations += replaced(self._base_files, expected)
            self.client.api().create_commit(
                self.repo,
                operations,
                commit_message=f"FP8 weights of {self.source}",
                commit_description=f"Made by nemotron_fp8. {self.branch.mark}",
                revision=self.revision,
                parent_commit=self._base,
            )

        try:
            with suppress(ConflictError):  # whose commit it was shows below
                self.client.patience.run(self.branch.context("publish", self.revision), attempt)
        except (RefusedError, MissingFileError) as error:
            # All were listed just before, so which it is shows in the answer at best.
            answer = str(error) if isinstance(error, RefusedError) else ""
            raise StagingLostError(self.repo, self.branch.ref, next(iter(shards), None), answer) from None
        except MissingRevisionError:
            raise StagingLostError(self.repo, self.branch.ref) from None
        published = self._moved(expected)
        if published is None:
            raise UnusableAnswerError(self.repo, "publish", f"{self.revision} did not move")
        return published

    def _finish_pull_request(self, small: Mapping[str, Content], expected: Mapping[str, Digest]) -> Published:
        """Complete the pull request: the small files come, old weights and the job's own files go."""
        from huggingface_hub import CommitOperationDelete

        def operations() -> list[Any]:
            adds = [addition(name, content) for name, content in small.items()]
            own = CommitOperationDelete(f"{FOLDER}/", is_folder=True)
            return [*adds, *replaced(self._base_files, expected), own]

        self.branch.commit("Complete the FP8 conversion", operations)
        listing = self.client.listing(self.repo, self.branch.ref)
        if (name := difference(listing, expected)) is not None:
            raise StagingMismatchError(self.repo, self.branch.ref, name, "not the content that was sent")
        return Published(self.repo, self.branch.ref, listing.sha)
