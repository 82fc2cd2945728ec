"""Meet a malicious Hub: every answer ends in a typed error, or in the right bytes, at once and in bounded memory.

Each case names an answer, the operation that meets it, and how the operation must end. The token goes to no other host
and into no message; nothing is left in the work folder, and no destination appears but a complete one.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from huggingface_hub import close_session, constants

from nemotron_fp8 import quantize_repo
from nemotron_fp8.errors import NemotronFp8Error, SourceError
from nemotron_fp8.errors.hub import (
    CardRefusedError,
    DigestError,
    HubError,
    MissingRevisionError,
    NoProgressError,
    NotAllowedError,
    RateLimitedError,
    StagingBusyError,
    StagingMismatchError,
    StorageFullError,
    TokenRejectedError,
    UnusableAnswerError,
)
from tests.hub.conversion import checkpoint
from tests.hub.hostile_hub import (
    LONGEST_WAIT,
    NOT_VERIFIED,
    STAGED,
    HostileHub,
    Outcome,
    Rule,
    Run,
    after,
    alternating,
    body,
    bomb,
    chunk,
    content_of,
    edited,
    endless,
    literal,
    perform,
    perform_all,
    raw,
    replaced,
    status,
    with_headers,
)
from tests.hub_server.fixtures import TOKEN
from tests.hub_server.server import HubServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

    from tests.hub.hostile_hub import Answer

    Ending = type[NemotronFp8Error] | str | None

PLAIN = "Zq7/kL+93==vX~secret%1"
"""A token without the usual prefix, some characters of which have another form in an address."""
MAX_SECONDS = 10.0
MAX_GROWTH = 200 << 20
MAX_ANSWER = 64 << 20
"""Bytes of an endless answer by which the client must have stopped, those in buffers of the system included."""

LISTING = "GET", r"^/api/models/nv/source/revision/"
HEAD = "HEAD", r"^/nv/source/resolve/.*safetensors"
GIT_FILE = "GET", r"^/nv/source/resolve/.*config\.json"
OBJECT = "GET", r"^/_cdn/nv/source/"
CARD = "POST", r"^/api/validate-yaml"
CREATE = "POST", r"^/api/repos/create"
REFS = "GET", r"^/api/models/me/target/refs"
BRANCH = "POST", r"^/api/models/me/target/branch/"
DELETE = "DELETE", r"^/api/models/me/target/branch/"
HISTORY = "GET", r"^/api/models/me/target/commits/"
PATHS = "POST", r"^/api/models/me/target/paths-info/"
PREUPLOAD = "POST", r"^/api/models/me/target/preupload/"
COMMIT = "POST", r"^/api/models/me/target/commit/"
BATCH = "POST", r"^/me/target.git/info/lfs/objects/batch"
UPLOAD = "PUT", r"^/_upload/"
CHECK = "POST", r"^/_verify/"
STAGING = "GET", r"^/api/models/me/target/revision/"


@dataclass(frozen=True)
class Case:
    """A hostile answer, the operation that meets it, and its end: an error, None for the right bytes, or any of some.

    A text is what is wrong with a result, by the library itself.
    """

    name: str
    operation: str
    endpoint: tuple[str, str]
    answer: Answer
    end: Ending | tuple[Ending, ...] = UnusableAnswerError
    times: int | None = None
    skip: int = 0
    token: str = TOKEN
    alone: bool = False  # in a process of its own, whose memory is measured
    full: bool = False  # not in the quick suite, which has others of its kind


def listed(change: Callable[[list[dict[str, Any]]], object]) -> Answer:
    """Answer with the honest listing after a change of its files, in place."""
    return edited(lambda value: change(value["siblings"]) and None)


def shard_of(files: list[dict[str, Any]]) -> dict[str, Any]:
    return next(file for file in files if file["rfilename"].endswith(".safetensors"))


def more(name: str, **fields: Any) -> Answer:
    """List one more file, of this name."""
    return listed(lambda files: files.append({"rfilename": name, "size": 3, "blobId": "0" * 40, **fields}))


def renamed(name: str) -> Answer:
    """List the shard by another name."""
    return listed(lambda files: shard_of(files).update(rfilename=name))


def in_first(change: Callable[[dict[str, Any]], object], key: str | None = None) -> Answer:
    """Change the first item of a list, in place."""
    return edited(lambda value: change((value if key is None else value[key])[0]) and None)


def elsewhere(path: str) -> Callable[[HostileHub], str]:
    return lambda hub: hub.other_host(path)


# -- bodies -----------------------------------------------------------------------------------------------------

SHA = "a" * 40
EMPTY_LISTING = json.dumps({"sha": SHA, "siblings": []}).encode()
BODIES = {
    "nothing": b"",
    "spaces": b" " * 1000,
    "no JSON": b"siblings: []",
    "a page of HTML": b"<!doctype html><html><body>Log in to this network</body></html>",
    "JSON cut short": EMPTY_LISTING[:-1],
    "JSON twice": EMPTY_LISTING * 2,
    "a byte order mark": b"\xef\xbb\xbf" + EMPTY_LISTING,
    "UTF-16": EMPTY_LISTING.decode().encode("utf-16"),
    "UTF-32": EMPTY_LISTING.decode().encode("utf-32"),
    "Latin-1": b'{"sha": "\xe9", "siblings": []}',
    "UTF-8 of half a surrogate pair": b'{"sha": "\xed\xa0\x80", "siblings": []}',
    "an escape of half a surrogate pair as sha": b'{"sha": "\\ud800", "siblings": []}',
    "a duplicate key": b'{"sha": "%s", "siblings": [], "siblings": []}' % SHA.encode(),
    "NaN in an unused key": b'{"x": NaN, "sha": "%s", "siblings": []}' % SHA.encode(),
    "1e999 in an unused key": b'{"x": 1e999, "sha": "%s", "siblings": []}' % SHA.encode(),
    "an integer of 5,000 digits": b'{"x": %s, "sha": "%s", "siblings": []}' % (b"9" * 5000, SHA.encode()),
    "a list": b"[]",
    "a string": b'"listing"',
    "a number": b"1",
    "null": b"null",
    "true": b"true",
    "an empty object": b"{}",
    "an error with status 200": b'{"error": "Repository not found"}',
    "NUL bytes": bytes(1000),
    "a control character in a string": b'{"sha": "\x01", "siblings": []}',
}
WEIGHTLESS = "a listing of nothing"
SOME_BODIES = ("HTML", "a list of nulls")
SOME_REQUESTS = ("history", "paths", "batch", "upload", "check", "commit")
HUGE = {
    "nested 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "objects nested 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested 100,000 deep and cut": b"[" * 100_000,
    "2,000,000 values": b'{"siblings": [' + b"0," * 2_000_000 + b"0]}",
    "2,000,000 empty lists": b"[" + b"[]," * 2_000_000 + b"[]]",
    "15 MB of one string": b'{"sha": "' + b"a" * 15_000_000 + b'"}',
    "15 MB of escapes": b'{"sha": "' + b"\\u0061" * 2_500_000 + b'"}',
    "15 MB of digits": b'{"sha": ' + b"1" * 15_000_000 + b"}",
    "500,000 keys": b"{" + b",".join(b'"%d": 0' % number for number in range(500_000)) + b"}",
    "40 MB of spaces": b" " * 40_000_000,
    "40 MB of a listing": b'{"sha": "%s", "siblings": [' % SHA.encode() + b'{"rfilename": "a", "size": 1},' * 1_300_000,
}
CASES = [Case(f"listing: {name}", "plan", LISTING, body(content)) for name, content in BODIES.items()]
CASES += [Case(f"listing: {WEIGHTLESS}", "plan", LISTING, body(EMPTY_LISTING), SourceError)]
SLOW = ("nested 100,000 deep", "500,000 keys")
CASES += [
    Case(f"listing: {name}", "plan", LISTING, body(content), alone=True, full=name in SLOW)
    for name, content in HUGE.items()
]
CASES += [
    Case(f"{what}: in answer {name}", operation, endpoint, body(content), (HubError, None),
        full=name not in SOME_BODIES or what not in SOME_REQUESTS)
    for what, operation, endpoint in (
        ("history", "stage", HISTORY), ("refs", "stage branch", REFS), ("paths", "stage", PATHS),
        ("card", "stage", CARD), ("preupload", "stage", PREUPLOAD), ("batch", "stage", BATCH),
        ("commit", "stage", COMMIT), ("new repository", "stage", CREATE), ("new branch", "stage", BRANCH),
        ("pull requests", "stage pull request", REFS),
    )
    for name, content in (("nothing", b""), ("a list", b"[]"), ("a null", b"null"), ("HTML", b"<html>"), ("a list of "
        "lists", b"[[[]]]"), ("a text", b'"x"'), ("a list of nulls", b"[null, null]"))
]  # fmt: skip
CASES += [
    Case("listing: 50,000 more files", "plan", LISTING, listed(lambda files: files.extend(
        {"rfilename": f"more/{number}.txt", "size": 3, "blobId": SHA} for number in range(50_000))), None, alone=True,
        full=True),
    Case("listing: half of a surrogate pair as a name", "quantize", LISTING, more("\ud800.txt"), None),
    Case("listing: another answer each time", "plan", LISTING,
        alternating(body(b"<html>"), status(503), None), None),
    Case("listing: an endless body", "plan", LISTING, endless(b"x" * 65536), alone=True),
    Case("listing: endless spaces in chunks", "plan", LISTING,
        endless(chunk(b" " * 65536), "Transfer-Encoding: chunked"), alone=True),
    Case("listing: endless values", "plan", LISTING, endless(b'{"rfilename": "a"},' * 4096), alone=True),
    Case("listing: an endless body of an error", "plan", LISTING, endless(b"x" * 65536, first="404 No"), alone=True),
    Case("listing: endless chunks of one byte", "plan", LISTING,
        endless(chunk(b" ") * 4096, "Transfer-Encoding: chunked"), HubError, alone=True, full=True),
    Case("listing: an endless extension of a chunk", "plan", LISTING,
        endless(b"x" * 65536, "Transfer-Encoding: chunked", begin=b"HTTP/1.1 200 OK\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n5;x=", name="extension"), HubError, alone=True),
    Case("listing: endless trailers", "plan", LISTING,
        endless(b"X-More: x\r\n" * 4096, begin=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\n", name="trailers"), HubError, alone=True),
    Case("listing: endless headers", "plan", LISTING,
        endless(b"X-More: x\r\n" * 4096, begin=b"HTTP/1.1 200 OK\r\n"), HubError, alone=True),
    Case("listing: an endless header", "plan", LISTING,
        endless(b"x" * 65536, begin=b"HTTP/1.1 200 OK\r\nX: "), HubError, alone=True),
    Case("listing: an endless status line", "plan", LISTING,
        endless(b"x" * 65536, begin=b"HTTP/1.1 200 "), HubError, alone=True),
    Case("listing: endless 100 Continue", "plan", LISTING,
        endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 2048, begin=b""), HubError, alone=True, full=True),
    Case("listing: endless 103 Early Hints", "plan", LISTING,
        endless(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 2048, begin=b""), HubError, alone=True,
        full=True),
    Case("listing: a body that drips", "plan", LISTING, endless(b" ", pause=0.1)),
    Case("listing: headers that drip", "plan", LISTING,
        endless(b"X-More: x\r\n", begin=b"HTTP/1.1 200 OK\r\n", pause=0.1), HubError, full=True),
    Case("object: an endless body", "download", OBJECT,
        endless(b"x" * 65536, "Content-Range: bytes 0-4999/5000", first="206 Partial Content"), alone=True),
    Case("object: an endless body of an error", "download", OBJECT, endless(b"x" * 65536, first="416 No"), HubError,
        alone=True),
    Case("git file: an endless body", "download", GIT_FILE, endless(b"x" * 65536), HubError, alone=True),
    Case("git file: an endless body of a refusal", "download", GIT_FILE, endless(b"x" * 65536, first="403 No"),
        HubError, alone=True),
    Case("head: a body after all", "download", HEAD, endless(b"x" * 65536), (HubError, None), alone=True),
    *(Case(f"{what}: an endless body{' of a refusal' if code[0] == '4' else ''}", operation, endpoint,
        endless(b" " * 65536, first=code), (HubError, None), alone=True,
        full=code[0] == "4" or what not in SOME_REQUESTS)
        for code in ("200 OK", "400 Bad Request") for what, operation, endpoint in (
            ("history", "stage", HISTORY), ("refs", "stage branch", REFS), ("paths", "stage", PATHS),
            ("card", "publish", CARD), ("preupload", "stage", PREUPLOAD), ("batch", "stage", BATCH),
            ("commit", "stage", COMMIT), ("upload", "stage", UPLOAD), ("check", "stage", CHECK),
            ("new repository", "stage", CREATE), ("new branch", "stage", BRANCH), ("deletion", "stage", DELETE))),
]  # fmt: skip

# -- encodings --------------------------------------------------------------------------------------------------

BOMBS = {kind: bomb(kind, 4000) for kind in ("gzip", "deflate")}
CASES += [
    *(Case(f"{what}: a bomb of {kind}, status {code}", operation, endpoint,
        body(content, code, Content_Encoding=kind), (HubError, None), alone=True, full=kind != "gzip")
        for kind, content in BOMBS.items() for what, operation, endpoint, code in (
            ("listing", "plan", LISTING, 200), ("listing", "plan", LISTING, 404), ("listing", "plan", LISTING, 503),
            ("head", "download", HEAD, 404), ("object", "download", OBJECT, 206), ("object", "download", OBJECT, 416),
            ("git file", "download", GIT_FILE, 200), ("git file", "download", GIT_FILE, 403))),
    *(Case(f"{what}: a bomb of gzip, status {code}", operation, endpoint,
        body(BOMBS["gzip"], code, Content_Encoding="gzip"), (HubError, None), alone=True,
        full=code == 400 or what not in SOME_REQUESTS)
        for code in (200, 400) for what, operation, endpoint in (
            ("history", "stage", HISTORY), ("refs", "stage branch", REFS), ("paths", "stage", PATHS),
            ("card", "publish", CARD), ("preupload", "stage", PREUPLOAD), ("batch", "stage", BATCH),
            ("commit", "stage", COMMIT), ("upload", "stage", UPLOAD), ("check", "stage", CHECK),
            ("new repository", "stage", CREATE), ("new branch", "stage", BRANCH), ("deletion", "stage", DELETE))),
    Case("listing: a bomb of gzip in gzip", "plan", LISTING,
        body(BOMBS["gzip"], Content_Encoding="gzip, gzip"), alone=True),
    Case("listing: a bomb as GZIP", "plan", LISTING, body(BOMBS["gzip"], Content_Encoding="GZIP"), alone=True),
    Case("listing: a bomb as x-gzip", "plan", LISTING, body(BOMBS["gzip"], Content_Encoding="x-gzip"), alone=True),
    Case("listing: a bomb by its transfer encoding", "plan", LISTING,
        raw("200 OK", "Transfer-Encoding: gzip, chunked", content=chunk(BOMBS["gzip"]) + chunk(b"")), HubError,
        alone=True),
    Case("listing: br", "plan", LISTING, body(b"\x8b\x02\x80" * 1000, Content_Encoding="br")),
    Case("listing: zstd", "plan", LISTING, body(b"\x28\xb5\x2f\xfd" * 1000, Content_Encoding="zstd")),
    Case("listing: an unknown encoding", "plan", LISTING, with_headers(Content_Encoding="x-mine")),
    Case("listing: identity", "plan", LISTING, with_headers(Content_Encoding="identity"), None),
    Case("listing: gzip without its header", "plan", LISTING, body(BOMBS["gzip"])),
    Case("listing: no type", "plan", LISTING, with_headers(Content_Type=""), None),
    Case("listing: an unknown charset", "plan", LISTING, with_headers(Content_Type="text/x; charset=rot13"), None),
]  # fmt: skip

# -- lengths ----------------------------------------------------------------------------------------------------

CASES += [
    Case("listing: a length too long", "plan", LISTING, raw("200 OK", "Content-Length: 99", content=b"{}"), HubError),
    Case("listing: a length too short", "plan", LISTING, with_headers(Content_Length="50")),
    Case("listing: a length of 0", "plan", LISTING, with_headers(Content_Length="0")),
    Case("listing: a negative length", "plan", LISTING, with_headers(Content_Length="-1"), HubError),
    Case("listing: a length of 1e3", "plan", LISTING, with_headers(Content_Length="1e3"), HubError),
    Case("listing: a length of 2**63", "plan", LISTING, with_headers(Content_Length=str(1 << 63)), HubError),
    Case("listing: a length of 5,000 digits", "plan", LISTING, with_headers(Content_Length="9" * 5000), HubError),
    Case("listing: two lengths", "plan", LISTING, with_headers(Content_Length="5, 6"), HubError),
    Case("listing: no length", "plan", LISTING, raw("200 OK", content=b"{}")),
    Case("listing: a chunk of no size", "plan", LISTING,
        raw("200 OK", "Transfer-Encoding: chunked", content=b"zz\r\n{}\r\n0\r\n\r\n"), HubError),
    Case("listing: a chunk of a negative size", "plan", LISTING,
        raw("200 OK", "Transfer-Encoding: chunked", content=b"-2\r\n{}\r\n0\r\n\r\n"), HubError),
    Case("listing: a chunk of a huge size", "plan", LISTING,
        raw("200 OK", "Transfer-Encoding: chunked", content=b"f" * 19 + b"\r\n{}"), HubError),
    Case("listing: an unknown transfer encoding", "plan", LISTING,
        raw("200 OK", "Transfer-Encoding: cow", content=b"{}"), HubError),
    Case("object: a length too long", "download", OBJECT, with_headers(Content_Length="999999"), (HubError, None)),
    Case("object: a length too short", "download", OBJECT, with_headers(Content_Length="3000"), (HubError, None)),
    Case("upload: no answer at all", "stage", UPLOAD, literal(b""), HubError),
    Case("commit: no answer to a commit that was made", "stage", COMMIT, after(literal(b"")), None),
    Case("commit: nonsense in answer to a commit that was made", "stage", COMMIT, after(body(b"<html>")), None),
    Case("commit: a refusal of a commit that was made", "stage", COMMIT, after(status(503)), (HubError, None)),
]  # fmt: skip

# -- ranges and contents ----------------------------------------------------------------------------------------

CASES += [
    *(Case(f"object: Content-Range {name}", "plan", OBJECT, with_headers(Content_Range=value))
        for name, value in {
            "of other bytes": "bytes 1-2/5000", "of another file": "bytes 0-4999/9999", "absent": "",
            "without bounds": "bytes */5000", "of 10,000 digits": f"bytes 0-{'9' * 10_000}/{'9' * 10_000}",
            "below 0": "bytes -5-10/16", "of another unit": "lines 0-4999/5000", "of an open end": "bytes 0-/5000",
            "twice": "bytes 0-1/2, bytes 0-1/2", "with NaN": "bytes 0-NaN/5000"}.items()),
    Case("object: Content-Range in other digits", "plan", OBJECT,
        with_headers(Content_Range="bytes \xb2-\xb3/\xb9"), UnusableAnswerError),
    Case("object: the whole file for a range", "verify", ("GET", "^/_cdn/me/result/"),
        lambda hub, call, honest: (call.headers.pop("range", None), honest())[1], (HubError, None)),
    Case("object: fewer bytes than told", "download", OBJECT, content_of(lambda data: data[:-1]), HubError),
    Case("object: more bytes than asked for", "download", OBJECT, content_of(lambda data: data + b"x"), HubError),
    Case("object: no bytes", "download", OBJECT, content_of(lambda data: b""), HubError),
    Case("object: several parts", "download", OBJECT, body(b"--x\r\n\r\n--x--", 206,
        Content_Type="multipart/byteranges; boundary=x")),
    Case("object: other bytes", "download", OBJECT, content_of(lambda data: data[:-1] + b"?"), DigestError),
    Case("object: other bytes of a shard", "quantize", OBJECT, content_of(lambda data: data[:-1] + b"?"), DigestError),
    Case("object: another header of a shard", "quantize", OBJECT,
        content_of(lambda data: data.replace(b"BF16", b"F16 ")), NemotronFp8Error),
    Case("object: another header at first", "quantize", OBJECT,
        content_of(lambda data: data.replace(b"up_proj", b"up_prox")), (DigestError, SourceError), times=1),
    Case("object: other bytes every second time", "download", OBJECT,
        alternating(content_of(lambda data: data[:-1] + b"?"), None), None),
    Case("git file: other bytes", "plan", GIT_FILE, content_of(lambda data: data.replace(b"llama", b"lhama")),
        DigestError),
    Case("git file: other bytes every second time", "quantize", GIT_FILE,
        alternating(content_of(lambda data: data.replace(b"llama", b"lhama")), None), None),
    Case("git file: a redirect", "plan", GIT_FILE, with_headers(Location="/elsewhere"), (HubError, None)),
    Case("result: other bytes of a shard's header", "verify", ("GET", "^/_cdn/me/result/"),
        content_of(lambda data: data.replace(b"F8_E4M3", b"F8_E5M2")), NOT_VERIFIED),
]  # fmt: skip

# -- addresses --------------------------------------------------------------------------------------------------

ADDRESSES: dict[str, str | Callable[[HostileHub], str]] = {
    "malformed": "http://[bad",
    "of a file": "file:///etc/passwd",
    "of FTP": "ftp://127.0.0.1/x",
    "of a script": "javascript:alert(1)",
    "of data": "data:application/json,{}",
    "without a host": "http:///x",
    "of no port": "http://127.0.0.1:99999/x",
    "of a negative port": "http://127.0.0.1:-1/x",
    "of a port that is text": "http://127.0.0.1:port/x",
    "with a zone": "http://[fe80::1%25eth0]:1/x",
    "of 10,000 characters": "/" + "x" * 10_000,
    "of 20,000 characters": "/" + "x" * 20_000,
    "with a tab": "/a\tb",
    "with a control character": "/a\x01b",
    "with an escape sequence": "/a\x1b[2Jb",
    "with Latin-1": "http://ex\xe4mple.invalid/",
    "with a space": "http://127.0.0.1 :80/x",
    "with a backslash": "http:\\\\127.0.0.1\\x",
    "that climbs": "/../../../etc/passwd",
    "of a fragment": "#x",
    "of a query": "?x=1",
}
CASES += [
    Case(f"{what}: a redirect to an address {name}", operation, endpoint,
        lambda hub, call, honest, to=to: with_headers(Location=to, Content_Length="0")(
            hub, call, lambda: status(302)(hub, call, honest)), (HubError, None), full=what == "head")
    for what, operation, endpoint in (("listing", "plan", LISTING), ("head", "download", HEAD))
    for name, to in ADDRESSES.items()
]  # fmt: skip


def moved(to: str | Callable[[HostileHub], str], code: int = 302) -> Answer:
    """Redirect."""
    return lambda hub, call, honest: with_headers(Location=to)(hub, call, lambda: status(code)(hub, call, honest))


CASES += [
    Case("listing: a redirect to nowhere", "plan", LISTING, body(b"", 302)),
    Case("listing: a redirect to itself", "plan", LISTING,
        lambda hub, call, honest: status(302, Location=call.path)(hub, call, honest)),
    Case("listing: a redirect to another host", "plan", LISTING,
        lambda hub, call, honest: honest() if call.host != "127.0.0.1" else moved(elsewhere(call.path))(
            hub, call, honest), (HubError, None)),
    Case("listing: a redirect to // another host", "plan", LISTING,
        moved(lambda hub: f"//localhost:{hub.port}/api/models/nv/source"), (HubError, None)),
    Case("listing: a redirect with a password", "plan", LISTING,
        moved(lambda hub: f"http://a:b@localhost:{hub.port}/x"), HubError),
    Case("listing: a redirect to another host and back", "plan", LISTING,
        lambda hub, call, honest: moved(f"http://{'localhost' if call.host == '127.0.0.1' else '127.0.0.1'}:{hub.port}"
            f"{call.path}")(hub, call, honest)),
    Case("head: a redirect to itself", "download", HEAD,
        lambda hub, call, honest: status(302, Location=call.path)(hub, call, honest)),
    Case("head: no redirect", "download", HEAD, status(200), (HubError, None)),
    Case("object: a redirect of the object", "download", OBJECT, moved("/x"), HubError),
    *(Case(f"{what}: a redirect to another host, {code}", operation, endpoint,
        lambda hub, call, honest, code=code: moved(elsewhere(call.path), code)(hub, call, honest), (HubError, None),
        full=code != 307 or what not in SOME_REQUESTS)
        for code in (302, 307, 308) for what, operation, endpoint in (
            ("history", "stage", HISTORY), ("refs", "stage branch", REFS), ("paths", "stage", PATHS),
            ("card", "publish", CARD), ("preupload", "stage", PREUPLOAD), ("batch", "stage", BATCH),
            ("commit", "stage", COMMIT), ("upload", "stage", UPLOAD), ("check", "stage", CHECK),
            ("new repository", "stage", CREATE), ("new branch", "stage", BRANCH), ("deletion", "stage", DELETE))),
    *(Case(f"batch: {verb} at an address {name}", "stage", BATCH,
        lambda hub, call, honest, verb=verb, to=to: in_first(
            lambda item: item.get("actions", {verb: {}})[verb].update(href=to), "objects")(hub, call, honest),
        (HubError, None), full=name not in ("malformed", "of a file", "with a control character"))
        for verb in ("upload", "verify") for name, to in ADDRESSES.items() if isinstance(to, str)),
    Case("batch: the check at another host", "stage", BATCH,
        lambda hub, call, honest: in_first(lambda item: item.get("actions", {"verify": {}})["verify"].update(
            href=hub.other_host("/_verify/me/target")), "objects")(hub, call, honest), (HubError, None)),
    Case("batch: headers with the upload", "stage", BATCH,
        in_first(lambda item: item.get("actions", {"upload": {}})["upload"].update(
            header={"Host": "evil", "X\r\nY": "\r\n"}), "objects"), (HubError, None)),
    *(Case(f"batch: parts of {name}", "stage", BATCH,
        lambda hub, call, honest, size=size: in_first(lambda item: item.get("actions", {"upload": {}})["upload"].update(
            header={"chunk_size": size, "1": hub.other_host("/x")}), "objects")(hub, call, honest), (HubError, None))
        for name, size in {"0 bytes": "0", "-1 bytes": "-1", "no number": "x", "null": None, "NaN": "NaN",
            "a huge size": "9" * 5000, "a byte": "1", "2**63 bytes": str(1 << 63)}.items()),
    *(Case(f"history: a link {name}", "publish over", ("GET", "^/api/models/me/result/commits/"),
        with_headers(Link=link), (HubError, None), full=name in ("to itself", "to another host", "of nothing"))
        for name, link in {
            "to itself": lambda hub: f'<{hub.endpoint}/api/models/me/result/commits/main>; rel="next"',
            "to another host": lambda hub: f'<{hub.other_host("/api/models/me/result/commits/main")}>; rel="next"',
            "to // another host": lambda hub: f'<//localhost:{hub.port}/api/models/me/result>; rel="next"',
            "to another repository": '</api/models/nv/source/commits/main>; rel="next"',
            "to a malformed address": '<http://[bad>; rel="next"', "to a file": '<file:///etc/passwd>; rel="next"',
            "of no form": "<", "of commas": "," * 5000, "of semicolons": "<a>" + ";" * 5000,
            "of nothing": "<>; rel=next",
            "of equals signs": "<a>; rel=" + "=" * 5000, "of 10,000 characters": f'</{"x" * 10_000}>; rel="next"',
            "with a control character": '</a\x01b>; rel="next"', "that climbs": '</../../x>; rel="next"',
            "of many links": ", ".join(f'</{number}>; rel="next"' for number in range(2000))}.items()),
]  # fmt: skip

# -- headers ----------------------------------------------------------------------------------------------------

WAITS = {
    "of 6,000 digits": "9" * 6000,
    "of 9 digits": "999999999",
    "below 0": "-5",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "1e999": "1e999",
    "a fraction": "0.5",
    "in other digits": "\xb2",
    "in the year 99999": "Fri, 31 Dec 99999 23:59:59 GMT",
    "in the year 9999": "Fri, 31 Dec 9999 23:59:59 GMT",
    "long ago": "Thu, 01 Jan 1970 00:00:00 GMT",
    "on no day": "Fri, 99 Foo 2026 99:99:99 GMT",
    "in a zone of 999999 hours": "Fri, 31 Dec 2026 23:59:59 +99999999",
    "of nothing": " ",
    "of commas": "," * 90,
    "of brackets": "(" * 90,
}
LIMITS = {
    "nonsense": "x",
    "of huge numbers": f'"api";r=0;t={"9" * 6000}',
    "of 9 digits": '"api";r=0;t=999999999',
    "below 0": '"api";r=-1;t=-1',
    "NaN": '"api";r=NaN;t=NaN',
    "of quotes": '"' * 5000,
    "of semicolons": '"api"' + ";" * 5000 + "r",
    "of spaces": '"api"' + " " * 5000 + ";r=0",
}
CASES += [
    *(Case(f"listing: {code} and a wait {name}", "plan", LISTING, raw(f"{code} X", f"Retry-After: {wait}"),
        HubError if name == "in other digits" else RateLimitedError if code == 429 else NoProgressError,
        full=code == 503)
        for code in (429, 503) for name, wait in WAITS.items()),
    *(Case(f"listing: a rate limit {name}", "plan", LISTING, raw("429 X", f"RateLimit: {limit}"), RateLimitedError)
        for name, limit in LIMITS.items()),
    *(Case(f"{what}: 429 and a wait {name}", "stage", endpoint, raw("429 X", f"Retry-After: {wait}"), HubError)
        for what, endpoint in (("preupload", PREUPLOAD), ("upload", UPLOAD))
        for name, wait in WAITS.items() if name in ("of 6,000 digits", "of 9 digits", "in the year 9999")),
    *(Case(f"{what}: a rate limit of 9 digits", "stage", endpoint, raw("429 X", f"RateLimit: {LIMITS['of 9 digits']}"),
        (HubError, "") if what == "check" else HubError)  # the object is there without the check
        for what, endpoint in (("preupload", PREUPLOAD), ("batch", BATCH), ("upload", UPLOAD),
            ("commit", COMMIT), ("check", CHECK), ("new repository", CREATE), ("new branch", BRANCH))),
    *(Case(f"head: an entity tag {name}", "download", HEAD, with_headers(X_Linked_Etag=tag, ETag=tag),
        UnusableAnswerError)
        for name, tag in {"of nothing": "", "of another file": f'"{"0" * 64}"', "of quotes": '""""', "W/": "W/",
            "of 10,000 characters": "x" * 10_000, "with a control character": '"\x01"', "in Latin-1": '"\xe9"',
            "as a pattern": '"*"'}.items()),
    Case("head: a weak entity tag", "download", HEAD,
        lambda hub, call, honest: with_headers(X_Linked_Etag="W/" + honest().headers["X-Linked-Etag"])(
            hub, call, honest), None),
    Case("head: another commit", "download", HEAD, with_headers(X_Repo_Commit=SHA), MissingRevisionError),
    Case("head: a commit that is none", "download", HEAD, with_headers(X_Repo_Commit="\x1b[2J"), HubError),
    *(Case(f"listing: {name}", "plan", LISTING, answer, ends) for name, answer, ends in (
        ("1,000 headers", raw("200 OK", *["X-More: x"] * 1000, content=b"{}"), UnusableAnswerError),
        ("a header of 90 kB", raw("200 OK", f"X: {'x' * 90_000}", content=b"{}"), UnusableAnswerError),
        ("a header of 200 kB", raw("200 OK", f"X: {'x' * 200_000}", content=b"{}"), HubError),
        ("a header with NUL", raw("200 OK", "X: a\0b", content=b"{}"), HubError),
        ("a header without a name", raw("200 OK", ": x", content=b"{}"), HubError),
        ("a header without a colon", raw("200 OK", "nonsense", content=b"{}"), HubError),
        ("a folded header", raw("200 OK", "X: a\r\n b", content=b"{}"), HubError),
        ("1,000 cookies", raw("200 OK", *[f"Set-Cookie: c{n}=x; Domain=.0.0.1" for n in range(1000)],
            content=b"{}"), UnusableAnswerError),
        ("a malformed cookie", raw("404 X", "Set-Cookie: =;;; Expires=x; Domain=[", content=b"{}"), HubError),
        ("a warning", with_headers(X_HF_Warning="a; b\x1b[2J"), None),
        ("another protocol", literal(b"SSH-2.0-OpenSSH_9.6\r\n"), HubError),
        ("HTTP/0.9", literal(EMPTY_LISTING), HubError),
        ("HTTP/2", literal(b"HTTP/2 200 OK\r\n\r\n{}"), HubError),
        ("no reason", literal(b"HTTP/1.1 200\r\n\r\n{}"), HubError),
        ("a reason of 10,000 characters", raw("200 " + "x" * 10_000, content=b"{}"), UnusableAnswerError),
        ("a reason with a control character", raw("404 \x1b[2J", content=b"{}"), HubError),
        ("a status of 2 digits", literal(b"HTTP/1.1 20 OK\r\n\r\n{}"), HubError),
        ("a status of 4 digits", literal(b"HTTP/1.1 2000 OK\r\n\r\n{}"), HubError),
        ("a status that is text", literal(b"HTTP/1.1 abc OK\r\n\r\n{}"), HubError),
        ("a message with control characters", raw("400 X", "X-Error-Message: \x1b[2J\x07", content=b"{}"), HubError),
        ("a message in Latin-1", raw("400 X", "X-Error-Message: \xe9\xff", content=b"{}"), HubError),
        ("a message of 60,000 characters", raw("400 X", f"X-Error-Message: {'x' * 60_000}", content=b"{}"), HubError),
        ("an unknown error code", status(400, X_Error_Code="NoSuch\xe9"), HubError),
        ("an error that is a list", body(b'{"error": [1, {}]}', 400), HubError),
        ("errors that are null", body(b'{"errors": null}', 400), HubError),
        ("errors of another form", body(b'{"errors": [null, 1, {"message": 5}]}', 422), HubError),
        ("an error nested 100,000 deep", body(HUGE["nested 100,000 deep"], 400), HubError),
        ("an error of half a surrogate pair", body(b'{"error": "\\ud800"}', 400), HubError),
        ("an error of 5,000 digits", body(b'{"error": ' + b"9" * 5000 + b"}", 400), HubError),
    )),
]  # fmt: skip

