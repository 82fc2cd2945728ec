"""Client of object stores: pinned listings and ranges, conditional writes, uploads in parts.

All requests are made by obstore. Its own retries are switched off, except for the parts of an upload: `RetryPolicy`
decides, reports waits and continues a broken transfer at the missing byte. A client holds no credentials. Each process
finds them in its environment when it makes its first request.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nemotron_fp8._retry import RetryPolicy, check_canceled
from nemotron_fp8._utils import shut_down
from nemotron_fp8.errors import printable
from nemotron_fp8.errors.stores import (
    ChangedObjectError,
    MissingObjectError,
    StoreAnswerError,
    StoreConflictError,
    StoreListingError,
    StoreUploadError,
    UnconditionalStoreError,
)
from nemotron_fp8.stores.address import why_unusable
from nemotron_fp8.stores.connection import connect, no_panic
from nemotron_fp8.stores.failures import (
    AbsentError,
    ExistsError,
    StoreContext,
    UnexpectedAnswerError,
)
from nemotron_fp8.stores.listing import StoredFile, StoreListing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from nemotron_fp8.stores.address import StoreAddress

T = TypeVar("T")
Item = TypeVar("Item")

CONNECTIONS = 8
"""Requests for small files, headers and pieces of a range that are made in parallel."""
PIECE = 8 << 20
"""Bytes of a large range that one request fetches."""
CHUNK = 1 << 20
"""Bytes of a piece that are handed on at once; a broken transfer continues after the last one."""
MAX_FILES = 200_000
"""Most files of a folder."""
PAGE = 1000
"""Files of a listing that are taken over at once, as many as a page of S3 has."""
PART = 8 << 20
"""Bytes of a part of an upload, unless a file would need more than `MAX_PARTS`."""
MAX_PARTS = 10_000
"""Most parts of an upload to S3 and GCS; Azure has 50,000."""
PAGE_SECONDS = 300.0
"""Longest time for a page of a listing, with the empty pages before it."""
MAX_TRANSFERS = 3
"""Transfers of a small file that may differ from its entity tag."""
STEP = 0.5
"""Seconds after which a waiting request looks whether it was canceled."""
UPLOADS = 4
"""Parts of a file that are sent in parallel."""


def nothing() -> None:
    """Check nothing."""


class Put(Protocol):
    """Receiver of the bytes of a range, in any order and from several threads."""

    def __call__(self, offset: int, data: bytes, /) -> None:
        """Put ``data`` at ``offset`` of the file."""


class _Connections:
    """obstore's objects of one process, made on first use."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._made: dict[bool, Any] = {}

    def get(self, address: StoreAddress, timeout: float, *, upload: bool) -> Any:
        """Return the store of an address; the one for uploads retries parts itself."""
        with self._lock:
            if upload not in self._made:
                self._made[upload] = connect(address, timeout, upload=upload)
            return self._made[upload]


