"""Classify failures of Hub requests."""

from __future__ import annotations

import errno
import re
import sys
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nemotron_fp8._retry import CanceledError, Retry
from nemotron_fp8.errors import NemotronFp8Error, printable
from nemotron_fp8.errors.hub import (
    CardRefusedError,
    DisabledRepoError,
    GatedRepoError,
    HubError,
    LocalDiskError,
    MissingFileError,
    MissingRepoError,
    MissingRevisionError,
    NoProgressError,
    NotAllowedError,
    OfflineError,
    RateLimitedError,
    StorageFullError,
    TokenRejectedError,
    UnreachableError,
    UnusableAnswerError,
)
from nemotron_fp8.untrusted.guard import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


_RATE_LIMIT = re.compile(r'"[^"]*"\s*;\s*r\s*=\s*(\d{1,9})\s*;\s*t\s*=\s*(\d{1,9})\b', re.ASCII)
_TOKEN = re.compile(r"hf_\w+")
_SECONDS = re.compile(r"[0-9]{1,9}")
_STORAGE = re.compile(r"storage|quota|payment|limit reached", re.IGNORECASE)
_XET_STATUS = re.compile(r"\b(?:status|error|HTTP)[^0-9]{0,40}\b([45]\d\d)\b", re.IGNORECASE)
MAX_MESSAGE = 500
"""Characters of a server's message that are shown."""
_BAD_CARD = "Invalid metadata in README.md."
"""Start of the ValueError that the client raises when the Hub rejects a card."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE)


class UnexpectedResponseError(Exception):
    """A response that contradicts the request, such as another range than the requested one; retried a few times."""


class MalformedAnswerError(UnexpectedResponseError):
    """An answer whose JSON has another form than its endpoint's; the next answer will hardly differ."""


class ConflictError(Exception):
    """412: the branch does not point to the parent that the commit names."""


