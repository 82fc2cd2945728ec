"""Samples: the same sequences in every call, and an error of ours for every unusable file of tokens or text."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import NemotronFp8Error
from nemotron_fp8.errors import SampleError
from nemotron_fp8.inference import sample as module
from nemotron_fp8.inference.sample import check_ids, draw_text, read_tokens
from nemotron_fp8.sources.open import open_source
from tests.support.checkpoints import model, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


def written(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_all_lists_are_taken(tmp_path: Path) -> None:
    lists = [[number, number + 1, number + 2] for number in range(20)]
    drawn = read_tokens(written(tmp_path / "t.json", lists), None, None)
    assert drawn.ids.tolist() == lists
    sample = drawn.sample
    assert (sample.name, sample.sequences, sample.available, sample.length) == ("t.json", 20, 20, 3)
    assert sample.predictions == 40


@given(st.integers(1, 30), st.integers(2, 6), st.integers(1, 40), st.integers(2, 6))
def test_some_lists_are_drawn_the_same_way_in_every_call(
    tmp_path_factory: pytest.TempPathFactory, count: int, size: int, sequences: int, length: int
) -> None:
    lists = [[100 * row + at for at in range(size)] for row in range(count)]
    path = written(tmp_path_factory.mktemp("tokens") / "t.json", lists)
    if length > size:
        with pytest.raises(SampleError, match="a sequence needs"):
            read_tokens(path, sequences, length)
        return
    first, second = (read_tokens(path, sequences, length) for _ in range(2))
    assert first.sample == second.sample
    assert torch.equal(first.ids, second.ids)
    indices = list(first.sample.indices)
    assert indices == sorted(set(indices))
    assert len(indices) == min(count, sequences)
    assert first.ids.tolist() == [lists[index][:length] for index in indices]


WRONG = [
    "",
    "x",
    "[[1, 2]",
    "[[1, 2]] x",
    '[[1, 2]], "x": [[3, 4]]',
    "{}",
    "[]",
    "[[]]",
    "[[1]]",
    "[1, 2]",
    "[[1, 2], [3]]",
    "[[1, 2], 3]",
    "[[1, 2.0]]",
    "[[1, 1e3]]",
    "[[1, -1]]",
    "[[1, null]]",
    "[[1, true]]",
    '[[1, "2"]]',
    "[[1, [2]]]",
    "[[1, 4294967296]]",
    "[[1, 1" + "0" * 5000 + "]]",
    "[[1, NaN]]",
    "[" * 100_000,
    '"' * 50,
    "\ufeff[[1, 2]]",
    "null",
    '"x"',
]


@pytest.mark.parametrize("text", WRONG, ids=[text[:20] for text in WRONG])
def test_wrong_tokens(tmp_path: Path, text: str) -> None:
    with pytest.raises(SampleError) as caught:
        read_tokens(written(tmp_path / "t.json", text), None, None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_tokens_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe"):
        with pytest.raises(SampleError, match="cannot be read"):
            read_tokens(path, None, None)


def test_a_token_outside_of_the_vocabulary(tmp_path: Path) -> None:
    drawn = read_tokens(written(tmp_path / "t.json", [[1, 99]]), None, None)
    check_ids(drawn, 100)
    with pytest.raises(SampleError, match="token id 99 is outside of the model's vocabulary of 99 words"):
        check_ids(drawn, 99)


# ---- texts ----


class Tokenizer:
    """A tokenizer of bytes, with a token before each text if there is one."""

    def __init__(self, begin: int | None) -> None:
        self.bos_token_id = begin

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*begin, *text.encode()]}

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class Quiet:
    """Functions of transformers, without transformers."""

    version = "0"

    def quiet(self) -> AbstractContextManager[None]:
        from contextlib import nullcontext

        return nullcontext()


@pytest.fixture(params=[None, 300])
def begin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int | None]:
    monkeypatch.setattr(module, "_tokenizer", lambda *_: Tokenizer(request.param))
    return request.param


def test_sequences_of_a_text(tmp_path: Path, begin: int | None) -> None:
    """They follow each other in the text, and each begins with the token that begins a text."""
    source = open_source(write_checkpoint(tmp_path / "c", model()))
    text = "".join(chr(97 + at % 26) for at in range(1000))
    drawn = draw_text(source, Quiet(), tmp_path, written(tmp_path / "t.txt", text), 5, 10)  # type: ignore[arg-type]
    step = 10 if begin is None else 9
    assert drawn.sample.available == 1000 // step
    assert drawn.ids.shape == (5, 10)
    for index, row, excerpt in zip(drawn.sample.indices, drawn.ids.tolist(), drawn.sample.excerpts, strict=True):
        body = row if begin is None else row[1:]
        assert begin is None or row[0] == begin
        assert bytes(body).decode() == text[index * step : (index + 1) * step]
        assert excerpt == bytes(body).decode()


def test_a_short_text(tmp_path: Path, begin: int | None) -> None:
    source = open_source(write_checkpoint(tmp_path / "c", model()))
    with pytest.raises(SampleError, match="3 tokens are fewer than one sequence of 10"):
        draw_text(source, Quiet(), tmp_path, written(tmp_path / "t.txt", "abc"), 5, 10)  # type: ignore[arg-type]


def test_the_default_text_is_long_enough(tmp_path: Path, begin: int | None) -> None:
    source = open_source(write_checkpoint(tmp_path / "c", model()))
    drawn = draw_text(source, Quiet(), tmp_path, None, 16, 512)  # type: ignore[arg-type]
    assert drawn.sample.sequences == 16
    assert drawn.sample.available > 400


@pytest.mark.parametrize("data", [b"\xff\xfe", b"abc\x80", "\u00fc".encode("latin-1")])
def test_a_text_that_is_not_utf8(tmp_path: Path, data: bytes, begin: int | None) -> None:
    source = open_source(write_checkpoint(tmp_path / "c", model()))
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(SampleError, match="not UTF-8 at byte"):
        draw_text(source, Quiet(), tmp_path, tmp_path / "t.txt", 5, 10)  # type: ignore[arg-type]


def test_a_tokenizer_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a stranger's\nfile")

    monkeypatch.setattr(module, "_tokenizer", lambda *_: fail)
    source = open_source(write_checkpoint(tmp_path / "c", model()))
    with pytest.raises(NemotronFp8Error, match="cannot encode the text") as caught:
        draw_text(source, Quiet(), tmp_path, None, 5, 10)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