# -- statuses ---------------------------------------------------------------------------------------------------

STATUSES: dict[int, Ending] = {
    201: None, 202: None, 203: None, 206: None, 226: None,  # with the right body
    **dict.fromkeys((101, 204, 205, 300, 304, 305, 306, 400, 405, 406, 409, 411, 412, 414, 415, 417, 418, 421, 422,
        423, 424, 426, 428, 431, 444, 451, 498), UnusableAnswerError),
    401: TokenRejectedError, 402: StorageFullError, 403: NotAllowedError, 404: UnusableAnswerError,
    407: UnusableAnswerError, 410: UnusableAnswerError, 413: StorageFullError, 416: UnusableAnswerError,
    408: NoProgressError, 425: NoProgressError, 429: RateLimitedError, 507: StorageFullError,
    **dict.fromkeys((500, 501, 502, 503, 504, 505, 506, 508, 509, 510, 511, 520, 530, 599, 600, 700, 999),
        NoProgressError),
}  # fmt: skip
CASES += [
    Case(f"listing: status {code}", "plan", LISTING,
        edited(lambda value: None) if end is None else status(code), (end, HubError)) for code, end in STATUSES.items()
]  # fmt: skip
CASES += [
    Case(f"{what}: status {code}", operation, endpoint, status(code), (HubError, None),
        full=code != 206 or what not in SOME_REQUESTS)
    for code in (204, 206, 304, 418, 451, 507, 999) for what, operation, endpoint in (
        ("head", "download", HEAD), ("object", "download", OBJECT), ("git file", "download", GIT_FILE),
        ("history", "stage", HISTORY), ("refs", "stage branch", REFS), ("paths", "stage", PATHS),
        ("card", "publish", CARD), ("preupload", "stage", PREUPLOAD), ("batch", "stage", BATCH),
        ("commit", "stage", COMMIT), ("upload", "stage", UPLOAD), ("check", "stage", CHECK),
        ("new repository", "stage", CREATE), ("new branch", "stage", BRANCH), ("deletion", "stage", DELETE))
]  # fmt: skip

