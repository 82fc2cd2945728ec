"""Answers that are rare or hostile, from a server of a few lines: what a client makes of them."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

import nemotron_fp8.stores.client as module
from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.errors import is_permanent
from nemotron_fp8.errors.stores import (
    ChangedObjectError,
    MissingBucketError,
    MissingObjectError,
    StoreAnswerError,
    StoreConflictError,
    StoreListingError,
    UnconditionalStoreError,
)
from nemotron_fp8.stores.address import parse_store
from nemotron_fp8.stores.client import StoreClient
from nemotron_fp8.stores.listing import StoredFile
from tests.stores.conftest import QuickClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.store_server.server import StoreServer

Answer = tuple[int, dict[str, str], bytes]
DATE = "Wed, 01 Jan 2020 00:00:00 GMT"


class Odd(ThreadingHTTPServer):
    """A server whose answers a function of the method and the path makes."""

    answer: Callable[[str, str], Answer]
    requests = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        owner: Odd = self.server  # type: ignore[assignment]  # the only server of this handler
        owner.requests += 1
        self.rfile.read(int(self.headers.get("content-length", 0)))
        status, headers, body = owner.answer(self.command, self.path)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Last-Modified": DATE, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815  # names of the library

    def log_message(self, *_args: object) -> None: ...


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Odd]:
    pytest.importorskip("obstore")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with Odd(("127.0.0.1", 0), _Handler) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def reader() -> StoreClient:
    return StoreClient(parse_store("s3://bucket/a"), RetryPolicy(clock=QuickClock()), timeout=2)


def listing(entries: str, truncated: str = "false", token: str = "") -> Answer:
    more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    head = "<ListBucketResult><Name>bucket</Name><Prefix>a/</Prefix>"
    return 200, {}, f"{head}<IsTruncated>{truncated}</IsTruncated>{more}{entries}</ListBucketResult>".encode()


def test_empty_pages_without_an_end(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing is given up, and its requests end."""
    monkeypatch.setattr(module, "PAGE_SECONDS", 0.2)
    monkeypatch.setattr(module, "STEP", 0.05)
    odd.answer = lambda *_: listing("", "true", f"t{odd.requests}")
    with pytest.raises(StoreListingError, match="no file was listed"):
        reader().listing()
    made = odd.requests
    threading.Event().wait(0.3)
    assert made > 1
    assert odd.requests <= made + 1  # the one that was on its way


@pytest.mark.parametrize("year", ["-262000", "0000", "+262000"])
def test_a_year_that_no_calendar_has(odd: Odd, year: str) -> None:
    entry = f"<LastModified>{year}-01-01T00:00:00Z</LastModified><ETag>&quot;e&quot;</ETag><Size>1</Size>"
    odd.answer = lambda *_: listing(f"<Contents><Key>a/x</Key>{entry}</Contents>")
    with pytest.raises(StoreAnswerError, match="a time that no calendar has"):
        reader().listing()


def test_weak_tags_of_a_proxy(odd: Odd) -> None:
    """A proxy that compresses makes the tag of an answer weak; the file is the same."""
    etags = {"GET": 'W/"e"'}
    more = {"Content-Range": "bytes 0-2/3"}
    odd.answer = lambda method, _: (206, {"ETag": etags[method], **more}, b"abc")
    assert reader().read_small(StoredFile("x", 3, '"e"')) == b"abc"
    assert reader().read_small(StoredFile("x", 3, 'W/"e"')) == b"abc"
    with pytest.raises(ChangedObjectError):
        reader().read_small(StoredFile("x", 3, '"f"'))


def _absent(code: str) -> Answer:
    return 404, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode()


def test_an_absent_object_is_no_absent_bucket(odd: Odd) -> None:
    """Only the store's own word tells that there is no bucket."""
    odd.answer = lambda *_: _absent("NoSuchKey")
    with pytest.raises(StoreConflictError):
        reader().put_small("x", b"1", replacing=StoredFile("x", 1, '"e"'))
    with pytest.raises(MissingObjectError) as absent:
        reader().read_small(StoredFile("x", 1, '"e"'))
    assert not is_permanent(absent.value)  # finished shards are kept for the next run
    odd.answer = lambda *_: _absent("NoSuchBucket")
    with pytest.raises(MissingBucketError):
        reader().put_small("x", b"1", create=True)


def test_conditions_that_are_switched_off(
    store: StoreServer, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    with pytest.raises(UnconditionalStoreError, match="AWS_CONDITIONAL_PUT switches them off"):
        client.put_small("x", b"1", create=True)
    assert store.files("bucket") == {}
