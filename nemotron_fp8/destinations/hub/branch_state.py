"""Read-only inspection of the destination repository before a job starts.

Every rejection follows from this state, so that a rejected run changes nothing on the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.destinations.hub.commit import result_files
from nemotron_fp8.destinations.hub.job import JOB_FILE, JobOptions, JobRecord, Published, StagedShard, note_path
from nemotron_fp8.errors.hub import HoldsWeightsError, MissingRevisionError, PublicRepoError, StagingMismatchError
from nemotron_fp8.hub.address import is_pull_request
from nemotron_fp8.untrusted import strict_json

if TYPE_CHECKING:
    from nemotron_fp8.destinations.hub.branch import Branch
    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.listing import Listing, RemoteFile


MAIN = "main"
"""Branch that new branches are created from."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".nemo")
MAX_PULL_REQUESTS = 50
"""Pull requests, from the newest on, that are searched for the job."""
MAX_PAGES = 200
"""Pages of a branch's history, from the newest commit on, that are searched for the publication of the job."""


@dataclass(frozen=True, slots=True)
class BranchState:
    """State of a job and of its destination on the Hub.

    Attributes:
        staging: staging branch or pull request of an unfinished run; None if no run has begun.
        main: branch of the destination; where that does not exist yet, the branch that it will be created from.
        exists: True if the branch of the destination exists.
        published: the result, if a pull request of this job is complete.
        pull_request: the job's pull request, as a revision; None without one.
    """

    staging: Listing | None
    main: Listing
    exists: bool
    published: Published | None = None
    pull_request: str | None = None

    def refuse_public(self, options: JobOptions) -> None:
        """Check that a destination that must be private is private.

        Raises:
            PublicRepoError: the repository is public.
        """
        if options.private and not (self.main.private or options.pull_request):
            raise PublicRepoError(options.repo)

    def refuse_weights(self, options: JobOptions) -> None:
        """Check that the destination holds no weights, unless they may be overwritten.

        Raises:
            HoldsWeightsError: the branch holds weights.
        """
        weights = tuple(sorted(path for path in self.main.files if path.endswith(WEIGHTS)))
        if weights and not options.overwrite:
            raise HoldsWeightsError(options.repo, options.revision, weights)


def inspect_destination(branch: Branch, options: JobOptions, *, staged: bool = True) -> BranchState:
    """Read the job's branch or pull request, then the branch of the destination.

    In this order, a publication by another run of the same job between the two reads is seen as a publication.

    Args:
        branch: the staging branch; nothing is written to it.
        options: destination and options of the job.
        staged: False for a repository that is new and holds no staging branch.

    Raises:
        MissingRepoError: the repository does not exist, or the token cannot see it.
        NoBranchError: the revision is a tag.
        HubError: the destination cannot be read; the class names the reason.
    """
    staging, published, pull_request = None, None, None
    if staged and not options.restart:
        if not options.pull_request:
            staging = _find_branch(branch)
        elif (found := find_pull_request(branch, branch.job_mark)) is not None:
            pull_request, listing = found
            if JOB_FILE in listing.files:
                staging = listing
            else:
                published = Published(options.repo, pull_request, listing.sha)
    client, repo, revision = branch.client, options.repo, options.revision
    try:
        branch.refuse_tag(revision)
        return BranchState(staging, client.listing(repo, revision), True, published, pull_request)
    except MissingRevisionError:
        if revision == MAIN or options.pull_request or is_pull_request(revision):
            raise
    return BranchState(staging, client.listing(repo, MAIN), False, published, pull_request)


def _find_branch(branch: Branch) -> Listing | None:
    try:
        listing = branch.client.listing(branch.repo, branch.ref)
    except MissingRevisionError:
        return None
    return listing if JOB_FILE in listing.files else None


def find_pull_request(branch: Branch, mark: str) -> tuple[str, Listing] | None:
    """Return the newest pull request with this mark and its files; without the job file it is complete."""
    for ref in branch.pull_requests()[:MAX_PULL_REQUESTS]:
        if any(mark in title for _, title, _ in branch.history(ref)):
            return ref, branch.client.listing(branch.repo, ref)
    return None


def was_published(branch: Branch, options: JobOptions, state: BranchState) -> bool:
    """Return True if the destination holds the result of this job; later edits of other files do not count."""
    main = state.main
    if MANIFEST not in main.files:  # every result has a manifest, so no search is needed
        return False
    for commit, title, message in branch.history(options.revision if state.exists else MAIN, MAX_PAGES):
        if branch.job_mark in f"{title} {message}":
            then = main if commit == main.sha else branch.client.listing(branch.repo, commit)
            return result_files(then) == result_files(main)
    return False


def listing_at(client: HubClient, repo: str, commit: str, otherwise: Listing) -> Listing:
    """Return the files at a commit, or another listing if the history was squashed and the commit is gone."""
    try:
        return client.listing(repo, commit)
    except MissingRevisionError:
        return otherwise


def read_job(branch: Branch, options: JobOptions, staging: Listing) -> JobRecord:
    """Read the job file of a staging branch.

    Raises:
        StagingMismatchError: the branch has no job file, or one of another job.
    """
    if JOB_FILE not in staging.files:
        raise StagingMismatchError(branch.repo, branch.ref, JOB_FILE, "missing")
    job = job_record(branch, staging)
    if (job.plan, job.revision) != (options.plan, options.revision):
        raise StagingMismatchError(branch.repo, branch.ref, JOB_FILE, "belongs to another job")
    return job


def job_record(branch: Branch, staging: Listing) -> JobRecord:
    """Return the job file of a listing that holds one, of whatever job.

    Raises:
        StagingMismatchError: it is not a job file.
    """

    def refuse(_file: str, problem: str) -> StagingMismatchError:
        return StagingMismatchError(branch.repo, branch.ref, JOB_FILE, f"not a job file ({problem})")

    found = strict_json.load_object(branch.client.read_small(staging, JOB_FILE), JOB_FILE, refuse)
    values = [found.get(field) for field in JobRecord.__slots__]
    if found.keys() != set(JobRecord.__slots__) or not all(type(value) is str for value in values):
        raise refuse(JOB_FILE, "its fields are not four texts")
    return JobRecord(*map(str, values))


def staged_shards(client: HubClient, staging: Listing, before: Listing) -> dict[str, StagedShard]:
    """Return the shards of a staging branch that have a note and differ from the destination's files ``before``."""

    def staged(view: HubClient, file: RemoteFile) -> StagedShard:
        note = view.read_small(staging, note_path(file.path))
        return StagedShard(file.path, file.size, file.sha256 or "", note)

    ours = [
        file
        for path, file in staging.files.items()
        if file.sha256 is not None and note_path(path) in staging.files and before.files.get(path) != file
    ]
    return {shard.name: shard for shard in client.map(staged, ours)}
