"""Headers: every malformed file refused with its reason, valid ones read and written as safetensors does."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8.checkpoint.header import (
    Entry,
    Header,
    Limits,
    build_header,
    header_length,
    parse_header,
    read_header,
    serialize,
)
from nemotron_fp8.errors import MalformedHeaderError, UnknownDtypeError
from tests.support import fuzz_header
from tests.support.corpus_headers import GOOD, OTHER, Case, header_cases, shard, tensor
from tests.support.corpus_headers import read_header_bytes as read_bytes
from tests.support.corpus_json import json_cases
from tests.support.header_strategies import Tensors, metadatas, mutants, tensors

HEADER_CASES = list(header_cases())
ROOT = Path(__file__).parents[2]


def parse(file: bytes, limits: Limits | None = None) -> Header:
    limits = limits or Limits()
    length = header_length(file[:8], len(file), "m.safetensors", limits)
    return parse_header(file[8 : 8 + length], len(file), "m.safetensors", limits)


def library_accepts(file: bytes) -> bool:
    return fuzz_header.reference(file) is not None


# ---- malformed files ----


@pytest.mark.parametrize("case", HEADER_CASES, ids=lambda case: case.name)
def test_malformed_header_is_refused(case: Case) -> None:
    """Every malformed file raises our error with its reason; the library agrees unless we are stricter."""
    file = case.make()
    with pytest.raises(MalformedHeaderError) as caught:
        read_bytes(file)
    assert re.search(case.says, str(caught.value))
    assert caught.value.file == "m.safetensors"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert library_accepts(file) == case.stricter


def test_corpus_is_large_and_its_names_are_unique() -> None:
    all_names = [case.name for case in [*HEADER_CASES, *json_cases()]]
    assert len(all_names) >= 120
    assert len(set(all_names)) == len(all_names)


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc")
def test_malformed_files_cost_little() -> None:
    """All of them in one process that loads nothing else: under 256 MB, each under one second of CPU."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.corpus_cost"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    cost = json.loads(done.stdout)
    assert cost["peak_bytes"] < 256_000_000, cost
    assert cost["seconds"] < 1, cost


def test_unknown_dtype_has_its_own_class() -> None:
    with pytest.raises(UnknownDtypeError) as caught:
        read_bytes(shard("{" + tensor('"w"', dtype='"F128"') + "}", b"x"))
    assert (caught.value.dtype, caught.value.tensor, caught.value.file) == ("F128", "w", "m.safetensors")


def test_error_names_the_tensor() -> None:
    with pytest.raises(MalformedHeaderError) as caught:
        read_bytes(shard("{" + tensor() + "," + tensor('"b"', offsets="[3,4]") + "}", b"wxyz"))
    assert caught.value.tensor == "b"
    assert "starts at byte 3 of the data section instead of byte 1" in caught.value.problem


# ---- accepted files ----

