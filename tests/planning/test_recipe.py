"""Every combination of format, granularity and activations: accepted, or refused with the nearest one that works."""

from __future__ import annotations

import pickle
import re
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import Recipe
from nemotron_fp8.checkpoint.inventory import Inventory, Shard
from nemotron_fp8.checkpoint.tensor_view import contiguous
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.amaxes import Amaxes
from nemotron_fp8.planning.module_lists import Modules
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.planning.recipe import as_recipe, recipe_of
from tests.support.amaxes import RUN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.planning.plan import Plan

FORMATS, ACTIVATIONS = ("fp8", "compressed-tensors", "mxfp8", "modelopt"), ("dynamic", "static", "none")
GRANULARITIES = ("tensor", "channel", "block", "mx")
ALL = [
    dict(zip(("format", "granularity", "activations"), c, strict=True))
    for c in product(FORMATS, GRANULARITIES, ACTIVATIONS)
]
ALLOWED = [
    *({"format": "fp8", "granularity": g, "activations": "dynamic"} for g in ("tensor", "block")),
    {"format": "fp8", "granularity": "tensor", "activations": "static"},
    *(
        {"format": "compressed-tensors", "granularity": g, "activations": a}
        for g in GRANULARITIES
        for a in ("dynamic", "none")
    ),
    *({"format": "compressed-tensors", "granularity": g, "activations": "static"} for g in ("tensor", "channel")),
    {"format": "mxfp8", "granularity": "mx", "activations": "dynamic"},
    *({"format": "modelopt", "granularity": g, "activations": "dynamic"} for g in ("channel", "block")),
    {"format": "modelopt", "granularity": "tensor", "activations": "static"},
]
"""Combinations that at least one engine loads: vLLM, SGLang or transformers."""
REFUSED = [combination for combination in ALL if combination not in ALLOWED]


def named(combination: Mapping[str, str]) -> str:
    return "-".join(combination.values())


def refusal(**fields: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe(**fields)
    assert caught.value.arguments == ()  # a combination, not one field
    return str(caught.value)


def suggestion(message: str) -> dict[str, str]:
    """The fields that a refusal says to use, from the last part of the message."""
    advice = re.split(r"; (?:for weights only |for vLLM |for SGLang )?use ", message)[1]
    return dict(re.findall(r"(format|granularity|activations|numerics) '([^']+)'", advice))


@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_what_an_engine_loads_is_accepted_and_told_from_its_config(combination: dict[str, Any]) -> None:
    recipe = Recipe(**combination)
    assert recipe_of(recipe.layout.render_config(recipe.scheme, Modules(("lm_head",)))) == recipe


@pytest.mark.parametrize("combination", REFUSED, ids=named)
def test_what_no_engine_loads_is_refused_with_the_nearest_that_works(combination: dict[str, Any]) -> None:
    """The message names what is wrong, and following it gives a recipe with the granularity that was asked for.

    Where activations are static, it keeps that instead.
    """
    message = refusal(**combination)
    assert f"format '{combination['format']}'" in message.split(";")[0]
    works = Recipe(**(combination | suggestion(message)))
    if combination["activations"] == "static":
        assert works.activations == "static"
        return
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
        ("format", "nvfp4"),
        ("granularity", "token"),
        ("activations", "weights"),
        ("numerics", "bfloat16"),
        ("nonfinite", "ignore"),
        ("select", ("(",)),
        ("ignore", ("[",)),
        ("unknown", 1),
    ],
)
def test_a_value_that_is_not_offered_is_refused_by_its_field(field: str, value: object) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**{field: value})
    assert isinstance(caught.value, ValueError)
    assert caught.value.arguments == (field,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "zz"}, "granularity is 'zz', not 'tensor', 'channel', 'block' or 'mx'"),
        (
            {"granularity": "blok"},
            "granularity is 'blok', not 'tensor', 'channel', 'block' or 'mx' (did you mean 'block'?)",
        ),
        ({"granulrity": "block"}, "a recipe has no field 'granulrity' (did you mean 'granularity'?)"),
        ({"zzz": 1}, f"a recipe has no field 'zzz'; its fields are {', '.join(Recipe.model_fields)}"),
        ({"select": "abc"}, "select is 'abc', not a tuple of regular expressions such as ('q_proj',)"),
        ({"select": ("a", 3)}, "select[1] is 3, not a string"),
        ({"stats": "maybe"}, "stats is 'maybe', not True or False"),
        ({"stats": None}, "stats is None, not True or False"),
        (
            {"numerics": 3, "nonfinite": "kep"},
            "numerics is 3, not 'float32' or 'original';"
            " nonfinite is 'kep', not 'error' or 'keep' (did you mean 'keep'?)",
        ),
        (
            {"format": "x" * 1000},
            f"format is '{'x' * 59}..., not 'fp8', 'compressed-tensors', 'mxfp8' or 'modelopt'",
        ),
    ],
)
def test_one_message_names_field_value_and_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**fields)
    assert str(caught.value) == message
    assert caught.value.arguments == tuple(fields)
    assert caught.value.__suppress_context__, "a traceback of pydantic's would say the same once more"