@dataclass(frozen=True)
class StoreClient:
    """Client of one folder in an object store. Picklable: a copy makes its own connections, from its own environment.

    Attributes:
        address: the folder.
        policy: limits and waits of retries.
        on_wait: called before each retry with the reason and the seconds until then. Not pickled.
        cancel: aborts all requests when set. Not pickled.
        timeout: seconds without a byte after which a connection counts as dead.
    """

    address: StoreAddress
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    on_wait: Callable[[str, float], None] | None = field(default=None, repr=False, compare=False)
    cancel: Event | None = field(default=None, repr=False, compare=False)
    timeout: float = 60.0
    _connections: _Connections = field(default_factory=_Connections, repr=False, compare=False)

    def __reduce__(self) -> tuple[Callable[..., StoreClient], tuple[object, ...]]:
        return _unpickled, (self.address, self.policy, self.timeout)

    def with_options(
        self,
        *,
        on_wait: Callable[[str, float], None] | None = None,
        cancel: Event | None = None,
        policy: RetryPolicy | None = None,
    ) -> StoreClient:
        """Return a view of this client with some options replaced; None keeps an option."""
        return replace(
            self, on_wait=on_wait or self.on_wait, cancel=cancel or self.cancel, policy=policy or self.policy
        )

    def linked(self, cancel: Event) -> StoreClient:
        """Return a view of this client that is canceled by another event, too."""
        return replace(self, cancel=_Linked(self.cancel, cancel))

    def check_canceled(self) -> None:
        """Raise CanceledError if `cancel` is set."""
        check_canceled(self.cancel)

    def map(self, call: Callable[[StoreClient, Item], T], items: Iterable[Item]) -> list[T]:
        """Call ``call(view, item)`` for all items, `CONNECTIONS` in parallel, and return the results in order.

        The view is this client with an event of its own, so that the first error cancels the other calls.
        """
        cancel = _Linked(self.cancel)
        view = self.with_options(cancel=cancel)
        pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="store")
        try:
            return list(pool.map(lambda item: call(view, item), items))
        finally:
            cancel.set()  # after an error or Ctrl-C, the other results are not needed
            shut_down(pool)

    # -- requests -----------------------------------------------------------------------------------------

    def _retry(self, context: StoreContext, attempt: Callable[[Any, Callable[[], None]], T]) -> T:
        """Call ``attempt(store, progressed)`` until it succeeds, as `RetryPolicy.run`."""
        store = self._connections.get(self.address, self.timeout, upload=False)

        def guarded(progressed: Callable[[], None]) -> T:
            with no_panic(self.address):
                return attempt(store, progressed)

        return self.policy.run(context, guarded, self.on_wait, self.cancel)

    def context(self, action: str, file: str | None = None, *, writes: bool = False) -> StoreContext:
        """Return the context of a request."""
        return StoreContext(str(self.address), self.address.scheme, self.address.bucket, action, file, writes)

    def listing(self) -> StoreListing:
        """List the files of the folder and of the folders in it; of an absent folder, none.

        Raises:
            StoreListingError: there are more than `MAX_FILES` files, or names that no file has.
            StoreError: the listing cannot be read; the class names the reason.
        """
        label = str(self.address)

        def attempt(store: Any, progressed: Callable[[], None]) -> dict[str, StoredFile]:
            files: dict[str, StoredFile] = {}
            listed = 0
            for page in self._pages(store):
                for meta in page:
                    file = self._listed(meta)
                    if file is not None:
                        files[file.name] = file
                listed += len(page)  # also what is listed twice: a listing ends
                if listed > MAX_FILES:
                    raise StoreListingError(label, f"more than {MAX_FILES:,} files")
                progressed()
            return files

        return StoreListing(self.address, self._retry(self.context("list the files"), attempt))

    def _pages(self, store: Any) -> Iterator[Sequence[Mapping[str, Any]]]:
        """Yield the pages of a listing.

        obstore joins empty pages to the next one and does not return meanwhile. It therefore runs in another thread,
        where its requests can be aborted.

        Raises:
            StoreListingError: no file came within `PAGE_SECONDS`.
        """
        import obstore

        pages = obstore.list(store, self.address.prefix or None, chunk_size=PAGE)
        over = _Linked(self.cancel)
        pool = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            while True:
                page = pool.submit(asyncio.run, _next_page(str(self.address), pages, over, PAGE_SECONDS)).result()
                if page is None:
                    return
                yield page
        finally:
            over.set()
            shut_down(pool)

    def _listed(self, meta: Mapping[str, Any]) -> StoredFile | None:
        """Return a file of a listing; None for a marker of a folder.

        Raises:
            UnexpectedAnswerError: the object is not in the folder.
            StoreListingError: its name is none of a file.
        """
        path = str(meta["path"])
        start = f"{self.address.prefix}/" if self.address.prefix else ""
        if path == self.address.prefix:
            return None
        name = path.removeprefix(start)
        if not path.startswith(start):
            raise UnexpectedAnswerError("a file of another folder")
        if why_unusable(name) is not None:
            raise StoreListingError(str(self.address), f"the folder holds {name!a}, a name that no file has")
        return stored_file(name, meta)

    def head(self, name: str) -> StoredFile | None:
        """Return a file's size and version; None if there is no such file.

        Raises:
            StoreError: the store cannot tell; the class names the reason.
        """
        import obstore

        def attempt(store: Any, _progressed: Callable[[], None]) -> StoredFile:
            return stored_file(name, obstore.head(store, self.address.key(name)))

        try:
            return self._retry(self.context(f"look for {name}", name), attempt)
        except AbsentError:
            return None

    def read_range(self, file: StoredFile, start: int, stop: int, put: Put) -> None:
        """Fetch bytes ``[start, stop)`` of a file; after a failure, only the missing rest.

        Large ranges are fetched in `CONNECTIONS` pieces at a time. Memory: `CHUNK` for each.

        Raises:
            ChangedObjectError: the file is not the one of the listing anymore.
            MissingObjectError: it was deleted.
            StoreError: the range cannot be read; the class names the reason.
        """
        if not 0 <= start <= stop <= file.size:
            raise ValueError(f"bytes [{start}, {stop}) of a file of {file.size}")
        if stop - start <= PIECE:
            self._read_piece(file, start, stop, put)
            return
        starts = range(start, stop, PIECE)
        self.map(lambda view, first: view._read_piece(file, first, min(first + PIECE, stop), put), starts)

    def _read_piece(self, file: StoredFile, start: int, stop: int, put: Put) -> None:
        import obstore

        position = start

        def attempt(store: Any, progressed: Callable[[], None]) -> None:
            nonlocal position
            if position == stop:
                return
            options: dict[str, Any] = {"range": (position, stop)}
            if file.etag is not None and not file.etag.startswith(_WEAK):  # a weak tag matches no condition
                options["if_match"] = file.etag
            result = obstore.get(store, self.address.key(file.name), options=options)  # type: ignore[arg-type]
            self._check(result, file, position, stop)
            for chunk in result.stream(min_chunk_size=CHUNK):
                check_canceled(self.cancel)
                if position + len(chunk) > stop:
                    raise UnexpectedAnswerError("more bytes than requested")
                put(position, chunk)
                position += len(chunk)
                progressed()
            if position != stop:
                raise UnexpectedAnswerError("a truncated answer")

        try:
            self._retry(self.context(f"read {file.name}", file.name), attempt)
        except AbsentError:
            raise MissingObjectError(str(self.address), file.name) from None

    def _check(self, result: Any, file: StoredFile, start: int, stop: int) -> None:
        """Compare the head of an answer with the request.

        Raises:
            ChangedObjectError: the file was replaced.
            UnexpectedAnswerError: another range than requested.
        """
        meta = result.meta
        if meta["size"] != file.size or not same_tag(file.etag, meta["e_tag"]):
            raise ChangedObjectError(str(self.address), file.name)
        if tuple(result.range) != (start, stop):
            raise UnexpectedAnswerError("another range than requested")

    def read_small(self, file: StoredFile, limit: int | None = None) -> bytes:
        """Fetch a whole file into memory; of one with more than ``limit`` bytes, the first ``limit + 1``.

        The entity tag of a file that was written in one request is often its MD5. A file that differs from it is
        fetched again, until two transfers agree: the tag may be something else, as of an encrypted file.

        Raises:
            StoreAnswerError: no two of `MAX_TRANSFERS` transfers agree.
            StoreError: as `read_range`.
        """
        seen: list[bytes] = []
        for _ in range(MAX_TRANSFERS):
            content = self._whole(file, file.size if limit is None else min(file.size, limit + 1))
            if len(content) < file.size or content in seen or not _differs(content, file.etag):
                return content
            seen.append(content)
        problem = f"{MAX_TRANSFERS} transfers of {printable(file.name)} differ from each other"
        raise StoreAnswerError(str(self.address), f"read {file.name}", problem)

    def _whole(self, file: StoredFile, size: int) -> bytes:
        buffer = bytearray(size)

        def put(offset: int, data: bytes) -> None:
            buffer[offset : offset + len(data)] = data

        if size:
            self.read_range(file, 0, size, put)
        return bytes(buffer)

    # -- writes -------------------------------------------------------------------------------------------

    def put_small(
        self,
        name: str,
        data: bytes,
        *,
        create: bool = False,
        replacing: StoredFile | None = None,
        check: Callable[[], None] = nothing,
    ) -> StoredFile:
        """Write a small file in one request. A write whose answer was lost is settled by reading the file back.

        Args:
            name: name in the folder.
            data: the content.
            create: only if there is no such file.
            replacing: only if the file is still this version of it.
            check: called before each attempt, which may be minutes after the one before; an error it raises ends them.

        Raises:
            StoreConflictError: another run wrote the file.
            UnconditionalStoreError: the store rejects conditional writes.
            StoreError: the file cannot be written; the class names the reason.
        """
        import obstore

        if replacing is not None and replacing.version is None and self.address.scheme == "gs":
            replacing = self._versioned(replacing)  # a condition there needs the generation, which a listing lacks
        key, mode = self.address.key(name), _mode(create, replacing)
        context = self.context(f"write {name}", name, writes=True)

        def attempt(store: Any, _progressed: Callable[[], None]) -> None:
            check()
            obstore.put(store, key, data, mode=mode, use_multipart=False)

        try:
            self._retry(context, attempt)
        except ExistsError:
            found = self._same(name, data)
            if found is None:
                raise StoreConflictError(str(self.address), name) from None
            return found
        found = self.head(name)
        if found is None or found.size != len(data):
            raise StoreUploadError(str(self.address), name, "gone or replaced right after it was written")
        return found

    def _versioned(self, file: StoredFile) -> StoredFile:
        """Return a file of a listing with its version.

        Raises:
            StoreConflictError: it was replaced.
        """
        found = self.head(file.name)
        if found is None or not same_tag(found.etag, file.etag):
            raise StoreConflictError(str(self.address), file.name)
        return found

    def _same(self, name: str, data: bytes) -> StoredFile | None:
        """Return a file if its content is ``data``."""
        found = self.head(name)
        if found is None or found.size != len(data) or self.read_small(found) != data:
            return None
        return found

    def require_conditions(self, name: str) -> None:
        """Check that the store honors conditional writes, by one that must fail: some stores ignore conditions.

        Args:
            name: name of a file that exists. It keeps its content.

        Raises:
            UnconditionalStoreError: the store wrote it nevertheless.
        """
        found = self.head(name)
        if found is None:
            raise StoreUploadError(str(self.address), name, "gone right after it was written")
        data = self.read_small(found)
        context = self.context(f"write {name}", name, writes=True)

        def attempt(store: Any, _progressed: Callable[[], None]) -> None:
            import obstore

            obstore.put(store, self.address.key(name), data, mode="create", use_multipart=False)

        try:
            self._retry(context, attempt)
        except ExistsError:
            return
        raise UnconditionalStoreError(str(self.address), "it replaced a file that was to be created only")

    def upload(
        self,
        name: str,
        size: int,
        pieces: Iterator[bytes | memoryview],
        sent: Callable[[int], None] | None = None,
    ) -> StoredFile:
        """Write a file in parts, as its pieces come. The file appears complete, or not at all.

        Memory: the parts in flight, at most ``UPLOADS + 1`` of `part_size`. Parts are retried for some minutes.

        Args:
            name: name in the folder.
            size: bytes of the file.
            pieces: the content in order. An exception of it aborts the upload and passes through.
            sent: called with the bytes of each piece that was taken over.

        Raises:
            StoreUploadError: the pieces have another size, or the file was replaced meanwhile.
            StoreError: the file cannot be written; the class names the reason.
        """
        import obstore

        failure: list[BaseException] = []
        taken = 0

        def feed() -> Iterator[bytes | memoryview]:
            nonlocal taken
            try:
                for piece in pieces:
                    check_canceled(self.cancel)
                    taken += len(piece)
                    if taken > size:
                        raise StoreUploadError(str(self.address), name, f"more than the announced {size:,} bytes")
                    yield piece
                    if sent is not None:
                        sent(len(piece))
                if taken != size:
                    raise StoreUploadError(str(self.address), name, f"{taken:,} bytes instead of {size:,}")
            except BaseException as error:
                failure.append(error)
                raise

        store = self._connections.get(self.address, self.timeout, upload=True)
        once = replace(self.policy, seconds=0.0)

        def attempt(_progressed: Callable[[], None]) -> Any:
            with no_panic(self.address):
                return obstore.put(
                    store,
                    self.address.key(name),
                    feed(),
                    use_multipart=True,
                    chunk_size=part_size(size),
                    max_concurrency=UPLOADS,
                )

        try:
            written = once.run(self.context(f"write {name}", name, writes=True), attempt, None, self.cancel)
        except BaseException as error:
            if failure:  # obstore wraps it
                raise failure[0] from None
            if isinstance(error, ExistsError):
                raise StoreUploadError(
                    str(self.address), name, "the store answers that there is no such place"
                ) from None
            raise
        found = self.head(name)
        if found is None or found.size != size or not same_tag(found.etag, written["e_tag"]):
            raise StoreUploadError(str(self.address), name, "gone or replaced right after it was written")
        return found

    def delete(self, names: Sequence[str], check: Callable[[], None] = nothing) -> None:
        """Delete files; names without a file are no error.

        Args:
            names: the files.
            check: called before each attempt; an error it raises ends them.

        Raises:
            StoreError: a file cannot be deleted; the class names the reason.
        """

        for start in range(0, len(names), PAGE):
            page = names[start : start + PAGE]
            try:
                self._delete(page, check)
            except AbsentError:  # of Azure and GCS, which delete one by one
                for name in page:
                    with suppress(AbsentError):
                        self._delete([name], check)

    def _delete(self, names: Sequence[str], check: Callable[[], None]) -> None:
        import obstore

        keys = [self.address.key(name) for name in names]

        def attempt(store: Any, _progressed: Callable[[], None]) -> None:
            check()
            obstore.delete(store, keys)

        self._retry(self.context(f"delete {names[0]}", names[0]), attempt)