# -- values -----------------------------------------------------------------------------------------------------

SHAS = {
    "39 digits": "a" * 39, "41 digits": "a" * 41, "upper case": "A" * 40, "a path": "../" * 13 + "a",
    "a command": "$(touch /tmp/x);`id`|" + "a" * 19, "a control character": "a" * 39 + "\x1b",
    "a newline at the end": "a" * 40 + "\n", "NUL": "\0" * 40, "other digits": "\u0663" * 40,
    "10,000 characters": "a" * 10_000, "nothing": "", "a branch": "main",
}  # fmt: skip
NAMES = {
    "climbs": "../x.txt", "climbs far": "../" * 20 + "etc/passwd", "climbs inside": "a/../../x.txt", "is ..": "..",
    "is .": ".", "is empty": "", "is absolute": "/etc/passwd", "has NUL": "a\0.txt", "has a newline": "a\nb.txt",
    "has an escape sequence": "\x1b[2J.txt", "is a path of Windows": "C:\\x.txt", "has backslashes": "..\\..\\x.txt",
    "is of 10,000 characters": "x" * 10_000, "is of 3,000 folders": "a/" * 3000 + "x", "is an option": "-rf",
    "ends in a slash": "a/", "has two slashes": "a//b.txt", "is the marker of a run": ".nemotron-fp8/job.json",
    "reverses text": "\u202etxt.exe", "is a query": "a.txt?x=1#y", "is quoted": "%2e%2e%2fx.txt",
}  # fmt: skip
SIZES: dict[str, Any] = {
    "2**63": 1 << 63, "2**64": 1 << 64, "2**60": 1 << 60, "-1": -1, "1.5": 1.5, "a text": "5", "true": True,
    "null": None, "of 200 digits": int("9" * 200),
}  # fmt: skip
CASES += [
    *(Case(f"listing: a sha of {name}", "plan", LISTING, edited(lambda value, sha=sha: {**value, "sha": sha}))
        for name, sha in SHAS.items()),
    *(Case(f"listing: a file whose name {name}", "quantize", LISTING, more(path), (None, HubError, SourceError))
        for name, path in NAMES.items()),
    *(Case(f"listing: a shard whose name {name}", "quantize", LISTING, renamed(path), (HubError, SourceError),
        full=True)
        for name, path in NAMES.items()),
    *(Case(f"listing: a size {name}", "plan", LISTING,
        listed(lambda files, size=size: shard_of(files).update(size=size)), (HubError, SourceError))
        for name, size in SIZES.items()),
    *(Case(f"listing: an object's size {name}", "plan", LISTING,
        listed(lambda files, size=size: shard_of(files)["lfs"].update(size=size)), (HubError, SourceError, None),
        full=True)
        for name, size in SIZES.items()),
    Case("listing: a size that is too small", "quantize", LISTING,
        listed(lambda files: shard_of(files).update(size=9)), (HubError, SourceError)),
    Case("listing: a size that is too large", "quantize", LISTING,
        listed(lambda files: shard_of(files).update(size=1 << 50)), (HubError, SourceError)),
    Case("listing: a side file of 2**59 bytes", "quantize", LISTING, more("a.txt", size=1 << 59),
        (None, NemotronFp8Error)),
    Case("listing: a config of 2**50 bytes", "plan", LISTING,
        listed(lambda files: next(f for f in files if f["rfilename"] == "config.json").update(size=1 << 50)),
        (HubError, SourceError)),
    Case("listing: an object without a digest", "quantize", LISTING,
        listed(lambda files: shard_of(files).pop("lfs")), (HubError, SourceError)),
    Case("listing: a git file without a digest", "plan", LISTING,
        listed(lambda files: [file.pop("blobId") for file in files]), (HubError, SourceError)),
    Case("listing: another digest", "quantize", LISTING,
        listed(lambda files: shard_of(files)["lfs"].update(sha256="0" * 64)), HubError),
    Case("listing: the same file twice", "quantize", LISTING,
        listed(lambda files: files.append({**shard_of(files), "size": 9})), (HubError, SourceError)),
    Case("listing: the same file twice, alike", "quantize", LISTING,
        listed(lambda files: files.append(shard_of(files))), (None, HubError)),
    Case("listing: a code file that is a config", "quantize", LISTING, more("config.py"),
        (None, HubError, SourceError)),
    Case("listing: another commit each time", "quantize", LISTING,
        alternating(None, edited(lambda value: {**value, "sha": SHA})), (None, HubError, SourceError)),
    Case("listing of the destination: of other files", "stage", STAGING,
        edited(lambda value: {**value, "siblings": []}), NemotronFp8Error),
    Case("listing of the destination: weights", "stage", STAGING,
        edited(lambda value: value["siblings"].append({"rfilename": "a.bin", "size": 1, "blobId": SHA})), HubError),
    Case("listing of the destination: another commit each time", "stage", STAGING,
        alternating(None, edited(lambda value: {**value, "sha": SHA})), (HubError, None)),
]  # fmt: skip

