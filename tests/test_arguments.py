"""Arguments of a wrong type, given to each public function: one error of ours, and nothing is written."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import (
    HubOptions,
    Recipe,
    compare_repos,
    convert_repo,
    dequantize_repo,
    inspect_repo,
    plan_repo,
    quantize_repo,
    report_repo,
    verify_repo,
)
from nemotron_fp8.errors import DeviceError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FUNCTIONS = (
    plan_repo,
    quantize_repo,
    convert_repo,
    dequantize_repo,
    verify_repo,
    inspect_repo,
    report_repo,
    compare_repos,
)
WRONG: dict[str, list[Any]] = {
    "source": [3, b"bytes", ["a"], ""],
    "destination": [3, b"bytes", ["a"], ""],
    "path": [3, b"bytes", ["a"], ""],
    "first": [3, None, ["a"], ""],
    "second": [3, None, ["a"], ""],
    "recipe": ["fp8", {"granularity": "block"}, {}, 0, 3, Recipe],
    "device": [3, None, ["cpu"]],
    "max_memory": [None, True, "lots", 0, -1, [], float("nan")],
    "max_device_memory": [True, "lots", 0, -1, []],
    "shard_size": [True, "lots", 0, -1, []],
    "min_share": ["x", -1, 100.5, True, [], float("nan")],
    "threads": ["x", "4", 0, -1, 1.5, True, []],
    "progress": [3, "x", []],
    "hub": ["hf://a/b", {}, {"revision": "main"}, 3, HubOptions],
    "cluster": [3, [], b"auto"],
    "base_model": [3, "name", "a/b/c", []],
    "amaxes": [3, [], b"amaxes.json", {"inputs": {}}],
    "evaluation": [3, [], b"figures.json", {"results": []}],
    "result": [3, "name without an evaluation"],
    "dtype": [3, None, [], "bf16"],
}
FLAGS = {"overwrite", "restart", "in_place", "digests"}
"""Any object has a truth."""

CASES = [
    pytest.param(function, name, value, id=f"{function.__name__}-{name}-{value!r:.30}")
    for function in FUNCTIONS
    for name in inspect.signature(function).parameters
    for value in WRONG.get(name, [])
]


@pytest.mark.parametrize(("function", "name", "value"), CASES)
def test_one_error_names_the_argument_and_its_values(
    function: Callable[..., Any], name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where there is no source: arguments are checked before anything is opened."""
    monkeypatch.chdir(tmp_path)
    parameters = inspect.signature(function).parameters
    needed = [key for key, each in parameters.items() if each.default is inspect.Parameter.empty]
    arguments = {key: tmp_path / key for key in (*needed, "destination") if key in parameters} | {name: value}
    with pytest.raises((RecipeError, DeviceError)) as caught:
        function(**arguments)
    text = str(caught.value)
    assert name in text
    assert repr(value)[:60] in text
    assert text.isprintable()
    assert len(text) < 300
    if isinstance(caught.value, RecipeError):
        assert caught.value.arguments == (name,)
    assert not list(tmp_path.iterdir())


def test_every_argument_is_tried() -> None:
    names = {name for function in FUNCTIONS for name in inspect.signature(function).parameters}
    assert names == WRONG.keys() | FLAGS


@pytest.mark.parametrize("value", [-1, "10min", True, None, float("nan"), float("inf")])
def test_the_time_of_retries(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"retry_seconds is .*a number of seconds") as caught:
        HubOptions(retry_seconds=value)
    assert caught.value.arguments == ("retry_seconds",)


@pytest.mark.parametrize("name", ["revision", "cache_dir", "on_wait", "token_env"])
def test_options_of_the_hub(name: str) -> None:
    with pytest.raises(RecipeError, match=name) as caught:
        HubOptions(**{name: 12345})
    assert ("12345" in str(caught.value)) == (name != "token_env"), "it may be the token itself"
