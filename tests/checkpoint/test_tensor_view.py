"""Views: which bytes of which files a tensor is made of, and the reader that brings them."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.checkpoint.tensor_view import Extent, TensorView, contiguous
from nemotron_fp8.errors import SourceChangedError, SourceReadError
from nemotron_fp8.sources.files import FolderOpener, MappedFile
from nemotron_fp8.sources.reader import Reader
from tests.support.checkpoints import raw
from tests.support.fakes import MemoryOpener
from tests.support.strategies import Pieces, pieces

if TYPE_CHECKING:
    from pathlib import Path


def span(draw: st.DataObject, size: int, step: int = 1) -> tuple[int, int]:
    """Two multiples of ``step`` up to ``size``, in order."""
    a, b = (draw.draw(st.integers(0, size // step)) * step for _ in range(2))
    return min(a, b), max(a, b)


def gathered(case: Pieces, begin: int, end: int) -> bytes:
    """Return the bytes of a range by executing its runs byte by byte. Each target byte must occur exactly once."""
    found: dict[int, int] = {}
    for run in case.view.runs(begin, end):
        for i in range(run.count):
            start = run.offset + i * run.stride
            data = case.files[run.file][start : start + run.length]
            assert len(data) == run.length, "a run leaves its file"
            for j, byte in enumerate(data):
                assert found.setdefault(run.target + i * run.pitch + j, byte) is byte
                assert 0 <= run.target + i * run.pitch + j < end - begin
    assert sorted(found) == list(range(end - begin))
    return bytes(found[i] for i in range(end - begin))


@given(pieces(), st.data())
@settings(max_examples=200)
def test_runs_bring_the_bytes_of_any_range(case: Pieces, data: st.DataObject) -> None:
    """Whatever a view is cut into, the runs of a range are its bytes, each once, from inside the files."""
    begin, end = span(data, len(case.data))
    assert gathered(case, begin, end) == case.data[begin:end]


@given(pieces(), st.data())
@settings(max_examples=100)
def test_runs_cover_each_target_once(case: Pieces, data: st.DataObject) -> None:
    """No byte of a range is read twice: the runs are as long as the range together."""
    begin, end = span(data, len(case.data))
    assert sum(run.count * run.length for run in case.view.runs(begin, end)) == end - begin


@given(
    st.sampled_from(sorted(BITS)),
    st.lists(st.integers(0, 6), max_size=3),
    st.integers(0, 99),
    st.data(),
)
def test_a_dense_tensor_is_one_run(dtype: str, shape: list[int], offset: int, data: st.DataObject) -> None:
    """Any range of a tensor that lies in one piece is one run, whatever its dtype, and none if it is empty."""
    view = contiguous("f", "t", dtype, (*shape, 4), offset)  # 4 elements of a sub-byte dtype fill bytes
    assert view.nbytes == view.rows * view.row_bytes
    begin, end = span(data, view.nbytes)
    runs = list(view.runs(begin, end))
    assert len(runs) == (end > begin)
    for run in runs:
        assert (run.file, run.offset, run.count) == ("f", offset + begin, 1)
        assert (run.length, run.target) == (end - begin, 0)


def test_whole_rows_of_a_strided_extent_are_one_run() -> None:
    """A plan of a large stacked array costs a run for each extent, not one for each row."""
    view = TensorView("t", "BF16", (1000, 8), (Extent("f", 64, 48, 1000, 16),))
    (run,) = view.runs(160, 16 * 900)
    assert (run.offset, run.stride, run.count, run.length) == (64 + 480, 48, 890, 16)
    assert (run.target, run.pitch) == (0, 16)
    assert len(list(view.runs(161, 16 * 900 - 1))) == 3


@given(pieces(), st.booleans(), st.data())
@settings(max_examples=150)
def test_reader_gives_the_bytes(case: Pieces, mapped: bool, data: st.DataObject) -> None:
    """Mapped or copied, the reader gives the bytes of a range, gives every window back and closes all."""
    opener = MemoryOpener(case.files, mapped)
    begin, end = span(data, len(case.data))
    with Reader(opener) as reader, reader.raw(case.view, begin, end) as found:
        assert bytes(found) == case.data[begin:end]
        del found
    for file in opener.opened:
        assert file.closed
        assert file.windows == file.released
        assert mapped or not file.windows
    assert len(opener.opened) <= 3


@given(pieces(("BF16", "F16", "F32")), st.data())
@settings(max_examples=100)
def test_reader_gives_elements(case: Pieces, data: st.DataObject) -> None:
    """Elements come flat, in the tensor's dtype, wherever they lie; files are opened once."""
    size = case.view.itemsize
    begin, end = span(data, len(case.data), size)
    opener = MemoryOpener(case.files)
    with Reader(opener) as reader:
        for _ in range(2):
            with reader.elements(case.view, begin // size, end // size) as found:
                assert raw(found) == case.data[begin:end]
                assert found.shape == ((end - begin) // size,)
                assert found.dtype in (torch.bfloat16, torch.float16, torch.float32)
                del found
    names = {run.file for run in case.view.runs(begin, end)}
    assert len(opener.opened) == len(names)


@given(pieces())
@settings(max_examples=25)
def test_views_are_values(case: Pieces) -> None:
    """A view is equal to its pickled copy, and hashable: plans travel between processes."""
    copy = pickle.loads(pickle.dumps(case.view))
    assert copy == case.view
    assert hash(copy) == hash(case.view)


# ---- local files ----


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4095, 4097])
def test_a_mapped_file_reads_unaligned_tensors(tmp_path: Path, offset: int) -> None:
    """Elements that begin at an odd byte are copied, aligned ones mapped; both are right."""
    values = torch.randn(3000)
    (tmp_path / "f").write_bytes(b"x" * offset + raw(values))
    view = contiguous("f", "t", "F32", (30, 100), offset)
    with Reader(FolderOpener(tmp_path)) as reader, reader.elements(view, 7, 2999) as found:
        assert torch.equal(found, values[7:2999])
        del found


