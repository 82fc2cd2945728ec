"""Reading from the Hub: a pinned listing, ranges of files, and whole files checked against the listing.

Everything goes through the client's own session, so that its proxies and certificates apply, and through
`RetryPolicy`. Redirects are followed by hand: the token goes to the Hub and never to where a redirect leads.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from nemotron_fp8.errors.hub import DigestError, LocalDiskError, MissingRevisionError
from nemotron_fp8.hub.failures import Context, UnexpectedResponseError
from nemotron_fp8.hub.listing import Listing, RemoteFile
from nemotron_fp8.hub.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from huggingface_hub import HfApi


T = TypeVar("T")
Item = TypeVar("Item")

CONNECTIONS = 8
"""Small files and headers that are fetched at the same time."""
MAX_TRANSFERS = 3
"""How often a file whose digest is wrong is transferred before it is an error."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Target(Protocol):
    """Takes the bytes of a range, in order."""

    def __call__(self, offset: int, data: bytes, /) -> None:
        """Put ``data`` at ``offset`` of the file."""


@dataclass
class HubClient:
    """A client of the Hub. Picklable; it keeps the name of the token's variable and not the token.

    Attributes:
        token_env: environment variable that holds the token; None for the one that ``hf auth login`` stored.
        endpoint: the Hub's address; None for ``HF_ENDPOINT`` or the public one.
        patience: when to try again.
        timeout: seconds without a byte after which a connection counts as dead.
    """

    token_env: str | None = None
    endpoint: str | None = None
    patience: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: float = 120.0
    _locations: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        # Whoever listens to the waits, or ends them, lives in this process; another may have another default address.
        kept = (self.token_env, self.base(), replace(self.patience, on_wait=None, stop=None), self.timeout)
        return dict(zip(("token_env", "endpoint", "patience", "timeout"), kept, strict=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a lock is not picklable, so make a new one

    # -- the client underneath ----------------------------------------------------------------------------

    def token(self) -> str | None:
        """The token, read anew each time: it may be replaced while a job runs."""
        from huggingface_hub import constants, get_token

        if self.token_env is not None:
            return os.environ.get(self.token_env) or None
        return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()

    def api(self) -> HfApi:
        """The client's own interface, with this client's address and token."""
        from huggingface_hub import HfApi

        self.session()
        return HfApi(endpoint=self.base(), token=self.token() or False, library_name="nemotron_fp8")

    def base(self) -> str:
        """The Hub's address."""
        from huggingface_hub import constants

        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    def session(self) -> Any:
        """The session of the client; one without any time limit, as it is by default, gets this client's.

        Most calls of the client have no parameter for it, and would wait for ever for a server that hangs.
        """
        from huggingface_hub import get_session

        session = get_session()
        if not any(session.timeout.as_dict().values()):
            session.timeout = self.timeout
        return session

    def context(self, repo: str, action: str, revision: str | None = None, file: str | None = None) -> Context:
        """What a call is about."""
        return Context(repo, action, self.token() is not None, revision, file)

    def get_json(self, path: str, parse: Callable[[Any], T], **params: str | int) -> T:
        """What ``parse`` makes of one GET of the JSON interface, without retries.

        Raises:
            OddAnswerError: it cannot make anything of it.
        """
        return self._get_json(f"{self.base()}{path}", parse, params)[0]

    def get_page(self, page: str, parse: Callable[[Any], T]) -> tuple[T, str | None]:
        """`get_json` of one page, and where the next one is; None after the last.

        Args:
            page: the path of the first page, or what was returned for the next.
            parse: takes the page.
        """
        base = urlsplit(self.base())
        url = page if page.startswith(f"{base.scheme}://") else f"{self.base()}{page}"
        found, link = self._get_json(url, parse)
        if link is None:
            return found, None
        # A mirror passes the Hub's own address on; and the token goes nowhere else.
        there = urlsplit(urljoin(url, link))
        return found, urlunsplit((base.scheme, base.netloc, there.path, there.query, ""))

    def _get_json(
        self, url: str, parse: Callable[[Any], T], params: Mapping[str, str | int] | None = None
    ) -> tuple[T, str | None]:
        """What ``parse`` makes of an answer, and its link to a next page."""
        from huggingface_hub import hf_raise_for_status

        answer = self.session().get(url, params=params, headers=self.headers(), timeout=self.timeout)
        hf_raise_for_status(answer)
        try:
            return parse(answer.json()), answer.links.get("next", {}).get("url")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UnexpectedResponseError("an answer that is not the Hub's") from error

    def headers(self) -> dict[str, str]:
        """The headers of a request to the Hub itself, the token's with them."""
        headers = {"user-agent": "nemotron_fp8", "accept-encoding": "identity"}
        if token := self.token():
            headers["authorization"] = f"Bearer {token}"
        return headers

    def several(self, call: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
        """What ``call`` gives for each item, `CONNECTIONS` at a time; after an error nothing more is asked for."""
        before, self.patience.stop = self.patience.stop, Event()
        pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="several")
        try:
            return list(pool.map(call, items))
        finally:
            self.patience.stop.set()  # after an error or Ctrl-C, nobody wants the others
            pool.shutdown(wait=True, cancel_futures=True)
            self.patience.stop = before

    # -- listing ------------------------------------------------------------------------------------------

    def listing(self, repo: str, revision: str | None = None) -> Listing:
        """Resolve a revision to its commit and list its files, in one request.

        Raises:
            HubError: the class says why not.
        """

        def attempt(_progressed: Callable[[], None]) -> Listing:
            return self.listing_once(repo, revision)

        return self.patience.run(self.context(repo, "list the repository", revision or "main"), attempt)

    def listing_once(self, repo: str, revision: str | None = None) -> Listing:
        """`listing`, without retries and with the client's own errors."""
        info = self.api().model_info(repo, revision=revision, files_metadata=True, timeout=self.timeout)
        if info.sha is None or info.siblings is None:
            raise UnexpectedResponseError("a listing without a commit")
        files = {}
        for item in info.siblings:
            if item.size is None:
                raise UnexpectedResponseError("a listing without sizes")
            sha256 = item.lfs.sha256 if item.lfs else None
            files[item.rfilename] = RemoteFile(item.rfilename, item.size, sha256, item.blob_id)
        return Listing(repo, info.sha, files, bool(info.private), bool(info.gated))

    # -- content ------------------------------------------------------------------------------------------

    def read_range(self, listing: Listing, path: str, start: int, stop: int, target: Target) -> None:
        """Fetch bytes ``[start, stop)`` of a file into ``target``; after a failure, only what is missing.

        The bytes are those of the pinned commit as far as the server tells: its entity tag must be the
        listing's. Whole files are checked by `download` and `read_small`.

        Raises:
            UnlistedFileError: the file is not in the listing; nothing is asked of the server.
            HubError: the class says why not.
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
                        raise UnexpectedResponseError("more bytes than were asked for")
                    try:
                        target(position, chunk)
                    except OSError as error:
                        problem = error.strerror or str(error)
                        raise LocalDiskError(listing.repo, f"store {path}", problem) from error
                    position += len(chunk)
                    progressed()
            if position != stop:
                raise UnexpectedResponseError("an answer that ends early")

        self.patience.run(self.context(listing.repo, f"read {path}", listing.sha, path), attempt)

    def read_small(self, listing: Listing, path: str) -> bytes:
        """Fetch a whole file into memory, checked against the listing.

        Raises:
            DigestError: it is something else, `MAX_TRANSFERS` times.
            HubError: the class says why not.
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
        """Fetch a whole file to ``target``, which appears once its digest is the listing's.

        Args:
            listing: where it stands.
            path: its path.
            target: a file in a private folder; ``<target>.part`` beside it is used meanwhile.
            progress: called with the bytes of each piece.

        Raises:
            DigestError: it is something else, `MAX_TRANSFERS` times.
            LocalDiskError: the disk is full, or refuses.
            HubError: the class says why not.
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
        """One transfer into a fresh file; the digest it has and the one it should have."""
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
        """One attempt at a range: the pieces of its body, once status and range are what they must be."""
        from huggingface_hub import hf_raise_for_status

        url = self._locate(listing, file)
        ours = _origin(url) == _origin(self.base())
        headers = self.headers()
        if not ours:
            headers.pop("authorization", None)
        headers["range"] = f"bytes={start}-{stop - 1}"
        with self.session().stream("GET", url, headers=headers, follow_redirects=False, timeout=self.timeout) as answer:
            if answer.status_code in (401, 403, 404, 410) and not ours:
                with self._lock:  # a signed address past its time: ask for another
                    self._locations.pop(f"{listing.sha}/{file.path}", None)
                raise UnexpectedResponseError(f"the store answers {answer.status_code}")
            if answer.status_code >= 400:
                answer.read()
            hf_raise_for_status(answer)
            self._check(answer, file, start, stop)
            yield answer.iter_raw()  # pieces as they arrive: a larger one would be lost with the connection

    def _check(self, answer: Any, file: RemoteFile, start: int, stop: int) -> None:
        if answer.status_code == 200:
            if (start, stop) != (0, file.size):
                raise UnexpectedResponseError("the whole file instead of a range")
        elif answer.status_code != 206:
            raise UnexpectedResponseError(f"status {answer.status_code} to a read")
        else:
            match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range") or "")
            if match is None or tuple(map(int, match.groups())) != (start, stop - 1, file.size):
                raise UnexpectedResponseError("another range than the one asked for")
        if (answer.headers.get("Content-Encoding") or "identity") != "identity":
            raise UnexpectedResponseError("a compressed answer to a read")

    def _locate(self, listing: Listing, file: RemoteFile) -> str:
        """Where the bytes of a file are: the Hub itself, or the signed address that it redirects to."""
        from huggingface_hub import hf_raise_for_status

        key = f"{listing.sha}/{file.path}"
        with self._lock:
            if key in self._locations:
                return self._locations[key]
        url = f"{self.base()}/{listing.repo}/resolve/{listing.sha}/{quote(file.path)}"
        if file.sha256 is None:
            return url
        # Relative redirects lead to a renamed repository on the Hub itself; the first one off it counts.
        for _ in range(5):
            answer = self.session().request(
                "HEAD", url, headers=self.headers(), follow_redirects=False, timeout=self.timeout
            )
            hf_raise_for_status(answer)
            tag = answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag") or ""
            if answer.headers.get("X-Repo-Commit") not in (None, listing.sha):
                raise MissingRevisionError(listing.repo, listing.sha)
            if "Location" not in answer.headers:
                return url
            url = urljoin(url, str(answer.headers["Location"]))
            if _origin(url) != _origin(self.base()):
                if tag.removeprefix("W/").strip('"') != file.sha256:
                    raise UnexpectedResponseError("another entity tag than the listing's")
                with self._lock:
                    self._locations[key] = url
                return url
        raise UnexpectedResponseError("redirects without an end")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