# -- commits and uploads ----------------------------------------------------------------------------------------


def gone(item: dict[str, Any], *keys: str) -> None:
    for key in keys:
        item.pop(key, None)


CASES += [
    Case("paths: another digest", "stage", PATHS, in_first(lambda item: item["lfs"].update(oid="0" * 64)),
        StagingMismatchError),
    Case("paths: another size", "stage", PATHS, in_first(lambda item: item["lfs"].update(size=1)),
        StagingMismatchError),
    Case("paths: a file of git", "stage", PATHS, in_first(lambda item: gone(item, "lfs")), StagingMismatchError),
    Case("paths: nothing", "stage", PATHS, body(b"[]"), StagingMismatchError),
    Case("paths: another file", "stage", PATHS, in_first(lambda item: item.update(path="../x")), StagingMismatchError),
    Case("history: nothing", "stage", HISTORY, body(b"[]"), StagingBusyError),
    Case("history: of somebody else", "stage", HISTORY, in_first(lambda item: item.update(title="mine")),
        StagingBusyError),
    Case("history: an id that is a path", "stage", HISTORY, in_first(lambda item: item.update(id="../../x")),
        UnusableAnswerError),
    Case("history: another id", "stage", HISTORY, in_first(lambda item: item.update(id=SHA)), HubError),
    Case("refs: a pull request that is a path", "stage pull request", REFS,
        edited(lambda value: {**value, "pullRequests": [{"ref": "refs/pr/../../x"}]}), UnusableAnswerError),
    Case("refs: a pull request of 400 digits", "stage pull request", REFS,
        edited(lambda value: {**value, "pullRequests": [{"ref": "refs/pr/" + "9" * 400}]}), UnusableAnswerError),
    Case("refs: 100,000 pull requests", "stage pull request", REFS,
        edited(lambda value: {**value, "pullRequests": [{"ref": f"refs/pr/{n}"} for n in range(100_000)]}),
        HubError, alone=True, full=True),
    Case("refs: the branch is a tag", "stage branch", REFS,
        edited(lambda value: {**value, "branches": [], "tags": [{"name": "fp8", "ref": "refs/tags/fp8"}]}), HubError),
    Case("preupload: every file is ignored", "stage", PREUPLOAD,
        edited(lambda value: [item.update(shouldIgnore=True) for item in value["files"]] and None), HubError),
    Case("preupload: the shard is a file of git", "stage", PREUPLOAD,
        edited(lambda value: [item.update(uploadMode="regular") for item in value["files"]] and None), HubError),
    Case("preupload: an unknown mode", "stage", PREUPLOAD,
        in_first(lambda item: item.update(uploadMode="carrier pigeon"), "files"), HubError),
    Case("preupload: other paths", "stage", PREUPLOAD,
        in_first(lambda item: item.update(path="../x"), "files"), HubError),
    Case("preupload: no files", "stage", PREUPLOAD, body(b'{"files": []}'), HubError),
    Case("batch: no objects", "stage", BATCH, body(b'{"objects": []}'), HubError),
    Case("batch: an object without its size", "stage", BATCH, in_first(lambda item: gone(item, "size"), "objects"),
        HubError),
    Case("batch: another object", "stage", BATCH, in_first(lambda item: item.update(oid="0" * 64), "objects"),
        HubError),
    Case("batch: an error for an object", "stage", BATCH,
        in_first(lambda item: item.update(error={"code": 507, "message": "no"}), "objects"), HubError),
    Case("batch: the objects are there already, they say", "stage", BATCH,
        in_first(lambda item: gone(item, "actions"), "objects"), HubError),
    Case("batch: an unknown transfer", "stage", BATCH, edited(lambda value: {**value, "transfer": "../x"}),
        (HubError, None)),
    Case("batch: xet", "stage", BATCH, edited(lambda value: {**value, "transfer": "xet"}), (HubError, None)),
    Case("check: not found", "stage", CHECK, status(404), HubError),
    Case("commit: nothing in it", "stage", COMMIT, after(body(b"{}")), (None, HubError)),
    Case("commit: an id that is no text", "stage", COMMIT, replaced(("commitOid",), "[1]"), (None, HubError)),
    Case("commit: an address that is malformed", "stage", COMMIT, replaced(("commitUrl",), '"http://[bad"'),
        (None, HubError)),
    Case("commit: done, it says", "stage", COMMIT,
        body(b'{"commitOid": "%s", "commitUrl": "http://x/y/z/commit/1", "success": true}' % SHA.encode()), HubError),
    Case("commit: done, it says of the last one", "stage", ("POST", "/commit/main$"),
        body(b'{"commitOid": "%s", "commitUrl": "http://x/y/z/commit/1", "success": true}' % SHA.encode()), HubError),
    *(Case(f"commit: a pull request at {name}", "stage pull request", COMMIT, replaced(("pullRequestUrl",), text),
        (None, HubError))
        for name, text in {"null": "null", "a path": '"../../x"', "no number": '"http://x/y/z/discussions/x"',
            "a huge number": f'"http://x/y/z/discussions/{"9" * 5000}"', "a list": "[]", "nothing": '""',
            "a malformed address": '"http://[bad/discussions/1"', "no key": None}.items()),
    Case("new repository: done, it says", "stage", CREATE, body(b'{"url": "http://x/me/target"}'), HubError),
    Case("new repository: of another name", "stage", CREATE, edited(lambda value: {**value, "url": "http://[bad"}),
        (None, HubError)),
    Case("new repository: exists, it says", "stage", CREATE, status(409), HubError),
    Case("new branch: done, it says", "stage", BRANCH, body(b"{}"), HubError),
    Case("new branch: exists, it says", "stage", BRANCH, status(409), HubError),
    Case("new branch: a commit is missing, it says", "stage", BRANCH, status(404, X_Error_Code="RevisionNotFound"),
        MissingRevisionError),
    Case("deletion: no such branch, it says", "stage", DELETE, status(404, X_Error_Code="RevisionNotFound"), None),
    Case("deletion: a refusal", "stage", DELETE, status(403), (HubError, None)),
    Case("card: faults", "publish", CARD, body(b'{"errors": [{"message": "no\\u001b[2J"}]}', 400), CardRefusedError),
    Case("card: faults of another form", "publish", CARD, body(b'{"errors": [1, null, {"x": 1}]}', 400),
        (HubError, None)),
    Case("card: 1,000,000 characters of a fault", "publish", CARD,
        body(b'{"errors": [{"message": "%s"}]}' % (b"x" * 1_000_000), 400), (HubError, None)),
]  # fmt: skip