@pytest.mark.parametrize(
    ("value", "passed"),
    [
        ("fp8", "Recipe(format='fp8')"),
        ("channel", "Recipe(granularity='channel')"),
        ("unknown", "Recipe(granularity='block')"),
        ({}, "Recipe(granularity='block')"),
        ({"granularity": "tensor", "stats": True}, "Recipe(granularity='tensor', stats=True)"),
        ({"granularty": "tensor"}, "Recipe(granularity='block')"),
        (Recipe, "Recipe(granularity='block')"),
        (0, "Recipe(granularity='block')"),
        (False, "Recipe(granularity='block')"),
    ],
)
def test_what_is_no_recipe_is_told_which_to_pass(value: object, passed: str) -> None:
    with pytest.raises(RecipeError) as caught:
        as_recipe(value)
    kind = "a class" if isinstance(value, type) else type(value).__name__
    assert str(caught.value) == f"recipe is {value!r} ({kind}); pass a Recipe, for example {passed}"


def test_recipes_pass_and_none_is_the_default() -> None:
    recipe = Recipe(granularity="block")
    assert as_recipe(recipe) is recipe
    assert as_recipe(None) == Recipe()
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(ValueError, match="granularity is 'x'"):  # pydantic's own class, where pydantic is called
        Recipe.model_validate({"granularity": "x"})


def inventory(*names: str) -> Inventory:
    views = tuple(contiguous("f", name, "BF16", (128, 128), 0) for name in names)
    return Inventory("fake", (Shard("s.safetensors", 1, None, views),), {}, {"model_type": "qwen3_moe"}, (), ())


def planned(source: Inventory, recipe: Recipe) -> Plan:
    """The plan of a source, with amaxes of all of its weights where the recipe needs them."""
    amaxes = Amaxes({view.name.removesuffix(".weight"): 1.0 for view in source.views}, {}, {}, (RUN,))
    return make_plan(source, recipe, 1 << 28, 1, amaxes=amaxes if recipe.needs_amaxes else None)


ROUTED = inventory("model.layers.0.mlp.experts.0.down_proj.weight", "model.layers.0.self_attn.o_proj.weight")
DENSE = inventory("model.layers.0.mlp.shared_experts.down_proj.weight", "model.layers.0.self_attn.o_proj.weight")


@pytest.mark.parametrize("source", ["dense", "routed"])
@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_some_layouts_are_refused_for_routed_experts(combination: dict[str, Any], source: str) -> None:
    """vLLM asserts on compressed-tensors with a scale a tensor and activations: both ways out that are named work."""
    recipe = Recipe(**combination)
    wrong = {"format": "compressed-tensors", "granularity": "tensor", "activations": "dynamic"}
    rows = {"format": "compressed-tensors", "granularity": "channel", "activations": "static"}
    dynamic = combination["format"] == "modelopt" and combination["activations"] == "dynamic"
    if source == "dense" or (combination not in (wrong, rows) and not dynamic):
        assert planned(DENSE if source == "dense" else ROUTED, recipe).quantized()
        return
    with pytest.raises(RecipeError, match="routed experts") as caught:
        planned(ROUTED, recipe)
    advice = suggestion(str(caught.value))
    if combination == wrong:
        assert advice == {"granularity": "channel", "format": "fp8"}
    elif combination == rows:
        assert advice == {"granularity": "tensor"}
    else:  # vLLM has parameters for one scale of an expert only
        assert advice == {"format": "compressed-tensors"}
    for field, value in advice.items():
        assert planned(ROUTED, Recipe(**(combination | {field: value}))).quantized()
    ignoring = Recipe(**combination, ignore=(r"\.experts\.",))
    assert planned(ROUTED, ignoring).quantized() == {"model.layers.0.self_attn.o_proj.weight"}


NOTICED = {
    ("compressed-tensors", "channel", "static"): ("CUTLASS", "fails"),
    ("compressed-tensors", "block", "none"): ("vLLM 0.32", "transformers"),
    ("compressed-tensors", "mx", "dynamic"): ("Blackwell", "no kernel"),
    ("compressed-tensors", "mx", "none"): ("Blackwell", "vLLM ignores activations 'none'"),
    ("mxfp8", "mx", "dynamic"): ("Blackwell", "for vLLM use"),
    ("modelopt", "channel", "dynamic"): ("transformers takes the codes for weights",),
    ("modelopt", "tensor", "static"): ("transformers takes the codes for weights", "SGLang"),
    ("modelopt", "block", "dynamic"): ("transformers takes the codes for weights",),
}
"""Words of the notices about layouts that not every engine, or not every device, reads as a user expects."""


