"""A repository on the Hub as destination: shards gather on a staging branch, then appear on main in one commit.

The order is that of restic and Icechunk: data before what refers to it, then one conditional update of a reference.
The staging branch is the only record of what is done, so a job goes on from any machine. Every commit on it names
its parent; a second run of the same job is refused by the Hub with 412, which makes the branch a lock. An answer
that is lost is looked up: the title of each commit on it names the job and the run.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nemotron_fp8.hub.errors import (
    DestinationMovedError,
    HoldsWeightsError,
    MissingFileError,
    MissingRevisionError,
    StagingBusyError,
    StagingLostError,
    StagingMismatchError,
    UnusableAnswerError,
)
from nemotron_fp8.hub.retry import ConflictError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nemotron_fp8.hub.client import HubClient, Listing, RemoteFile
    from nemotron_fp8.hub.retry import Context

    Content = bytes | Path

FOLDER = ".nemotron-fp8"
JOB_FILE = f"{FOLDER}/job.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".nemo")
REPLACED = (".safetensors", ".safetensors.index.json")
"""Endings of what goes from the branch when weights are replaced: shards beside the new ones would be a mixture."""
MAX_PULL_REQUESTS = 50
"""How many pull requests, from the newest on, are searched for the job."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a staging branch is for; a small file on it says so.

    Attributes:
        plan: hash of everything that decides the result's bytes; jobs with the same one may continue each other.
        source: the source and its commit, for people.
        base: commit of the destination's branch that the result is published on top of.
        revision: the destination's branch.
    """

    plan: str
    source: str
    base: str
    revision: str


@dataclass(frozen=True, slots=True)
class StagedShard:
    """A shard that is on the staging branch.

    Attributes:
        name: its file name.
        size: its bytes.
        sha256: hexadecimal digest of its content, as the Hub reports it.
        note: what was stored with it in the same commit.
    """

    name: str
    size: int
    sha256: str
    note: bytes


@dataclass(frozen=True, slots=True)
class Published:
    """The result on the Hub.

    Attributes:
        repo, revision: where it is; ``refs/pr/N`` for a pull request.
        commit: the commit that completed it.
    """

    repo: str
    revision: str
    commit: str


class Staging:
    """One job's way to the Hub. Call `open`, then `stage` for each shard that is not staged, then `publish`.

    Args:
        client: the client, with a token that may write (any token for a pull request).
        repo: the destination, ``owner/name``.
        plan: hash of everything that decides the result's bytes, hexadecimal.
        source: the source and its commit, for people.
        revision: the destination's branch.
        private: whether to make a new repository private.
        pull_request: leave a pull request instead of writing to the branch. It is never merged from here.
        overwrite: whether to replace weights that the branch holds, and to publish on top of a branch that moved.
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
    ) -> None:
        self.client, self.repo, self.revision = client, repo, revision
        self.private, self.pull_request, self.overwrite = private, pull_request, overwrite
        self.plan, self.source = plan, source
        self.ref = f"fp8-staging-{plan[:24]}"
        self.published: Published | None = None
        self._run = uuid.uuid4().hex[:12]
        self._lock = Lock()
        self._base = ""
        self._base_files: Mapping[str, RemoteFile] = {}
        self._head = ""

    # -- beginning ----------------------------------------------------------------------------------------

    def open(self) -> dict[str, StagedShard]:
        """Make repository and staging branch where they are missing; return the shards that are staged already.

        Afterwards `published` is set if an earlier run got as far as that, and there is nothing left to do.

        Raises:
            HoldsWeightsError: the branch holds other weights, and ``overwrite`` is off.
            DestinationMovedError: it moved since the job began, and ``overwrite`` is off.
            StagingBusyError: another run began the same job at the same moment.
            HubError: the class says why not.
        """
        if not self.pull_request:
            self._create_repo()
        main = self._destination()
        staging = self._find_pull_request() if self.pull_request else self._find_branch()
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
        self._head, self._base = staging.sha, job.base
        moved = main.sha != job.base
        self._base_files = self.client.listing(self.repo, job.base).files if moved else main.files
        staged = self._staged(staging)
        if moved and self.overwrite:
            self._base = main.sha
        elif moved and not (staged and all(_holds(main, shard) for shard in staged.values())):
            # Holding every staged shard, it moved by this job's own commit, and `publish` will find that.
            raise DestinationMovedError(self.repo, self.revision, job.base, main.sha)
        return staged

    def _create_repo(self) -> None:
        def attempt(_progressed: Callable[[], None]) -> None:
            self.client.api().create_repo(self.repo, private=self.private or None, exist_ok=True)

        self.client.patience.run(self._context("create the repository"), attempt)

    def _destination(self) -> Listing:
        """The destination's branch as it is now, made from main where it is missing."""
        try:
            return self.client.listing(self.repo, self.revision)
        except MissingRevisionError:
            if self.revision == "main" or self.pull_request:
                raise
        self._create_branch(self.revision, "main")
        return self.client.listing(self.repo, self.revision)

    def _create_branch(self, branch: str, start: str) -> None:
        def attempt(_progressed: Callable[[], None]) -> None:
            # One that is there already is this call's own, its answer lost, or another run's: both will do.
            self.client.api().create_branch(self.repo, branch=branch, revision=start, exist_ok=True)

        self.client.patience.run(self._context(f"create the branch {branch}", start), attempt)

    def _find_branch(self) -> Listing | None:
        try:
            listing = self.client.listing(self.repo, self.ref)
        except MissingRevisionError:
            return None
        return listing if JOB_FILE in listing.files else None

    def _find_pull_request(self) -> Listing | None:
        """The newest pull request of this job; one without the job file is complete."""

        def attempt(_progressed: Callable[[], None]) -> list[str]:
            answer = self.client.get_json(f"/api/models/{self.repo}/refs", include_prs=1)
            return [str(ref["ref"]) for ref in answer.get("pullRequests") or ()]

        refs = self.client.patience.run(self._context("list the pull requests"), attempt)
        for ref in sorted(refs, key=lambda ref: int(ref.rpartition("/")[2]), reverse=True)[
            :MAX_PULL_REQUESTS
        ]:
            if any(self._job_mark in title for _, title, _ in self._history(ref)):
                listing = self.client.listing(self.repo, ref)
                self.ref = ref
                if JOB_FILE in listing.files:
                    return listing
                self.published = Published(self.repo, ref, listing.sha)
                return None
        return None

    def _begin(self, main: Listing) -> Listing:
        """Make the staging branch; its first commit carries the job file."""
        job = Job(self.plan, self.source, main.sha, self.revision)
        content = json.dumps(asdict(job), indent=1).encode()
        title = f"Begin FP8 conversion of {self.source}"
        if self.pull_request:
            self._open_pull_request(title, content)
        else:
            self._create_branch(self.ref, main.sha)
            self._head = self.client.listing(self.repo, self.ref).sha
            self._commit(title, lambda: [_add(JOB_FILE, content)])
        return self.client.listing(self.repo, self.ref)

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
                [_add(JOB_FILE, content)],
                commit_message=self._marked(title),
                revision=self.revision,
                create_pr=True,
            )
            if commit.pr_revision is None:
                raise UnusableAnswerError(self.repo, "open a pull request", "no pull request in the answer")
            self.ref = commit.pr_revision

        self.client.patience.run(self._context("open a pull request"), attempt)

    def _read_job(self, staging: Listing) -> Job:
        if JOB_FILE not in staging.files:
            raise StagingMismatchError(self.repo, self.ref, JOB_FILE, "not there")
        try:
            job = Job(**json.loads(self.client.read_small(staging, JOB_FILE)))
        except (ValueError, TypeError) as error:
            raise StagingMismatchError(self.repo, self.ref, JOB_FILE, "not a job") from error
        if (job.plan, job.revision) != (self.plan, self.revision):
            raise StagingMismatchError(self.repo, self.ref, JOB_FILE, "belongs to another job")
        return job

    def _staged(self, staging: Listing) -> dict[str, StagedShard]:
        """What is on the branch with its note, and was not on the destination's when the job began."""
        done: dict[str, StagedShard] = {}
        for path, file in staging.files.items():
            note = _note_path(path)
            if file.sha256 is None or note not in staging.files or self._base_files.get(path) == file:
                continue
            done[path] = StagedShard(path, file.size, file.sha256, self.client.read_small(staging, note))
        return done

    # -- shards -------------------------------------------------------------------------------------------

    def stage(self, name: str, path: Path, sha256: str, size: int, note: bytes = b"{}") -> StagedShard:
        """Put a finished shard on the staging branch, with a note, in one commit; check what the Hub has.

        From any thread; commits follow one another.

        Args:
            name: its file name in the repository.
            path: the local file; not needed afterwards.
            sha256: hexadecimal digest of its content.
            size: its bytes.
            note: a small JSON text to get back from `open` in a later run.

        Raises:
            StagingBusyError: another run of the job moved the branch.
            StagingLostError: somebody removed it.
            StagingMismatchError: the Hub has other content than ``sha256``.
            HubError: the class says why not.
        """
        with self._lock:
            self._commit(f"Stage {name}", lambda: [_add(name, path), _add(_note_path(name), note)])
            found = self._look_up(name)
        if found != (sha256, size):
            problem = "not there after its commit" if found is None else "not the content that was sent"
            raise StagingMismatchError(self.repo, self.ref, name, problem)
        return StagedShard(name, size, sha256, note)

    def _commit(self, title: str, operations: Callable[[], list[Any]]) -> None:
        """One commit on the staging branch on top of `_head`, which moves to it.

        Operations are made anew for each attempt: the client marks those that it has sent.
        """
        sent = False

        def attempt(_progressed: Callable[[], None]) -> None:
            nonlocal sent
            if sent and self._advance():
                return
            sent = True
            self.client.api().create_commit(
                self.repo,
                operations(),
                commit_message=self._marked(title),
                revision=self.ref,
                parent_commit=self._head,
            )
            # The client makes no commit, and so no check of the parent, where nothing would change: look.
            self._advance()

        try:
            self.client.patience.run(self._context(f"store {title!r} on {self.ref}", self.ref), attempt)
        except ConflictError:
            if not self._advance():
                raise StagingBusyError(self.repo, self.ref) from None
        except MissingRevisionError:
            raise StagingLostError(self.repo, self.ref) from None
        except RefusedError as error:
            raise UnusableAnswerError(self.repo, f"store {title!r} on {self.ref}", str(error)) from None

    def _advance(self) -> bool:
        """Move `_head` over commits of this run; whether there was one.

        Raises:
            StagingBusyError: a commit of another run is among them.
        """
        ours = None
        for commit, title, _ in self._history(self.ref):
            if commit == self._head:
                self._head = ours or self._head
                return ours is not None
            if self._run not in title:
                break
            ours = ours or commit
        raise StagingBusyError(self.repo, self.ref)

    def _history(self, revision: str) -> list[tuple[str, str, str]]:
        """The newest commits of a revision: id, title and message."""

        def attempt(_progressed: Callable[[], None]) -> list[tuple[str, str, str]]:
            answer = self.client.get_json(f"/api/models/{self.repo}/commits/{quote(revision, safe='')}")
            return [(str(item["id"]), str(item["title"]), str(item.get("message") or "")) for item in answer]

        return self.client.patience.run(self._context("read the history", revision), attempt)

    def _look_up(self, name: str) -> tuple[str, int] | None:
        """SHA-256 and size of a file at `_head`, as the Hub reports them."""

        def attempt(_progressed: Callable[[], None]) -> tuple[str, int] | None:
            for item in self.client.api().get_paths_info(self.repo, [name], revision=self._head):
                lfs = getattr(item, "lfs", None)
                if item.path == name and lfs is not None:
                    return str(lfs.sha256), int(lfs.size)
            return None

        return self.client.patience.run(self._context(f"check {name}", self._head), attempt)

    # -- publishing ---------------------------------------------------------------------------------------

    def publish(self, shards: Mapping[str, tuple[str, int]], small: Mapping[str, Content]) -> Published:
        """Let the staged shards and the small files appear on the destination's branch in one commit.

        Args:
            shards: SHA-256 and size of every shard of the result, by name.
            small: everything beside them, by name: bytes, or a local file.

        Raises:
            StagingLostError, StagingMismatchError: the staging branch is not what was staged; nothing is published.
            DestinationMovedError: somebody moved the destination's branch; nothing is published.
            HubError: the class says why not.
        """
        expected = {name: _digest_of(content) for name, content in small.items()}
        expected |= {name: _Digest(sha256, None, size) for name, (sha256, size) in shards.items()}
        if self.pull_request:
            self._check_staged(shards)
            return self._finish_pull_request(small, expected)
        published = self._published(expected)
        if published is None:
            self._check_staged(shards)
            published = self._publish(shards, small, expected)
        self._delete_staging()
        self.published = published
        return published

    def _check_staged(self, shards: Mapping[str, tuple[str, int]]) -> None:
        try:
            staging = self.client.listing(self.repo, self.ref)
        except MissingRevisionError:
            raise StagingLostError(self.repo, self.ref) from None
        for name, (sha256, size) in shards.items():
            file = staging.files.get(name)
            if file is None:
                raise StagingLostError(self.repo, self.ref, name)
            if (file.sha256, file.size) != (sha256, size):
                raise StagingMismatchError(self.repo, self.ref, name, "not the content that was staged")

    def _published(self, expected: Mapping[str, _Digest]) -> Published | None:
        """The publication, if the branch moved by it; None while it has not moved.

        Raises:
            DestinationMovedError: it moved by something else.
        """
        main = self.client.listing(self.repo, self.revision)
        if main.sha == self._base:
            return None
        if _difference(main, expected) is not None:
            raise DestinationMovedError(self.repo, self.revision, self._base, main.sha)
        return Published(self.repo, self.revision, main.sha)

    def _publish(
        self,
        shards: Mapping[str, tuple[str, int]],
        small: Mapping[str, Content],
        expected: Mapping[str, _Digest],
    ) -> Published:
        sent = False

        def attempt(_progressed: Callable[[], None]) -> Published | None:
            nonlocal sent
            if sent and (published := self._published(expected)) is not None:
                return published
            sent = True
            from huggingface_hub import CommitOperationCopy

            copies = [CommitOperationCopy(name, name, src_revision=self.ref) for name in shards]
            self.client.api().create_commit(
                self.repo,
                [
                    *copies,
                    *(_add(name, content) for name, content in small.items()),
                    *self._replaced(expected),
                ],
                commit_message=f"FP8 weights of {self.source}",
                commit_description=f"Made by nemotron_fp8. {self._job_mark}",
                revision=self.revision,
                parent_commit=self._base,
            )
            return None

        try:
            self.client.patience.run(self._context("publish", self.revision), attempt)
        except ConflictError:
            pass  # whose commit it was shows below
        except (RefusedError, MissingFileError):
            raise StagingLostError(self.repo, self.ref, next(iter(shards), None)) from None
        except MissingRevisionError:
            raise StagingLostError(self.repo, self.ref) from None
        published = self._published(expected)
        if published is None:
            raise UnusableAnswerError(self.repo, "publish", f"{self.revision} did not move")
        return published

    def _finish_pull_request(
        self, small: Mapping[str, Content], expected: Mapping[str, _Digest]
    ) -> Published:
        from huggingface_hub import CommitOperationDelete

        def operations() -> list[Any]:
            adds = [_add(name, content) for name, content in small.items()]
            return [*adds, *self._replaced(expected), CommitOperationDelete(f"{FOLDER}/", is_folder=True)]

        self._commit("Complete the FP8 conversion", operations)
        listing = self.client.listing(self.repo, self.ref)
        if (name := _difference(listing, expected)) is not None:
            raise StagingMismatchError(self.repo, self.ref, name, "not the content that was sent")
        self.published = Published(self.repo, self.ref, listing.sha)
        return self.published

    def _replaced(self, expected: Mapping[str, _Digest]) -> list[Any]:
        """Deletions of weights that the branch held and the result does not name."""
        from huggingface_hub import CommitOperationDelete

        old = (path for path in self._base_files if path.endswith(REPLACED) and path not in expected)
        return [CommitOperationDelete(path, is_folder=False) for path in sorted(old)]

    def _delete_staging(self) -> None:
        def attempt(_progressed: Callable[[], None]) -> None:
            self.client.api().delete_branch(self.repo, branch=self.ref)

        try:
            self.client.patience.run(self._context("delete the staging branch", self.ref), attempt)
        except (MissingRevisionError, RefusedError):
            pass  # gone already, perhaps by this very call before its answer was lost

    # -- names --------------------------------------------------------------------------------------------

    @property
    def _job_mark(self) -> str:
        return f"[job {self.plan[:24]}]"

    def _marked(self, title: str) -> str:
        return f"{title} {self._job_mark} [run {self._run}]"

    def _was_published(self, main: Listing) -> bool:
        """Whether the branch stands at a publication of this job."""
        newest = self._history(self.revision)[:1]
        return (
            bool(newest) and newest[0][0] == main.sha and self._job_mark in f"{newest[0][1]} {newest[0][2]}"
        )

    def _context(self, action: str, revision: str | None = None) -> Context:
        return self.client.context(self.repo, action, revision)


@dataclass(frozen=True, slots=True)
class _Digest:
    """What a listing must say of a file: its SHA-256 as an object, or its git blob id where git holds it."""

    sha256: str
    blob: str | None
    size: int


def _digest_of(content: Content) -> _Digest:
    data = content.read_bytes() if isinstance(content, Path) else content
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return _Digest(hashlib.sha256(data).hexdigest(), blob, len(data))


def _difference(listing: Listing, expected: Mapping[str, _Digest]) -> str | None:
    """The first file that a listing does not hold as expected, or a shard that it should not hold."""
    for name, digest in sorted(expected.items()):
        file = listing.files.get(name)
        if file is None or file.size != digest.size:
            return name
        same = file.blob == digest.blob if file.sha256 is None else file.sha256 == digest.sha256
        if not same:
            return name
    return next((name for name in listing.files if name.endswith(REPLACED) and name not in expected), None)


def _holds(listing: Listing, shard: StagedShard) -> bool:
    file = listing.files.get(shard.name)
    return file is not None and (file.sha256, file.size) == (shard.sha256, shard.size)


def _note_path(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def _add(name: str, content: Content) -> Any:  # noqa: ANN401  (the client's class, which is imported late)
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
