"""Client of the Hub: pinned listings, byte ranges, and whole files checked against their digests.

All requests use the session of huggingface_hub, so that its proxies and certificates apply, and are retried by
`RetryPolicy`. Redirects are followed by hand: the token is sent to the Hub alone, never to a redirect's target.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from nemotron_fp8._retry import RetryPolicy, check_canceled
from nemotron_fp8._utils import shortened, shut_down
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.errors.hub import DigestError, LocalDiskError, MissingRevisionError, UnusableAnswerError
from nemotron_fp8.hub.answers import ModelInfo, parse
from nemotron_fp8.hub.failures import (
    ConflictError,
    Context,
    MalformedAnswerError,
    RefusedError,
    UnexpectedResponseError,
)
from nemotron_fp8.hub.listing import Listing, RemoteFile
from nemotron_fp8.hub.transport import (
    AGENT,
    check_encoding,
    deadline,
    finished,
    install,
    limits,
    origin,
    receive,
    redirected,
)
from nemotron_fp8.untrusted.guard import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from huggingface_hub import HfApi


T = TypeVar("T")
Item = TypeVar("Item")

CONNECTIONS = 8
"""Small files and headers that are fetched in parallel."""
_TOKEN = re.compile(r"[!-~]{1,1000}")
"""A token, as a header can hold it."""
MAX_TRANSFERS = 3
"""Transfers of a file with a wrong digest before it is an error."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)


@cache
def _address(endpoint: str) -> str:
    """Check the address of a Hub.

    Raises:
        RecipeError: it is no address of the web.
    """
    with suppress(UnexpectedResponseError):
        scheme, host, _ = origin(endpoint)
        if scheme in ("http", "https") and host and endpoint.isprintable() and " " not in endpoint:
            return endpoint
    raise RecipeError(
        f"HF_ENDPOINT is {shortened(endpoint)}, not an address; unset it, or set one like https://huggingface.co"
    )


class Target(Protocol):
    """Receiver of the bytes of a range, in order."""

    def __call__(self, offset: int, data: bytes, /) -> None:
        """Put ``data`` at ``offset`` of the file."""


class _SignedAddresses:
    """Cache of the addresses that the Hub redirects to, by commit and path. Thread-safe."""

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}
        self._lock = Lock()

    def get(self, key: str) -> str | None:
        """Return a known address."""
        with self._lock:
            return self._addresses.get(key)

    def put(self, key: str, address: str) -> None:
        """Add an address."""
        with self._lock:
            self._addresses[key] = address

    def drop(self, key: str) -> None:
        """Remove an address that has expired."""
        with self._lock:
            self._addresses.pop(key, None)