class RefusedError(Exception):
    """400, 404 or 409, whose meaning depends on the request."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(f"{status}: {message}")


@dataclass(frozen=True, slots=True)
class Context:
    """Subject of a request (`nemotron_fp8._retry.Subject`).

    Attributes:
        repo: the repository.
        action: verb phrase that follows "could not" in the message.
        has_token: True if the request sends a token.
        revision, file: part of the repository, where the message needs it.
        secret: the token, which is masked in messages of the server.
    """

    repo: str
    action: str
    has_token: bool
    revision: str | None = None
    file: str | None = None
    secret: str | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.repo

    def classify(self, error: Exception) -> Retry | Exception:
        return classify(error, self)

    def unusable(self, reason: str) -> HubError:
        return UnusableAnswerError(self.repo, self.action, reason)

    def unreachable(self, reason: str) -> HubError:
        return UnreachableError(self.repo, self.action, reason)

    def no_progress(self, seconds: float, reason: str) -> HubError:
        return NoProgressError(self.repo, self.action, seconds, reason)

    def rate_limited(self, seconds: float, reason: str, wait: float | None) -> HubError:
        return RateLimitedError(self.repo, self.action, seconds, reason, wait)


def classify(error: BaseException, context: Context) -> Retry | Exception:
    """Map a failure to `Retry` or to the error to raise.

    The client wraps the causes of failed uploads, so the whole chain of causes is searched.
    """
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, (NemotronFp8Error, ConflictError, RefusedError, CanceledError)):
            return link
        if type(link).__name__ == "OfflineModeIsEnabled":
            return OfflineError(context.repo, context.action)
        if type(link).__name__ == "EntryNotFoundError":  # the client's own, for the source of a copy
            return MissingFileError(context.repo, context.file or "a file to copy")
        if isinstance(link, ValueError) and str(link).startswith(_BAD_CARD):
            return CardRefusedError(context.repo, mask_tokens(str(link)[len(_BAD_CARD) :], context.secret))
        if isinstance(link, UnexpectedResponseError):
            reason = mask_tokens(str(link), context.secret)
            return Retry(reason, unexpected=True, certain=isinstance(link, MalformedAnswerError))
        if (response := _response(link)) is not None:
            return _classify_status(link, response, context)
        if _is_transport(link):
            return Retry(f"the connection failed ({type(link).__name__})", unreached=_is_unreached(link))
        if _is_unusable(link):
            return Retry(f"a malformed answer ({type(link).__name__})", unexpected=True)
        if isinstance(link, OSError) and link.errno in _DISK:
            return LocalDiskError(context.repo, context.action, link.strerror or str(link))
    for link in chain:
        if isinstance(link, (ConnectionError, TimeoutError)):
            return Retry(f"the connection failed ({type(link).__name__})")
        if isinstance(link, Exception) and _in_reader(link):
            return Retry(f"an answer of unexpected form ({describe(link)})", unexpected=True, certain=True)
        if isinstance(link, RuntimeError) and not isinstance(link, RecursionError):
            return _classify_runtime_error(link, context)
        if isinstance(link, Exception) and not isinstance(link, (OSError, MemoryError)) and _in_client(link):
            return Retry("a response of unexpected form", unexpected=True)
    raise error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException) -> Any | None:
    """Return the response of an HTTP error; None for a transport error, which has none."""
    response = getattr(error, "response", None)
    return response if hasattr(response, "status_code") else None


def _is_transport(error: BaseException) -> bool:
    """Return True for an error of the HTTP client: httpx for huggingface_hub 1.x, httpx2 for 2.x."""
    for name in ("httpx2", "httpx"):
        module = sys.modules.get(name)
        if module is not None and isinstance(error, (module.TransportError, module.StreamError)):
            return True
    return False


def _is_unusable(error: BaseException) -> bool:
    """Return True for an error of the HTTP client about an answer: an encoding, a redirect, an address."""
    for name in ("httpx2", "httpx"):
        module = sys.modules.get(name)
        if module is not None and isinstance(error, (module.RequestError, module.InvalidURL, module.CookieConflict)):
            return True
    return False


def _is_unreached(error: BaseException) -> bool:
    """Return True if no connection was made: unknown host, no listener, or no route."""
    return type(error).__name__ in ("ConnectError", "ConnectTimeout")


def _in_client(error: BaseException) -> bool:
    """Return True if the client raised the error, as it does when it parses a response of the wrong shape."""
    return any(name.partition(".")[0] in ("huggingface_hub", "httpx", "httpx2", "hf_xet") for name in _modules(error))


def _in_reader(error: BaseException) -> bool:
    """Return True if an error comes from our own reading of an answer, outside of the client."""
    return not _in_client(error) and any(name in _READERS for name in _modules(error))


_READERS = ("nemotron_fp8.hub.answers", "nemotron_fp8.hub.transport")
"""Modules that read answers."""


def _modules(error: BaseException) -> Iterator[str]:
    """Yield the modules that an error passed through."""
    trace = error.__traceback__
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next


def _classify_runtime_error(error: RuntimeError, context: Context) -> Retry | Exception:
    """Classify an error of hf_xet, or of a session that another thread closed after a refused connection (1.26)."""
    name, text = type(error).__name__, str(error)
    if "No space left" in text or "os error 28" in text:
        return LocalDiskError(context.repo, context.action, "no space left on device")
    status = _XET_STATUS.search(text)
    if name == "XetAuthenticationError" or (status and status[1] == "401"):
        return TokenRejectedError(context.repo)
    if status and status[1] == "403":
        return NotAllowedError(context.repo, context.action)
    return Retry("the connection failed" if "closed" in text else "the transfer failed")


def _classify_status(error: BaseException, response: Any, context: Context) -> Retry | Exception:
    status, headers = int(response.status_code), response.headers
    code = headers.get("X-Error-Code")
    message = str(getattr(error, "server_message", None) or headers.get("X-Error-Message") or "")
    if status in (408, 425, 429) or status >= 500:
        if status == 507:
            return StorageFullError(context.repo, context.action)
        return Retry(f"the Hub answers {status}", requested_wait(headers, status), limited=status == 429)
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
        return RefusedError(status, printable(mask_tokens(message, context.secret), MAX_MESSAGE))
    return UnusableAnswerError(context.repo, context.action, f"status {status}")


def mask_tokens(text: str, secret: str | None = None) -> str:
    """Return the start of a server's message as one line, with tokens masked.

    Args:
        text: the message.
        secret: the token that was sent; a server may echo it, as it is or encoded.
    """
    text = text[: 10 * MAX_MESSAGE]
    if secret:
        text = _forms(secret).sub("...", text)
    return " ".join(_TOKEN.sub("hf_...", text).split())[:MAX_MESSAGE]


@lru_cache(maxsize=4)
def _forms(secret: str) -> re.Pattern[str]:
    """Return the pattern of a token, each character of which may be encoded as in an address or in JSON."""
    each = (rf"(?:{re.escape(c)}|%{ord(c):02x}|\\u{ord(c):04x})" for c in secret)
    return re.compile("".join(each), re.IGNORECASE)


def requested_wait(headers: Mapping[str, str], status: int) -> float | None:
    """Return the seconds that a response asks to wait; None if it does not ask.

    ``RateLimit`` counts if no request remains, ``Retry-After`` otherwise.

    Source: RFC 9110 section 10.2.3, and draft-ietf-httpapi-ratelimit-headers as the Hub sends it.
    """
    if status == 429 and (match := _RATE_LIMIT.search(headers.get("RateLimit") or "")) and match[1] == "0":
        return float(match[2])
    value = (headers.get("Retry-After") or "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    if value and len(value) < 100:
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError, LookupError, OverflowError, OSError):  # by the kind of nonsense
            return None
    return None
