"""The file of amaxes: what is written is read, merges obey laws, and no file of a stranger passes unchecked."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import Amaxes, NemotronFp8Error
from nemotron_fp8.errors import AmaxesFileError, SourceReadError
from nemotron_fp8.planning.amaxes import (
    FACTORS,
    LONGEST,
    CalibrationRun,
    merge_amaxes,
    parse_amaxes,
    read_amaxes,
)

if TYPE_CHECKING:
    from pathlib import Path

NAMES = st.text(min_size=1, max_size=12) | st.sampled_from(["model.layers.0.self_attn.q_proj", "a", "\u202ex", "é.ü"])
NUMBERS = st.floats(0, 3.4028234663852886e38, width=32).map(abs)
TABLES = st.dictionaries(NAMES, NUMBERS, max_size=6)
TEXTS = st.text(string.ascii_letters + "é- _.", max_size=12)
RUNS = st.builds(
    CalibrationRun,
    TEXTS,
    TEXTS,
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.integers(1, 1 << 40),
    st.integers(1, 1 << 40),
    TEXTS,
    TEXTS,
    TEXTS,
)
SETS_OF_RUNS = st.sets(RUNS, min_size=1, max_size=3).map(lambda runs: tuple(sorted(runs)))
PERCENTILES = st.none() | st.floats(50, 100)
AMAXES = st.builds(Amaxes, TABLES, TABLES, TABLES, SETS_OF_RUNS, PERCENTILES, st.floats(*FACTORS))
ALIKE = st.builds(Amaxes, TABLES, TABLES, TABLES, SETS_OF_RUNS)
"""Amaxes with one percentile and factor, which can be merged."""


def merged(*parts: Amaxes) -> Amaxes:
    return merge_amaxes([(f"{number}.json", part) for number, part in enumerate(parts)])


@given(AMAXES)
def test_what_is_written_is_read(amaxes: Amaxes) -> None:
    data = amaxes.render()
    assert parse_amaxes(data, "a.json") == amaxes
    assert parse_amaxes(data, "a.json").render() == data


@given(AMAXES, st.randoms(use_true_random=False))
def test_equal_amaxes_are_equal_bytes(amaxes: Amaxes, chance: Any) -> None:
    """Whatever the order in which modules and calibrations came."""

    def mixed(items: Any) -> list[Any]:
        found = list(items)
        chance.shuffle(found)
        return found

    tables = {name: dict(mixed(getattr(amaxes, name).items())) for name in ("inputs", "k", "v")}
    again = replace(amaxes, **tables, runs=tuple(mixed(amaxes.runs)))
    assert again.render() == amaxes.render()
    assert again.sha256 == amaxes.sha256


@given(ALIKE, ALIKE)
def test_a_merge_is_commutative(one: Amaxes, other: Amaxes) -> None:
    assert merged(one, other) == merged(other, one)


@given(ALIKE, ALIKE, ALIKE)
def test_a_merge_is_associative(one: Amaxes, other: Amaxes, third: Amaxes) -> None:
    assert merged(merged(one, other), third) == merged(one, merged(other, third)) == merged(one, other, third)


@given(ALIKE, ALIKE)
def test_a_merge_is_idempotent(one: Amaxes, other: Amaxes) -> None:
    assert merged(one) == merged(one, one) == one
    both = merged(one, other)
    assert merged(both, one) == merged(both, other, both) == both


@given(st.lists(ALIKE, min_size=1, max_size=4))
def test_a_merge_has_the_largest_amax_of_each_module(parts: list[Amaxes]) -> None:
    found = merged(*parts)
    for name in ("inputs", "k", "v"):
        tables = [getattr(part, name) for part in parts]
        modules = {module for table in tables for module in table}
        assert getattr(found, name) == {m: max(table[m] for table in tables if m in table) for m in modules}
    assert set(found.runs) == {run for part in parts for run in part.runs}


RUN = CalibrationRun("m", "t.txt", "0" * 64, 16, 512, "0.1.0", "2.13.0", "5.23.0")
PLAIN = Amaxes({"a.q_proj": 3.5, "lm_head": 8.0}, {"a": 9.25}, {"a": 1.0}, (RUN,))


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (replace(PLAIN, percentile=99.0), r"b\.json: .* percentile is 99\.0, that of the others None"),
        (replace(PLAIN, factor=1.5), r"b\.json: .* factor is 1\.5, that of the others 1\.0"),
    ],
)
def test_amaxes_of_other_kinds_are_not_merged(other: Amaxes, problem: str) -> None:
    with pytest.raises(AmaxesFileError, match=problem):
        merge_amaxes([("a.json", PLAIN), ("b.json", other)])


def test_nothing_is_not_merged() -> None:
    with pytest.raises(AmaxesFileError, match="no files to merge"):
        merge_amaxes([])


@given(st.data())
def test_a_changed_byte_is_an_error_or_another_number(data: st.DataObject) -> None:
    """Never another class of error, and never a value outside of the limits."""
    whole = PLAIN.render()
    at = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.sampled_from([b"", b'"', b"9", b"-", b"e", b"{", b"}", b",", b"\x00", b"\xff", b"null"]))
    cut = data.draw(st.sampled_from([0, 1, len(whole)]))
    try:
        found = parse_amaxes(whole[:at] + change + whole[at + cut :], "a.json")
    except NemotronFp8Error as error:
        assert isinstance(error, AmaxesFileError)
        assert "\n" not in str(error)
        assert str(error).startswith("a.json: ")
    else:
        assert parse_amaxes(found.render(), "a.json") == found


WRONG: list[tuple[str, Any, str]] = [
    ("schema", 2, "schema 2"),
    ("schema", True, "schema True"),
    ("runs", [], "not a list of calibrations"),
    ("runs", {}, "not a list of calibrations"),
    ("runs", [{}], "is no calibration"),
    ("runs", [{**RUN._asdict(), "more": 1}], "is no calibration"),
    ("runs", [{**RUN._asdict(), "sequences": 0}], "sequences is 0"),
    ("runs", [{**RUN._asdict(), "length": True}], "length is True"),
    ("runs", [{**RUN._asdict(), "length": 1 << 60}], "length is"),
    ("runs", [{**RUN._asdict(), "source": "a\nb"}], "source is"),
    ("runs", [{**RUN._asdict(), "text": "\u202eb"}], "text is"),
    ("runs", [{**RUN._asdict(), "torch": 2}], "torch is 2"),
    ("runs", [{**RUN._asdict(), "sha256": "0" * 63 + "G"}], "not 64 hexadecimal digits"),
    ("runs", [RUN._asdict()] * 2 + [7], "is no calibration"),
    ("percentile", 49.9, "percentile is 49.9"),
    ("percentile", 100.1, "percentile is 100.1"),
    ("percentile", "99", "percentile is '99'"),
    ("percentile", True, "percentile is True"),
    ("factor", 0, "factor is 0"),
    ("factor", 1e9, "factor is"),
    ("factor", None, "factor is None"),
    ("inputs", None, "inputs is None"),
    ("inputs", {"a": -1}, "the amax of 'a' is -1"),
    ("inputs", {"a": "1"}, "the amax of 'a' is '1'"),
    ("inputs", {"a": True}, "the amax of 'a' is True"),
    ("inputs", {"a": 3.6e38}, "the amax of 'a' is"),
    ("inputs", {"a": 10**299}, "the amax of 'a' is"),
    ("k", {"": 1}, "is not the name of a module"),
    ("v", {"a" * (LONGEST + 1): 1}, "is not the name of a module"),
    ("v", [], "v is"),
    ("more", 1, "'more' is no key of such a file"),
]


@pytest.mark.parametrize(("key", "value", "problem"), WRONG)
def test_a_wrong_value_is_an_error(key: str, value: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**json.loads(PLAIN.render()), key: value}))
    with pytest.raises(AmaxesFileError, match=problem) as caught:
        read_amaxes(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("key", ["schema", "runs", "percentile", "factor", "inputs", "k", "v"])
def test_a_missing_key_is_an_error(key: str) -> None:
    found = json.loads(PLAIN.render())
    del found[key]
    with pytest.raises(AmaxesFileError, match=f"'{key}' is missing"):
        parse_amaxes(json.dumps(found).encode(), "a.json")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe{}",
        b'{"inputs": {"a": NaN}}',
        b'{"inputs": {"a": 1, "a": 2}}',
        b'{"inputs": ' + b"[" * 10000,
        b'{"factor": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_such_json_is_an_error(data: bytes) -> None:
    with pytest.raises(AmaxesFileError) as caught:
        parse_amaxes(data, "a.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_is_no_regular_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "loop"):
        if path.name == "loop":
            path.symlink_to(path)
        with pytest.raises(SourceReadError):
            read_amaxes(path)
