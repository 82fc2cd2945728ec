"""Sinks, what makes them durable, and the threads that feed them."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import resource
import signal
import time
from threading import Timer, get_ident
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.destinations.file_sink import FileSink, commit_file, write_file
from nemotron_fp8.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@given(
    st.binary(max_size=5000),
    st.lists(st.integers(0, 5000), max_size=12),
    st.randoms(),
    st.integers(1, 4),
    st.booleans(),
)
@settings(max_examples=60)
def test_any_order_of_writes_gives_the_file_and_its_digest(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int], order: object, workers: int, digests: bool
) -> None:
    """Pieces in any order, from several threads, are the file; the digest is that of its bytes."""
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    spans = list(itertools.pairwise(edges))
    order.shuffle(spans)  # type: ignore[attr-defined]  # hypothesis' random numbers
    folder = tmp_path_factory.mktemp("sink")
    with FileSink(folder, "shard", len(data), digests) as sink:
        parallel_for(workers, spans, lambda span: sink.write_at(span[0], memoryview(data)[span[0] : span[1]]))
        staged = sink.finish()
    assert (folder / "shard").read_bytes() == data
    assert (staged.name, staged.size) == ("shard", len(data))
    assert staged.sha256 == (hashlib.sha256(data).hexdigest() if digests else None)


class SlowHash:
    """Hash that takes its time."""

    def update(self, data: object) -> None:
        time.sleep(0.5)

    def hexdigest(self) -> str:
        return ""


def test_ctrl_c_while_a_thread_waits_for_its_turn_to_hash(tmp_path: Path) -> None:
    """The interrupted thread hashes nothing more, and those whose bytes follow do not wait for it."""
    main, taken = get_ident(), itertools.count()
    interrupt = Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))

    def work(_: int) -> None:
        wanted = 1 if get_ident() == main else 2 * next(taken)  # the caller writes the second of three pieces
        while sink._digest._taken < wanted:  # type: ignore[union-attr]  # there is a digest
            time.sleep(0.01)
        sink.write_at(wanted, memoryview(b"x"))

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), FileSink(tmp_path, "shard", 3, digests=True) as sink:
        sink._digest._hash = SlowHash()  # type: ignore[union-attr, assignment]
        interrupt.start()
        parallel_for(3, range(3), work)
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WriteError, match="writes no bytes"), FileSink(tmp_path, "shard", 3, digests=False) as sink:
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        sink.write_at(0, memoryview(b"abc"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_a_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems."""
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WriteError) as caught, FileSink(tmp_path, "shard", 3, digests=True) as sink:
        sink.write_at(0, memoryview(b"abc"))
        monkeypatch.setattr(os, "close", close)
        sink.finish()
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize(
    "spans", [[], [(0, 99)], [(1, 100)], [(0, 50), (51, 100)]], ids=["nothing", "end", "beginning", "middle"]
)
def test_a_byte_that_was_not_written_is_an_error(tmp_path: Path, digests: bool, spans: list[tuple[int, int]]) -> None:
    """The size of the file alone would not show a hole."""
    with pytest.raises(WriteError) as caught, FileSink(tmp_path, "shard", 100, digests) as sink:
        for begin, end in spans:
            sink.write_at(begin, memoryview(bytes(end - begin)))
        sink.finish()
    assert caught.value.path == str(tmp_path / "shard")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("digests", [False, True])
def test_leaving_a_sink_discards_it(tmp_path: Path, digests: bool) -> None:
    """No file, no descriptor and no thread is left, whatever ended the work."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH112, PTH208
    with pytest.raises(ZeroDivisionError), FileSink(tmp_path, "shard", 100, digests) as sink:
        sink.write_at(0, memoryview(bytes(10)))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    if before:
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_sink_overwrites_nothing(tmp_path: Path) -> None:
    """Neither a file nor, through a link, one elsewhere."""
    (tmp_path / "shard").write_text("mine")
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("shard", "link"):
        with pytest.raises(WriteError, match="File exists"):
            FileSink(tmp_path, name, 10, digests=False)
    assert (tmp_path / "shard").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_a_sink_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No such file"):
        FileSink(tmp_path / "no", "shard", 10, digests=True)


def test_a_file_that_is_too_large_for_the_system(tmp_path: Path) -> None:
    """A reservation that the system rejects raises an error with its errno. No file is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(WriteError) as caught, FileSink(tmp_path, "shard", 1 << 17, digests=True) as sink:
            sink.write_at(0, memoryview(bytes(1 << 17)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.errno is not None
    assert not list(tmp_path.iterdir())


def test_settling_gives_the_final_name(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"x" * 10)
    commit_file(tmp_path / "made", 10, tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    for size in (9, 11):
        with pytest.raises(WriteError):
            commit_file(tmp_path / "final", size, tmp_path / "other")
    with pytest.raises(WriteError):
        commit_file(tmp_path / "gone", 10, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_small_file_appears_whole_or_not(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "f", pieces(), tmp_path / "t")
    assert not list(tmp_path.iterdir())
    write_file(tmp_path / "f", iter([b"ha", b"", b"lf"]), tmp_path / "t")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("f", b"half")]


# ---- threads ----


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_is_done_once(workers: int) -> None:
    done: list[int] = []
    parallel_for(workers, range(500), done.append)
    assert sorted(done) == list(range(500))
    if workers == 1:
        assert done == list(range(500))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_stops_the_others_and_is_raised(workers: int) -> None:
    """Of an endless supply no more is drawn, and no thread goes on."""
    drawn = itertools.count()
    last = 0

    def work(job: int) -> None:
        nonlocal last
        last = max(last, job)
        if job == 20:
            raise ZeroDivisionError(job)

    with pytest.raises(ZeroDivisionError, match="20"):
        parallel_for(workers, drawn, work)
    stopped_at = last
    time.sleep(0.02)
    assert last == stopped_at < 10_000


def test_an_error_of_the_supply_is_raised() -> None:
    def jobs() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parallel_for(3, jobs(), lambda _: None)


def test_the_callers_thread_works_too() -> None:
    """One worker means no thread at all."""
    seen = set()
    parallel_for(1, range(3), lambda _: seen.add(get_ident()))
    assert seen == {get_ident()}
