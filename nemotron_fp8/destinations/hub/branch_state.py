"""What the Hub holds of a job before this run does anything: a look that changes nothing there.

All that can be refused is refused by what is found here, so a run that is refused leaves nothing behind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.destinations.hub.branch import Branch
from nemotron_fp8.destinations.hub.commit import result_of
from nemotron_fp8.destinations.hub.job import JOB_FILE, Job, Published, StagedShard, note_path
from nemotron_fp8.errors.hub import HoldsWeightsError, MissingRevisionError, PublicRepoError, StagingMismatchError
from nemotron_fp8.hub.address import is_pull_request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing, RemoteFile


MAIN = "main"
"""The branch that others are made from."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".nemo")
MAX_PULL_REQUESTS = 50
"""How many pull requests, from the newest on, are searched for the job."""
MAX_PAGES = 200
"""How many pages of a branch's history, from the newest commit on, are searched for the publication of the job."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a look has found.

    Attributes:
        staging: the staging branch, or the pull request, of an unfinished run; None to begin anew.
        main: the destination's branch; where that is not there yet, what it is to be made from.
        there: whether the destination's branch is there.
    """

    staging: Listing | None
    main: Listing
    there: bool


class BranchState:
    """A job as it stands on the Hub. See `nemotron_fp8.destinations.hub.staging.HubStaging`, which carries it on.

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

    def look(self) -> Found:
        """Look at the job's branch, then at the destination's.

        In this order: what another run of the job publishes in between is then seen as published. Afterwards
        `published` is set where a pull request is complete.

        Raises:
            MissingRepoError: there is no such repository, or none that the token can see.
            NoBranchError: the revision is a tag.
            HubError: the class says why not.
        """
        if self.restart:
            return self.look_at_destination(None)
        return self.look_at_destination(self.find_pull_request() if self.pull_request else self._find_branch())

    def look_at_destination(self, staging: Listing | None) -> Found:
        """The second half of `look`, with what the first has found."""
        try:
            self.branch.refuse_tag(self.revision)
            return Found(staging, self.client.listing(self.repo, self.revision), True)
        except MissingRevisionError:
            if self.revision == MAIN or self.pull_request or is_pull_request(self.revision):
                raise
        return Found(staging, self.client.listing(self.repo, MAIN), False)

    def refuse_public(self, found: Found) -> None:
        """Make sure that a private destination is one.

        Raises:
            PublicRepoError: it is public.
        """
        if self.private and not (found.main.private or self.pull_request):
            raise PublicRepoError(self.repo)

    def refuse_weights(self, found: Found) -> None:
        """Make sure that no weights are there that nobody said were to be replaced.

        Raises:
            HoldsWeightsError: there are.
        """
        weights = tuple(sorted(path for path in found.main.files if path.endswith(WEIGHTS)))
        if weights and not self.overwrite:
            raise HoldsWeightsError(self.repo, self.revision, weights)

    def listing_of(self, commit: str, otherwise: Listing) -> Listing:
        """The files at a commit; another listing where the history was squashed, and the commit is no more."""
        try:
            return self.client.listing(self.repo, commit)
        except MissingRevisionError:
            return otherwise

    def _find_branch(self) -> Listing | None:
        try:
            listing = self.client.listing(self.repo, self.branch.ref)
        except MissingRevisionError:
            return None
        return listing if JOB_FILE in listing.files else None

    def find_pull_request(self, mark: str | None = None) -> Listing | None:
        """The newest pull request of this job, or with this mark; one without the job file is complete."""
        mark = self.branch.mark if mark is None else mark
        for ref in self.branch.pull_requests()[:MAX_PULL_REQUESTS]:
            if any(mark in title for _, title, _ in self.branch.history(ref)):
                listing = self.client.listing(self.repo, ref)
                self.branch.ref = ref
                if JOB_FILE in listing.files:
                    return listing
                self.published = Published(self.repo, ref, listing.sha)
                return None
        return None

    def was_published(self, found: Found) -> bool:
        """Whether the branch holds what this job published; what was edited beside it since does not count."""
        main = found.main
        if MANIFEST not in main.files:  # every result has one: no need to search
            return False
        for commit, title, message in self.branch.history(self.revision if found.there else MAIN, MAX_PAGES):
            if self.branch.mark in f"{title} {message}":
                then = main if commit == main.sha else self.client.listing(self.repo, commit)
                return result_of(then) == result_of(main)
        return False

    def read_job(self, staging: Listing) -> Job:
        """What the staging branch is for.

        Raises:
            StagingMismatchError: it is not this job's.
        """
        if JOB_FILE not in staging.files:
            raise StagingMismatchError(self.repo, self.branch.ref, JOB_FILE, "not there")
        try:
            job = Job(**json.loads(self.client.read_small(staging, JOB_FILE)))
        except (ValueError, TypeError) as error:
            raise StagingMismatchError(self.repo, self.branch.ref, JOB_FILE, "not a job") from error
        if (job.plan, job.revision) != (self.plan, self.revision):
            raise StagingMismatchError(self.repo, self.branch.ref, JOB_FILE, "belongs to another job")
        return job

    def staged_on(self, staging: Listing, before: Listing) -> dict[str, StagedShard]:
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
