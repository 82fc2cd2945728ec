"""YAML as texts: what is accepted and refused, and that a written mapping is read again as it was."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.untrusted.yaml_text import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_NODES,
    Plain,
    as_flag,
    as_integer,
    as_number,
    dump_mapping,
    load_mapping,
)

Text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=30)
Scalar = st.one_of(
    Text, st.sampled_from(["1", "1e3", "0o17", "2024-01-01", "190:20:30", "yes", "null", "~", "=", "<<", "*x"])
)
Tree = st.recursive(
    Scalar,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(Scalar, inner, max_size=4)),
    max_leaves=12,
)


class BadError(Exception):
    """A text is refused."""


@given(st.dictionaries(Scalar, Tree, max_size=5))
def test_a_mapping_of_texts_survives(tree: dict[str, object]) -> None:
    assert load_mapping(dump_mapping(tree), BadError) == tree


@given(st.dictionaries(Text, Tree, max_size=5))
def test_other_readers_find_the_same_texts(tree: dict[str, object]) -> None:
    """PyYAML with all its types reads a text where a text was written, also a text like a number."""
    assert yaml.safe_load(dump_mapping(tree)) == tree


PLAIN = [
    "1",
    "0x1F",
    "1_000",
    "1.50",
    "1e3",
    "2024-01-01",
    "2001-12-14 21:59:43.10 -5",
    "190:20:30",
    "yes",
    "Off",
    "-.inf",
    "07",
]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_values_keep_their_digits(text: str) -> None:
    assert dump_mapping(load_mapping(f"key: {text}\n", BadError)) == f"key: {text}\n"


@pytest.mark.parametrize("text", PLAIN)
def test_quoted_values_stay_texts(text: str) -> None:
    written = dump_mapping(load_mapping(f"key: '{text}'\n", BadError))
    assert yaml.safe_load(written) == {"key": text}


HOSTILE = {
    "an alias": "a: &x [1]\nb: *x",
    "a merge of an alias": "a: &x {k: v}\n<<: *x",
    "a tag of Python": "a: !!python/object/apply:os.system [ls]",
    "a tag of a stranger": "a: !thing 1",
    "a binary": "a: !!binary aGVsbG8=",
    "a set": "a: !!set {x, y}",
    "a list": "- a\n- b",
    "a text": "hello",
    "two documents": "a: 1\n---\nb: 2",
    "a key twice": "a: 1\na: 2",
    "a mapping as a key": "{[1]: 2}",
    "an open bracket": "a: [",
    "a control character": "a: \x00",
    "depth": "[" * 100_000,
    "depth of blocks": "".join("  " * i + "a:\n" for i in range(MAX_DEPTH + 2)),
    "nodes": "a: [" + "1," * MAX_NODES + "]",
    "bytes": "#" * (MAX_BYTES + 1),
    "half of a surrogate pair": "a: \ud800",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_refused_at_once(kind: str) -> None:
    began = time.monotonic()
    with pytest.raises(BadError):
        load_mapping(HOSTILE[kind], BadError)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["!!float ''", "!!int ''", "!!timestamp x", "!!bool maybe", "!!null x", "! x"])
def test_values_with_a_tag_of_yaml_are_texts(kind: str) -> None:
    (value,) = load_mapping(f"a: {kind}", BadError).values()
    assert type(value) is str


def test_texts_become_numbers_only_where_a_number_is_asked_for() -> None:
    assert as_integer(Plain("4_096")) == 4096
    assert [as_integer(value) for value in ("4096", Plain("012"), Plain("4.0"), Plain("0x10"), None)] == [None] * 5
    assert as_number(Plain("1e-5")) == as_number("1e-5") == 1e-5
    assert [as_number(value) for value in ("9" * 1000, "x", None, ["1"])] == [None] * 4
    assert [as_flag(Plain(text)) for text in ("True", "off", "maybe")] == [True, False, None]
    assert as_flag("true") is None
