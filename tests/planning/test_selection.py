"""Which tensors become FP8, and which stay with what engines fuse them with."""

from __future__ import annotations

import pytest

from nemotron_fp8.checkpoint.tensor_view import contiguous
from nemotron_fp8.planning.families import DEFAULT_FAMILY
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.planning.selection import Decision, decide

NANO = "backbone.layers.{}.mixer."

FAMILIES: dict[str, dict[str, bool]] = {
    "nemotron": {
        "model.embed_tokens.weight": False,
        "model.layers.0.self_attn.q_proj.weight": True,
        "model.layers.0.self_attn.k_proj.weight": True,
        "model.layers.0.self_attn.v_proj.weight": True,
        "model.layers.0.self_attn.o_proj.weight": True,
        "model.layers.0.mlp.up_proj.weight": True,
        "model.layers.0.mlp.down_proj.weight": True,
        "model.layers.0.input_layernorm.weight": False,
        "model.layers.0.input_layernorm.bias": False,
        "model.norm.weight": False,
        "lm_head.weight": False,
    },
    "nemotron_h": {
        "backbone.embeddings.weight": False,
        NANO.format(0) + "in_proj.weight": True,
        NANO.format(0) + "out_proj.weight": True,
        NANO.format(0) + "conv1d.weight": False,
        NANO.format(0) + "conv1d.bias": False,
        NANO.format(0) + "A_log": False,
        NANO.format(0) + "D": False,
        NANO.format(0) + "dt_bias": False,
        NANO.format(1) + "q_proj.weight": True,
        NANO.format(1) + "k_proj.weight": True,
        NANO.format(1) + "v_proj.weight": True,
        NANO.format(1) + "o_proj.weight": True,
        NANO.format(2) + "up_proj.weight": True,
        NANO.format(2) + "down_proj.weight": True,
        NANO.format(3) + "experts.0.up_proj.weight": True,
        NANO.format(3) + "experts.0.down_proj.weight": True,
        NANO.format(3) + "shared_experts.up_proj.weight": True,
        NANO.format(3) + "shared_experts.down_proj.weight": True,
        NANO.format(3) + "gate.weight": False,
        NANO.format(3) + "gate.e_score_correction_bias": False,
        NANO.format(3) + "fc1_latent_proj.weight": False,
        NANO.format(3) + "fc2_latent_proj.weight": False,
        "mtp.layers.0.eh_proj.weight": False,
        "mtp.layers.0.mixer.q_proj.weight": False,
        "mtp.layers.1.mixer.experts.0.up_proj.weight": False,
        "backbone.norm_f.weight": False,
        "lm_head.weight": False,
    },
    "deci": {
        "model.layers.0.self_attn.q_proj.weight": True,
        "model.layers.0.self_attn.k_proj.weight": True,
        "model.layers.0.self_attn.v_proj.weight": True,
        "model.layers.0.mlp.gate_proj.weight": True,
        "model.layers.0.mlp.up_proj.weight": True,
        "model.layers.0.mlp.down_proj.weight": True,
        "model.layers.1.mlp.up_proj.weight": True,  # a layer may lack its partners
        "lm_head.weight": False,
    },
    "mixtral": {
        "model.layers.0.mlp.gate.weight": False,
        "model.layers.0.mlp.experts.3.gate_proj.weight": True,
        "model.layers.0.mlp.experts.3.up_proj.weight": True,
        "model.layers.0.mlp.experts.3.down_proj.weight": True,
    },
}
"""True for each tensor name to quantize, by family; the names are from the engines' model files."""

SHAPES = {"norm": (8,), "bias": (8,), "A_log": (4,), ".D": (4,), "conv1d.weight": (8, 1, 4)}


def shape_of(name: str) -> tuple[int, ...]:
    return next((shape for part, shape in SHAPES.items() if part in name), (8, 8))


def decisions(
    names: dict[str, tuple[int, ...]] | list[str], recipe: Recipe | None = None, dtype: str = "BF16"
) -> tuple[dict[str, Decision], tuple[str, ...]]:
    shapes = names if isinstance(names, dict) else {name: shape_of(name) for name in names}
    return decide([contiguous("f", n, dtype, s, 0) for n, s in shapes.items()], recipe or Recipe())


def chosen(names: dict[str, tuple[int, ...]] | list[str], recipe: Recipe | None = None) -> set[str]:
    return {name for name, decision in decisions(names, recipe)[0].items() if decision.quantize}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_rule_takes_what_each_family_quantizes(family: str) -> None:
    wanted = FAMILIES[family]
    found, notices = decisions(list(wanted))
    assert {name: decision.quantize for name, decision in found.items()} == wanted
    assert all(decision.reason for decision in found.values())
    assert not notices


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8", "I32", "F8_E5M2"])
def test_only_16_and_32_bit_floats_are_quantized(dtype: str) -> None:
    found, _ = decisions(["a.o_proj.weight"], dtype=dtype)
    assert found["a.o_proj.weight"].quantize is False
    assert dtype in found["a.o_proj.weight"].reason


