"""Headers: every malformed file refused with its reason, valid ones read and written as safetensors does."""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemotron_fp8.dtypes import BITS, RANK, nbytes
from nemotron_fp8.errors import MalformedHeaderError, UnknownDtypeError
from nemotron_fp8.header import (
    Entry,
    Header,
    Limits,
    header_length,
    layout,
    parse_header,
    read_header,
    serialise,
)
from nemotron_fp8.jsonguard import load_object
from tests import fuzz_header
from tests.corpus_headers import GOOD, OTHER, Case, header_cases, shard, tensor
from tests.corpus_headers import read_header_bytes as read_bytes
from tests.corpus_json import BadJsonError, json_cases, read_json_bytes
from tests.header_strategies import Tensors, metadatas, mutants, names, tensors, texts

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADER_CASES = list(header_cases())
JSON_CASES = list(json_cases())
ROOT = Path(__file__).parent.parent

TORCH_DTYPES: dict[str, torch.dtype] = {
    **{name: dtype for name, dtype in safetensors.torch._TYPES.items() if dtype is not None},
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}
"""Every dtype that torch has and the safetensors library writes; torch packs two F4 elements into one."""


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


@pytest.mark.parametrize("case", JSON_CASES, ids=lambda case: case.name)
def test_malformed_json_is_refused(case: Case) -> None:
    with pytest.raises(BadJsonError, match=case.says) as caught:
        read_json_bytes(case.make())
    assert len(str(caught.value)) < 1000


def test_corpus_is_large_and_its_names_are_unique() -> None:
    all_names = [case.name for case in HEADER_CASES + JSON_CASES]
    assert len(all_names) >= 120
    assert len(set(all_names)) == len(all_names)


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc")
def test_malformed_files_cost_little() -> None:
    """All of them in one process that loads nothing else: under 256 MB, each under one second of CPU."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.corpus_cost"],
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
    assert "starts at byte 3 of the data where 1 is due" in caught.value.problem


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
    """What the format allows is read, and understood as the library does."""
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
        (Limits(max_tensors=1), "2 tensors, the limit is 1"),
        (Limits(max_depth=2), "deeper than 2 levels"),
        (Limits(max_values=10), "more than 10 values"),
    ]:
        with pytest.raises(MalformedHeaderError, match=says):
            parse(file, limits)


def test_limits_hold_for_what_is_written() -> None:
    three = [(name, "U8", (1,)) for name in "abc"]
    size = layout(three).data_start - 8
    layout(three, limits=Limits(max_bytes=size, max_tensors=3))
    with pytest.raises(MalformedHeaderError, match="3 tensors, the limit is 2"):
        layout(three, limits=Limits(max_tensors=2))
    with pytest.raises(MalformedHeaderError, match=f"a header of {size}"):
        layout(three, limits=Limits(max_bytes=size - 1))


# ---- reading from a descriptor ----


def test_read_header_moves_no_position(tmp_path: Path) -> None:
    header = layout([("w", "BF16", (3, 5)), ("s", "F32", ())], {"format": "pt"})
    path = tmp_path / "m.safetensors"
    path.write_bytes(serialise(header) + bytes(header.data_size))
    with path.open("rb", buffering=0) as file:
        file.seek(3)
        assert read_header(file.fileno(), path.name) == header
        assert read_header(file.fileno(), path.name, header.file_size) == header
        assert file.tell() == 3


@pytest.mark.parametrize("keep", [0, 5, 8, 20])
def test_file_that_shrank_since_its_size_was_taken(tmp_path: Path, keep: int) -> None:
    header = layout([("w", "BF16", (3, 5))])
    path = tmp_path / "m.safetensors"
    path.write_bytes(serialise(header)[:keep])
    with (
        path.open("rb") as file,
        pytest.raises(MalformedHeaderError, match=r"at least 8|can be read; it was cut"),
    ):
        read_header(file.fileno(), "m.safetensors", header.file_size)


# ---- writing ----


def saved(drawn: Tensors, metadata: Mapping[str, str] | None) -> bytes:
    """The file that the library writes for zeros of these dtypes and shapes."""
    made = {}
    for name, dtype, shape in drawn:
        stored = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
        made[name] = (
            torch.zeros(nbytes(dtype, shape), dtype=torch.uint8).view(TORCH_DTYPES[dtype]).reshape(stored)
        )
    return safetensors.torch.save(made, None if metadata is None else dict(metadata))


@given(tensors(TORCH_DTYPES), metadatas)
def test_written_byte_for_byte_as_the_library_does(drawn: Tensors, metadata: dict[str, str] | None) -> None:
    """For any tensors torch can save and at most one metadata pair, the header equals the library's."""
    assume(drawn or metadata != {})  # see test_no_tensors_and_empty_metadata
    header = layout(drawn, metadata)
    file = saved(drawn, metadata)
    assert file[: header.data_start] == serialise(header)
    assert header.file_size == len(file)


