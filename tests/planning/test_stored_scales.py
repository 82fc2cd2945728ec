"""Scales from a calibration: their arithmetic, the weights that have one scale together, and what has none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, plan_repo, quantize_repo
from nemotron_fp8.errors import MissingAmaxError, OtherAmaxesError, RecipeError
from nemotron_fp8.planning.number_format import bfloat16_from
from nemotron_fp8.planning.stored_scales import SMALLEST, scale_of
from tests.support.amaxes import amaxes_of
from tests.support.decoders import HIDDEN, attention, decoder, mlp, write

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.plan import Plan

STATIC = Recipe(activations="static", kv_cache="fp8")
FLOATS = st.floats(0, 2.0**127, width=32, allow_subnormal=False)
LLAMA = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 2}
QWEN = {"model_type": "qwen3_moe", "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_experts": 4}


def values(plan: Plan) -> dict[str, float]:
    """The stored scales of a plan, by name."""
    tasks = [task for shard in plan.shard_tasks for task in shard.tensor_tasks]
    return {scale.name: scale.value for task in tasks for scale in task.stored_scales}


def experts(folder: Path, count: int = 4) -> Path:
    """A mixture of experts with a shared one and attention."""
    shapes = decoder(layers=1, dense=False)
    for i in range(count):
        shapes |= mlp(f"model.layers.0.mlp.experts.{i}.")
    shapes |= {"model.layers.0.mlp.gate.weight": (count, HIDDEN)}
    return write(folder, QWEN, shapes)


@given(FLOATS)
def test_a_scale_is_the_float32_quotient(amax: float) -> None:
    """As torch divides, but for quotients that are no normal numbers, and for an amax of 0."""
    quotient = float(torch.tensor(amax, dtype=torch.float32) / 448)
    assert scale_of(amax) == (max(quotient, SMALLEST) if amax else 1.0)


@given(FLOATS, st.floats(0.01, 100))
def test_a_factor_enlarges_before_the_only_rounding(amax: float, factor: float) -> None:
    exact = torch.tensor(amax, dtype=torch.float64) * factor / 448
    assert scale_of(amax, factor) == (max(float(exact.float()), SMALLEST) if amax else 1.0)


@given(st.floats(SMALLEST, 2.0**120, width=32, allow_subnormal=False))
def test_a_scale_of_the_cache_is_the_least_bfloat16_from_it_on(scale: float) -> None:
    up = bfloat16_from(scale)
    bfloat16 = torch.tensor(up, dtype=torch.float32).bfloat16()
    assert float(bfloat16) == up >= scale
    before = (bfloat16.view(torch.int16) - 1).view(torch.bfloat16)
    assert float(before) < scale


def test_weights_with_one_input_have_one_scale(tmp_path: Path) -> None:
    """The largest amax counts, whichever of them has it."""
    source = write(tmp_path / "source", LLAMA, decoder())
    amaxes = amaxes_of(source)
    layer = "model.layers.0."
    inputs = {**amaxes.inputs, f"{layer}self_attn.v_proj": 448.0, f"{layer}mlp.gate_proj": 896.0}
    del inputs[f"{layer}mlp.up_proj"]
    found = values(plan_repo(source, STATIC, amaxes=replace(amaxes, inputs=inputs)))
    assert {found[f"{layer}self_attn.{p}_proj.input_scale"] for p in "qkv"} == {1.0}
    assert {found[f"{layer}mlp.{p}_proj.input_scale"] for p in ("gate", "up")} == {2.0}
    assert found[f"{layer}mlp.down_proj.input_scale"] == scale_of(amaxes.inputs[f"{layer}mlp.down_proj"])
    # A scale for each of 7 projections and for keys and values, in both layers.
    assert len(found) == 2 * 9


@pytest.mark.parametrize(
    ("format", "k_scale", "shape", "is_rounded"),
    [
        ("compressed-tensors", "self_attn.k_scale", (1,), False),
        ("fp8", "self_attn.k_proj.k_scale", (), True),
        ("modelopt", "self_attn.k_proj.k_scale", (), True),
    ],
)
def test_each_layout_has_its_own_names_and_shapes(
    tmp_path: Path, format: str, k_scale: str, shape: tuple[int, ...], is_rounded: bool
) -> None:
    source = write(tmp_path / "source", LLAMA, decoder())
    amaxes = amaxes_of(source)
    plan = plan_repo(source, Recipe(format=format, activations="static", kv_cache="fp8"), amaxes=amaxes)
    tasks = [task for shard in plan.shard_tasks for task in shard.tensor_tasks]
    stored = {scale.name: scale for task in tasks for scale in task.stored_scales}
    assert {scale.shape for scale in stored.values()} == {shape}
    found = stored[f"model.layers.1.{k_scale}"]
    exact = scale_of(amaxes.k["model.layers.1.self_attn"])
    assert found.value == (bfloat16_from(exact) if is_rounded else exact)
    assert f"model.layers.1.{k_scale.replace('k_', 'v_')}" in stored
    entries = {entry.name: (entry.dtype, entry.shape) for shard in plan.shard_tasks for entry in shard.layout.entries}
    assert all(entries[name] == ("F32", shape) for name in stored)


def test_experts_of_a_layer_have_one_scale_by_role(tmp_path: Path) -> None:
    """Those that saw no token have that of the others, and the plan tells how many."""
    source = experts(tmp_path / "source")
    amaxes = amaxes_of(source, seen=lambda module: "experts.2" not in module)
    plan = plan_repo(source, Recipe(format="modelopt", activations="static"), amaxes=amaxes)
    found = {name: value for name, value in values(plan).items() if ".experts." in name}
    assert len(found) == 12
    stem = "model.layers.0.mlp.experts."
    seen = [0, 1, 3]
    for parts in (("gate_proj", "up_proj"), ("down_proj",)):
        largest = max(amaxes.inputs[f"{stem}{i}.{part}"] for i in seen for part in parts)
        assert {found[f"{stem}{i}.{part}.input_scale"] for i in range(4) for part in parts} == {scale_of(largest)}
    assert [n for n in plan.notices if "no token" in n] == [
        "no token of the calibration reached 3 projections of experts: they have the scales of the other experts of"
        " their layers"
    ]


def test_a_layer_whose_experts_saw_no_token_is_refused_by_name(tmp_path: Path) -> None:
    source = experts(tmp_path / "source")
    amaxes = amaxes_of(source, seen=lambda module: not module.endswith("experts.0.down_proj"))
    none = replace(amaxes, inputs={n: a for n, a in amaxes.inputs.items() if ".experts." not in n or "down" not in n})
    plan_repo(source, STATIC, amaxes=amaxes)
    with pytest.raises(MissingAmaxError, match=r"model\.layers\.0\.mlp\.experts\.down_proj.*more text") as caught:
        plan_repo(source, STATIC, amaxes=none)
    assert caught.value.names == ("model.layers.0.mlp.experts.down_proj",)


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"])
def test_a_linear_layer_without_an_amax_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    """Unless the recipe leaves it unquantized."""
    source = write(tmp_path / "source", LLAMA, decoder())
    amaxes = amaxes_of(source, seen=lambda module: module != missing)
    with pytest.raises(MissingAmaxError, match="calibrate this source") as caught:
        plan_repo(source, STATIC, amaxes=amaxes)
    assert caught.value.names == (missing,)
    found = values(plan_repo(source, STATIC.model_copy(update={"ignore": (missing,)}), amaxes=amaxes))
    assert f"{missing}.input_scale" not in found
    assert len(found) == 2 * 9 - 1


@pytest.mark.parametrize("table", ["k", "v"])
def test_attention_without_an_amax_is_refused_by_name(tmp_path: Path, table: str) -> None:
    source = write(tmp_path / "source", LLAMA, decoder())
    amaxes = amaxes_of(source)
    name = "model.layers.1.self_attn"
    less = replace(amaxes, **{table: {k: v for k, v in getattr(amaxes, table).items() if k != name}})
    with pytest.raises(MissingAmaxError) as caught:
        plan_repo(source, STATIC, amaxes=less)
    assert caught.value.names == (name,)
    plan_repo(source, Recipe(activations="static"), amaxes=less)


def test_a_model_whose_attention_was_not_seen_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source", LLAMA, decoder())
    with pytest.raises(MissingAmaxError, match="keys"):
        plan_repo(source, STATIC, amaxes=replace(amaxes_of(source), k={}, v={}))


def test_encoders_and_layers_behind_the_last_have_no_scales(tmp_path: Path) -> None:
    """A text does not reach them: engines build them apart."""
    shapes = decoder() | attention("model.layers.2.self_attn.") | attention("vision_tower.encoder.layers.0.self_attn.")
    source = write(tmp_path / "source", LLAMA, shapes)
    amaxes = amaxes_of(source, seen=lambda module: "layers.2" not in module and "vision" not in module)
    found = values(plan_repo(source, STATIC, amaxes=amaxes))
    assert len(found) == 2 * 9


def test_scales_of_the_cache_stay_where_attention_is_unquantized(tmp_path: Path) -> None:
    source = write(tmp_path / "source", LLAMA, decoder())
    recipe = Recipe(format="modelopt", activations="static", kv_cache="fp8", ignore=("self_attn",))
    found = values(plan_repo(source, recipe, amaxes=amaxes_of(source)))
    assert "model.layers.0.self_attn.k_proj.k_scale" in found
    assert "model.layers.0.self_attn.k_proj.input_scale" not in found


@pytest.mark.parametrize("projection", ["qkv_proj", "query_key_value"])
@pytest.mark.parametrize("format", ["compressed-tensors", "fp8"])
def test_a_checkpoint_without_a_projection_of_keys_names_the_module(
    tmp_path: Path, format: str, projection: str
) -> None:
    """The name from which every engine gets the attention."""
    shapes = {n: s for n, s in decoder().items() if "self_attn.k_" not in n and "self_attn.v_" not in n}
    shapes |= {f"model.layers.{i}.self_attn.{projection}.weight": (384, HIDDEN) for i in range(2)}
    source = write(tmp_path / "source", LLAMA, shapes)
    modules = {f"model.layers.{i}.self_attn": 2.0 for i in range(2)}
    amaxes = replace(amaxes_of(source), k=modules, v=modules)
    recipe = Recipe(format=format, granularity="tensor", kv_cache="fp8")
    assert sorted(values(plan_repo(source, recipe, amaxes=amaxes))) == [
        f"model.layers.{i}.self_attn.{kind}_scale" for i in range(2) for kind in "kv"
    ]


def test_an_input_of_zeros_has_the_scale_one(tmp_path: Path) -> None:
    source = write(tmp_path / "source", LLAMA, decoder())
    amaxes = amaxes_of(source)
    silent = replace(amaxes, inputs={**amaxes.inputs, "model.layers.0.mlp.down_proj": 0.0})
    plan = plan_repo(source, STATIC, amaxes=silent)
    assert values(plan)["model.layers.0.mlp.down_proj.input_scale"] == 1.0
    assert any("were all 0" in notice and "model.layers.0.mlp.down_proj" in notice for notice in plan.notices)


@pytest.mark.parametrize("table", ["inputs", "k", "v"])
def test_amaxes_of_another_model_are_refused(tmp_path: Path, table: str) -> None:
    """A deeper one, a wider mixture: whatever the source lacks."""
    source = write(tmp_path / "source", LLAMA, decoder())
    amaxes: Amaxes = amaxes_of(source)
    strange = replace(amaxes, **{table: {**getattr(amaxes, table), "model.layers.7.self_attn.o_proj": 1.0}})
    with pytest.raises(OtherAmaxesError, match=r"1 module .*model\.layers\.7\.self_attn\.o_proj") as caught:
        plan_repo(source, STATIC, amaxes=strange)
    assert caught.value.names == ("model.layers.7.self_attn.o_proj",)


@pytest.mark.parametrize(
    ("fields", "given", "says"),
    [
        ({"activations": "static"}, False, "activations 'static' .* needs the amaxes"),
        ({"format": "fp8", "granularity": "tensor", "kv_cache": "fp8"}, False, "kv_cache 'fp8' .* needs the amaxes"),
        ({}, True, "nothing uses them"),
        ({"granularity": "block"}, True, "nothing uses them"),
    ],
)
def test_amaxes_and_the_recipe_need_each_other(tmp_path: Path, fields: dict[str, Any], given: bool, says: str) -> None:
    source = write(tmp_path / "source", LLAMA, decoder())
    with pytest.raises(RecipeError, match=says):
        plan_repo(source, Recipe(**fields), amaxes=amaxes_of(source) if given else None)


def test_amaxes_without_any_attention_give_no_cache(tmp_path: Path) -> None:
    source = write(tmp_path / "source", LLAMA, decoder())
    with pytest.raises(MissingAmaxError, match="no keys of any module; calibrate") as caught:
        plan_repo(source, STATIC, amaxes=replace(amaxes_of(source), k={}, v={}))
    assert caught.value.names == ()


@pytest.mark.parametrize(
    ("activations", "says"),
    [
        ("dynamic", "engines scale activations while they run"),
        ("static", "those of the calibration are stored in their place"),
        ("none", "engines leave activations in 16 bits"),
    ],
)
def test_the_scales_of_a_source_are_dropped_for_what_the_result_has(
    tmp_path: Path, activations: str, says: str
) -> None:
    original = write(tmp_path / "original", LLAMA, decoder())
    amaxes, recipe = amaxes_of(original), Recipe(activations="static")
    quantize_repo(original, tmp_path / "source", recipe, amaxes=amaxes)
    given = amaxes if activations == "static" else None
    plan = plan_repo(tmp_path / "source", Recipe(activations=activations), amaxes=given)
    assert f"14 scales of activations are dropped: {says}" in plan.notices


def test_a_cache_alone_can_be_calibrated(tmp_path: Path) -> None:
    """Activations stay dynamic; the notice about scales of 1.0 is gone."""
    source = write(tmp_path / "source", LLAMA, decoder())
    plan = plan_repo(source, Recipe(kv_cache="fp8"), amaxes=amaxes_of(source))
    assert len(values(plan)) == 4
    assert not any("1.0" in notice for notice in plan.notices)


@pytest.mark.parametrize("config", [{"kv_lora_rank": 64}, {"model_type": "jamba"}, {"model_type": "zamba2"}])
def test_no_scale_is_stored_where_engines_read_none(tmp_path: Path, config: dict[str, Any]) -> None:
    """Those of latent vectors are dropped; attention without scales makes an engine reject the checkpoint."""
    source = write(tmp_path / "source", LLAMA | config, decoder())
    plan = plan_repo(source, STATIC, amaxes=amaxes_of(source))
    assert len(values(plan)) == 2 * 7
    assert any("has scales of 1.0, whatever was calibrated" in notice for notice in plan.notices)


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt", "fp8"])
def test_an_attention_in_a_module_of_its_name_is_named_twice(tmp_path: Path, format: str) -> None:
    """GPT-2 and its like: engines have the attention itself under ``attn.attn``."""
    shapes = {name.replace("self_attn", "attn"): shape for name, shape in decoder().items()}
    source = write(tmp_path / "source", LLAMA, shapes)
    amaxes = amaxes_of(source, attention=("attn",))
    plan = plan_repo(source, Recipe(format=format, activations="static", kv_cache="fp8"), amaxes=amaxes)
    found = {name for name in values(plan) if name.endswith(("k_scale", "v_scale"))}
    assert found == {f"model.layers.{i}.attn.attn.{kind}_scale" for i in range(2) for kind in "kv"}
