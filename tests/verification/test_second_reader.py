"""verify opens every shard with the safetensors library: the two readers agree, and a difference is a problem."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from nemotron_fp8.checkpoint import header as header_module
from nemotron_fp8.checkpoint.header import Entry, Header, build_header, parse_header, serialize
from nemotron_fp8.checkpoint.inventory import make_shard
from nemotron_fp8.sources.files import FolderOpener
from nemotron_fp8.verification import second_reader
from nemotron_fp8.verification.second_reader import LibraryTensor, check_shards, compare_readers, read_with_library
from tests.support.corpus_headers import shard as file_bytes
from tests.support.corpus_headers import tensor
from tests.support.header_strategies import Tensors, metadatas, tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.sources.files import SourceFile

FIRST = "model-00001-of-00002.safetensors"


def shard_file(folder: Path, drawn: Tensors, metadata: dict[str, str] | None = None) -> tuple[Path, Header]:
    header = build_header(drawn, metadata)
    path = folder / FIRST
    path.write_bytes(serialize(header) + bytes(header.data_size))
    return path, header


class Remote:
    """An opener of files that are not local: only reads, counted."""

    def __init__(self, root: Path) -> None:
        self.folder, self.read = FolderOpener(root), 0

    def open(self, file: str) -> SourceFile:
        return RemoteFile(self, self.folder.open(file))


class RemoteFile:
    def __init__(self, owner: Remote, file: SourceFile) -> None:
        self._owner, self._file = owner, file

    def window(self, offset: int, length: int) -> memoryview | None:
        return None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._owner.read += len(buffer)
        self._file.read_into(offset, buffer)

    def release(self, offset: int, length: int) -> None:
        pass

    def close(self) -> None:
        self._file.close()


# ---- the readers agree ----


@settings(max_examples=150)
@given(tensors(), metadatas)
def test_readers_agree_about_every_valid_shard(
    tmp_path_factory: pytest.TempPathFactory, drawn: Tensors, metadata: dict[str, str] | None
) -> None:
    """Every dtype, empty tensors and scalars; opened as they are, and as a sparse copy of what lies elsewhere."""
    folder = tmp_path_factory.mktemp("shard")
    path, header = shard_file(folder, drawn, metadata)
    read = parse_header(path.read_bytes()[8 : header.data_start], header.file_size, FIRST)
    shard = make_shard(FIRST, read, header.file_size)
    assert check_shards([shard], FolderOpener(folder), 2, "the result") == []
    remote = Remote(folder)
    assert check_shards([shard], remote, 2, "the result") == []
    assert remote.read == header.data_start


def test_sparse_copy_takes_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of 16 GiB elsewhere: its header is read, and its copy has 16 GiB without taking them."""
    header = build_header([("w", "F8_E4M3", (1 << 17, 1 << 17)), ("w_scale", "F32", ())])
    (tmp_path / FIRST).write_bytes(serialize(header))
    seen: list[os.stat_result] = []
    compare = compare_readers

    def watch(shard: Any, path: Path, owner: str) -> Any:
        seen.append(path.stat())
        return compare(shard, path, owner)

    monkeypatch.setattr(second_reader, "compare_readers", watch)
    remote = Remote(tmp_path)
    assert check_shards([make_shard(FIRST, header, header.file_size)], remote, 1, "the result") == []
    assert remote.read == header.data_start
    assert seen[0].st_size == header.file_size > 1 << 34
    assert seen[0].st_blocks * 512 < 1 << 20


def test_no_room_for_a_sparse_copy_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, header = shard_file(tmp_path, [("w", "BF16", (2, 3))])

    def refuse(*_: object) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(os, "ftruncate", refuse)
    (problem,) = check_shards([make_shard(FIRST, header, header.file_size)], Remote(tmp_path), 1, "the result")
    assert problem.tensor == FIRST
    assert f"no sparse temporary file of {header.file_size:,} bytes possible; set TMPDIR" in problem.problem


# ---- a difference is a problem ----

W = "model.layers.0.mlp.up_proj.weight"


def moved(entry: Entry) -> Entry:
    return entry._replace(start=entry.start + 2, end=entry.end + 2)


OURS: dict[str, tuple[Callable[[Entry], Entry], str]] = {
    "dtype": (lambda entry: entry._replace(dtype="F16"), r"our reader finds F16 \[8, 4\], .* BF16 \[8, 4\]"),
    "shape": (lambda entry: entry._replace(shape=(4, 8)), r"our reader finds BF16 \[4, 8\], .* BF16 \[8, 4\]"),
    "offsets": (moved, r"our reader finds bytes \[\d+, \d+\), .* \[\d+, \d+\)"),
    "length": (
        lambda entry: entry._replace(shape=(7, 4), end=entry.end - 8),
        r"our reader finds BF16 \[7, 4\], .* BF16 \[8, 4\]",
    ),
    "name": (lambda entry: entry._replace(name="other"), "our reader finds no such tensor, .* BF16"),
}


@pytest.mark.parametrize("what", OURS)
def test_wrong_reading_of_ours_is_found(tmp_path: Path, what: str) -> None:
    """Our reader misunderstands one tensor of three: the problem names it and both readings."""
    change, says = OURS[what]
    path, header = shard_file(tmp_path, [("a", "F32", (3,)), (W, "BF16", (8, 4)), ("z", "BF16", (5,))])
    wrong = tuple(change(entry) if entry.name == W else entry for entry in header.entries)
    shard = make_shard(FIRST, Header(wrong, header.metadata, header.data_start), header.file_size)
    problems = compare_readers(shard, path, "the result")
    assert problems[0].tensor == W
    assert problems[0].problem.startswith(f"in {FIRST} of the result, ")
    assert re.search(says, problems[0].problem)
    assert "safetensors library" in problems[0].problem


