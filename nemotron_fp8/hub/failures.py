"""Classify failures of Hub requests."""

from __future__ import annotations

import errno
import re
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8.errors import NemotronFp8Error, printable
from nemotron_fp8.errors.hub import (
    CardRefusedError,
    DisabledRepoError,
    GatedRepoError,
    LocalDiskError,
    MissingFileError,
    MissingRepoError,
    MissingRevisionError,
    NotAllowedError,
    OfflineError,
    StorageFullError,
    TokenRejectedError,
    UnusableAnswerError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


_RATE_LIMIT = re.compile(r'"[^"]*"\s*;\s*r\s*=\s*(\d+)\s*;\s*t\s*=\s*(\d+)')
_TOKEN = re.compile(r"hf_\w+")
_STORAGE = re.compile(r"storage|quota|payment|limit reached", re.IGNORECASE)
_XET_STATUS = re.compile(r"\b(?:status|error|HTTP)[^0-9]{0,40}\b([45]\d\d)\b", re.IGNORECASE)
_BAD_CARD = "Invalid metadata in README.md."
"""What the client's ValueError begins with where the Hub has found fault with a card."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE)


class UnexpectedResponseError(Exception):
    """An answer that makes no sense, such as another range than was asked for; worth a few more tries."""


class StoppedError(Exception):
    """The run ends, so what this thread was at is not needed any more."""


class ConflictError(Exception):
    """412: the branch is not where the commit expected it."""


class RefusedError(Exception):
    """400, 404 or 409 on a call whose maker knows better what it means."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(f"{status}: {message}")


@dataclass(frozen=True, slots=True)
class Retry:
    """A failure that may pass.

    Attributes:
        reason: what it was, for a message.
        after: seconds that the server asks to wait; None where it does not say.
        odd: whether it counts against `MAX_UNEXPECTED_RESPONSES`.
        limited: whether it is the rate limit.
        unreached: whether no connection came about.
    """

    reason: str
    after: float | None = None
    odd: bool = False
    limited: bool = False
    unreached: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    """What a call is about, for the message of its failure.

    Attributes:
        repo: the repository.
        action: what is tried, as it follows "could not".
        has_token: whether a token is sent.
        revision, file: what of the repository, where that matters.
    """

    repo: str
    action: str
    has_token: bool
    revision: str | None = None
    file: str | None = None


def classify(error: BaseException, context: Context) -> Retry | Exception:
    """Say what a failure means: try again, or which error of ours to raise.

    Looks through what the client wraps around the cause of a failed upload.
    """
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, (NemotronFp8Error, ConflictError, RefusedError, StoppedError)):
            return link
        if type(link).__name__ == "OfflineModeIsEnabled":
            return OfflineError(context.repo, context.action)
        if type(link).__name__ == "EntryNotFoundError":  # the client's own, for the source of a copy
            return MissingFileError(context.repo, context.file or "a file to copy")
        if isinstance(link, ValueError) and str(link).startswith(_BAD_CARD):
            return CardRefusedError(context.repo, without_token(str(link)[len(_BAD_CARD) :]))
        if isinstance(link, UnexpectedResponseError):
            return Retry(str(link), odd=True)
        if (response := _response(link)) is not None:
            return _of_status(link, response, context)
        if _is_transport(link):
            return Retry(f"the connection failed ({type(link).__name__})", unreached=_is_unreached(link))
        if isinstance(link, OSError) and link.errno in _DISK:
            return LocalDiskError(context.repo, context.action, link.strerror or str(link))
    for link in chain:
        if isinstance(link, (ConnectionError, TimeoutError)):
            return Retry(f"the connection failed ({type(link).__name__})")
        if isinstance(link, RuntimeError):
            return _of_runtime_error(link, context)
        if isinstance(link, (ValueError, TypeError, LookupError, AttributeError)) and _in_client(link):
            return Retry("an answer that is not the Hub's", odd=True)
    raise error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException) -> Any | None:
    """The answer that an HTTP error stands for; both clients keep it, and a transport error has none."""
    response = getattr(error, "response", None)
    return response if hasattr(response, "status_code") else None