async def _next_page(label: str, pages: Any, over: Event, seconds: float) -> Any:
    """Return the next page of a listing; None after the last.

    Args:
        label: address of the folder.
        pages: stream of pages.
        over: aborts the requests when set.
        seconds: longest time.

    Raises:
        CanceledError: ``over`` is set.
        StoreListingError: the time is over.
    """
    coming = asyncio.ensure_future(_awaited(pages.__anext__()))
    end = time.monotonic() + seconds
    while not coming.done():
        await asyncio.wait((coming,), timeout=STEP)
        if not coming.done() and (over.is_set() or time.monotonic() > end):
            coming.cancel()
            check_canceled(over)
            raise StoreListingError(label, f"no file was listed in {seconds:.0f} s of pages")
    return coming.result()


async def _awaited(page: Any) -> Any:
    try:
        return await page
    except StopAsyncIteration:
        return None


class _Linked(Event):
    """Event that is set also when one of others is."""

    def __init__(self, *others: Event | None) -> None:
        super().__init__()
        self._others = [other for other in others if other is not None]

    def is_set(self) -> bool:
        return super().is_set() or any(other.is_set() for other in self._others)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait in steps, since the others wake nobody here."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = STEP if end is None else min(STEP, end - time.monotonic())
            if left <= 0:
                break
            super().wait(left)
        return self.is_set()