def test_a_file_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    """Bytes past the end of a file are an error of ours, not a fault of the process."""
    (tmp_path / "f").write_bytes(bytes(100))
    view = contiguous("f", "t", "U8", (200,), 0)
    with (
        pytest.raises(SourceReadError, match="100 bytes are missing at byte 100") as caught,
        Reader(FolderOpener(tmp_path)) as reader,
        reader.raw(view, 0, 200),
    ):
        pass
    assert caught.value.file == str(tmp_path / "f")


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceReadError, match="No such file"):
        MappedFile(tmp_path / "f")


@pytest.mark.parametrize("change", ["grown", "touched"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, change: str) -> None:
    """The check is made on leaving the reader, after the last byte was read; every file is closed."""
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(8))
    views = [contiguous(name, name, "U8", (8,), 0) for name in "ab"]
    files = []
    with pytest.raises(SourceChangedError) as caught, Reader(FolderOpener(tmp_path)) as reader:
        for view in views:
            with reader.raw(view, 0, 8):
                files.append(reader.file(view.name))
        with (tmp_path / "a").open("r+b") as file:
            file.write(b"new")
            file.truncate(9 if change == "grown" else 8)
    assert caught.value.file == str(tmp_path / "a")
    assert (caught.value.before, caught.value.after) == (8, 9 if change == "grown" else 8)
    for opened in files:
        with pytest.raises(SourceReadError, match="Bad file descriptor"):
            opened.read_into(0, memoryview(bytearray(1)))


def test_the_first_error_is_the_one_to_tell(tmp_path: Path) -> None:
    """A file that also changed does not hide what went wrong."""
    (tmp_path / "a").write_bytes(bytes(8))
    with pytest.raises(ZeroDivisionError), Reader(FolderOpener(tmp_path)) as reader:
        reader.file("a")
        (tmp_path / "a").write_bytes(b"more than before")
        raise ZeroDivisionError