THEIRS: dict[str, Callable[[list[LibraryTensor]], list[LibraryTensor]]] = {
    "dtype": lambda found: [t._replace(dtype="U8") if t.name == W else t for t in found],
    "shape": lambda found: [t._replace(shape=(32,)) if t.name == W else t for t in found],
    "offsets": lambda found: found[::-1],
    "a tensor less": lambda found: [t for t in found if t.name != W],
    "a tensor more": lambda found: [*found, LibraryTensor(f"{W}_more", "U8", (0,))],
}


@pytest.fixture
def result(checkpoint: Path, destination: Path) -> Path:
    quantize_repo(checkpoint, destination, Recipe())
    return destination


def test_verify_opens_every_shard_of_source_and_result(
    checkpoint: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def read(path: Path) -> Any:
        opened.append(path)
        return read_with_library(path)

    monkeypatch.setattr(second_reader, "read_with_library", read)
    names = sorted(path.name for path in result.glob("*.safetensors"))
    assert verify_repo(None, result).ok
    assert sorted(opened) == [result / name for name in names]
    opened.clear()
    assert verify_repo(checkpoint, result).ok
    assert sorted(opened) == sorted([result / name for name in names] + [checkpoint / name for name in names])


@pytest.mark.parametrize("what", THEIRS)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with the source"])
def test_verify_reports_another_reading_of_the_library(
    checkpoint: Path, result: Path, monkeypatch: pytest.MonkeyPatch, what: str, alone: bool
) -> None:
    def read(path: Path) -> tuple[dict[str, str], list[LibraryTensor]]:
        metadata, found = read_with_library(path)
        names = [tensor.name for tensor in found]
        return metadata, THEIRS[what](found) if path.parent == result and W in names else found

    monkeypatch.setattr(second_reader, "read_with_library", read)
    verification = verify_repo(None if alone else checkpoint, result)
    assert not verification.ok
    assert any(problem.tensor.startswith(W) for problem in verification.problems)
    assert all("our reader finds" in problem.problem for problem in verification.problems)
    assert all("of the result" in problem.problem for problem in verification.problems)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with the source"])
def test_verify_reports_another_reading_of_ours(
    checkpoint: Path, result: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """Our parser swaps the places of two tensors of one size: every other check would take the wrong bytes."""
    parse = header_module.parse_header

    def swapped(*arguments: Any) -> Header:
        header = parse(*arguments)
        entries = list(header.entries)
        for i in range(len(entries) - 1):
            one, two = entries[i : i + 2]
            if (one.dtype, one.shape) == (two.dtype, two.shape):
                entries[i : i + 2] = (
                    two._replace(start=one.start, end=one.end),
                    one._replace(start=two.start, end=two.end),
                )
                return Header(tuple(entries), header.metadata, header.data_start)
        return header

    monkeypatch.setattr(header_module, "parse_header", swapped)
    verification = verify_repo(None if alone else checkpoint, result)
    assert any("our reader finds bytes [" in problem.problem for problem in verification.problems)


def test_metadata_that_differs_is_a_problem(tmp_path: Path) -> None:
    path, header = shard_file(tmp_path, [("w", "U8", (1,))], {"format": "pt"})
    shard = make_shard(FIRST, Header(header.entries, (("format", "tf"),), header.data_start), header.file_size)
    (problem,) = compare_readers(shard, path, "the source")
    assert "our reader finds the metadata {'format': 'tf'}" in problem.problem
    assert "{'format': 'pt'}" in problem.problem


# ---- what offsets are derived from: the library refuses anything that is not dense ----

NOT_DENSE = {
    "a gap": ("{" + tensor() + "," + tensor('"b"', offsets="[2,3]") + "}", b"xyz"),
    "an overlap": ("{" + tensor(shape="[2]", offsets="[0,2]") + "," + tensor('"b"', offsets="[1,2]") + "}", b"xy"),
    "a gap at the start": ("{" + tensor(offsets="[1,2]") + "}", b"xy"),
    "bytes after the last": ("{" + tensor() + "}", b"xy"),
    "bytes missing": ("{" + tensor(shape="[2]", offsets="[0,2]") + "}", b"x"),
    "a size that is not the shape's": ("{" + tensor(shape="[2]", offsets="[0,1]") + "}", b"x"),
    "an unknown dtype": ("{" + tensor(dtype='"F128"') + "}", b"x"),
}


@pytest.mark.parametrize("what", NOT_DENSE)
def test_file_that_only_our_reader_accepts_is_a_problem(tmp_path: Path, what: str) -> None:
    """A reader of ours that checks nothing: the library refuses what our reader should have refused."""
    data = file_bytes(*NOT_DENSE[what])
    (tmp_path / FIRST).write_bytes(data)
    lenient = make_shard(FIRST, Header((Entry("a", "U8", (1,), 0, 1),), None, len(data) - 1), len(data))
    (problem,) = check_shards([lenient], FolderOpener(tmp_path), 1, "the result")
    assert problem.tensor == FIRST
    assert f"our reader accepts {FIRST} of the result, the safetensors library" in problem.problem
    assert "rejects it" in problem.problem


@given(st.binary(max_size=64))
def test_any_bytes_give_problems_and_no_exception(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / FIRST
    path.write_bytes(data)
    shard = make_shard(FIRST, Header((), None, 8), 8)
    assert compare_readers(shard, path, "the result")
