"""What can go wrong with the Hub: one class a case, each message says what to do.

No message, attribute or chained exception holds a token or a signed address: an error of the HTTP client
carries the request with its headers, so it is never chained to one of these.
"""

from __future__ import annotations

from nemotron_fp8.errors.base import DestinationError, NemotronFp8Error, SourceError, printable


class HubError(NemotronFp8Error):
    """Base of every error about the Hub.

    Attributes:
        repo: the repository, ``owner/name``.
    """

    def __init__(self, repo: str, problem: str) -> None:
        self.repo = repo
        super().__init__(f"hf://{repo}: {problem}")


class AddressError(NemotronFp8Error, ValueError):
    """Text that should name a repository does not.

    Attributes:
        text: what was given.
    """

    def __init__(self, text: str, problem: str) -> None:
        self.text = text
        super().__init__(f"{printable(text)}: {problem}; write hf://owner/name or hf://owner/name@revision")


class MissingRepoError(HubError):
    """There is no such repository, or the token cannot see it: the Hub does not tell which."""

    def __init__(self, repo: str, has_token: bool) -> None:
        self.has_token = has_token
        advice = (
            "check the name, and that the owner of the token is a member of it"
            if has_token
            else "check the name; if it is private, log in (hf auth login) or name a token (--token-env)"
        )
        super().__init__(repo, f"not found, or private and not visible to you; {advice}")


class GatedRepoError(HubError):
    """The repository is gated and the caller is not on its list."""

    def __init__(self, repo: str, has_token: bool) -> None:
        self.has_token = has_token
        login = "" if has_token else ", then log in (hf auth login) or name a token (--token-env)"
        super().__init__(
            repo,
            f"gated; ask for access at https://huggingface.co/{repo}{login}, then run again once you have it",
        )


class DisabledRepoError(HubError):
    """The repository was disabled by its author or by the Hub."""

    def __init__(self, repo: str) -> None:
        super().__init__(repo, "disabled, nobody can read it now; ask its author, or use another repository")


class TokenRejectedError(HubError):
    """The token is unknown, expired or revoked."""

    def __init__(self, repo: str) -> None:
        super().__init__(
            repo,
            "the Hub does not accept the token: it is mistyped, expired or revoked; make a new one at"
            " https://huggingface.co/settings/tokens and run again, finished shards are kept",
        )


class NoTokenError(HubError, DestinationError):
    """There is no token, and a destination on the Hub needs one."""

    def __init__(self, repo: str) -> None:
        super().__init__(
            repo,
            "writing needs a token with write access: make one at https://huggingface.co/settings/tokens, then log in"
            " (hf auth login), set HF_TOKEN, or name the variable that holds it (--token-env)",
        )


class NotAllowedError(HubError):
    """The token may not do this.

    Attributes:
        action: what was tried.
    """

    def __init__(self, repo: str, action: str) -> None:
        self.action = action
        super().__init__(
            repo,
            f"the token may not {action}; it needs write access to this repository, or open a pull request (--pr)",
        )


class StorageFullError(HubError, DestinationError):
    """The owner's storage on the Hub is used up, or the file is over a limit."""

    def __init__(self, repo: str, action: str) -> None:
        self.action = action
        super().__init__(
            repo,
            f"the Hub refuses to store more ({action}); free storage or raise its limit, then run again:"
            " finished shards are kept",
        )


class MissingRevisionError(HubError):
    """The repository has no such branch, tag or commit.

    Attributes:
        revision: what was asked for.
    """

    def __init__(self, repo: str, revision: str) -> None:
        self.revision = revision
        super().__init__(
            repo,
            f"no revision {printable(revision)} (any more); check the name, and if it was there when the run"
            " began, run again with the revision that holds now",
        )


class MissingFileError(HubError):
    """A file is not in the repository at this revision.

    Attributes:
        file: its path.
    """

    def __init__(self, repo: str, file: str, problem: str = "not found at this revision") -> None:
        self.file = file
        super().__init__(repo, f"{printable(file)}: {problem}; is the upload of this repository complete?")


class UnlistedFileError(HubError, SourceError):
    """A name does not stand in the repository's listing, so nothing is asked of the server for it.

    Attributes:
        file: the name.
    """

    def __init__(self, repo: str, file: str) -> None:
        self.file = file
        super().__init__(repo, f"{printable(file)}: not in the repository's listing, so it is not fetched")


class DigestError(HubError):
    """Content is not what the Hub's listing says it is, however often it was transferred.

    Attributes:
        file: its path.
        expected, actual: hexadecimal digests.
        attempts: how often it was transferred.
    """

    def __init__(self, repo: str, file: str, expected: str, actual: str, attempts: int) -> None:
        self.file, self.expected, self.actual, self.attempts = file, expected, actual, attempts
        super().__init__(
            repo,
            f"{printable(file)}: digest {actual[:16]}... instead of {expected[:16]}... after {attempts}"
            " transfers; look for a proxy or a disk that alters data, then run again",
        )


class OfflineError(HubError):
    """The client was told to stay off the network."""

    def __init__(self, repo: str, action: str) -> None:
        self.action = action
        super().__init__(
            repo,
            f"could not {action}: HF_HUB_OFFLINE is set (or TRANSFORMERS_OFFLINE); unset it, or use a local folder",
        )


