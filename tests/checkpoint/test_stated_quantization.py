"""Statements of a quantization in a config: found at any depth, and dropped only where the tensors contradict them."""

from __future__ import annotations

from typing import Any

import pytest

from nemotron_fp8.checkpoint.inventory import Inventory, Shard, without_remnants
from nemotron_fp8.checkpoint.stated_quantization import (
    STORED,
    method_of,
    packed_tensor,
    stated,
    states_quantization,
    without_statements,
)
from nemotron_fp8.checkpoint.tensor_view import TensorView

FP8 = {"quant_method": "fp8"}
UNQUANTIZED = {
    "a.q_proj.weight": "BF16",
    "a.norm.weight": "F32",
    "a.position_ids": "I64",
    "a.mask": "BOOL",
    "a.logit_scale": "F32",
    "a.layer_scale.scale": "F16",
}
QUANTIZED = {
    "FP8": {"a.q_proj.weight": "F8_E4M3"},
    "AWQ and GPTQ": {"a.q_proj.qweight": "I32"},
    "bitsandbytes, 4 bits": {"a.q_proj.weight": "U8"},
    "bitsandbytes, its state": {"a.q_proj.weight.quant_state.bitsandbytes__nf4": "F32"},
    "bitsandbytes, 8 bits": {"a.q_proj.SCB": "F32"},
    "compressed-tensors, integers": {"a.q_proj.weight": "I8"},
    "a scale": {"a.q_proj.weight": "BF16", "a.q_proj.weight_scale": "F32"},
    "a scale of the cache": {"a.k_proj.weight": "BF16", "a.attn.k_scale": "F32"},
}
NESTED: dict[str, dict[str, Any]] = {
    "quantization_config": {"a": 1, "quantization_config": FP8, "b": [1, {"c": 2}]},
    "compression_config": {"compression_config": {"config_groups": {}}, "a": 1, "b": [1, {"c": 2}]},
    "text_config.quantization_config": {"a": 1, "text_config": {"quantization_config": FP8}, "b": [1, {"c": 2}]},
    "b[1].d.compression_config": {"a": 1, "b": [1, {"c": 2, "d": {"compression_config": FP8}}]},
}


def inventory(config: dict[str, Any] | None, tensors: dict[str, str]) -> Inventory:
    views = tuple(TensorView(name, dtype, (2, 2), ()) for name, dtype in tensors.items())
    return Inventory("s", (Shard("x", 9, None, views),), None, config, (), (), notices=("before",))


@pytest.mark.parametrize("place", [place for place in NESTED if place != "quantization_config"])
def test_a_remnant_is_dropped_and_named_at_any_depth(place: str) -> None:
    config = NESTED[place]
    ((found, statement),) = stated(config)
    assert (found, method_of(statement)) == (place, "compressed-tensors" if place == "compression_config" else "fp8")
    cleaned = without_remnants(inventory(config, UNQUANTIZED))
    assert cleaned.config == without_statements(config)
    assert not list(stated(cleaned.config))
    assert {"a": 1, "b": [1, {"c": 2}]}.items() <= _without_empty(cleaned.config).items()
    before, notice = cleaned.notices
    assert before == "before"
    assert place in notice
    assert cleaned.quantization_config is None


@pytest.mark.parametrize("place", NESTED)
def test_a_statement_of_the_model_itself_is_kept_with_all_others(place: str) -> None:
    """The source is then rejected: only the author of a model knows what its own ``quantization_config`` means."""
    given = inventory({**NESTED[place], "quantization_config": FP8}, UNQUANTIZED)
    assert without_remnants(given) == given


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: kept for key, item in value.items() if (kept := _without_empty(item)) != {}}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", QUANTIZED)
@pytest.mark.parametrize("place", NESTED)
def test_a_statement_about_quantized_tensors_is_kept(place: str, case: str) -> None:
    given = inventory(NESTED[place], {**UNQUANTIZED, **QUANTIZED[case]})
    assert without_remnants(given) == given
    assert given.quantization_config is not None


@pytest.mark.parametrize("statement", [{"quant_method": "bitnet"}, {"quant_method": 7}, {}, "fp8", [1], True])
def test_a_statement_of_another_method_is_kept(statement: Any) -> None:
    """Unquantized tensors do not contradict it: a model of ternary weights is trained with them."""
    for config in ({"quantization_config": statement}, {"a": {"quantization_config": statement}}):
        given = inventory(config, UNQUANTIZED)
        assert without_remnants(given) == given


def test_a_null_states_nothing() -> None:
    given = inventory({"a": 1, "quantization_config": None, "b": {"quantization_config": None}}, UNQUANTIZED)
    assert list(stated(given.config)) == []
    cleaned = without_remnants(given)
    assert cleaned.config == {"a": 1, "b": {}}
    assert cleaned.notices == given.notices


def test_a_config_without_a_statement_is_the_same_object() -> None:
    for config in (None, {}, {"a": {"b": [1]}}):
        given = inventory(config, UNQUANTIZED)
        assert without_remnants(given) is given


def test_the_outermost_statement_counts() -> None:
    nested = {"compression_config": {"x": 1}, "text_config": {"quantization_config": {"y": 2}}}
    assert inventory(nested, UNQUANTIZED).quantization_config == {"x": 1}
    assert inventory({**nested, "quantization_config": FP8}, UNQUANTIZED).quantization_config == FP8


@pytest.mark.parametrize(
    ("statement", "method"),
    [
        ({"quant_method": "AWQ"}, "awq"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_algo": "FP8", "producer": {"name": "modelopt"}}, "modelopt"),
        ({"config_groups": {}}, "compressed-tensors"),
    ],
)
def test_methods(statement: dict[str, Any], method: str) -> None:
    assert method_of(statement) == method
    assert method in STORED


def test_packed_weights_prove_a_quantization_without_any_config() -> None:
    for name in ("a.qweight", "a.weight_packed", "a.SCB", "a.weight.absmax"):
        assert packed_tensor(inventory(None, {**UNQUANTIZED, name: "I32"}).views) == name
    assert packed_tensor(inventory(None, UNQUANTIZED).views) is None


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("hf_quant_config.json", True),
        ("quantize_config.json", True),
        ("quant_config.json", True),
        ("quantization_config.json", True),
        ("quant_model_description_w8a8.json", True),
        ("Recipe.yaml", True),
        ("recipe.yml", True),
        ("config.json", False),
        ("my_recipe.yaml", False),
        ("quant_config.json.txt", False),
        ("generation_config.json", False),
    ],
)
def test_files_that_state_a_quantization(name: str, states: bool) -> None:
    assert states_quantization(name) == states