@dataclass(frozen=True)
class HubClient:
    """A client of the Hub. Picklable: a copy has the name of the token's variable, never the token.

    Attributes:
        token_env: environment variable that holds the token; None for the login of ``hf auth login``.
        endpoint: address of the Hub; None for ``HF_ENDPOINT`` or the public Hub.
        policy: limits and waits of retries.
        timeout: seconds without a byte after which a connection counts as dead.
        on_wait: called before each retry with the reason and the seconds until then. Not pickled.
        cancel: aborts all requests when set. Not pickled.
    """

    token_env: str | None = None
    endpoint: str | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: float = 120.0
    on_wait: Callable[[str, float], None] | None = field(default=None, repr=False, compare=False)
    cancel: Event | None = field(default=None, repr=False, compare=False)
    _addresses: _SignedAddresses = field(default_factory=_SignedAddresses, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[HubClient], tuple[object, ...]]:
        # Callbacks and events belong to this process; another process may have another default endpoint.
        return HubClient, (self.token_env, self.base(), self.policy, self.timeout)

    def with_options(
        self,
        *,
        on_wait: Callable[[str, float], None] | None = None,
        cancel: Event | None = None,
        policy: RetryPolicy | None = None,
    ) -> HubClient:
        """Return a view of this client with some options replaced; None keeps an option."""
        return replace(
            self, on_wait=on_wait or self.on_wait, cancel=cancel or self.cancel, policy=policy or self.policy
        )

    def retry(self, context: Context, attempt: Callable[[Callable[[], None]], T], *, refusals: bool = False) -> T:
        """Call ``attempt`` until it succeeds, as `RetryPolicy.run`, within the limits of `transport`.

        Args:
            context: subject of the request, for error messages.
            attempt: makes the request.
            refusals: raise ConflictError and RefusedError, which mean something to the caller, as they are.

        Raises:
            UnusableAnswerError: the server refuses the request, unless ``refusals`` is set.
        """
        try:
            with limits(self.base(), self.token()):
                return self.policy.run(context, attempt, self.on_wait, self.cancel)
        except (ConflictError, RefusedError) as error:
            if refusals:
                raise
            problem = f"the server refuses the request ({error or 'status 412'})"
            raise UnusableAnswerError(context.repo, context.action, problem) from None

    def check_canceled(self) -> None:
        """Raise CanceledError if `cancel` is set."""
        check_canceled(self.cancel)

    # -- requests ----------------------------------------------------------------------------

    def token(self) -> str | None:
        """Return the token, read anew on each call: it may be replaced while a job runs."""
        from huggingface_hub import constants, get_token

        if self.token_env is not None:
            token = (os.environ.get(self.token_env) or "").strip() or None
        else:
            try:
                token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
            except (OSError, ValueError) as error:
                raise RecipeError(
                    f"the login of hf auth login cannot be read: {describe(error)}; log in again"
                ) from None
        if token is not None and not _TOKEN.fullmatch(token):
            where = f"the variable {self.token_env}" if self.token_env else "HF_TOKEN, or in the login of hf auth login"
            raise RecipeError(f"the token in {where} has characters that no token has, such as spaces; set it again")
        return token

    def api(self) -> HfApi:
        """Return an HfApi with this client's endpoint and token."""
        from huggingface_hub import HfApi

        self.session()
        return HfApi(endpoint=self.base(), token=self.token() or False, library_name="nemotron_fp8")

    def base(self) -> str:
        """Return the address of the Hub."""
        from huggingface_hub import constants

        return _address((self.endpoint or constants.ENDPOINT).rstrip("/"))

    def session(self) -> Any:
        """Return the session of huggingface_hub; set this client's timeout where it has none.

        Most functions of huggingface_hub have no timeout parameter and would wait forever for a hanging server.

        Raises:
            RecipeError: the environment names a proxy that cannot be used.
        """
        from huggingface_hub import get_session

        try:
            session = get_session()
        except Exception as error:  # of the HTTP library, about the variables of the environment
            problem = f"the connection to the Hub cannot be set up: {describe(error)}"
            raise RecipeError(f"{problem}; correct HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY") from None
        if not any(session.timeout.as_dict().values()):
            session.timeout = self.timeout
        install(session)
        return session

    def context(self, repo: str, action: str, revision: str | None = None, file: str | None = None) -> Context:
        """Return the context of a request."""
        token = self.token()
        return Context(repo, action, token is not None, revision, file, token)

    def get_json(self, path: str, kind: type[T], **params: str | int) -> T:
        """GET a path of the JSON API once, without retries.

        Args:
            path: path of the endpoint.
            kind: record of `nemotron_fp8.hub.answers`, or a list of one.
            **params: the query.

        Raises:
            UnexpectedResponseError: the answer exceeds a limit, or is not of this kind.
        """
        answer, _ = self._receive("GET", f"{self.base()}{path}", params=params)
        return parse(kind, answer.content)

    def post_form(self, path: str, kind: type[T], form: Mapping[str, object]) -> T:
        """POST a form to a path of the JSON API once, without retries; otherwise like `get_json`."""
        answer, _ = self._receive("POST", f"{self.base()}{path}", data=form)
        return parse(kind, answer.content)

    def post_json(self, path: str, value: object, timeout: float) -> Any:
        """POST a JSON value once, and return the answer, whatever its status."""
        return receive(self.session(), "POST", f"{self.base()}{path}", self.headers(), timeout, json=value)[0]

    def get_page(self, page: str, kind: type[T]) -> tuple[T, str | None]:
        """GET a page like `get_json`; return it and the address of the next page, None after the last.

        Args:
            page: path of the first page, or the address that an earlier call returned.
            kind: record of the page.
        """
        base = urlsplit(self.base())
        answer, url = self._receive("GET", page if page.startswith(f"{base.scheme}://") else f"{self.base()}{page}")
        link = answer.links.get("next", {}).get("url")
        if link is None:
            return parse(kind, answer.content), None
        # A mirror may pass on the links of the Hub itself; the token must not be sent there.
        there = urlsplit(redirected(url, link))
        return parse(kind, answer.content), urlunsplit((base.scheme, base.netloc, there.path, there.query, ""))

    def _receive(self, method: str, url: str, **content: Any) -> tuple[Any, str]:
        """Make a request of the JSON API once, and raise the error of huggingface_hub for an error status."""
        from huggingface_hub import hf_raise_for_status

        found = receive(self.session(), method, url, self.headers(), self.timeout, **content)
        hf_raise_for_status(found[0])
        return found

    def headers(self) -> dict[str, str]:
        """Return the headers of a request to the Hub, including the token."""
        headers = {"user-agent": AGENT, "accept-encoding": "identity"}
        if token := self.token():
            headers["authorization"] = f"Bearer {token}"
        return headers

    def map(self, call: Callable[[HubClient, Item], T], items: Iterable[Item]) -> list[T]:
        """Call ``call(view, item)`` for all items, `CONNECTIONS` in parallel, and return the results in order.

        The view is this client with an event of its own, so that the first error cancels the other calls.
        """
        cancel = Event()
        view = self.with_options(cancel=cancel)
        pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hub")
        try:
            return list(pool.map(lambda item: call(view, item), items))
        finally:
            cancel.set()  # after an error or Ctrl-C, the other results are not needed
            shut_down(pool)

    # -- listing ------------------------------------------------------------------------------------------

    def listing(self, repo: str, revision: str | None = None) -> Listing:
        """Resolve a revision to its commit and list its files, in one request.

        Raises:
            HubError: the listing cannot be read; the class names the reason.
        """

        def attempt(_progressed: Callable[[], None]) -> Listing:
            return self.listing_once(repo, revision)

        return self.retry(self.context(repo, "list the repository", revision or "main"), attempt)

    def listing_once(self, repo: str, revision: str | None = None) -> Listing:
        """List a revision once, without retries and with the errors of huggingface_hub."""
        path = f"/api/models/{repo}/revision/{quote(revision or 'main', safe='')}"
        info = self.get_json(path, ModelInfo, blobs="true")
        if (secret := self.token()) and any(secret in item.rfilename for item in info.siblings):
            raise MalformedAnswerError("a file whose name holds the token")
        files = {
            item.rfilename: RemoteFile(item.rfilename, item.size, item.lfs.sha256 if item.lfs else None, item.blob)
            for item in info.siblings
        }
        return Listing(repo, info.sha, files, info.private, bool(info.gated))

    # -- content ------------------------------------------------------------------------------------------

    def read_range(self, listing: Listing, path: str, start: int, stop: int, target: Target) -> None:
        """Fetch bytes ``[start, stop)`` of a file into ``target``; after a failure, only the missing rest.

        The server's entity tag must be that of the listing. Only `download` and `read_small` check digests.

        Raises:
            UnlistedFileError: the file is not in the listing; no request is made.
            HubError: the range cannot be read; the class names the reason.
        """
        file = listing.file(path)
        if not 0 <= start <= stop <= file.size:
            raise ValueError(f"bytes [{start}, {stop}) of a file of {file.size}")
        position = start

        def attempt(progressed: Callable[[], None]) -> None:
            nonlocal position
            if position == stop:
                return
            with self._open_range(listing, file, position, stop) as chunks:
                for chunk in chunks:
                    if position + len(chunk) > stop:
                        raise UnexpectedResponseError("more bytes than requested")
                    try:
                        target(position, chunk)
                    except OSError as error:
                        problem = error.strerror or str(error)
                        raise LocalDiskError(listing.repo, f"store {path}", problem) from error
                    position += len(chunk)
                    progressed()
            if position != stop:
                raise UnexpectedResponseError("a truncated response")

        self.retry(self.context(listing.repo, f"read {path}", listing.sha, path), attempt)

    def read_small(self, listing: Listing, path: str) -> bytes:
        """Fetch a whole file into memory and check its digest against the listing.

        Raises:
            DigestError: the digest is wrong `MAX_TRANSFERS` times.
            HubError: the file cannot be read; the class names the reason.
        """
        file = listing.file(path)
        actual = ""
        for _ in range(MAX_TRANSFERS):
            pieces: list[bytes] = []
            self.read_range(listing, path, 0, file.size, lambda _offset, data, to=pieces: to.append(data))
            digest, expected = file.digest()
            digest.update(content := b"".join(pieces))
            if (actual := digest.hexdigest()) == expected:
                return content
        raise DigestError(listing.repo, path, file.digest()[1], actual, MAX_TRANSFERS)

    def download(
        self, listing: Listing, path: str, target: Path, progress: Callable[[int], None] | None = None
    ) -> None:
        """Download a whole file to ``target``, which appears only if its digest is that of the listing.

        Args:
            listing: the listing that names the file.
            path: its path in the repository.
            target: a file in a private folder; ``<target>.part`` beside it holds the bytes until then.
            progress: called with the number of bytes of each piece.

        Raises:
            DigestError: the digest is wrong `MAX_TRANSFERS` times.
            LocalDiskError: the disk is full or not writable.
            HubError: the file cannot be downloaded; the class names the reason.
        """
        file = listing.file(path)
        part = target.with_name(f"{target.name}.part")
        actual = ""
        try:
            for _ in range(MAX_TRANSFERS):
                actual, expected = self._transfer(listing, file, part, progress)
                if actual == expected:
                    part.replace(target)
                    return
        except OSError as error:
            if isinstance(error, LocalDiskError):
                raise
            problem = error.strerror or str(error)
            raise LocalDiskError(listing.repo, f"store {path}", problem) from error
        finally:
            part.unlink(missing_ok=True)
        raise DigestError(listing.repo, path, file.digest()[1], actual, MAX_TRANSFERS)

    def _transfer(
        self, listing: Listing, file: RemoteFile, part: Path, progress: Callable[[int], None] | None
    ) -> tuple[str, str]:
        """Transfer a file once into a new file; return its digest and the expected one."""
        digest, expected = file.digest()
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as sink:

            def write(_offset: int, data: bytes) -> None:
                view = memoryview(data)
                while view:
                    view = view[sink.write(view) :]
                digest.update(data)
                if progress is not None:
                    progress(len(data))

            self.read_range(listing, file.path, 0, file.size, write)
            os.fsync(descriptor)
        return digest.hexdigest(), expected

    @contextmanager
    def _open_range(self, listing: Listing, file: RemoteFile, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        """Request a range once, check status and range, and yield the pieces of its body."""
        from huggingface_hub import hf_raise_for_status

        url = self._locate(listing, file)
        ours = origin(url) == origin(self.base())
        headers = self.headers()
        if not ours:
            headers.pop("authorization", None)
        headers["range"] = f"bytes={start}-{stop - 1}"
        with self.session().stream("GET", url, headers=headers, follow_redirects=False, timeout=self.timeout) as answer:
            if answer.status_code in (401, 403, 404, 410) and not ours:
                self._addresses.drop(f"{listing.sha}/{file.path}")  # expired: the next attempt gets a new one
                raise UnexpectedResponseError(f"the object store answers {answer.status_code}")
            hf_raise_for_status(finished(answer) if answer.status_code >= 400 else answer)
            self._check(answer, file, start, stop)
            yield answer.iter_raw()  # pieces as they arrive: a larger buffer would be lost with the connection

    def _check(self, answer: Any, file: RemoteFile, start: int, stop: int) -> None:
        if answer.status_code == 200:
            if (start, stop) != (0, file.size):
                raise UnexpectedResponseError("the whole file instead of a range")
        elif answer.status_code != 206:
            raise UnexpectedResponseError(f"status {answer.status_code} for a read")
        else:
            match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range") or "")
            if match is None or tuple(map(int, match.groups())) != (start, stop - 1, file.size):
                raise UnexpectedResponseError("another range than requested")
        check_encoding(answer)

    def _locate(self, listing: Listing, file: RemoteFile) -> str:
        """Return the address of a file's bytes: on the Hub, or the signed address that the Hub redirects to."""
        from huggingface_hub import hf_raise_for_status

        key = f"{listing.sha}/{file.path}"
        if known := self._addresses.get(key):
            return known
        url = f"{self.base()}/{listing.repo}/resolve/{listing.sha}/{quote(file.path)}"
        if file.sha256 is None:
            return url
        # Relative redirects lead to a renamed repository on the Hub; the first one to another host counts.
        for _ in range(5):
            with deadline():
                answer = self.session().request(
                    "HEAD", url, headers=self.headers(), follow_redirects=False, timeout=self.timeout
                )
            hf_raise_for_status(answer)
            tag = answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag") or ""
            if answer.headers.get("X-Repo-Commit") not in (None, listing.sha):
                raise MissingRevisionError(listing.repo, listing.sha)
            if "Location" not in answer.headers:
                return url
            url = redirected(url, str(answer.headers["Location"]))
            if origin(url) != origin(self.base()):
                if tag.removeprefix("W/").strip('"') != file.sha256:
                    raise UnexpectedResponseError("an entity tag that differs from the listing")
                self._addresses.put(key, url)
                return url
        raise UnexpectedResponseError("too many redirects")
