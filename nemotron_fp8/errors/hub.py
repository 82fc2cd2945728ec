"""Errors of the Hugging Face Hub.

No message, attribute or chained exception holds a token or a signed address: an error of the HTTP client
carries the request with its headers, so it is never chained to one of these.
"""

from __future__ import annotations

from nemotron_fp8.errors.base import DestinationError, NemotronFp8Error, SourceError, printable


class HubError(NemotronFp8Error):
    """Base of every error about a repository on the Hub.

    Attributes:
        repo: the repository, ``owner/name``.
    """

    repo: str


class AddressError(NemotronFp8Error, ValueError):
    """An address does not name a repository.

    Attributes:
        text: the address.
    """

    text: str
    problem: str
    message = "{text!a}: {problem}; write hf://owner/name or hf://owner/name@revision"


class MissingRepoError(HubError):
    """The repository does not exist, or the token cannot see it; the Hub does not distinguish the two.

    Attributes:
        has_token: True if a token was sent.
    """

    has_token: bool
    message = "hf://{repo}: not found, or private and not visible to you; check the name{_advice}"

    @property
    def _advice(self) -> str:
        if self.has_token:
            return ", and that the owner of the token has access"
        return "; if it is private, log in (hf auth login) or name a token (--token-env)"


class GatedRepoError(HubError):
    """The repository is gated, and the caller has no access to it.

    Attributes:
        has_token: True if a token was sent.
    """

    has_token: bool
    message = (
        "hf://{repo}: gated; request access at https://huggingface.co/{repo}{_login}, then run again once it is granted"
    )

    @property
    def _login(self) -> str:
        return "" if self.has_token else ", then log in (hf auth login) or name a token (--token-env)"


class DisabledRepoError(HubError):
    """The repository was disabled by its author or by the Hub."""

    message = "hf://{repo}: disabled by its author or by the Hub; ask the author, or use another repository"


class TokenRejectedError(HubError):
    """The token is unknown, expired or revoked."""

    message = (
        "hf://{repo}: the Hub rejects the token, which is mistyped, expired or revoked; create a new one at"
        " https://huggingface.co/settings/tokens and run again: finished shards are kept"
    )


class NoTokenError(HubError, DestinationError):
    """A destination on the Hub needs a token, but no token is set."""

    message = (
        "hf://{repo}: writing needs a token with write access: create one at https://huggingface.co/settings/tokens,"
        " then log in (hf auth login), set HF_TOKEN, or name the variable that holds it (--token-env)"
    )


class NotAllowedError(HubError):
    """The token does not permit the action.

    Attributes:
        action: the action.
    """

    action: str
    message = (
        "hf://{repo}: the token may not {action}; it needs write access to this repository, or open a pull request"
        " (--pr)"
    )


class StorageFullError(HubError, DestinationError):
    """The owner's storage on the Hub is full, or the file exceeds a limit.

    Attributes:
        action: the action.
    """

    action: str
    message = (
        "hf://{repo}: the storage is full or a limit is exceeded ({action}); free storage or raise the limit, then run"
        " again: finished shards are kept"
    )


class MissingRevisionError(HubError):
    """The repository has no such branch, tag or commit.

    Attributes:
        revision: the requested revision.
    """

    revision: str
    message = (
        "hf://{repo}: revision {revision!a} does not exist or was deleted; check the name, or run again with the"
        " current revision"
    )


class MissingFileError(HubError):
    """A file is not in the repository at this revision.

    Attributes:
        file: path of the file.
        problem: the reason.
    """

    file: str
    problem: str = "not found at this revision"
    message = "hf://{repo}: {file!a}: {problem}; is the upload of this repository complete?"


class UnlistedFileError(HubError, SourceError):
    """A file name is not in the repository's listing, so it is not requested from the server.

    Attributes:
        file: the name.
    """

    file: str
    message = "hf://{repo}: {file!a}: not in the repository's listing, so the file is not fetched"


class DigestError(HubError):
    """A file's content does not match the digest in the repository's listing.

    Attributes:
        file: path of the file.
        expected: hexadecimal digest in the listing.
        actual: hexadecimal digest of the content.
        attempts: number of transfers.
    """

    file: str
    expected: str
    actual: str
    attempts: int
    message = (
        "hf://{repo}: {file!a}: digest {actual:.16}... instead of {expected:.16}... after {attempts} transfers;"
        " suspect a proxy or a disk that alters data; fix it and run again"
    )


class OfflineError(HubError):
    """The environment forbids network access.

    Attributes:
        action: the action that needs the network.
    """

    action: str
    message = (
        "hf://{repo}: could not {action}: HF_HUB_OFFLINE is set (or TRANSFORMERS_OFFLINE); unset it, or use a local"
        " folder"
    )