# -- the token ----------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[str], str]] = {
    "as it is": lambda token: token,
    "percent-encoded": lambda token: quote(token, safe=""),
    "percent-encoded in every character": lambda token: "".join(f"%{ord(c):02x}" for c in token),
    "cut by the limit of a message": lambda token: " " * (5000 - len(token) + 4) + token,
    "cut by the limit of what is shown": lambda token: "x" * (500 - len(token) + 4) + token,
    "between letters": lambda token: f"abc{token}def",
}


def echo(make: Callable[[str], Answer]) -> Answer:
    """Answer with the token of the request."""
    return lambda hub, call, honest: make(call.token or "no token")(hub, call, honest)


def echoes(form: Callable[[str], str], code: int) -> dict[str, Answer]:
    """Return answers that hold a form of the token, in each place that a message may come from."""
    return {
        "a header": echo(lambda t: raw(f"{code} X", f"X-Error-Message: {form(t)}", content=b"{}")),
        "an error": echo(lambda t: body(json.dumps({"error": form(t)}).encode(), code)),
        "errors": echo(lambda t: body(json.dumps({"errors": [{"message": form(t)}]}).encode(), code)),
        "a text": echo(lambda t: body(form(t).encode(), code, Content_Type="text/plain")),
        "the reason": echo(lambda t: raw(f"{code} {form(t)}", content=b"{}")),
        "an escaped error": echo(lambda t: body(
            b'{"error": "%s"}' % "".join(f"\\u{ord(c):04x}" for c in form(t)).encode(), code)),
    }  # fmt: skip