@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_what_an_engine_refuses_or_misreads_has_a_notice(combination: dict[str, Any]) -> None:
    """Weight-only blocks: transformers reads them, vLLM 0.32 does not (pinned by the engine tests)."""
    notices = planned(DENSE, Recipe(**combination)).notices
    words = NOTICED.get((combination["format"], combination["granularity"], combination["activations"]))
    assert len(notices) == (words is not None)
    for word in words or ():
        assert word in notices[0]
    if combination["granularity"] == "block" and combination["activations"] == "none":
        assert Recipe(**(combination | suggestion(notices[0]))).granularity == "channel"


def test_blocks_with_scales_that_engines_round_again_have_a_notice() -> None:
    for format in ("fp8", "compressed-tensors", "modelopt"):
        recipe = Recipe(format=format, granularity="block", scale_rounding="none")
        assert any("cast the weights a second time" in notice for notice in planned(DENSE, recipe).notices)
        assert recipe.weight_format.numbers.scale_rounding == "none"
        assert Recipe(format=format, granularity="block").weight_format.numbers.scale_rounding == "power-of-two"


@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_scales_of_rows_only_are_searched(combination: dict[str, Any]) -> None:
    """Where no row has a scale, the message says why; the layout on disk does not depend on the choice."""
    if combination["granularity"] == "channel":
        recipe = Recipe(**combination, scales="best")
        assert recipe.weight_format.numbers.scale_choice == "best"
        assert recipe.on_disk == Recipe(**combination).on_disk
        assert Recipe(**combination).weight_format.numbers.scale_choice == "amax"
        return
    message = refusal(**combination, scales="best")
    assert "scales 'best' needs granularity 'channel': " in message
    assert message.endswith("; use scales 'amax'")


def test_original_scales_are_not_searched() -> None:
    assert "its script" in refusal(numerics="original", scales="best")


@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_scales_in_bytes_are_for_blocks_of_fp8_and_for_mx(combination: dict[str, Any]) -> None:
    if combination["granularity"] == "mx":
        recipe = Recipe(**combination)
        assert (recipe.scale_dtype, recipe.scale_rounding) == ("e8m0", "power-of-two")
        assert recipe.weight_format.numbers.scale.dtype == "U8"
        assert "use scale_dtype 'e8m0'" in refusal(**combination, scale_dtype="float32")
        assert "use scale_rounding 'power-of-two'" in refusal(**combination, scale_rounding="none")
        return
    if (combination["format"], combination["granularity"]) == ("fp8", "block"):
        recipe = Recipe(**combination, scale_dtype="e8m0")
        assert recipe.weight_format.numbers.scale.dtype == "F8_E8M0"
        config = recipe.layout.config(recipe.scheme, Modules(("lm_head",)), recipe.choices)
        assert config["scale_fmt"] == "ue8m0"
        assert recipe_of(config) == recipe
        assert "scale_fmt" not in recipe.layout.config(recipe.scheme, Modules(("lm_head",)))
        assert "powers of two only" in refusal(**combination, scale_dtype="e8m0", scale_rounding="none")
        return
    message = refusal(**combination, scale_dtype="e8m0")
    assert Recipe(**(combination | suggestion(message))).format == "fp8"


@pytest.mark.parametrize("combination", ALLOWED, ids=named)
def test_the_cache_of_keys_and_values_is_declared_where_engines_follow(combination: dict[str, Any]) -> None:
    """Told from the config too; the other formats name the engines' own option."""
    if combination["format"] == "fp8":  # scales of a calibration switch it on, not the config
        recipe = Recipe(**combination, kv_cache="fp8")
        assert recipe.needs_amaxes
        config = recipe.layout.config(recipe.scheme, Modules(("lm_head",)), recipe.choices)
        assert recipe_of(config) == Recipe(**combination)
        return
    if combination["format"] == "mxfp8":
        message = refusal(**combination, kv_cache="fp8")
        assert "--kv-cache-dtype fp8_e4m3" in message
        assert suggestion(message.replace("; pass", "; use")) == {"format": "compressed-tensors"}
        return
    recipe = Recipe(**combination, kv_cache="fp8")
    config = recipe.layout.config(recipe.scheme, Modules(("lm_head",)), recipe.choices)
    scheme = config.pop("kv_cache_scheme")
    assert (scheme["num_bits"], scheme["type"], scheme["dynamic"]) == (8, "float", False)
    assert recipe_of(config | {"kv_cache_scheme": scheme}) == recipe
    assert recipe_of(config) == Recipe(**combination)
    assert recipe.layout.describes(config | {"kv_cache_scheme": scheme}, recipe.scheme)
    assert not recipe.layout.describes(config | {"kv_cache_scheme": scheme | {"num_bits": 4}}, recipe.scheme)


def test_a_value_without_the_name_of_its_field_is_one_error_with_an_example() -> None:
    with pytest.raises(RecipeError, match=r"not 'block' alone; write Recipe\(granularity='block'\)"):
        Recipe("block")  # type: ignore[call-arg]