@settings(max_examples=25)
@given(tensors(TORCH_DTYPES), metadatas)
def test_written_as_save_file_writes(
    tmp_path_factory: pytest.TempPathFactory, drawn: Tensors, metadata: dict[str, str] | None
) -> None:
    """The same through ``save_file`` and ``safe_open``, the calls that users make."""
    assume(drawn or metadata != {})
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    made = {name: torch.zeros(1) for name, _, _ in drawn}
    safetensors.torch.save_file(made, path, metadata)
    header = layout([(name, "F32", (1,)) for name in made], metadata)
    assert path.read_bytes() == serialise(header) + bytes(header.data_size)
    with safetensors.safe_open(path, "pt") as opened:
        assert sorted(opened.keys()) == sorted(made)
        assert opened.metadata() == metadata


def test_no_tensors_and_empty_metadata() -> None:
    """The one case where ours differs: safetensors 0.8 then writes ``{},"__metadata__":{}}``, no JSON."""
    header = layout([], {})
    assert serialise(header)[8:] == b'{"__metadata__":{}}     '
    assert library_accepts(serialise(header))
    assert parse(serialise(header)) == header


def test_every_dtype_of_torch_is_covered_at_once() -> None:
    """Dtype order, exhaustively: one tensor of every dtype the library writes, names in reverse."""
    drawn: Tensors = [
        (f"t{len(BITS) - place:02}", dtype, (2, 4)) for place, dtype in enumerate(sorted(TORCH_DTYPES))
    ]
    assert set(BITS) - {dtype for _, dtype, _ in drawn} == {"F6_E2M3", "F6_E3M2"}
    header = layout(drawn)
    assert saved(drawn, None)[: header.data_start] == serialise(header)
    assert [entry.dtype for entry in header.entries] == sorted(TORCH_DTYPES, key=RANK.__getitem__)


@given(tensors(), st.one_of(st.none(), st.dictionaries(texts, texts, max_size=4)))
def test_round_trip(drawn: Tensors, metadata: dict[str, str] | None) -> None:
    """What is laid out, in any order, and written reads back equal, and the library reads it too."""
    header = layout(drawn, metadata)
    written = serialise(header)
    assert len(written) == header.data_start
    assert len(written) % 8 == 0
    assert parse(written + bytes(header.data_size)) == header
    assert layout(reversed(drawn), header.metadata) == header
    assert pickle.loads(pickle.dumps(header)) == header
    assert hash(header) == hash(layout(drawn, metadata))
    theirs = fuzz_header.reference(written + bytes(header.data_size))
    assert theirs == {entry.name: (entry.dtype, entry.shape, entry.nbytes) for entry in header.entries}


@given(st.lists(names, unique=True, max_size=20))
def test_names_sort_as_utf8_bytes(drawn: list[str]) -> None:
    header = layout([(name, "U8", (1,)) for name in drawn])
    assert [entry.name for entry in header.entries] == sorted(drawn, key=str.encode)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (("", "U8", (1,)), "empty"),
        (("a\0", "U8", (1,)), "NUL"),
        (("\ud800", "U8", (1,)), "surrogate"),
        (("__metadata__", "U8", (1,)), "header's own"),
        ((b"a", "U8", (1,)), "not a string"),
        (("a", "u8", (1,)), "unknown dtype"),
        (("a", None, (1,)), "not a string"),
        (("a", "U8", (-1,)), "negative"),
        (("a", "U8", (True,)), "a boolean"),
        (("a", "U8", (1.0,)), "a number"),
        (("a", "U8", (2**64,)), "over 64 bits"),
        (("a", "U8", (2**32, 2**32, 0)), "overflow"),
        (("a", "F4", (3,)), "whole bytes"),
    ],
)
def test_layout_refuses_what_could_not_be_read_back(
    entry: tuple[str, str, tuple[int, ...]], says: str
) -> None:
    with pytest.raises(MalformedHeaderError, match=says):
        layout([entry])