@pytest.mark.parametrize("shape", [(), (8,), (2, 8, 8)])
def test_only_matrices_are_quantized(shape: tuple[int, ...]) -> None:
    assert not chosen({"a.o_proj.weight": shape})


QKV = [f"model.layers.7.self_attn.{p}_proj.weight" for p in "qkv"]
GATE_UP = [f"model.layers.7.mlp.{p}_proj.weight" for p in ("gate", "up")]
EXPERTS = [f"model.layers.7.mlp.experts.{e}.{p}_proj.weight" for e in (0, 1, 10) for p in ("up", "down")]
APART = ["model.layers.7.self_attn.o_proj.weight", "model.layers.70.self_attn.q_proj.weight"]


@pytest.mark.parametrize("fused_module", [QKV, GATE_UP, EXPERTS])
def test_ignoring_one_keeps_all_that_is_fused_and_says_so(fused_module: list[str]) -> None:
    """Any one member takes its whole bundle with it and nothing else; the notice names those that follow."""
    everything = [*QKV, *GATE_UP, *EXPERTS, *APART]
    for member in fused_module:
        recipe = Recipe(ignore=(f"^{member}$",))
        assert chosen(everything, recipe) == set(everything) - set(fused_module)
        found, notices = decisions(everything, recipe)
        (notice,) = notices
        assert member in notice
        followers = [name for name in fused_module if name != member]
        assert all(name in notice for name in followers[:4])
        assert all(member in found[name].reason for name in followers)


def test_select_replaces_the_default_rule() -> None:
    names = ["a.special.weight", "a.o_proj.weight", "mtp.o_proj.weight"]
    assert chosen(names, Recipe(select=("special",))) == {"a.special.weight"}
    everything = (r"^a\.", r"^mtp\.")
    assert chosen(names, Recipe(select=everything)) == {"a.special.weight", "a.o_proj.weight"}
    assert chosen(names, Recipe(select=everything, force_select=True)) == set(names)


def test_also_select_adds_to_the_default() -> None:
    names = ["a.special.weight", "a.o_proj.weight", "a.other.weight"]
    assert chosen(names) == {"a.o_proj.weight"}
    assert chosen(names, Recipe(also_select=("special",))) == {"a.special.weight", "a.o_proj.weight"}


def test_select_is_searched_in_the_full_name_and_ignore_wins() -> None:
    names = ["a.b.weight", "c.b.weight"]
    assert chosen(names, Recipe(select=("b",), ignore=(r"^c\.",))) == {"a.b.weight"}
    assert chosen(names, Recipe(select=("b",), ignore=("b", "nothing"))) == set()


def test_selecting_a_part_of_what_is_fused_keeps_it() -> None:
    """Engines refuse a fused module of which a part is FP8, so a selection that cuts through one is undone."""
    assert chosen([*QKV, *APART], Recipe(select=(r"[qo]_proj",))) == set(APART)


def test_a_partner_that_cannot_be_quantized_keeps_the_others() -> None:
    views = [contiguous("f", n, "F64" if "k_proj" in n else "BF16", (8, 8), 0) for n in QKV]
    found, notices = decide(views, Recipe())
    assert not any(decision.quantize for decision in found.values())
    assert len(notices) == 1


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.embed_tokens.weight", "backbone.embeddings.weight", "wte.weight"]
)
def test_no_selection_makes_a_head_or_an_embedding_fp8(name: str) -> None:
    found, _ = decisions([name, "a.b.weight"], Recipe(select=(".",)))
    assert found[name].quantize is False
    assert found["a.b.weight"].quantize is True


def test_no_selection_makes_a_bias_fp8() -> None:
    assert chosen({"a.b.bias": (4, 4), "a.b.weight": (4, 4)}, Recipe(select=(".",))) == {"a.b.weight"}


@pytest.mark.parametrize(
    ("name", "fused_module"),
    [
        ("model.layers.3.self_attn.k_proj.weight", "model.layers.3.self_attn.qkv_proj"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.gate_up_proj"),
        ("model.layers.3.mlp.experts.12.w2.weight", "model.layers.3.mlp.experts"),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", "model.layers.3.mlp.shared_experts.gate_up_proj"),
        ("q_proj.weight", "qkv_proj"),
        ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"),
    ],
)
def test_bundles(name: str, fused_module: str) -> None:
    assert DEFAULT_FAMILY.fused_module_of(name) == fused_module
