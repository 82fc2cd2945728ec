"""Bytes that come out of order reach the upload in order, within bounded memory and without a deadlock."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.destinations.store.ordered_bytes import OrderedBytes, StoppedError
from nemotron_fp8.errors import WriteError

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 300_000


def in_thread(ordered: OrderedBytes, found: bytearray, pause: float = 0.0) -> threading.Thread:
    """Read all bytes in a thread, as an upload does."""

    def read() -> None:
        for piece in ordered:
            time.sleep(pause)
            found.extend(piece)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def pieces_of(data: bytes, step: int) -> list[tuple[int, bytes]]:
    return [(begin, data[begin : begin + step]) for begin in range(0, len(data), step)]


@pytest.mark.parametrize(
    ("order", "spills"), [("as it is", False), ("backwards", True), ("at random", True), ("last first", False)]
)
def test_any_order_comes_out_in_order(tmp_path: Path, order: str, spills: bool) -> None:
    data = random.Random(1).randbytes(SIZE)
    pieces = pieces_of(data, 7000)
    if order == "backwards":
        pieces.reverse()
    elif order == "at random":
        random.Random(2).shuffle(pieces)
    elif order == "last first":
        pieces = [pieces[-1], *pieces[:-1]]
    ordered, found = OrderedBytes(SIZE, tmp_path / "spill", waiting=20_000, ahead=50_000), bytearray()
    reader = in_thread(ordered, found)
    for offset, piece in pieces:
        buffer = bytearray(piece)
        ordered.write_at(offset, memoryview(buffer))
        buffer[:] = bytes(len(buffer))  # as an engine uses its buffer again
    ordered.release()
    reader.join(10)
    ordered.close()
    assert bytes(found) == data
    assert (ordered.spilled > 0) == spills
    assert ordered.spilled <= SIZE
    assert not (tmp_path / "spill").exists() or list((tmp_path / "spill").iterdir()) == []


@pytest.mark.parametrize("seed", range(4))
def test_many_threads_and_a_slow_reader_end(tmp_path: Path, seed: int) -> None:
    data = random.Random(seed).randbytes(SIZE)
    pieces = iter(pieces_of(data, 1500))
    ordered, found, lock = OrderedBytes(SIZE, tmp_path, waiting=5_000, ahead=10_000), bytearray(), threading.Lock()
    chance = random.Random(seed)

    def write() -> None:
        while True:
            with lock:
                piece = next(pieces, None)
                pause = chance.random() * 0.004
            if piece is None:
                return
            time.sleep(pause)
            ordered.write_at(piece[0], memoryview(piece[1]))

    reader = in_thread(ordered, found, pause=0.0005)
    writers = [threading.Thread(target=write) for _ in range(6)]
    for writer in writers:
        writer.start()
    ordered.release()
    for thread in (*writers, reader):
        thread.join(30)
        assert not thread.is_alive()
    ordered.close()
    assert bytes(found) == data


def test_a_writer_waits_for_the_reader_and_memory_stays_bounded() -> None:
    ordered = OrderedBytes(10_000, waiting=2_000)
    wrote: list[int] = []

    def write() -> None:
        for begin in range(0, 10_000, 1000):
            ordered.write_at(begin, memoryview(bytes(1000)))
            wrote.append(begin)

    writer = threading.Thread(target=write)
    ordered.release()
    writer.start()
    writer.join(0.3)
    assert wrote == [0, 1000]  # the third one lies in the queue, and its writer waits
    assert sum(map(len, ordered)) == 10_000
    writer.join(10)
    assert len(wrote) == 10


def test_the_last_bytes_wait_for_their_release() -> None:
    ordered, found = OrderedBytes(3000, waiting=10), bytearray()  # the last writer does not wait for the reader
    reader = in_thread(ordered, found)
    for begin in range(0, 3000, 1000):
        ordered.write_at(begin, memoryview(bytes(1000)))
    reader.join(0.2)
    assert len(found) == 2000
    ordered.release()
    reader.join(10)
    assert len(found) == 3000


def test_a_failed_upload_wakes_the_writers() -> None:
    ordered = OrderedBytes(10_000, waiting=10)
    caught: list[BaseException] = []

    def write() -> None:
        try:
            ordered.write_at(0, memoryview(bytes(100)))
        except KeyError as error:
            caught.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.1)
    ordered.stop(KeyError("the reason"))
    writer.join(10)
    assert [str(error) for error in caught] == ["'the reason'"]
    with pytest.raises(KeyError, match="the reason"):
        ordered.write_at(100, memoryview(bytes(100)))
    with pytest.raises(StoppedError):
        next(iter(ordered))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ordered = OrderedBytes(SIZE, tmp_path, ahead=1000)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        ordered.write_at(5000, memoryview(bytes(2000)))
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    ordered.close()