def test_layout_refuses_two_of_one_name() -> None:
    with pytest.raises(MalformedHeaderError, match="two tensors") as caught:
        layout([("a", "U8", (1,)), ("a", "U8", (2,))])
    assert caught.value.tensor == "a"
    with pytest.raises(MalformedHeaderError, match="two tensors"):
        layout([("a", "U8", (1,)), ("a", "F32", (1,))])
    with pytest.raises(MalformedHeaderError, match="a key twice"):
        layout([], [("a", "1"), ("a", "2")])


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, {1: "a"}, {"\ud800": ""}, {"a": "\udfff"}])
def test_layout_refuses_bad_metadata(metadata: dict[str, str]) -> None:
    with pytest.raises(MalformedHeaderError, match="__metadata__"):
        layout([], metadata)


def test_data_past_64_bits_is_refused() -> None:
    with pytest.raises(MalformedHeaderError, match="more than 64 bits count"):
        layout([(f"t{place}", "U8", (2**60,)) for place in range(17)])


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
    header = layout(drawn, metadata)
    file = bytearray(serialise(header) + bytes(header.data_size))
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


# ---- strict JSON ----

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=20,
)


@given(st.dictionaries(texts, json_values, max_size=4), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_any_plain_object_is_read_as_json_reads_it(
    value: dict[str, object], ascii_only: bool, indent: int | str | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert load_object(text.encode(), "config.json", BadJsonError) == json.loads(text)


@given(st.binary(max_size=40) | texts.map(str.encode))
def test_any_bytes_give_an_object_or_the_given_error(data: bytes) -> None:
    try:
        read = load_object(data, "config.json", BadJsonError)
    except BadJsonError:
        return
    assert read == json.loads(data.decode())


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(['"[{"', '"\\\\"', '"\\""', "1", "[]"]))
def test_depth_counts_brackets_outside_strings(levels: int, limit: int, leaf: str) -> None:
    """Exactly the objects and arrays around a value count, whatever its strings hold."""
    depth = levels + 1 + (leaf == "[]")
    data = ('{"[":' + "[" * levels + leaf + "]" * levels + "}").encode()
    if depth <= limit:
        load_object(data, "config.json", BadJsonError, max_depth=limit)
    else:
        with pytest.raises(BadJsonError, match=f"deeper than {limit} levels"):
            load_object(data, "config.json", BadJsonError, max_depth=limit)


def test_numbers_of_real_configs_are_read() -> None:
    text = b'{"model_max_length":1000000000000000019884624838656,"eps":1e-05,"max":3.4028235e+38}'
    assert load_object(text, "tokenizer_config.json", BadJsonError) == json.loads(text)


def test_error_does_not_carry_the_document() -> None:
    """No chained JSONDecodeError, whose ``doc`` would bring the whole file into a log."""
    with pytest.raises(BadJsonError) as caught:
        load_object(b'{"secret": x}', "config.json", BadJsonError)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


# ---- cost ----


def test_hundred_thousand_tensors_take_seconds_at_most() -> None:
    """A guard against quadratic work, not a benchmark: 1.6 s of CPU here, four times that is allowed."""
    named = [(f"model.layers.{place}.mlp.up_proj.weight", "BF16", (4096, 14336)) for place in range(100_000)]
    gc.collect()
    started = time.process_time()
    header = layout(named, {"format": "pt"})
    written = serialise(header)
    assert parse_header(written[8:], header.file_size, "m.safetensors") == header
    assert time.process_time() - started < 6.5


def test_module_needs_no_torch() -> None:
    code = "import sys, nemotron_fp8.header; sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )
