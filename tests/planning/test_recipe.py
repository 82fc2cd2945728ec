"""Every combination of format, granularity and activations: accepted, or refused with the nearest one that works."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from nemotron_fp8 import Recipe
from nemotron_fp8.checkpoint.inventory import Inventory, Shard
from nemotron_fp8.checkpoint.tensor_view import contiguous
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.planning.recipe import recipe_of

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMATS, GRANULARITIES, ACTIVATIONS = ("fp8", "compressed-tensors"), ("tensor", "channel", "block"), ("dynamic", "none")
ALL = [
    dict(zip(("format", "granularity", "activations"), c, strict=True))
    for c in product(FORMATS, GRANULARITIES, ACTIVATIONS)
]
ALLOWED = [
    *({"format": "fp8", "granularity": g, "activations": "dynamic"} for g in ("tensor", "block")),
    *({"format": "compressed-tensors", "granularity": g, "activations": a} for g in GRANULARITIES for a in ACTIVATIONS),
]
"""What some engine loads; vLLM, SGLang or transformers."""
REFUSED = [combination for combination in ALL if combination not in ALLOWED]


def named(combination: Mapping[str, str]) -> str:
    return "-".join(combination.values())


def refusal(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Recipe(**fields)
    (error,) = caught.value.errors()
    return str(error["msg"])


def suggestion(message: str) -> dict[str, str]:
    """The fields that a refusal says to use, from the last part of the message."""
    advice = re.split(r"; (?:for weights only |for vLLM )?use ", message)[1]
    return dict(re.findall(r"(format|granularity|activations|numerics) '([^']+)'", advice))


@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_what_an_engine_loads_is_accepted_and_told_from_its_config(combination: dict[str, Any]) -> None:
    recipe = Recipe(**combination)
    assert recipe_of(recipe.layout.render_config(recipe.scheme, ["lm_head"])) == recipe


@pytest.mark.parametrize("combination", REFUSED, ids=named)
def test_what_no_engine_loads_is_refused_with_the_nearest_that_works(combination: dict[str, Any]) -> None:
    """The message names what is wrong, and following it gives a recipe with the granularity that was asked for."""
    message = refusal(**combination)
    assert "format 'fp8'" in message.split(";")[0]
    works = Recipe(**(combination | suggestion(message)))
    assert works.granularity == combination["granularity"]
    assert works.format == "compressed-tensors"


@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_scales_are_shared_for_tensors_only(combination: dict[str, Any]) -> None:
    if combination["granularity"] == "tensor":
        assert Recipe(**combination, share_scales=True).share_scales
        return
    message = refusal(**combination, share_scales=True)
    assert f"'{combination['granularity']}'" in message
    assert "granularity 'tensor'" in message


@pytest.mark.parametrize("share_scales", [False, True])
@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_the_original_numerics_are_for_one_scale_a_tensor(combination: dict[str, Any], share_scales: bool) -> None:
    if combination["granularity"] == "tensor" and not share_scales:
        assert Recipe(**combination, numerics="original").numerics == "original"
        return
    message = refusal(**combination, numerics="original", share_scales=share_scales)
    if share_scales and combination["granularity"] != "tensor":  # the first thing that is wrong is told
        assert "share_scales" in message
    else:
        assert "numerics 'original'" in message
        assert "numerics 'float32'" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "modelopt"),
        ("granularity", "token"),
        ("activations", "static"),
        ("numerics", "bfloat16"),
        ("nonfinite", "ignore"),
        ("select", ("(",)),
        ("ignore", ("[",)),
        ("unknown", 1),
    ],
)
def test_a_value_that_is_not_offered_is_refused_by_its_field(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe(**{field: value})
    assert {error["loc"] for error in caught.value.errors()} == {(field,)}


def inventory(*names: str) -> Inventory:
    views = tuple(contiguous("f", name, "BF16", (128, 128), 0) for name in names)
    return Inventory("fake", (Shard("s.safetensors", 1, None, views),), {}, {"model_type": "qwen3_moe"}, (), ())


ROUTED = inventory("model.layers.0.mlp.experts.0.down_proj.weight", "model.layers.0.self_attn.o_proj.weight")
DENSE = inventory("model.layers.0.mlp.shared_experts.down_proj.weight", "model.layers.0.self_attn.o_proj.weight")


@pytest.mark.parametrize("source", ["dense", "routed"])
@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_one_layout_is_refused_for_routed_experts(combination: dict[str, Any], source: str) -> None:
    """vLLM asserts on compressed-tensors with a scale a tensor and activations: both ways out that are named work."""
    recipe = Recipe(**combination)
    wrong = {"format": "compressed-tensors", "granularity": "tensor", "activations": "dynamic"}
    if source == "dense" or combination != wrong:
        assert make_plan(DENSE if source == "dense" else ROUTED, recipe, 1 << 28, 1).quantized()
        return
    with pytest.raises(RecipeError, match="routed experts") as caught:
        make_plan(ROUTED, recipe, 1 << 28, 1)
    advice = suggestion(str(caught.value))
    assert advice == {"granularity": "channel", "format": "fp8"}
    for field, value in advice.items():
        assert make_plan(ROUTED, Recipe(**(combination | {field: value})), 1 << 28, 1).quantized()
    ignoring = Recipe(**combination, ignore=(r"\.experts\.",))
    assert make_plan(ROUTED, ignoring, 1 << 28, 1).quantized() == {"model.layers.0.self_attn.o_proj.weight"}


@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_what_vllm_refuses_has_a_notice(combination: dict[str, Any]) -> None:
    """Weight-only blocks: transformers reads them, vLLM 0.32 does not (pinned by the engine tests)."""
    notices = make_plan(DENSE, Recipe(**combination), 1 << 28, 1).notices
    if combination["granularity"] == "block" and combination["activations"] == "none":
        (notice,) = notices
        assert "vLLM 0.32" in notice
        assert "transformers" in notice
        assert Recipe(**(combination | suggestion(notice))).granularity == "channel"
    else:
        assert notices == ()
