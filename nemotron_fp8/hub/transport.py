"""Receive answers of a server within limits: bytes, encoding, time, redirects.

A body is read piece by piece and never decompressed: 4 MB of gzip can become 4 GB. ``huggingface_hub`` reads bodies as
a whole, so its session is limited by hooks, which apply to the requests of this package only.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from threading import Event, Timer
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from nemotron_fp8.hub.failures import UnexpectedResponseError, mask_tokens, requested_wait

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


MAX_ANSWER = 16 << 20
"""Size cap of a JSON answer, in bytes: the listing of 50,000 files has about 12 MB."""
MAX_FAULT = 64 << 10
"""Bytes of an answer with an error status that are read."""
MAX_SECONDS = 300.0
"""Longest time for one JSON answer, however slowly its bytes arrive."""
MAX_REDIRECTS = 5
MAX_ADDRESS = 16 << 10
"""Most characters of an address; signed addresses have some thousand."""
_MOVED = (301, 302, 303, 307, 308)
AGENT = "nemotron_fp8"
"""Name of this package in its own requests, whose waits `RetryPolicy` limits."""
MAX_WAIT = 300.0
"""Longest wait, in seconds, that ``huggingface_hub`` may read in an answer: it sleeps without a limit of its own. The
windows of the Hub's rate limit have 300 s."""


@dataclass(frozen=True, slots=True)
class _Scope:
    """Requests that this package makes now.

    Attributes:
        home: scheme, host and port of the Hub; the token is sent to no other.
        secret: the token; None without one.
    """

    home: tuple[str, str | None, int | None]
    secret: str | None


_scope: ContextVar[_Scope | None] = ContextVar("nemotron_fp8_limits", default=None)


@contextmanager
def limits(base: str, secret: str | None) -> Iterator[None]:
    """Limit the answers to all requests of this thread on a session with `install`, and keep the token at the Hub.

    Args:
        base: address of the Hub.
        secret: the token; None without one.
    """
    scope = _Scope(origin(base), secret)
    before = _scope.set(scope)
    _active.append(scope)
    try:
        yield
    finally:
        _active.remove(scope)
        _scope.reset(before)


_active: list[_Scope] = []
"""Scopes of all threads: huggingface_hub uploads in threads of its own."""


def _scope_of(request: Any) -> _Scope | None:
    """Return the scope of a request; None for a request of the caller's own, beside this package."""
    scope = _scope.get()
    if scope is None and request.method in ("POST", "PUT"):
        return next(iter(_active), None)
    return scope


def install(session: Any) -> None:
    """Add the hooks to a session of huggingface_hub, once."""
    hooks = session.event_hooks
    if _limit not in hooks["response"]:
        session.event_hooks = {
            "request": [*hooks["request"], _ask_plain],
            "response": [*hooks["response"], _limit],
        }
        logging.getLogger("huggingface_hub.utils._http").addFilter(_mask)


def _mask(record: logging.LogRecord) -> bool:
    """Mask the token in a message of huggingface_hub, which logs addresses and warnings of a server."""
    if (scope := _scope.get() or next(iter(_active), None)) is not None:
        record.msg, record.args = mask_tokens(record.getMessage(), scope.secret), ()
    return True


def _applies(request: Any) -> bool:
    """Return True for a request of this package that is not for a range of a file, which has limits of its own."""
    agent = request.headers.get("user-agent", "")
    return (_scope_of(request) is not None or AGENT in agent) and "range" not in request.headers


def _ask_plain(request: Any) -> None:
    if _applies(request):
        request.headers["accept-encoding"] = "identity"
    scope = _scope_of(request)
    if scope is not None and origin(str(request.url)) != scope.home:
        request.headers.pop("authorization", None)  # an answer of the Hub may name any address for the next step


def _limit(answer: Any) -> None:
    if _applies(answer.request):
        check_encoding(answer)
        answer.headers.pop("x-hf-warning", None)
        theirs = answer.request.headers.get("user-agent") != AGENT
        wait = requested_wait(answer.headers, answer.status_code)
        if theirs and (wait is None or wait > MAX_WAIT):
            for name in ("ratelimit", "retry-after"):
                answer.headers.pop(name, None)
        answer.stream = _capped(type(answer).__module__.partition(".")[0])(answer.stream)


@cache
def _capped(library: str) -> type:
    """Return the class of capped streams for an HTTP library: httpx for huggingface_hub 1.x, httpx2 for 2.x."""
    base: Any = sys.modules[library].SyncByteStream

    class Capped(base):  # type: ignore[misc]  # the base is known at run time only
        """A stream that fails beyond a limit of bytes or time."""

        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            yield from _within(self._stream, MAX_ANSWER)

        def close(self) -> None:
            self._stream.close()

    return Capped