def _is_transport(error: BaseException) -> bool:
    """Whether an error is the HTTP client's own: httpx for huggingface_hub 1.x, httpx2 for 2.x."""
    for name in ("httpx2", "httpx"):
        module = sys.modules.get(name)
        if module is not None and isinstance(error, (module.TransportError, module.StreamError)):
            return True
    return False


def _is_unreached(error: BaseException) -> bool:
    """Whether a transport error is that no connection came about: no such host, none that listens, no way there."""
    return type(error).__name__ in ("ConnectError", "ConnectTimeout")


def _in_client(error: BaseException) -> bool:
    """Whether an error arose in the client, as it does where it parses an answer of the wrong shape."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in ("huggingface_hub", "httpx", "httpx2", "hf_xet"):
            return True
        trace = trace.tb_next
    return False


def _of_runtime_error(error: RuntimeError, context: Context) -> Retry | Exception:
    """Errors of hf_xet, and of a session that another thread closed after a refused connection (1.26)."""
    name, text = type(error).__name__, str(error)
    if "No space left" in text or "os error 28" in text:
        return LocalDiskError(context.repo, context.action, "no space left on device")
    status = _XET_STATUS.search(text)
    if name == "XetAuthenticationError" or (status and status[1] == "401"):
        return TokenRejectedError(context.repo)
    if status and status[1] == "403":
        return NotAllowedError(context.repo, context.action)
    return Retry("the connection failed" if "closed" in text else "the transfer failed")


def _of_status(error: BaseException, response: Any, context: Context) -> Retry | Exception:
    status, headers = int(response.status_code), response.headers
    code = headers.get("X-Error-Code")
    message = str(getattr(error, "server_message", None) or headers.get("X-Error-Message") or "")
    if status in (408, 425, 429) or status >= 500:
        if status == 507:
            return StorageFullError(context.repo, context.action)
        return Retry(f"the Hub answers {status}", wait_of(headers, status), limited=status == 429)
    kind = type(error).__name__
    if kind == "GatedRepoError" or code == "GatedRepo":
        return GatedRepoError(context.repo, context.has_token)
    if kind == "RepositoryNotFoundError" or code == "RepoNotFound":
        return MissingRepoError(context.repo, context.has_token)
    if kind == "RevisionNotFoundError" or code == "RevisionNotFound":
        return MissingRevisionError(context.repo, context.revision or "")
    if kind == "RemoteEntryNotFoundError" or code == "EntryNotFound":
        return MissingFileError(context.repo, context.file or "")
    if kind == "DisabledRepoError":
        return DisabledRepoError(context.repo)
    if status == 401:
        return TokenRejectedError(context.repo) if context.has_token else MissingRepoError(context.repo, False)
    if status in (402, 413) or (status == 403 and _STORAGE.search(message)):
        return StorageFullError(context.repo, context.action)
    if status == 403:
        return NotAllowedError(context.repo, context.action)
    if status == 412:
        return ConflictError()
    if status in (400, 404, 409):
        return RefusedError(status, printable(without_token(message)))
    return UnusableAnswerError(context.repo, context.action, f"status {status}")


def without_token(text: str) -> str:
    """What a server says, in one line and without any token that it repeats."""
    return " ".join(_TOKEN.sub("hf_...", text).split())


def wait_of(headers: Mapping[str, str], status: int) -> float | None:
    """Seconds that an answer asks to wait, of ``Retry-After`` or of ``RateLimit`` where nothing remains.

    Source: RFC 9110 section 10.2.3, and draft-ietf-httpapi-ratelimit-headers as the Hub sends it.
    """
    if status == 429 and (match := _RATE_LIMIT.search(headers.get("RateLimit") or "")) and match[1] == "0":
        return float(match[2])
    value = (headers.get("Retry-After") or "").strip()
    if value.isdecimal():
        return float(value)
    if value:
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    return None
