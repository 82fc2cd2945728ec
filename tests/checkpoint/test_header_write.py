"""Headers laid out and written: the bytes that safetensors writes, and nothing that cannot be read back."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemotron_fp8.checkpoint.dtypes import BITS, RANK, nbytes
from nemotron_fp8.checkpoint.header import build_header, serialize
from nemotron_fp8.errors import MalformedHeaderError
from tests.support import fuzz_header
from tests.support.header_strategies import Tensors, metadatas, names, tensors, texts

if TYPE_CHECKING:
    from collections.abc import Mapping


TORCH_DTYPES: dict[str, torch.dtype] = {
    **{name: dtype for name, dtype in safetensors.torch._TYPES.items() if dtype is not None},
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}
"""Every dtype that torch has and the safetensors library writes; torch packs two F4 elements into one."""


def saved(drawn: Tensors, metadata: Mapping[str, str] | None) -> bytes:
    """The file that the library writes for zeros of these dtypes and shapes."""
    made = {}
    for name, dtype, shape in drawn:
        stored = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
        made[name] = torch.zeros(nbytes(dtype, shape), dtype=torch.uint8).view(TORCH_DTYPES[dtype]).reshape(stored)
    return safetensors.torch.save(made, None if metadata is None else dict(metadata))


@given(tensors(TORCH_DTYPES), metadatas)
def test_written_byte_for_byte_as_the_library_does(drawn: Tensors, metadata: dict[str, str] | None) -> None:
    """For any tensors torch can save and at most one metadata pair, the header equals the library's."""
    assume(drawn or metadata != {})  # see test_no_tensors_and_empty_metadata
    header = build_header(drawn, metadata)
    file = saved(drawn, metadata)
    assert file[: header.data_start] == serialize(header)
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
    header = build_header([(name, "F32", (1,)) for name in made], metadata)
    assert path.read_bytes() == serialize(header) + bytes(header.data_size)
    with safetensors.safe_open(path, "pt") as opened:
        assert sorted(opened.keys()) == sorted(made)
        assert opened.metadata() == metadata


def test_no_tensors_and_empty_metadata() -> None:
    """The one case where ours differs: safetensors 0.8 then writes ``{},"__metadata__":{}}``, no JSON."""
    header = build_header([], {})
    assert serialize(header)[8:] == b'{"__metadata__":{}}     '
    assert fuzz_header.reference(serialize(header)) is not None
    assert fuzz_header.read(serialize(header)) == header


def test_every_dtype_of_torch_is_covered_at_once() -> None:
    """Dtype order, exhaustively: one tensor of every dtype the library writes, names in reverse."""
    drawn: Tensors = [(f"t{len(BITS) - place:02}", dtype, (2, 4)) for place, dtype in enumerate(sorted(TORCH_DTYPES))]
    assert set(BITS) - {dtype for _, dtype, _ in drawn} == {"F6_E2M3", "F6_E3M2"}
    header = build_header(drawn)
    assert saved(drawn, None)[: header.data_start] == serialize(header)
    assert [entry.dtype for entry in header.entries] == sorted(TORCH_DTYPES, key=RANK.__getitem__)


@given(tensors(), st.one_of(st.none(), st.dictionaries(texts, texts, max_size=4)))
def test_round_trip(drawn: Tensors, metadata: dict[str, str] | None) -> None:
    """A header built from tensors in any order and written reads back equal. The safetensors library reads it too."""
    header = build_header(drawn, metadata)
    written = serialize(header)
    assert len(written) == header.data_start
    assert len(written) % 8 == 0
    assert fuzz_header.read(written + bytes(header.data_size)) == header
    assert build_header(reversed(drawn), header.metadata) == header
    assert pickle.loads(pickle.dumps(header)) == header
    assert hash(header) == hash(build_header(drawn, metadata))
    theirs = fuzz_header.reference(written + bytes(header.data_size))
    assert theirs == {entry.name: (entry.dtype, entry.shape, entry.nbytes) for entry in header.entries}


@given(st.lists(names, unique=True, max_size=20))
def test_names_sort_as_utf8_bytes(drawn: list[str]) -> None:
    header = build_header([(name, "U8", (1,)) for name in drawn])
    assert [entry.name for entry in header.entries] == sorted(drawn, key=str.encode)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (("", "U8", (1,)), "empty"),
        (("a\0", "U8", (1,)), "NUL"),
        (("\ud800", "U8", (1,)), "surrogate"),
        (("__metadata__", "U8", (1,)), "reserved for the metadata"),
        ((b"a", "U8", (1,)), "not a string"),
        (("a", "u8", (1,)), "unknown dtype"),
        (("a", None, (1,)), "not a string"),
        (("a", "U8", (-1,)), "negative"),
        (("a", "U8", (True,)), "a boolean"),
        (("a", "U8", (1.0,)), "a number"),
        (("a", "U8", (2**64,)), "exceeds 64 bits"),
        (("a", "U8", (2**32, 2**32, 0)), "overflow"),
        (("a", "F4", (3,)), "whole number of bytes"),
    ],
)
def test_layout_refuses_what_could_not_be_read_back(entry: tuple[str, str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(MalformedHeaderError, match=says):
        build_header([entry])


def test_layout_refuses_two_of_one_name() -> None:
    with pytest.raises(MalformedHeaderError, match="duplicate name") as caught:
        build_header([("a", "U8", (1,)), ("a", "U8", (2,))])
    assert caught.value.tensor == "a"
    with pytest.raises(MalformedHeaderError, match="duplicate name"):
        build_header([("a", "U8", (1,)), ("a", "F32", (1,))])
    with pytest.raises(MalformedHeaderError, match="a duplicate key"):
        build_header([], [("a", "1"), ("a", "2")])


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, {1: "a"}, {"\ud800": ""}, {"a": "\udfff"}])
def test_layout_refuses_bad_metadata(metadata: dict[str, str]) -> None:
    with pytest.raises(MalformedHeaderError, match="__metadata__"):
        build_header([], metadata)


def test_data_past_64_bits_is_refused() -> None:
    with pytest.raises(MalformedHeaderError, match="overflow 64 bits"):
        build_header([(f"t{place}", "U8", (2**60,)) for place in range(17)])
