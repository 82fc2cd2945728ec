"""A file of figures: it survives, it is checked, and a result is found in it by its name."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8._utils import short_name
from nemotron_fp8.errors import AmbiguousResultError, EvaluationFileError, OtherResultError, SourceReadError
from nemotron_fp8.evaluation.figures import MOST_CLIPPED
from nemotron_fp8.evaluation.naming import SOURCE, find_result, labels_of, read_evaluation
from nemotron_fp8.evaluation.result import BUCKETS, Evaluation, parse_evaluation
from tests.support.evaluations import CLIPPED, evaluation_of, evaluations, figures_of, write_figures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VALUES: list[Any] = [
    *(None, True, "", "x" * 3000, 1e31, -1e31, 10**200, -1, 1.5, [], {}, [[]], {"a": 1}),
    *(["a"], [None], [1e31], [1e30] * 40, [True]),
]
"""Values for every place of a file."""


@given(evaluations())
def test_figures_survive_their_file(evaluation: Evaluation) -> None:
    data = json.dumps(evaluation.to_json()).encode()
    again = parse_evaluation(data, "f.json")
    assert json.dumps(again.to_json()) == json.dumps(evaluation.to_json())


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a JSON text; of a list, to its first item."""
    yield path
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> bytes:
    """Return a text with a change of one value, made by ``change(parent, key)``."""
    whole = {"top": copy.deepcopy(value)}
    parent: Any = whole
    for key in ("top", *path[:-1]) if path else ():
        parent = parent[key]
    change(parent, path[-1] if path else "top")
    return json.dumps(whole["top"]).encode()


def read(data: bytes) -> Evaluation | None:
    """Return the figures in a text; None if it is rejected, with one line that names the file."""
    try:
        return parse_evaluation(data, "figures.json")
    except EvaluationFileError as error:
        assert str(error).startswith("figures.json: not the figures of an evaluation: ")
        assert str(error).isprintable()
        assert len(str(error)) < 1000
        return None


FEW = evaluation_of(figures_of("a", 0.1, 4, 3, **CLIPPED), sequences=4, layers=3)
WHOLE = json.loads(json.dumps(FEW.to_json()))
PLACES = list(places(WHOLE))


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)) or "the file")
def test_a_changed_value_is_rejected_or_read(path: tuple[Any, ...]) -> None:
    """Any value at any place gives figures of the right types, or one error of ours."""
    for value in VALUES:

        def put(parent: Any, key: Any, value: Any = value) -> None:
            parent[key] = value

        found = read(changed(WHOLE, path, put))
        if found is not None:
            assert parse_evaluation(json.dumps(found.to_json()).encode(), "f") == found
    if path:

        def remove(parent: Any, key: Any) -> None:
            del parent[key]

        found = read(changed(WHOLE, path, remove))
        assert found is None or path[-2:-1] in {("notices",), ("libraries",), ("position_kl",), ("clipped",)}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not JSON"),
        (b"[]", "the top level is an array"),
        (b"{}", "source is missing; write the file by evaluate --json"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"source": NaN}', "NaN is not valid JSON"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "nested deeper than 64 levels"),
        (b'{"a": 1e999}', "too large for a double"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5,000 characters"),
        (b'{"a": "' + b"x" * 25_000_001 + b'"}', "the limit is 25,000,000"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_a_text_of_another_kind_is_rejected(data: bytes, problem: str) -> None:
    with pytest.raises(EvaluationFileError, match=problem):
        parse_evaluation(data, "f.json")


def test_counts_must_agree() -> None:
    def with_value(*path: Any, value: Any) -> bytes:
        def put(parent: Any, key: Any) -> None:
            parent[key] = value

        return changed(WHOLE, path, put)

    for path in (
        ("results", 0, "sequence_kl"),
        ("source", "sequence_nll"),
        ("source", "layers"),
        ("sample", "indices"),
    ):
        assert read(with_value(*path, value=[1])) is None
    assert read(with_value("sample", "excerpts", value=["one"])) is None
    assert read(with_value("sample", "excerpts", value=[])) is not None
    assert read(with_value("results", value=[])) is None
    assert read(with_value("results", 0, "position_kl", value=[0.1] * (BUCKETS + 1))) is None
    modules = WHOLE["results"][0]["clipped"]
    assert read(with_value("results", 0, "clipped", value=modules[:1] * MOST_CLIPPED)) is not None
    assert read(with_value("results", 0, "clipped", value=modules[:1] * (MOST_CLIPPED + 1))) is None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(SourceReadError, match=path.name):
            read_evaluation(path)
    assert read_evaluation(write_figures(evaluation_of(), tmp_path / "f.json")) == evaluation_of()


# ---- names ----


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("out/fp8", "fp8"),
        ("/a/fp8/", "fp8"),
        ("hf://me/model-FP8", "model-FP8"),
        ("hf://me/model-FP8@refs/pr/1", "model-FP8"),
        ("a@b", "a@b"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


@given(evaluations(), st.integers(8, 40))
def test_labels_differ_and_fit(evaluation: Evaluation, most: int) -> None:
    labels = labels_of(evaluation.results, most)
    assert len({SOURCE, *labels}) == len(labels) + 1
    assert all(label.isprintable() and len(label) <= most for label in labels)


def test_a_result_is_found_by_its_folder_or_by_the_choice() -> None:
    first, second, third = figures_of("x/a", 0.1), figures_of("hf://me/b@v1", 0.2), figures_of("y/a", 0.3)
    both = evaluation_of(first, second)
    assert find_result(both, "f", "a") == first
    assert find_result(both, "f", "b") == second
    assert find_result(both, "f", "other", "b") == find_result(both, "f", "other", "hf://me/b@v1") == second
    with pytest.raises(OtherResultError, match=r"f: has figures of \['x/a', 'hf://me/b@v1'\], not of 'c'; pass"):
        find_result(both, "f", "c")
    three = evaluation_of(first, second, third)
    with pytest.raises(AmbiguousResultError, match=r"several results 'a': \['x/a', 'y/a'\]; name one"):
        find_result(three, "f", "a")
    assert find_result(three, "f", "a", "y/a") == third
    assert find_result(evaluation_of(first, first), "f", "a") == first
