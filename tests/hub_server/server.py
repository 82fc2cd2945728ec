"""A small Hugging Face Hub on 127.0.0.1 that the unmodified ``huggingface_hub`` client talks to.

In a test::

    with HubServer(Hub(folder)) as server:
        ...  # HF_ENDPOINT=server.endpoint in the client's environment

or on its own, over a folder that outlives it: ``python -m tests.hub_server.server FOLDER [--port N]``.
"""

from __future__ import annotations

import argparse
import contextlib
import posixpath
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tests.hub_server.faults import STATUS_FAULTS, Fault, Request
from tests.hub_server.hub import Hub
from tests.hub_server.messages import Call, FilePart, Response, Wire

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

CHUNK = 1 << 18
CUT_SHORT = ("reset_body", "early_end", "hang_body")


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection; ``reset`` makes the server end it by a TCP reset."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    reset = False

    @property
    def owner(self) -> HubServer:
        return cast("HubServer", self.server)

    def log_message(self, *_args: object) -> None:
        """Do nothing: the Hub has its own request log."""

    def do_GET(self) -> None:
        hub = self.owner.hub
        path, _, query = self.path.partition("?")
        authorization = self.headers.get("Authorization")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            number=0,
            method=self.command,
            path=posixpath.normpath(path),
            query=query,
            host=(self.headers.get("Host") or "").rpartition(":")[0],
            has_authorization=authorization is not None,
            range=headers.get("range"),
            user_agent=headers.get("user-agent", ""),
        )
        with hub.log_lock:
            request.number = len(hub.log)
            hub.log.append(request)
        fault = hub.fault_for(request)
        request.fault = fault.kind if fault else None
        if fault is not None and self._fail_early(fault):
            return
        body = self._body(headers)
        if fault is not None and fault.kind == "corrupt" and self.command == "PUT":
            body = flip_one_bit(body)
        if fault is not None and fault.kind == "ignore_range":
            headers.pop("range", None)
        token = authorization.removeprefix("Bearer ") if authorization else None
        call = Call(self.command, request.path, query, request.host, token, headers, lambda: body)
        if fault is not None and fault.kind in STATUS_FAULTS:
            response = hub.fault_answer(fault)
        else:
            response = hub.handle(call)
            if hub.after is not None:
                hub.after(request)
        for _ in body:  # what the route left unread would be taken for the next request
            pass
        request.status = response.status
        self._answer(response, fault)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  (see above)

    def _fail_early(self, fault: Fault) -> bool:
        """Apply faults that hit before the request is handled."""
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

    def _body(self, headers: dict[str, str]) -> Iterator[bytes]:
        """Yield the body of the request, chunked or of a known length."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self._read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return
        left = int(headers.get("content-length", 0))
        while left > 0:
            chunk = self._read(min(left, CHUNK))
            left -= len(chunk)
            yield chunk

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("the client went away")
        return data

    def _answer(self, response: Response, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        if isinstance(response, Wire):
            for piece in response.pieces:
                self.wfile.write(piece)
            self._drop(reset=False)
            return
        if kind == "answer_lost":
            self._drop(reset=True)
            return
        if kind == "answer_lost_504":
            response = Response.of_json({"error": "Gateway Timeout"}, 504)
        if kind == "wrong_range" and response.status == 206:
            shift_range(response)
        size = len(response.body)
        cut = kind in CUT_SHORT
        if cut and (size < 2 or self.command == "HEAD"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
        else:
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if self.command == "HEAD":
                return
            chunks = response.chunks()
            if kind == "corrupt" and response.status in (200, 206):
                chunks = flip_one_bit(chunks)
            left = size // 2 if cut else size
            for chunk in chunks:
                self.wfile.write(chunk[:left])
                left -= len(chunk)
                if left <= 0:
                    break
        if cut and fault is not None:
            if kind == "hang_body":
                self.owner.stopping.wait(fault.seconds)
            self._drop(reset=kind == "reset_body")


def flip_one_bit(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the same bytes, with one bit in the middle of the first chunk flipped."""
    for number, chunk in enumerate(chunks):
        if number == 0 and chunk:
            damaged = bytearray(chunk)
            damaged[len(chunk) // 2] ^= 1
            yield bytes(damaged)
        else:
            yield chunk


def shift_range(response: Response) -> None:
    """Send the neighboring range, labeled correctly."""
    part, total = response.body, response.headers["Content-Range"].rpartition("/")[2]
    if isinstance(part, FilePart):
        step = -1 if part.start > 0 else 1
        stop = min(part.stop + step, int(total))
        response.body = FilePart(part.path, part.start + step, stop)
        response.headers["Content-Range"] = f"bytes {part.start + step}-{stop - 1}/{total}"


class HubServer:
    """Listens for ``hub``; one thread accepts, and another serves each connection."""

    def __init__(self, hub: Hub, port: int = 0) -> None:
        self.hub = hub
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = self._listen(port)
        hub.port = self._listener.getsockname()[1]

    @property
    def endpoint(self) -> str:
        return self.hub.endpoint

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

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
        except OSError:
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
                    self._listener = self._listen(self.hub.port)

        self._close_listener()
        threading.Thread(target=listen_again, daemon=True).start()

    def _close_listener(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        self._listener.close()

    def stop(self) -> None:
        """Close everything; another server may resume from the folder."""
        self.stopping.set()
        with self._lock:
            self._close_listener()
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def close(connection: socket.socket, reset: bool) -> None:
    with contextlib.suppress(OSError):
        if reset:  # a linger time of zero makes close() send RST instead of FIN
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Hugging Face Hub for tests.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN=USER")
    parser.add_argument("--part-size", type=int, default=None, help="bytes above which an upload goes in parts")
    parser.add_argument("--xet", action="store_true", help="offer the offline Xet store")
    arguments = parser.parse_args()
    hub = Hub(arguments.folder)
    hub.part_size, hub.xet_enabled = arguments.part_size, arguments.xet
    for pair in arguments.token:
        token, _, user = pair.partition("=")
        hub.store.add_token(token, user)
    with HubServer(hub, arguments.port) as server:
        print(server.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