ACCEPTED = {
    "no tensors": ("{}", b""),
    "leading white space": (" \t\r\n" + GOOD, b"x"),
    "white space everywhere": (
        ' { "a" : { "dtype" : "U8" , "shape" : [ 1 ] , "data_offsets" : [ 0 , 1 ] } } \n',
        b"x",
    ),
    "metadata null": ('{"__metadata__":null}', b""),
    "metadata empty": ('{"__metadata__":{}}', b""),
    "metadata last": (GOOD[:-1] + ',"__metadata__":{"a":"b"}}', b"x"),
    "metadata that looks like a tensor": (
        '{"__metadata__":{"dtype":"U8","shape":"","data_offsets":""}}',
        b"",
    ),
    "metadata with an empty key": ('{"__metadata__":{"":""}}', b""),
    "unknown fields": ("{" + tensor(extra=',"x":{"y":[1.5,null,true,-0,1e300]},"z":""') + "}", b"x"),
    "unknown field of 61 levels": ("{" + tensor(extra=',"x":' + "[" * 61 + "]" * 61) + "}", b"x"),
    "unknown field of 300 digits": ("{" + tensor(extra=',"x":' + "9" * 300) + "}", b"x"),
    "unaligned offsets": (
        "{" + tensor() + "," + tensor('"b"', dtype='"F64"', offsets="[1,9]") + "}",
        bytes(9),
    ),
    "entries not in file order": ("{" + OTHER + "," + tensor() + "}", b"xy"),
    "fields in another order": ('{"a":{"data_offsets":[0,1],"shape":[1],"dtype":"U8"}}', b"x"),
    "scalar": ("{" + tensor(shape="[]") + "}", b"x"),
    "empty tensor": ("{" + tensor(shape="[3,0]", offsets="[0,0]") + "}", b""),
    "empty tensors between others": (
        "{" + tensor('"e"', shape="[0]", offsets="[1,1]") + "," + tensor() + "," + OTHER + "}",
        b"xy",
    ),
    "empty tensor with a huge dimension": (
        "{" + tensor(shape="[18446744073709551615,0]", offsets="[0,0]") + "}",
        b"",
    ),
    "escaped name": ("{" + tensor('"\\u0061\\ud83d\\ude00\\/"') + "}", b"x"),
    "raw name": ("{" + tensor('"a\x7f/../é😀[{,"') + "}", b"x"),
    "sub-byte": ("{" + tensor(dtype='"F6_E2M3"', shape="[4]", offsets="[0,3]") + "}", b"xyz"),
    "length not a multiple of 8": (GOOD + " ", b"x"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    """A file that the format allows is read as the safetensors library reads it."""
    file = shard(*ACCEPTED[name])
    assert fuzz_header.compare(file) == "both"
    header = parse(file)
    assert header.file_size == len(file)
    assert header.data_start + header.data_size == len(file)


def test_entries_come_in_file_order() -> None:
    header = parse(shard(*ACCEPTED["empty tensors between others"]))
    assert [entry.name for entry in header.entries] == ["a", "e", "b"]
    assert header.entries[1] == Entry("e", "U8", (0,), 1, 1)
    assert header.entries[2].nbytes == 1


def test_metadata_none_null_and_empty_differ() -> None:
    assert parse(shard("{}")).metadata is None
    assert parse(shard('{"__metadata__":null}')).metadata is None
    assert parse(shard('{"__metadata__":{}}')).metadata == ()
    assert parse(shard('{"__metadata__":{"b":"1","a":"2"}}')).metadata == (("a", "2"), ("b", "1"))


# ---- limits ----


def test_limits_are_inclusive_and_each_is_named() -> None:
    file = shard("{" + tensor() + "," + OTHER + "}", b"xy")
    length = len(file) - 10
    parse(file, Limits(max_bytes=length, max_tensors=2, max_depth=3, max_values=17))
    for limits, says in [
        (Limits(max_bytes=length - 1), f"limit is {length - 1}"),
        (Limits(max_tensors=1), "2 tensors; the limit is 1"),
        (Limits(max_depth=2), "deeper than 2 levels"),
        (Limits(max_values=10), "over the limit of 10 values"),
    ]:
        with pytest.raises(MalformedHeaderError, match=says):
            parse(file, limits)


def test_limits_hold_for_what_is_written() -> None:
    three = [(name, "U8", (1,)) for name in "abc"]
    size = build_header(three).data_start - 8
    build_header(three, limits=Limits(max_bytes=size, max_tensors=3))
    with pytest.raises(MalformedHeaderError, match="3 tensors; the limit is 2"):
        build_header(three, limits=Limits(max_tensors=2))
    with pytest.raises(MalformedHeaderError, match=f"a header of {size}"):
        build_header(three, limits=Limits(max_bytes=size - 1))


# ---- reading from a descriptor ----


def test_read_header_moves_no_position(tmp_path: Path) -> None:
    header = build_header([("w", "BF16", (3, 5)), ("s", "F32", ())], {"format": "pt"})
    path = tmp_path / "m.safetensors"
    path.write_bytes(serialize(header) + bytes(header.data_size))
    with path.open("rb", buffering=0) as file:
        file.seek(3)
        assert read_header(file.fileno(), path.name) == header
        assert read_header(file.fileno(), path.name, header.file_size) == header
        assert file.tell() == 3


@pytest.mark.parametrize("keep", [0, 5, 8, 20])
def test_file_that_shrank_since_its_size_was_taken(tmp_path: Path, keep: int) -> None:
    header = build_header([("w", "BF16", (3, 5))])
    path = tmp_path / "m.safetensors"
    path.write_bytes(serialize(header)[:keep])
    with (
        path.open("rb") as file,
        pytest.raises(MalformedHeaderError, match=r"at least 8|the file was truncated"),
    ):
        read_header(file.fileno(), "m.safetensors", header.file_size)


# ---- against the library ----


@settings(max_examples=500)
@given(mutants)
def test_nothing_the_library_rejects_is_accepted(file: bytes) -> None:
    """Broken files, structure and bytes: no false accept, no other understanding, no untyped exception."""
    assert not fuzz_header.compare(file).startswith("FAULT")


@settings(max_examples=200)
@given(tensors(), metadatas, st.data())
def test_no_single_byte_makes_a_false_accept(
    drawn: Tensors, metadata: dict[str, str] | None, data: st.DataObject
) -> None:
    header = build_header(drawn, metadata)
    file = bytearray(serialize(header) + bytes(header.data_size))
    at = data.draw(st.integers(0, header.data_start - 1))
    file[at] = data.draw(st.integers(0, 255))
    assert not fuzz_header.compare(bytes(file)).startswith("FAULT")


def test_fuzzing_is_reproducible_and_reaches_both_sides() -> None:
    """The fuzz script in small: a seed gives the same counts, and no side of the comparison is empty."""
    counts = fuzz_header.run(2000, seed=3)
    assert counts == fuzz_header.run(2000, seed=3)
    assert counts["both"] > 200
    assert counts["neither"] > 200
    assert not any(verdict.startswith("FAULT") for verdict in counts)


def test_fuzzing_finds_a_reader_that_is_too_lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: with a reader that takes everything, it reports false accepts."""
    anything = Header((), None, 8)
    monkeypatch.setattr(fuzz_header, "read", lambda file: anything)
    lines: list[str] = []
    counts = fuzz_header.run(200, seed=1, say=lines.append)
    assert counts["FAULT false accept"] > 0
    assert len(lines) == sum(count for verdict, count in counts.items() if verdict.startswith("FAULT"))


# ---- cost ----


def test_hundred_thousand_tensors_take_seconds_at_most() -> None:
    """A guard against quadratic work, not a benchmark: 1.6 s of CPU here, four times that is allowed."""
    named = [(f"model.layers.{place}.mlp.up_proj.weight", "BF16", (4096, 14336)) for place in range(100_000)]
    gc.collect()
    started = time.process_time()
    header = build_header(named, {"format": "pt"})
    written = serialize(header)
    assert parse_header(written[8:], header.file_size, "m.safetensors") == header
    assert time.process_time() - started < 6.5


def test_module_needs_no_torch() -> None:
    code = "import sys, nemotron_fp8.checkpoint.header; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