def _unpickled(address: StoreAddress, policy: RetryPolicy, timeout: float) -> StoreClient:
    return StoreClient(address, policy, timeout=timeout)


def _mode(create: bool, replacing: StoredFile | None) -> Any:
    """Return obstore's name of a condition."""
    if create:
        return "create"
    if replacing is None:
        return "overwrite"
    version = {"e_tag": replacing.etag, "version": replacing.version}
    return {name: value for name, value in version.items() if value is not None}


def stored_file(name: str, meta: Mapping[str, Any]) -> StoredFile:
    """Return a file from obstore's description of its object."""
    return StoredFile(name, meta["size"], _quoted(meta["e_tag"]), meta["version"], meta["last_modified"].timestamp())


def _quoted(etag: str | None) -> str | None:
    """Return an entity tag with its quotes, which the listings of Azure leave out."""
    return etag if etag is None or etag.endswith('"') else f'"{etag}"'


def same_tag(first: str | None, second: str | None) -> bool:
    """Return True unless two entity tags tell two versions apart. A proxy may make a tag weak, as in ``W/"tag"``."""
    tags = {tag.removeprefix(_WEAK) for tag in map(_quoted, (first, second)) if tag is not None}
    return len(tags) < 2


_WEAK = "W/"
_MD5 = re.compile(r'"?([0-9a-f]{32})"?', re.ASCII)


def _differs(content: bytes, etag: str | None) -> bool:
    """Return True if an entity tag has the form of an MD5 and is not that of the content."""
    match = _MD5.fullmatch(etag or "")
    return match is not None and hashlib.md5(content, usedforsecurity=False).hexdigest() != match[1]


def part_size(size: int) -> int:
    """Return the bytes of a part of an upload, so that `MAX_PARTS` suffice."""
    smallest = -(-size // MAX_PARTS)
    return max(PART, smallest + -smallest % (1 << 20))
