"""A branch that one run at a time commits to, each commit on top of the one before.

Every commit names its parent, so a second run is refused by the Hub with 412: the branch is its own lock. An
answer that is lost is looked up in the history, where each title names the run.
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
from nemotron_fp8.hub.failures import ConflictError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.hub.client import HubClient
    from nemotron_fp8.hub.failures import Context


class Branch:
    """A branch, or the branch of a pull request, as one run sees it.

    Attributes:
        client, repo: where it is.
        ref: its name.
        head: the commit that this run believes to be its newest.
        mark: what the title of each commit says of the job.
        own: what it says of the run.
    """

    def __init__(self, client: HubClient, repo: str, ref: str, mark: str) -> None:
        self.client, self.repo, self.ref, self.mark = client, repo, ref, mark
        self.head = ""
        self._run = uuid.uuid4().hex[:12]
        self.own = f"[run {self._run}]"

    def context(self, action: str, revision: str | None = None) -> Context:
        """What a call is about."""
        return self.client.context(self.repo, action, revision)

    def title(self, title: str) -> str:
        """A title that names the job and the run."""
        return f"{title} {self.mark} {self.own}"

    def create(self, branch: str, start: str) -> None:
        """Make a branch that starts at a commit; one that is there already stays as it is.

        Raises:
            MissingRevisionError: it is the name of a pull request, and only a person opens one.
        """
        if is_pull_request(branch):
            raise MissingRevisionError(self.repo, branch)

        def attempt(_progressed: Callable[[], None]) -> None:
            # It may be this call's own, the answer lost, or another run's: its first commit will tell.
            self.client.api().create_branch(self.repo, branch=branch, revision=start, exist_ok=True)

        self.client.patience.run(self.context(f"create the branch {branch}", start), attempt)

    def delete(self) -> None:
        """Delete the branch."""

        def attempt(_progressed: Callable[[], None]) -> None:
            self.client.api().delete_branch(self.repo, branch=self.ref)

        with suppress(MissingRevisionError, RefusedError):  # gone, perhaps by this call, its answer lost
            self.client.patience.run(self.context("delete the staging branch", self.ref), attempt)

    def commit(self, title: str, operations: Callable[[], list[Any]]) -> None:
        """One commit on top of `head`, which moves to it.

        Args:
            title: its first line.
            operations: makes the client's operations, anew for each attempt.

        Raises:
            StagingBusyError: another run moved the branch.
            StagingLostError: the branch is gone.
            HubError: the class says why not.
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
            # Where nothing would change, the client makes no commit and the parent is not checked: look.
            self.advance()

        try:
            self.client.patience.run(self.context(f"store {title!r} on {self.ref}", self.ref), attempt)
        except ConflictError:
            if not self.advance():
                raise StagingBusyError(self.repo, self.ref) from None
        except MissingRevisionError:
            raise StagingLostError(self.repo, self.ref) from None
        except RefusedError as error:
            raise UnusableAnswerError(self.repo, f"store {title!r} on {self.ref}", str(error)) from None

    def advance(self) -> bool:
        """Move `head` over commits of this run; whether there was one.

        Raises:
            StagingBusyError: a commit of another run is among them.
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
        """The newest commits of a revision: id, title and message.

        Args:
            revision: whose.
            pages: how many pages of them at the most; each is fetched when it is come to.
        """

        def parse(answer: Any) -> list[tuple[str, str, str]]:
            return [(str(item["id"]), str(item["title"]), str(item.get("message") or "")) for item in answer]

        page: str | None = f"/api/models/{self.repo}/commits/{quote(revision, safe='')}"
        for _ in range(pages):
            if page is None:
                return

            def attempt(
                _progressed: Callable[[], None], at: str = page
            ) -> tuple[list[tuple[str, str, str]], str | None]:
                return self.client.get_page(at, parse)

            found, page = self.client.patience.run(self.context("read the history", revision), attempt)
            yield from found

    def refuse_tag(self, revision: str) -> None:
        """Make sure, before any work is done, that a revision is none that stands still.

        Raises:
            NoBranchError: it is a tag.
        """
        if revision == "main" or is_pull_request(revision):
            return

        def attempt(_progressed: Callable[[], None]) -> bool:
            return self.client.get_json(f"/api/models/{self.repo}/refs", parse)

        def parse(answer: Any) -> bool:
            branches, tags = ({str(ref["name"]) for ref in answer.get(kind) or ()} for kind in ("branches", "tags"))
            return revision in tags and revision not in branches

        if self.client.patience.run(self.context("list the branches"), attempt):
            raise NoBranchError(self.repo, revision)

    def pull_requests(self) -> list[str]:
        """The pull requests of the repository, as revisions, newest first."""

        def attempt(_progressed: Callable[[], None]) -> list[str]:
            return self.client.get_json(f"/api/models/{self.repo}/refs", parse, include_prs=1)

        def parse(answer: Any) -> list[str]:
            found = [str(ref["ref"]) for ref in answer.get("pullRequests") or ()]
            return sorted(found, key=lambda ref: int(ref.rpartition("/")[2]), reverse=True)

        return self.client.patience.run(self.context("list the pull requests"), attempt)

    def look_up(self, name: str) -> tuple[str, int] | None:
        """SHA-256 and size of an object at `head`, as the Hub reports them; None where it has none."""

        def attempt(_progressed: Callable[[], None]) -> tuple[str, int] | None:
            for item in self.client.api().get_paths_info(self.repo, [name], revision=self.head):
                lfs = getattr(item, "lfs", None)
                if item.path == name and lfs is not None:
                    return str(lfs.sha256), int(lfs.size)
            return None

        return self.client.patience.run(self.context(f"check {name}", self.head), attempt)
