"""Requests and responses of the routes, without sockets."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class FilePart:
    """Bytes [start, stop) of a file on the disk."""

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def chunks(self, size: int = 1 << 20) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = len(self)
            while left > 0 and (chunk := file.read(min(size, left))):
                left -= len(chunk)
                yield chunk


@dataclass
class Response:
    """A response with a body in memory or a part of a file."""

    status: int = 200
    body: bytes | FilePart = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: object, status: int = 200, **headers: str) -> Response:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def chunks(self) -> Iterator[bytes]:
        if isinstance(self.body, FilePart):
            yield from self.body.chunks()
        elif self.body:
            yield self.body


@dataclass
class Wire(Response):
    """A response of literal bytes, from the status line on, after which the connection is closed."""

    pieces: Iterable[bytes] = ()


@dataclass
class Call:
    """A parsed request. ``path`` is normalized but still quoted; the body is read on demand."""

    method: str
    path: str
    query: str
    host: str
    token: str | None
    headers: dict[str, str]
    chunks: Callable[[], Iterator[bytes]]

    def body(self) -> bytes:
        return b"".join(self.chunks())

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")

    def parameter(self, name: str) -> str | None:
        values = parse_qs(self.query).get(name)
        return values[0] if values else None

    def flag(self, name: str) -> bool:
        return (self.parameter(name) or "").lower() in ("1", "true")


def serve_file(path: Path, size: int, range_header: str | None, headers: dict[str, str]) -> Response:
    """Return a whole file (200), a range of it (206), or 416 for a range beyond its end."""
    common = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    match = RANGE.fullmatch(range_header) if range_header else None
    if match is None or match.groups() == ("", ""):
        return Response(200, FilePart(path, 0, size), common)
    first, last = match.groups()
    if first:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
    else:
        start, stop = max(0, size - int(last)), size
    if start >= stop:
        return Response(416, b"", {**common, "Content-Range": f"bytes */{size}"})
    part = FilePart(path, start, stop)
    return Response(206, part, {**common, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})