CASES += [
    Case(f"token {'without prefix ' if token == PLAIN else ''}{kind}, in {place}, {what} {code}", operation, endpoint,
        answer, HubError, token=token, full=what == "preupload" or place not in ("a header", "an escaped error"))
    for token in (TOKEN, PLAIN) for kind, form in FORMS.items()
    for what, operation, endpoint, code in (("listing", "plan", LISTING, 400), ("preupload", "stage", PREUPLOAD, 403))
    for place, answer in echoes(form, code).items()
]  # fmt: skip
CASES += [
    Case(f"token {'without prefix ' if token == PLAIN else ''}{name}", operation, endpoint, answer, end, token=token)
    for token in (TOKEN, PLAIN) for name, operation, endpoint, answer, end in (
        ("in the sha", "plan", LISTING, echo(lambda t: edited(lambda value: {**value, "sha": t})), HubError),
        ("as a key", "plan", LISTING, echo(lambda t: edited(lambda value: {t: 1, "sha": 1})), HubError),
        ("as a duplicate key", "plan", LISTING,
            echo(lambda t: body(b'{"%s": 1, "%s": 2}' % (t.encode(), t.encode()))), HubError),
        ("instead of JSON", "plan", LISTING, echo(lambda t: body(t.encode())), HubError),
        ("in the name of a file", "plan", LISTING, echo(lambda t: renamed(f"{t.replace('/', '-')}.safetensors")),
            (HubError, SourceError)),
        ("in the name of a bad file", "plan", LISTING, echo(lambda t: listed(lambda files: [
            shard_of(files).update(rfilename=f"{t.replace('/', '-')}.safetensors"), files.remove(next(
                f for f in files if f["rfilename"].endswith("index.json")))])), (HubError, SourceError)),
        ("in a redirect", "plan", LISTING, echo(lambda t: moved(f"http://[{t}")), HubError),
        ("in an entity tag", "download", HEAD, echo(lambda t: with_headers(X_Linked_Etag=t)), HubError),
        ("in a commit of a header", "download", HEAD, echo(lambda t: with_headers(X_Repo_Commit=t)), HubError),
        ("in a range", "plan", OBJECT, with_headers(Content_Range=f"bytes {token}"), HubError),
        ("in an encoding", "plan", LISTING, echo(lambda t: with_headers(Content_Encoding=t)), HubError),
        ("in a wait", "plan", LISTING, echo(lambda t: raw("429 X", f"Retry-After: {t}")), HubError),
        ("in an error code", "plan", LISTING, echo(lambda t: status(404, X_Error_Code=t)), HubError),
        ("in a malformed header", "plan", LISTING, echo(lambda t: raw("200 OK", f"{t}\x01: x")), HubError),
        ("in a malformed status", "plan", LISTING, echo(lambda t: literal(f"{t}\r\n\r\n".encode())), HubError),
        ("in a malformed chunk", "plan", LISTING,
            echo(lambda t: raw("200 OK", "Transfer-Encoding: chunked", content=f"{t}\r\n".encode())), HubError),
        ("in a malformed length", "plan", LISTING, echo(lambda t: raw("200 OK", f"Content-Length: {t}")), HubError),
        ("in a warning", "plan", LISTING, echo(lambda t: with_headers(X_HF_Warning=f"{len(t)}; {t}")), None),
        ("in a cookie", "plan", LISTING, echo(lambda t: with_headers(Set_Cookie=f"a={t}; Domain=localhost")), None),
        ("in a fault of a card", "publish", CARD,
            echo(lambda t: body(json.dumps({"errors": [{"message": t}]}).encode(), 400)), CardRefusedError),
        ("in an error of a batch", "stage", BATCH, echo(lambda t: in_first(
            lambda item: item.update(error={"code": 422, "message": t}), "objects")), HubError),
        ("in a pull request", "stage pull request", COMMIT, echo(lambda t: replaced(
            ("pullRequestUrl",), json.dumps(f"http://x/y/z/discussions/{t}"))), (HubError, None)),
        ("in the history", "stage", HISTORY, echo(lambda t: in_first(lambda item: item.update(title=t))), HubError),
        ("in an address of an upload", "stage", BATCH, echo(lambda t: in_first(
            lambda item: item.get("actions", {"upload": {}})["upload"].update(href=f"http://[{t}"), "objects")),
            HubError),
        ("in a mode of an upload", "stage", PREUPLOAD,
            echo(lambda t: in_first(lambda item: item.update(uploadMode=t), "files")), HubError),
    )
    # A token with a slash cannot be the name of a file.
    if token == TOKEN or "the name of" not in name
]  # fmt: skip

