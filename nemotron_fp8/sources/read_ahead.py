"""Read remote files in order ahead of their use, within bounded memory.

Workers read the slices of a tensor one after the other, and the tensors of a shard in the order of its bytes. The bytes
after a read are fetched while it is used, so that neither waits for the other. A read elsewhere is fetched as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Fetch = Callable[[str, int, memoryview, Event | None], None]
    """Fills a buffer from an offset of a file; gives up when the event is set."""

SEGMENT = 4 << 20
"""Bytes that are fetched ahead by one request."""
AHEAD = 4
"""Segments that are fetched ahead of the last read."""
HELD = 8
"""Most segments in memory."""
RECENT = 16
"""Reads of a file whose ends are remembered, so that several threads may take turns."""
GROWTH = 4
"""Bytes that are fetched ahead for each byte read in order before: few after a header, much within a tensor."""
LEAST = 1 << 20
"""Fewest bytes that are worth a request ahead."""


@dataclass(slots=True, eq=False)
class _Segment:
    """Bytes ``[start, stop)`` of a file that are fetched ahead; dropped once each was read."""

    start: int
    stop: int
    data: bytearray
    done: Future[None]
    left: int


@dataclass(slots=True)
class _OfFile:
    """Segments of one file, in order, and the ends of its last reads, each with the bytes read in order before it."""

    segments: list[_Segment] = field(default_factory=list)
    ends: OrderedDict[int, int] = field(default_factory=OrderedDict)
    closed: Event = field(default_factory=Event)


class ReadAhead:
    """Reads files of one source. Thread-safe.

    Args:
        fetch: fetches a range.
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._lock = Lock()
        self._files: dict[str, _OfFile] = {}
        self._held = 0
        self._pool: ThreadPoolExecutor | None = None

    def read_into(self, name: str, size: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from an offset of a file of ``size`` bytes."""
        stop = offset + len(buffer)
        with self._lock:
            file = self._files.setdefault(name, _OfFile())
            ready = [
                (part, part.start, part.stop) for part in file.segments if part.start < stop and part.stop > offset
            ]
            before = AHEAD * SEGMENT if ready else file.ends.pop(offset, 0)
            file.ends[stop] = before + len(buffer)
            if len(file.ends) > RECENT:
                file.ends.popitem(last=False)
            ahead = min(AHEAD * SEGMENT, GROWTH * (before + len(buffer)))
            if before and ahead >= LEAST:
                self._plan(name, file, stop, min(size, stop + ahead), size)
        position = offset
        for part, first, last in [*ready, (None, stop, stop)]:
            if position < first:
                self._fetch(name, position, buffer[position - offset : first - offset], None)
                position = first
            if part is not None:
                upto = min(last, stop)
                self._take(name, file, part, position, buffer[position - offset : upto - offset])
                position = upto

    def _take(self, name: str, file: _OfFile, part: _Segment, position: int, target: memoryview) -> None:
        """Copy bytes out of a segment; fetch them again if that failed."""
        try:
            part.done.result()
            target[:] = memoryview(part.data)[position - part.start : position - part.start + len(target)]
        except Exception:  # of a fetch ahead, which nobody asked for yet, or a canceled one
            self._fetch(name, position, target, None)
        with self._lock:
            part.left -= len(target)
            if part.left <= 0:
                self._drop(file, part)

    def _plan(self, name: str, file: _OfFile, stop: int, last: int, size: int) -> None:
        """Fetch the bytes ``[stop, last)`` that are not on their way, in whole segments."""
        position = stop
        for part in file.segments:
            if part.start <= position < part.stop:
                position = part.stop
        while position < last and self._make_room(file, stop, last):
            end = min(position + SEGMENT, size, *(part.start for part in file.segments if part.start > position))
            data = bytearray(end - position)
            done = self._submit(name, position, data, file.closed)
            file.segments.append(_Segment(position, end, data, done, end - position))
            file.segments.sort(key=lambda part: part.start)
            self._held += 1
            position = end
            for part in file.segments:
                if part.start == position:
                    position = part.stop

    def _submit(self, name: str, position: int, data: bytearray, closed: Event) -> Future[None]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="read-ahead")
        return self._pool.submit(self._fetch, name, position, memoryview(data), closed)

    def _make_room(self, file: _OfFile, stop: int, last: int) -> bool:
        """Return True if another segment may be held; drop a complete one that lies elsewhere if needed."""
        if self._held < HELD:
            return True
        for other in self._files.values():
            for part in other.segments:
                near = other is file and part.start < last and part.stop > stop - HELD * SEGMENT
                if part.done.done() and not near:
                    self._drop(other, part)
                    return True
        return False

    def _drop(self, file: _OfFile, part: _Segment) -> None:
        with suppress(ValueError):  # dropped before, to make room
            file.segments.remove(part)
            self._held -= 1

    def close(self, name: str) -> None:
        """Forget a file and end the fetches ahead of it; another reader of the file goes on without them."""
        with self._lock:
            file = self._files.pop(name, None)
            if file is None:
                return
            file.closed.set()
            for part in list(file.segments):
                part.done.cancel()
                self._drop(file, part)
            if not self._files and self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None