class NoProgressError(HubError):
    """No request succeeded within the longest wait of a run.

    Attributes:
        action: the action.
        seconds: seconds since the last success.
        reason: the last failure.
    """

    action: str
    seconds: float
    reason: str
    message = (
        "hf://{repo}: could not {action}: {reason}, and no request succeeded for {seconds:,.0f} s; check the connection"
        " and https://status.huggingface.co, then run again: finished shards are kept"
    )


class UnreachableError(HubError):
    """No connection to the Hub could be opened within the allowed attempts.

    Attributes:
        action: the action.
        reason: the last failure.
    """

    action: str
    reason: str
    message = "hf://{repo}: could not {action}: the Hub cannot be reached, {reason}; check the connection"


class RateLimitedError(NoProgressError):
    """The Hub requests a longer delay than the longest wait of a run.

    Attributes:
        wait: delay that the Hub requests, in seconds; None if the Hub requests no delay.
    """

    wait: float | None = None
    message = (
        "hf://{repo}: could not {action}: the rate limit is reached ({reason}) after {seconds:,.0f} s of retries; run"
        " again {_when}: finished shards are kept"
    )

    @property
    def _when(self) -> str:
        return f"in {self.wait:,.0f} s" if self.wait is not None else "later"


class UnusableAnswerError(HubError):
    """The answer of the server is not an answer of the Hub.

    Attributes:
        action: the action.
    """

    action: str
    problem: str
    message = "hf://{repo}: could not {action}: {problem}; check HF_ENDPOINT and any proxy in between, then run again"


class LocalDiskError(HubError, OSError):
    """A transfer cannot write to the disk of this machine.

    Attributes:
        action: the action.
    """

    action: str
    problem: str
    message = (
        "hf://{repo}: could not {action}: {problem}; free space or choose another work folder (--cache-dir), then run"
        " again"
    )


class CardRefusedError(HubError):
    """The Hub rejects the front matter of the model card.

    Attributes:
        problem: the Hub's reason.
    """

    problem: str
    message = (
        "hf://{repo}: the Hub rejects the front matter of README.md: {problem!a}; correct it in the source's README.md,"
        " then run again"
    )


class NoBranchError(HubError, DestinationError):
    """The revision of a destination is a tag, which accepts no commits.

    Attributes:
        revision: the requested revision.
    """

    revision: str
    message = "hf://{repo}: {revision!a} is a tag, and tags accept no commits; name a branch"


class PublicRepoError(HubError, DestinationError):
    """A private destination was requested, but the repository exists and is public."""

    message = (
        "hf://{repo}: already exists and is public, and --private applies to new repositories only; make it private in"
        " its settings, or omit --private"
    )


class HoldsWeightsError(HubError, DestinationError):
    """The destination's branch already contains weights.

    Attributes:
        revision: the branch.
        files: names of the weights.
    """

    revision: str
    files: tuple[str, ...]
    message = (
        "hf://{repo}: {revision!a} already contains {_count:,} weight files ({files[0]!a} ...); choose another"
        " repository or branch, or replace them (--overwrite)"
    )

    @property
    def _count(self) -> int:
        return len(self.files)


class DestinationMovedError(HubError, DestinationError):
    """The destination's branch received a commit while the job ran, so nothing was published.

    Attributes:
        revision: the branch.
        expected: commit of the branch when the job began.
        actual: current commit of the branch.
    """

    revision: str
    expected: str
    actual: str
    message = (
        "hf://{repo}: {revision!a} was at {expected:.12} when the job began and is at {actual:.12} now; nothing was"
        " published. Inspect that change, then run again with --overwrite to publish on top of it: finished shards are"
        " kept"
    )


class StagingBusyError(HubError, DestinationError):
    """Another run of the same job is writing to the staging branch.

    Attributes:
        revision: the staging branch.
    """

    revision: str
    message = (
        "hf://{repo}: another run of the same job is writing to {revision!a}; wait for it to finish, or stop it and run"
        " again"
    )


class StagingLostError(HubError, DestinationError):
    """The staging branch, or a file on it, is gone.

    Attributes:
        revision: the staging branch.
        file: the missing file; None for the branch itself.
        answer: the Hub's answer to the commit that failed; empty if the loss was found without a commit.
    """

    revision: str
    file: str | None = None
    answer: str = ""
    message = (
        "hf://{repo}: the staging branch {revision!a} {_loss}: another run of the same job finished and removed it,"
        " or a user removed it. Run again: missing shards are converted again; if the error recurs, start over"
        " (--restart)"
    )

    @property
    def _loss(self) -> str:
        loss = "is gone" if self.file is None else f"lost {printable(self.file)}"
        return f"{loss} (the Hub answers {self.answer})" if self.answer else loss


class StagingMismatchError(HubError, DestinationError):
    """A file on the staging branch differs from the one that this job staged.

    Attributes:
        revision: the staging branch, or the branch that was read back.
        file: the first file that differs.
        problem: the difference.
    """

    revision: str
    file: str
    problem: str
    message = "hf://{repo}: {file!a} on {revision!a}: {problem}; start over (--restart)"
