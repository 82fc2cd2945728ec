"""Commits to one branch: a chain in which every commit names its parent.

The Hub rejects a commit with another parent by 412, so the branch is its own lock: a second run fails at its first
commit. If a response is lost, the history shows whether the commit was made, because each title names the run.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nemotron_fp8.errors.hub import (
    MissingRevisionError,
    NoBranchError,
    StagingBusyError,
    StagingLostError,
    UnusableAnswerError,
)
from nemotron_fp8.hub.address import is_pull_request
from nemotron_fp8.hub.answers import HistoryItem, PathInfo, Refs
from nemotron_fp8.hub.failures import ConflictError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.failures import Context


class Branch:
    """A branch, or the branch of a pull request, as seen by one run.

    Attributes:
        client, repo: client and repository.
        ref: name of the branch.
        head: newest commit known to this run.
        job_mark: mark of the job in the title of each commit.
        run_mark: mark of the run in the title of each commit.
    """

    def __init__(self, client: HubClient, repo: str, ref: str, mark: str) -> None:
        self.client, self.repo, self.ref, self.job_mark = client, repo, ref, mark
        self.head = ""
        self._run = uuid.uuid4().hex[:12]
        self.run_mark = f"[run {self._run}]"

    def context(self, action: str, revision: str | None = None) -> Context:
        """Return the context of a request."""
        return self.client.context(self.repo, action, revision)

    def title(self, title: str) -> str:
        """Return a title with the marks of the job and the run."""
        return f"{title} {self.job_mark} {self.run_mark}"

    def create(self, branch: str, start: str) -> None:
        """Create a branch at a commit; leave an existing branch unchanged.

        Raises:
            MissingRevisionError: the name is that of a pull request, which cannot be created by name.
        """
        if is_pull_request(branch):
            raise MissingRevisionError(self.repo, branch)

        def attempt(_progressed: Callable[[], None]) -> None:
            # This call, its response lost, or another run may have created the branch: the first commit decides.
            self.client.api().create_branch(self.repo, branch=branch, revision=start, exist_ok=True)

        self.client.retry(self.context(f"create the branch {branch}", start), attempt)

    def delete(self) -> None:
        """Delete the branch."""

        def attempt(_progressed: Callable[[], None]) -> None:
            self.client.api().delete_branch(self.repo, branch=self.ref)

        with suppress(MissingRevisionError, RefusedError):  # already deleted, perhaps by a call whose response was lost
            self.client.retry(self.context("delete the staging branch", self.ref), attempt, refusals=True)

    def commit(self, title: str, operations: Callable[[], list[Any]]) -> None:
        """Commit on top of `head` and move `head` to the new commit.

        Args:
            title: first line of the message.
            operations: makes the operations of huggingface_hub, anew for each attempt.

        Raises:
            StagingBusyError: another run moved the branch.
            StagingLostError: the branch is gone.
            HubError: the commit failed; the class names the reason.
        """
        sent = False

        def attempt(_progressed: Callable[[], None]) -> None:
            nonlocal sent
            if sent and self.advance():
                return
            sent = True
            self.client.api().create_commit(
                self.repo,
                operations(),
                commit_message=self.title(title),
                revision=self.ref,
                parent_commit=self.head,
            )
            # Without a change the client makes no commit and checks no parent: read the history.
            self.advance()

        try:
            self.client.retry(self.context(f"store {title!r} on {self.ref}", self.ref), attempt, refusals=True)
        except ConflictError:
            if not self.advance():
                raise StagingBusyError(self.repo, self.ref) from None
        except MissingRevisionError:
            raise StagingLostError(self.repo, self.ref) from None
        except RefusedError as error:
            raise UnusableAnswerError(self.repo, f"store {title!r} on {self.ref}", str(error)) from None

    def advance(self) -> bool:
        """Move `head` over new commits of this run; return True if there was one.

        Raises:
            StagingBusyError: another run made a commit.
        """
        ours = None
        for commit, title, _ in self.history(self.ref):
            if commit == self.head:
                self.head = ours or self.head
                return ours is not None
            if self._run not in title:
                break
            ours = ours or commit
        raise StagingBusyError(self.repo, self.ref)

    def history(self, revision: str, pages: int = 1) -> Iterator[tuple[str, str, str]]:
        """Yield commits of a revision from the newest on: id, title and message.

        Args:
            revision: a branch, a commit or a pull request.
            pages: maximal number of pages; each is fetched on demand.
        """
        yield from ((item.id, item.title, item.message or "") for item in self.commits(revision, pages))

    def commits(self, revision: str, pages: int = 1) -> Iterator[HistoryItem]:
        """Yield commits of a revision as `history`, each as the Hub describes it."""
        page: str | None = f"/api/models/{self.repo}/commits/{quote(revision, safe='')}"
        for _ in range(pages):
            if page is None:
                return

            def attempt(_progressed: Callable[[], None], at: str = page) -> tuple[list[HistoryItem], str | None]:
                return self.client.get_page(at, list[HistoryItem])

            found, page = self.client.retry(self.context("read the history", revision), attempt)
            yield from found

    def refuse_tag(self, revision: str) -> None:
        """Check before any work that a revision is not a tag.

        Raises:
            NoBranchError: the revision is a tag.
        """
        if revision == "main" or is_pull_request(revision):
            return

        def attempt(_progressed: Callable[[], None]) -> Refs:
            return self.client.get_json(f"/api/models/{self.repo}/refs", Refs)

        refs = self.client.retry(self.context("list the branches"), attempt)
        if any(tag.name == revision for tag in refs.tags) and all(each.name != revision for each in refs.branches):
            raise NoBranchError(self.repo, revision)

    def pull_requests(self) -> list[str]:
        """Return the pull requests of the repository as revisions, newest first."""

        def attempt(_progressed: Callable[[], None]) -> Refs:
            return self.client.get_json(f"/api/models/{self.repo}/refs", Refs, include_prs=1)

        found = self.client.retry(self.context("list the pull requests"), attempt).pull_requests or []
        return sorted((each.ref for each in found), key=lambda ref: int(ref.rpartition("/")[2]), reverse=True)

    def stored_object(self, name: str) -> tuple[str, int] | None:
        """Return SHA-256 and size of an object at `head` as the Hub reports them; None if there is none."""
        path = f"/api/models/{self.repo}/paths-info/{quote(self.head, safe='')}"

        def attempt(_progressed: Callable[[], None]) -> list[PathInfo]:
            return self.client.post_form(path, list[PathInfo], {"paths": [name], "expand": False})

        found = self.client.retry(self.context(f"check {name}", self.head), attempt)
        return next(((item.lfs.oid, item.lfs.size) for item in found if item.path == name and item.lfs), None)