# -- every field --------------------------------------------------------------------------------------------------

VALUES = {
    "null": "null", "true": "true", "1.5": "1.5", "a text": '"x"', "[]": "[]", "{}": "{}", "[null]": "[null]",
    "2**63": str(1 << 63), "400 digits": "9" * 400, "-1": "-1", "-0": "-0", "NaN": "NaN", "-Infinity": "-Infinity",
    "1e999": "1e999", "a surrogate": '"\\ud800"', "missing": None,
}  # fmt: skip
FIELDS: dict[str, tuple[str, tuple[str, str], tuple[str | int, ...]]] = {
    **{f"listing {'.'.join(map(str, keys))}": ("plan", LISTING, keys) for keys in (
        ("sha",), ("siblings",), ("siblings", 0), ("private",), ("gated",), ("siblings", 3, "rfilename"),
        ("siblings", 2, "size"), ("siblings", 2, "lfs"), ("siblings", 2, "lfs", "sha256"),
        ("siblings", 2, "lfs", "size"), ("siblings", 1, "blobId"), ("siblings", 1, "size"))},
    **{f"history {key}": ("stage", HISTORY, (0, key)) for key in ("id", "title", "message")},
    **{f"refs {'.'.join(map(str, keys))}": ("stage branch", REFS, keys) for keys in (
        ("branches",), ("tags",), ("branches", 0), ("branches", 0, "name"), ("branches", 0, "ref"))},
    "pull requests": ("stage pull request", REFS, ("pullRequests",)),
    **{f"paths {'.'.join(map(str, keys))}": ("stage", PATHS, (0, *keys)) for keys in (
        ("path",), ("lfs",), ("lfs", "oid"), ("lfs", "size"))},
    **{f"preupload {'.'.join(map(str, keys))}": ("stage", PREUPLOAD, keys) for keys in (
        ("files",), ("files", 0), ("files", 0, "path"), ("files", 0, "uploadMode"), ("files", 0, "shouldIgnore"))},
    **{f"batch {'.'.join(map(str, keys))}": ("stage", BATCH, keys) for keys in (
        ("transfer",), ("objects",), ("objects", 0), ("objects", 0, "oid"), ("objects", 0, "size"),
        ("objects", 0, "actions"), ("objects", 0, "actions", "upload"), ("objects", 0, "actions", "upload", "href"),
        ("objects", 0, "actions", "verify"), ("objects", 0, "actions", "verify", "href"))},
    **{f"commit {key}": ("stage", COMMIT, (key,)) for key in ("commitOid", "commitUrl", "success")},
    "new repository url": ("stage", CREATE, ("url",)),
}  # fmt: skip


