"""A repository on the Hub as destination: shards gather on a staging branch, then appear in one commit.

The order is that of restic and Icechunk: data before what refers to it, then one conditional update of a
reference. The staging branch is the only record of what is done, so a job goes on from any machine.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from threading import Lock
from typing import TYPE_CHECKING, Any

from nemotron_fp8.hub.branch import Branch
from nemotron_fp8.hub.contents import Digest, addition, difference, digest_of, holds, replaced, result_of
from nemotron_fp8.hub.errors import (
    DestinationMovedError,
    HoldsWeightsError,
    MissingFileError,
    MissingRevisionError,
    PublicRepoError,
    StagingLostError,
    StagingMismatchError,
    UnusableAnswerError,
)
from nemotron_fp8.hub.job import FOLDER, JOB_FILE, Job, Published, StagedShard, note_path
from nemotron_fp8.hub.retry import ConflictError, RefusedError
from nemotron_fp8.source import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.contents import Content, Uploaded
    from nemotron_fp8.hub.listing import Listing, RemoteFile

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".nemo")
MAX_PULL_REQUESTS = 50
"""How many pull requests, from the newest on, are searched for the job."""
MAX_PAGES = 200
"""How many pages of a branch's history, from the newest commit on, are searched for the publication of the job."""


class HubStaging:
    """One job's way to the Hub: `open`, then `stage` for each shard that is not staged, then `publish`.

    Args:
        client: the client, with a token that may write (any token for a pull request).
        repo: the destination, ``owner/name``.
        plan: hash of everything that decides the result's bytes, hexadecimal.
        source: the source and its commit, for people.
        revision: the destination's branch.
        private: whether to make a new repository private; one that is public already is then refused.
        pull_request: leave a pull request instead of writing to the branch. It is never merged from here.
        overwrite: whether to replace weights that are there, and to publish on a branch that moved.
        restart: whether to discard what an unfinished run has staged. A pull request is left alone, and another one
            is opened.

    Attributes:
        published: the result, once it is there.
    """

    def __init__(
        self,
        client: HubClient,
        repo: str,
        plan: str,
        source: str,
        *,
        revision: str = "main",
        private: bool = False,
        pull_request: bool = False,
        overwrite: bool = False,
        restart: bool = False,
    ) -> None:
        self.client, self.repo, self.revision = client, repo, revision
        self.private, self.pull_request, self.overwrite, self.restart = private, pull_request, overwrite, restart
        self.plan, self.source = plan, source
        self.branch = Branch(client, repo, f"fp8-staging-{plan[:24]}", f"[job {plan[:24]}]")
        self.published: Published | None = None
        self._lock = Lock()
        self._base = ""
        self._base_files: Mapping[str, RemoteFile] = {}

    def open(self) -> dict[str, StagedShard]:
        """Make repository and branch where they are missing; return the shards that are staged already.

        Afterwards `published` is set if an earlier run got as far as that, and nothing is left to do.

        Raises:
            PublicRepoError: the repository is public, and a private one was asked for.
            HoldsWeightsError: the branch holds other weights, and ``overwrite`` is off.
            DestinationMovedError: it moved since the job began, and ``overwrite`` is off.
            StagingBusyError: another run began the same job at the same moment.
            HubError: the class says why not.
        """
        if not self.pull_request:
            self._create_repo()
        # In this order: what another run of the job publishes in between is then seen as published.
        staging = self._find_unfinished()
        main = self._destination()
        if self.private and not (main.private or self.pull_request):
            raise PublicRepoError(self.repo)
        if self.published is not None:
            return {}
        if staging is None:
            if not self.pull_request and self._was_published(main):
                self.published = Published(self.repo, self.revision, main.sha)
                return {}
            weights = tuple(sorted(path for path in main.files if path.endswith(WEIGHTS)))
            if weights and not self.overwrite:
                raise HoldsWeightsError(self.repo, self.revision, weights)
            staging = self._begin(main)
        job = self._read_job(staging)
        self.branch.head, self._base = staging.sha, job.base
        moved = main.sha != job.base
        before = self._listing_of(job.base, main) if moved else main
        staged = self._staged(staging, before)
        self._base_files = before.files
        whole = all(holds(main, shard) for shard in staged.values())
        if moved and whole and not self.pull_request and self._was_published(main):
            # A run that was stopped right after it, or one that came late to another's end, left the branch.
            self.branch.delete()
            self.published = Published(self.repo, self.revision, main.sha)
            return {}
        if moved and self.overwrite:
            self._base, self._base_files = main.sha, main.files
        elif moved and not (staged and whole):
            # If it holds every staged shard, it moved by this job's own commit, and `publish` will find that.
            raise DestinationMovedError(self.repo, self.revision, job.base, main.sha)
        return staged

    def _listing_of(self, commit: str, otherwise: Listing) -> Listing:
        """The files at a commit; another listing where the history was squashed, and the commit is no more."""
        try:
            return self.client.listing(self.repo, commit)
        except MissingRevisionError:
            return otherwise

    def _create_repo(self) -> None:
        def attempt(_progressed: Callable[[], None]) -> None:
            self.client.api().create_repo(self.repo, private=self.private or None, exist_ok=True)

        self.client.patience.run(self.branch.context("create the repository"), attempt)

    def _destination(self) -> Listing:
        """The destination's branch as it is now, made from main where it is missing."""
        try:
            self.branch.refuse_tag(self.revision)
            return self.client.listing(self.repo, self.revision)
        except MissingRevisionError:
            if self.revision == "main" or self.pull_request:
                raise
        self.branch.create(self.revision, "main")
        return self.client.listing(self.repo, self.revision)

    def _find_unfinished(self) -> Listing | None:
        """What an earlier run has left; with `restart`, nothing is."""
        if not self.restart:
            return self._find_pull_request() if self.pull_request else self._find_branch()
        if not self.pull_request:
            self.branch.delete()
        return None

    def _find_branch(self) -> Listing | None:
        try:
            listing = self.client.listing(self.repo, self.branch.ref)
        except MissingRevisionError:
            return None
        return listing if JOB_FILE in listing.files else None

    def _find_pull_request(self) -> Listing | None:
        """The newest pull request of this job; one without the job file is complete."""
        for ref in self.branch.pull_requests()[:MAX_PULL_REQUESTS]:
            if any(self.branch.mark in title for _, title, _ in self.branch.history(ref)):
                listing = self.client.listing(self.repo, ref)
                self.branch.ref = ref
                if JOB_FILE in listing.files:
                    return listing
                self.published = Published(self.repo, ref, listing.sha)
                return None
        return None

    def _was_published(self, main: Listing) -> bool:
        """Whether the branch holds what this job published; what was edited beside it since does not count."""
        if MANIFEST not in main.files:  # every result has one: no need to search
            return False
        for commit, title, message in self.branch.history(self.revision, MAX_PAGES):
            if self.branch.mark in f"{title} {message}":
                then = main if commit == main.sha else self.client.listing(self.repo, commit)
                return result_of(then) == result_of(main)
        return False

    def _begin(self, main: Listing) -> Listing:
        """Make the staging branch; its first commit carries the job file."""
        job = Job(self.plan, self.source, main.sha, self.revision)
        content = json.dumps(asdict(job), indent=1).encode()
        title = f"Begin FP8 conversion of {self.source}"
        if self.pull_request:
            self._open_pull_request(title, content)
        else:
            self.branch.create(self.branch.ref, main.sha)
            self.branch.head = self.client.listing(self.repo, self.branch.ref).sha
            self.branch.commit(title, lambda: [addition(JOB_FILE, content)])
        return self.client.listing(self.repo, self.branch.ref)

    def _open_pull_request(self, title: str, content: bytes) -> None:
        """Open the pull request by its first commit; a lost answer is looked up among the open ones."""
        sent = False

        def attempt(_progressed: Callable[[], None]) -> None:
            nonlocal sent
            if sent and self._find_pull_request() is not None:
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

    def _read_job(self, staging: Listing) -> Job:
        if JOB_FILE not in staging.files:
            raise StagingMismatchError(self.repo, self.branch.ref, JOB_FILE, "not there")
        try:
            job = Job(**json.loads(self.client.read_small(staging, JOB_FILE)))
        except (ValueError, TypeError) as error:
            raise StagingMismatchError(self.repo, self.branch.ref, JOB_FILE, "not a job") from error
        if (job.plan, job.revision) != (self.plan, self.revision):
            raise StagingMismatchError(self.repo, self.branch.ref, JOB_FILE, "belongs to another job")
        return job

    def _staged(self, staging: Listing, before: Listing) -> dict[str, StagedShard]:
        """What is on the branch with its note, and was not on the destination's when the job began."""

        def staged(file: RemoteFile) -> StagedShard:
            note = self.client.read_small(staging, note_path(file.path))
            return StagedShard(file.path, file.size, file.sha256 or "", note)

        ours = [
            file
            for path, file in staging.files.items()
            if file.sha256 is not None and note_path(path) in staging.files and before.files.get(path) != file
        ]
        return {shard.name: shard for shard in self.client.several(staged, ours)}

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
        except (RefusedError, MissingFileError):
            raise StagingLostError(self.repo, self.branch.ref, next(iter(shards), None)) from None
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