def check_encoding(answer: Any) -> None:
    """Reject a compressed answer: none was asked for.

    Raises:
        UnexpectedResponseError: the answer has a ``Content-Encoding``.
    """
    if (answer.headers.get("Content-Encoding") or "identity") != "identity":
        raise UnexpectedResponseError("a compressed answer, which was not asked for")


def _within(pieces: Any, most: int) -> Iterator[bytes]:
    """Yield the pieces of a body.

    Raises:
        UnexpectedResponseError: the body is longer than ``most`` bytes, or takes longer than `MAX_SECONDS`.
    """
    size, end = 0, time.monotonic() + MAX_SECONDS
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise UnexpectedResponseError(f"an answer of more than {most:,} bytes, the limit")
        if time.monotonic() > end:
            raise UnexpectedResponseError(f"an answer that takes longer than {MAX_SECONDS:.0f} s")
        yield piece


def receive(
    session: Any, method: str, url: str, headers: Mapping[str, str], timeout: float, **content: Any
) -> tuple[Any, str]:
    """Make a request, follow redirects of a GET, and receive the whole answer within the limits.

    The token is sent to the host of ``url`` alone.

    Args:
        session: session of huggingface_hub.
        method: the HTTP method.
        url: address of the endpoint.
        headers: headers of the request, with the token.
        timeout: seconds without a byte after which the connection counts as dead.
        **content: query or body of the request, as the session takes it.

    Returns:
        The answer, whose body is complete and not compressed, and the address that answered.

    Raises:
        UnexpectedResponseError: the answer exceeds a limit, or a redirect leads nowhere.
    """
    sent = dict(headers)
    for _ in range(MAX_REDIRECTS + 1):
        with (
            deadline(),
            session.stream(method, url, headers=sent, timeout=timeout, follow_redirects=False, **content) as answer,
        ):
            where = answer.headers.get("Location")
            if method == "GET" and answer.status_code in _MOVED and where is not None:
                target = redirected(url, where)
                if origin(target) != origin(url):
                    sent.pop("authorization", None)
                url, content = target, {}
                continue
            return finished(answer), url
    raise UnexpectedResponseError("too many redirects")


@contextmanager
def deadline() -> Iterator[None]:
    """Close the connections of huggingface_hub if a request takes longer than `MAX_SECONDS`.

    The HTTP library has a limit for the time without a byte only: a server may send one byte of a header every second,
    or interim answers (status 100) without end.

    Raises:
        UnexpectedResponseError: the time is over.
    """
    from huggingface_hub import close_session

    over = Event()

    def expire() -> None:
        over.set()
        close_session()

    timer = Timer(MAX_SECONDS, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if over.is_set():
            raise UnexpectedResponseError(f"an answer that takes longer than {MAX_SECONDS:.0f} s") from None
        raise
    finally:
        timer.cancel()


def finished(answer: Any) -> Any:
    """Return an answer with its body; of an answer with an error status, the first `MAX_FAULT` bytes.

    Raises:
        UnexpectedResponseError: the answer is compressed, too long or too slow.
    """
    check_encoding(answer)
    if answer.status_code < 400:
        body = b"".join(_within(answer.iter_raw(), MAX_ANSWER))
    else:
        body = b""
        for piece in _within(answer.iter_raw(), MAX_ANSWER):
            body += piece
            if len(body) >= MAX_FAULT:
                break
    kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in _BODY]
    return type(answer)(answer.status_code, headers=kept, content=body[:MAX_ANSWER], request=answer.request)


_BODY = ("content-length", "content-encoding", "transfer-encoding")
"""Headers about the body as it was sent."""


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of an address.

    Raises:
        UnexpectedResponseError: the address is malformed.
    """
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port
    except ValueError:
        raise UnexpectedResponseError("a malformed address") from None


def redirected(url: str, location: str) -> str:
    """Return the address that a redirect leads to.

    Raises:
        UnexpectedResponseError: the address is malformed, not of the web, or gives up encryption.
    """
    if len(location) > MAX_ADDRESS or not location.isprintable():
        raise UnexpectedResponseError("a redirect to a malformed address")
    try:
        target = urljoin(url, location)
    except ValueError:
        raise UnexpectedResponseError("a redirect to a malformed address") from None
    scheme, host, _ = origin(target)
    if scheme not in ("http", "https") or not host:
        raise UnexpectedResponseError("a redirect to an address that is not of the web")
    if origin(url)[0] == "https" and scheme != "https":
        raise UnexpectedResponseError("a redirect from an encrypted to an unencrypted address")
    return target