# -- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A server for all tests, each with a Hub of its own: every new session of the client reads all certificates."""
    with pytest.MonkeyPatch.context() as patch, HubServer(HostileHub(tmp_path_factory.mktemp("none"))) as server:
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.getbasetemp() / "no-token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setenv("TEST_HUB_TOKEN", TOKEN)
        close_session()
        yield server
    close_session()


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> HostileHub:
    return new_hub(server, tmp_path / "hub")


def new_hub(server: HubServer, folder: Path) -> HostileHub:
    """Return a new Hub behind a server."""
    hub = HostileHub(folder)
    hub.port, server.hub = server.hub.port, hub
    return hub


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and its conversion."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint(folder / "source", 1)
    quantize_repo(str(folder / "source"), str(folder / "wanted"), device="cpu", threads=1)
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """The folder of a run, with the checkpoint, its conversion, and nothing else."""
    (tmp_path / "run").mkdir()
    for name in ("source", "wanted"):
        (tmp_path / "run" / name).symlink_to(made / name)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def alone() -> Iterator[Connection]:
    """A process that performs runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=perform_all, args=(theirs,), daemon=True)
    process.start()
    yield ours
    ours.send(None)
    process.join(5)
    if process.is_alive():
        process.kill()


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare(hub: HostileHub, folder: Path, operation: str, token: str) -> None:
    """Fill the Hub as the operation needs it."""
    hub.secret = token
    if hub.store.token(token) is None:
        hub.store.add_token(token, "me")
    hub.store.seed("nv/source", files_in(folder / "source"))
    if operation in ("verify", "publish over"):
        hub.store.seed("me/result", files_in(folder / "wanted"))
    if operation in ("stage branch", "stage pull request"):
        hub.store.create("me/target")


def check(hub: HostileHub, run: Run, outcome: Outcome, ends: tuple[Ending, ...]) -> None:
    """Check the end of an operation: its error or its result, and what it left."""
    allowed = [end.__name__ if isinstance(end, type) else end or "no error" for end in ends]
    assert any(name in allowed for name in outcome.kinds or [outcome.wrong or "no error"]), (allowed, outcome.error)
    assert outcome.leaks == [], outcome.error
    assert hub.leaked == []
    assert hub.unstopped == []
    assert hub.sent <= MAX_ANSWER
    assert outcome.seconds < MAX_SECONDS
    assert outcome.slept <= LONGEST_WAIT
    assert not run.work.exists() or list(run.work.iterdir()) == []
    left = {path.name for path in run.folder.iterdir()} - {"source", "wanted", "work"}
    # A conversion that has begun keeps its finished shards beside the destination.
    results = {"result.partial"} if outcome.error else {"result"}
    assert left <= results if run.operation == "quantize" else not left
    hub.rules.clear()
    check_repository(hub, run, bool(outcome.error))


def check_repository(hub: HostileHub, run: Run, failed: bool) -> None:
    """Check that the destination is complete after success, and unchanged or complete after an error."""
    if run.operation.startswith("publish"):
        repo, complete = (
            ("me/result" if run.operation == "publish over" else "me/target"),
            files_in(run.folder / "wanted"),
        )
        before = complete if run.operation == "publish over" else {}
    elif run.operation.startswith("stage"):
        repo, complete, before = "me/target", STAGED, {}
    else:
        return
    found = {}
    if hub.store.find(repo) is not None:
        revision = {"stage branch": "fp8", "stage pull request": "refs/pr/1"}.get(run.operation, "main")
        exists = {f"refs/heads/{revision}", revision} & set(hub.store.repo(repo).refs)
        found = {name: content for name, content in (hub.files(repo, revision) if exists else {}).items()
            if name != ".gitattributes"}  # fmt: skip
    if failed and (found == before or run.operation == "stage pull request"):
        return
    changing = {"README.md", "nemotron_fp8.json"} if run.operation.startswith("publish") else set()
    assert found.keys() == complete.keys()
    assert [name for name in found if found[name] != complete[name] and name not in changing] == []


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.faults] * case.full) for case in CASES]
)
def test_a_hostile_answer(hub: HostileHub, folder: Path, request: pytest.FixtureRequest, case: Case) -> None:
    prepare(hub, folder, case.operation, case.token)
    hub.rules.append(Rule(*case.endpoint, case.answer, case.times, case.skip))
    run = Run(case.operation, hub.endpoint, case.token, folder)
    if case.alone:
        process: Connection = request.getfixturevalue("alone")
        process.send(run)
        assert process.poll(60)
        outcome: Outcome = process.recv()
    else:
        outcome = perform(run)
    assert hub.rules[0].seen > 0, "the answer was not asked for"
    check(hub, run, outcome, case.end if isinstance(case.end, tuple) else (case.end,))
    assert outcome.grown < MAX_GROWTH


@pytest.mark.parametrize("field", [name for name in FIELDS if not name.startswith("listing")])
def test_a_field_without_its_value(server: HubServer, tmp_path: Path, made: Path, field: str) -> None:
    meet_values(server, tmp_path, made, field, ("null", "missing"))


@pytest.mark.faults
@pytest.mark.parametrize(
    "field", [pytest.param(name, marks=[pytest.mark.faults] * (not name.startswith("listing"))) for name in FIELDS]
)
def test_a_field_of_another_type(server: HubServer, tmp_path: Path, made: Path, field: str) -> None:
    meet_values(server, tmp_path, made, field, tuple(VALUES))


def meet_values(server: HubServer, tmp_path: Path, made: Path, field: str, values: tuple[str, ...]) -> None:
    """Meet each value in the place of a field, each on a Hub of its own behind the same server."""
    operation, endpoint, keys = FIELDS[field]
    for number, name in enumerate(values):
        text = VALUES[name]
        again = new_hub(server, tmp_path / f"hub-{number}")
        (folder := tmp_path / f"run-{number}").mkdir()
        for given in ("source", "wanted"):
            (folder / given).symlink_to(made / given)
        prepare(again, folder, operation, TOKEN)
        again.rules.append(Rule(*endpoint, replaced(keys, text)))
        run = Run(operation, again.endpoint, TOKEN, folder)
        outcome = perform(run)
        assert again.rules[0].seen > 0, name
        try:
            check(again, run, outcome, (HubError, SourceError, None))
        except AssertionError as failed:
            raise AssertionError(f"{field} is {name}: {failed}") from None


def test_there_are_many_and_each_has_its_name() -> None:
    assert sum(not case.full for case in CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)
    asked = {endpoint for _, endpoint, _ in FIELDS.values()} | {case.endpoint for case in CASES}
    everywhere = {
        LISTING,
        HEAD,
        GIT_FILE,
        OBJECT,
        CARD,
        CREATE,
        REFS,
        BRANCH,
        DELETE,
        HISTORY,
        PATHS,
        PREUPLOAD,
        COMMIT,
    }
    assert everywhere | {BATCH, UPLOAD, CHECK} <= asked
