"""An S3 server on 127.0.0.1 for the unmodified client: moto's, behind a proxy that records requests and adds faults.

In a test::

    with StoreServer() as server:
        server.create("bucket")
        ...  # server.environment() in the client's environment

or on its own: ``python -m tests.store_server.server BUCKET [--port N]``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import logging
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Literal, cast, get_args
from urllib.parse import unquote

from tests.hub_server.faults import Fault, FaultPlan, Request
from tests.hub_server.server import close

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

StoreFault = Literal[
    "refused",  # the connection is reset and the port refuses new ones for `seconds`
    "reset_before",  # the connection is reset before the request was acted on
    "reset_body",  # the connection is reset in the middle of the response's body
    "early_end",  # the connection is closed in the middle of the response's body
    "hang",  # no response for `seconds`, then the connection is closed
    "hang_body",  # half of the body, then nothing for `seconds`
    "408",
    "429",
    "429_retry_after",
    "500",
    "503",  # SlowDown
    "401",
    "403",  # SignatureDoesNotMatch, with the access key and the signature in its body
    "ignore_range",  # 200 with the whole object instead of 206
    "wrong_range",  # 206 with another range than requested, correctly labeled
    "corrupt",  # the body has the right size, and one bit differs
    "answer_lost",  # the request is acted on, then the connection is reset
    "answer_lost_504",  # the request is acted on, then a gateway answers 504
]
STORE_FAULTS: tuple[StoreFault, ...] = get_args(StoreFault)

_CODES = {
    "408": (408, "RequestTimeout"),
    "429": (429, "TooManyRequests"),
    "429_retry_after": (429, "TooManyRequests"),
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "401": (401, "InvalidToken"),
    "403": (403, "SignatureDoesNotMatch"),
    "answer_lost_504": (504, "GatewayTimeout"),
    "wrong_body": (400, "XAmzContentSHA256Mismatch"),
}
CUT = ("reset_body", "early_end", "hang_body")
KEY_ID = "AKIACANARY0123456789"
SECRET = "canarySecret/abcdefghijklmnopqrstuvwxyz0"
SESSION = "canarySession//token0123456789=="
CANARIES = (KEY_ID, SECRET, SESSION)
"""Credentials that a test may look for where none must appear."""


class _Moto:
    """moto's server, one for each process; its state is shared by everything in the process."""

    _lock = threading.Lock()
    _port: int | None = None

    @classmethod
    def port(cls) -> int:
        from moto.server import ThreadedMotoServer

        with cls._lock:
            if cls._port is None:
                logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request
                server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
                server.start()
                cls._port = server.get_host_and_port()[1]
            return cls._port


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection; ``reset`` makes the proxy end it by a TCP reset."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    reset = False

    @property
    def owner(self) -> StoreServer:
        return cast("StoreServer", self.server)

    def log_message(self, *_args: object) -> None:
        """Do nothing: the proxy has its own request log."""

    def do_GET(self) -> None:
        owner = self.owner
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            number=0,
            method=self.command,
            path=unquote(path),
            query=query,
            host=(self.headers.get("Host") or "").rpartition(":")[0],
            has_authorization="authorization" in headers,
            range=headers.get("range"),
            user_agent=headers.get("user-agent", ""),
        )
        with owner.log_lock:
            request.number = len(owner.log)
            owner.log.append(request)
        fault = owner.fault_for(request)
        kind = fault.kind if fault else None
        request.fault = kind
        body = self.rfile.read(int(headers.get("content-length", 0)))
        if fault is not None and self._fail_early(fault):
            return
        if kind in _CODES and kind != "answer_lost_504":
            self._refuse(request, cast("str", kind), headers.get("authorization", ""), fault)
            return
        if kind == "corrupt" and self.command == "PUT":
            body = flip_one_bit(body)
            headers.pop("content-md5", None)
        if not _is_signed_body(headers, body):  # as S3 and its likes; moto does not look
            self._refuse(request, "wrong_body", "", fault)
            return
        if kind == "ignore_range":
            headers.pop("range", None)
        if kind == "wrong_range" and "range" in headers:
            first, last = map(int, headers["range"].removeprefix("bytes=").split("-"))
            step = -1 if first > 0 else 1
            headers["range"] = f"bytes={first + step}-{max(first, last + step)}"
        status, reply, content = owner.forward(self.command, self.path, headers, body)
        request.status = status
        if owner.after is not None:
            owner.after(request)
        if kind == "answer_lost":
            self._drop(reset=True)
        elif kind == "answer_lost_504":
            self._refuse(request, kind, "", fault)
        else:
            self._answer(status, reply, content, fault)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  (see above)

    def _fail_early(self, fault: Fault) -> bool:
        """Apply faults that hit before the request is acted on."""
        if fault.kind == "refused":
            self.owner.refuse(fault.seconds)
        elif fault.kind == "hang":
            self.owner.stopping.wait(fault.seconds)
        elif fault.kind != "reset_before":
            return False
        self._drop(reset=fault.kind != "hang")
        return True

    def _drop(self, reset: bool) -> None:
        self.reset = reset
        self.close_connection = True

    def _refuse(self, request: Request, kind: str, authorization: str, fault: Fault | None) -> None:
        """Answer as S3 refuses a request: a 403 repeats the key and the signature of the request."""
        status, code = _CODES[kind]
        request.status = status
        text = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected {kind} {KEY_ID}</Message>"
            f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId><SignatureProvided>{authorization}</SignatureProvided></Error>"
        )
        content = b"" if self.command == "HEAD" else text.encode()
        headers = {"content-type": "application/xml"}
        if kind == "429_retry_after" and fault is not None:
            headers["retry-after"] = str(int(fault.seconds))
        self._answer(status, headers, content, None)

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        cut = kind in CUT
        if cut and (len(content) < 2 or self.command == "HEAD"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
        else:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if kind == "corrupt" and status in (200, 206):
                content = flip_one_bit(content)
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut and fault is not None:
            if kind == "hang_body":
                self.owner.stopping.wait(fault.seconds)
            self._drop(reset=kind == "reset_body")


def _is_signed_body(headers: Mapping[str, str], body: bytes) -> bool:
    """Return True unless the request was signed with the digest of another body."""
    digest = headers.get("x-amz-content-sha256", "")
    return len(digest) != 64 or hashlib.sha256(body).hexdigest() == digest


def flip_one_bit(data: bytes) -> bytes:
    """Return the same bytes with one bit in the middle flipped."""
    damaged = bytearray(data)
    if damaged:
        damaged[len(damaged) // 2] ^= 1
    return bytes(damaged)


class StoreServer:
    """The proxy: one thread accepts, and another serves each connection. Attributes may be changed while it serves.

    Attributes:
        faults: rules of planned faults; the path of a request is ``/BUCKET/KEY``, unquoted.
        before: called with each request before it is acted on; a returned fault hits the request.
        after: called with each request after it was acted on and before the response is sent.
        log: every request in the order of arrival.
    """

    def __init__(self, port: int = 0) -> None:
        self.faults = FaultPlan()
        self.before: Callable[[Request], Fault | None] | None = None
        self.after: Callable[[Request], None] | None = None
        self.log: list[Request] = []
        self.log_lock = threading.Lock()
        self.stopping = threading.Event()
        self._moto = _Moto.port()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = self._listen(port)
        self.port = int(self._listener.getsockname()[1])

    @property
    def endpoint(self) -> str:
        """Address for ``AWS_ENDPOINT_URL``."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Return the variables of a client: this endpoint, and credentials that a test can look for."""
        return environment_of(self.port)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what a test does behind the client's back --------------------------------------------------------

    def reset(self) -> None:
        """Forget every bucket of the process."""
        self.forward("POST", "/moto-api/reset", {}, b"")

    def create(self, bucket: str) -> None:
        """Create a bucket."""
        self._expect(200, "PUT", f"/{bucket}")

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object."""
        from moto.s3.models import s3_backends

        next(iter(s3_backends.values()))["aws"].put_object(bucket, key, data)

    def files(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Return every object under a prefix with its content, by key without the prefix."""
        from moto.s3.models import s3_backends

        found = next(iter(s3_backends.values()))["aws"].buckets[bucket].keys
        there = {key: found.get(key) for key in list(found) if key.startswith(prefix)}
        return {key.removeprefix(prefix): each.value for key, each in there.items() if each is not None}

    def remove(self, bucket: str, key: str) -> None:
        """Delete an object."""
        from moto.s3.models import s3_backends

        next(iter(s3_backends.values()))["aws"].delete_object(bucket, key)

    def unfinished(self, bucket: str) -> list[str]:
        """Return the keys of multipart uploads that are neither completed nor aborted."""
        from moto.s3.models import s3_backends

        uploads = next(iter(s3_backends.values()))["aws"].buckets[bucket].multiparts
        return [upload.key_name for upload in uploads.values()]

    # -- serving ------------------------------------------------------------------------------------------

    def _expect(self, status: int, method: str, path: str) -> None:
        answered, _, content = self.forward(method, path, {}, b"")
        if answered != status:
            raise AssertionError(f"{method} {path}: {answered} {content[:200]!r}")

    def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request to moto; return status, headers and body of its answer."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._moto, timeout=60)
            self._local.connection = connection
        sent = {name: value for name, value in headers.items() if name not in ("connection", "expect")}
        sent["host"] = f"127.0.0.1:{self._moto}"
        try:
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise
        return answer.status, dict(answer.getheaders()) | _length(answer), content

    def fault_for(self, request: Request) -> Fault | None:
        if self.before is not None and (fault := self.before(request)) is not None:
            return fault
        return self.faults.take(request)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
        return listener

    def _accept(self) -> None:
        while not self.stopping.is_set():
            listener = self._listener
            try:
                connection, address = listener.accept()
            except OSError:  # closed by `refuse` or `stop`
                time.sleep(0.01)
                continue
            threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

    def _serve(self, connection: socket.socket, address: tuple[str, int]) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(connection)
        reset = False
        try:
            reset = Handler(connection, address, self).reset  # type: ignore[arg-type]  # only handed through
        except (OSError, http.client.HTTPException):
            pass  # the client went away
        finally:
            with self._lock:
                self._open.discard(connection)
            close(connection, reset)

    def refuse(self, seconds: float) -> None:
        """Refuse new connections for a while, then listen on the same port again."""

        def listen_again() -> None:
            self.stopping.wait(seconds)
            with self._lock:
                if not self.stopping.is_set():
                    self._listener = self._listen(self.port)

        self._close_listener()
        with self._lock:
            for connection in self._open:  # an open connection would not notice
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=listen_again, daemon=True).start()

    def _close_listener(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        self._listener.close()

    def stop(self) -> None:
        """Close everything; the objects stay until `reset` or the end of the process."""
        self.stopping.set()
        with self._lock:
            self._close_listener()
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def environment_of(port: int) -> dict[str, str]:
    """Return the variables of a client of the server at a port, which need not be there yet."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": SESSION,
    }


def _length(answer: http.client.HTTPResponse) -> dict[str, str]:
    value = answer.getheader("Content-Length")
    return {} if value is None else {"content-length": value}


def main() -> None:
    parser = argparse.ArgumentParser(description="An S3 server for tests.")
    parser.add_argument("bucket")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    with StoreServer(arguments.port) as server:
        server.create(arguments.bucket)
        for name, value in server.environment().items():
            print(f"export {name}={value}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