class NoProgressError(HubError):
    """Nothing got through for as long as the run is willing to wait.

    Attributes:
        action: what was tried.
        seconds: how long nothing got through.
        reason: the last failure.
    """

    def __init__(self, repo: str, action: str, seconds: float, reason: str) -> None:
        self.action, self.seconds, self.reason = action, seconds, reason
        super().__init__(
            repo,
            f"could not {action}: {reason}, and nothing else for {seconds:,.0f} s; check the connection and"
            " https://status.huggingface.co, then run again: finished shards are kept",
        )


class UnreachableError(HubError):
    """No connection to the Hub came about, and the run is not willing to go on trying.

    Attributes:
        action: what was tried.
        reason: the last failure.
    """

    def __init__(self, repo: str, action: str, reason: str) -> None:
        self.action, self.reason = action, reason
        super().__init__(repo, f"could not {action}: the Hub cannot be reached, {reason}; check the connection")


class RateLimitedError(NoProgressError):
    """The Hub asks to wait for longer than the run is willing to.

    Attributes:
        wait: seconds that the Hub asks for; None where it does not say.
    """

    def __init__(self, repo: str, action: str, seconds: float, wait: float | None) -> None:
        self.wait = wait
        when = f"in {wait:,.0f} s" if wait is not None else "later"
        super().__init__(repo, action, seconds, f"the rate limit is reached; run again {when}")


class UnusableAnswerError(HubError):
    """The server answers, and not as the Hub does.

    Attributes:
        action: what was tried.
        problem: what is wrong with the answer.
    """

    def __init__(self, repo: str, action: str, problem: str) -> None:
        self.action, self.problem = action, problem
        super().__init__(
            repo, f"could not {action}: {problem}; check HF_ENDPOINT and any proxy in between, then run again"
        )


class LocalDiskError(HubError, OSError):
    """This machine's disk refuses what the transfer needs.

    Attributes:
        action: what was tried.
    """

    def __init__(self, repo: str, action: str, problem: str) -> None:
        self.action = action
        super().__init__(
            repo, f"could not {action}: {problem}; free space or choose another work folder, then run again"
        )


class CardRefusedError(HubError):
    """The Hub does not accept the front matter of the model card.

    Attributes:
        problem: what it says.
    """

    def __init__(self, repo: str, problem: str) -> None:
        self.problem = problem
        super().__init__(
            repo,
            f"the Hub refuses the front matter of README.md: {printable(problem)}; mend it in the source's README.md,"
            " then run again",
        )


class NoBranchError(HubError, DestinationError):
    """A destination's revision stands still, so that nothing can be committed to it.

    Attributes:
        revision: what was given.
    """

    def __init__(self, repo: str, revision: str) -> None:
        self.revision = revision
        super().__init__(repo, f"{printable(revision)} is a tag, and tags stay as they are; name a branch")


class PublicRepoError(HubError, DestinationError):
    """A private destination was asked for, and the repository is there and public."""

    def __init__(self, repo: str) -> None:
        super().__init__(
            repo,
            "is there already and public, and --private makes new repositories private only; make it private in its"
            " settings, or leave --private out",
        )


class HoldsWeightsError(HubError, DestinationError):
    """The destination's branch holds weights already.

    Attributes:
        revision: the branch.
        files: names of the weights.
    """

    def __init__(self, repo: str, revision: str, files: tuple[str, ...]) -> None:
        self.revision, self.files = revision, files
        super().__init__(
            repo,
            f"{printable(revision)} holds {len(files)} weight files already ({printable(files[0])} ...);"
            " choose another repository or branch, or replace them (--overwrite)",
        )


class DestinationMovedError(HubError, DestinationError):
    """Somebody committed to the destination's branch while the job ran; nothing was published.

    Attributes:
        revision: the branch.
        expected, actual: the commit that the job began from, and the one that is there now.
    """

    def __init__(self, repo: str, revision: str, expected: str, actual: str) -> None:
        self.revision, self.expected, self.actual = revision, expected, actual
        super().__init__(
            repo,
            f"{printable(revision)} was at {expected[:12]} when the job began and is at {actual[:12]} now;"
            " nothing was published. Look at that change, then run again with --overwrite to publish on top"
            " of it: finished shards are kept",
        )


class StagingBusyError(HubError, DestinationError):
    """Another run writes to the same staging branch.

    Attributes:
        revision: the staging branch.
    """

    def __init__(self, repo: str, revision: str) -> None:
        self.revision = revision
        super().__init__(
            repo,
            f"another run of this very job writes to {printable(revision)}; wait for it, or stop it and run again",
        )


class StagingLostError(HubError, DestinationError):
    """The staging branch, or an object on it, is gone.

    Attributes:
        revision: the staging branch.
        file: what is missing; None for the branch itself.
        answer: what the Hub answered to the commit that needs it; empty where it was seen without.
    """

    def __init__(self, repo: str, revision: str, file: str | None = None, answer: str = "") -> None:
        self.revision, self.file, self.answer = revision, file, answer
        what = "is gone" if file is None else f"lost {printable(file)}"
        what += f" (the Hub answers {answer})" if answer else ""
        super().__init__(
            repo,
            f"the staging branch {printable(revision)} {what}: another run of this very job has finished and removed"
            " it, or somebody has. Run again: what is missing is made anew; if this comes back, start over (--restart)",
        )


class StagingMismatchError(HubError, DestinationError):
    """The staging branch does not hold what this job staged.

    Attributes:
        revision: the staging branch, or the branch that was read back.
        file: the first file that differs.
    """

    def __init__(self, repo: str, revision: str, file: str, problem: str) -> None:
        self.revision, self.file, self.problem = revision, file, problem
        super().__init__(repo, f"{printable(file)} on {printable(revision)}: {problem}; start over (--restart)")
