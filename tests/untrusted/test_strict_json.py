"""Strict JSON: malformed texts refused with the reason, plain ones read as ``json`` reads them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.checkpoint.json_text import pretty_json
from nemotron_fp8.untrusted.strict_json import load_object
from tests.support.corpus_json import BadJsonError, json_cases, read_json_bytes
from tests.support.header_strategies import texts

if TYPE_CHECKING:
    from tests.support.corpus_headers import Case


@pytest.mark.parametrize("case", list(json_cases()), ids=lambda case: case.name)
def test_malformed_json_is_refused(case: Case) -> None:
    with pytest.raises(BadJsonError, match=case.says) as caught:
        read_json_bytes(case.make())
    assert len(str(caught.value)) < 1000


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


@given(st.dictionaries(texts, json_values, max_size=4))
def test_pretty_json_has_the_bytes_of_the_standard_library(value: dict[str, object]) -> None:
    assert pretty_json(value) == (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(
        "utf-8", "surrogatepass"
    )


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
