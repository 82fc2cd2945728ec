"""Faults that other tools and earlier versions had, each with the smallest checkpoint that shows it: the plan is right.

Each test names the family, or the report, of the fault.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, plan_repo
from nemotron_fp8.documents.render import render_documents
from nemotron_fp8.errors import NothingSelectedError, RecipeError, StackedExpertsError
from tests.support.decoders import HIDDEN, INNER, VOCABULARY, Shapes, attention, decoder, ends, in_list, mlp, write

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8 import Plan

CHANNEL = Recipe()
FP8_TENSOR, FP8_BLOCK = Recipe(format="fp8", granularity="tensor"), Recipe(format="fp8")
BLOCK = Recipe(granularity="block")
MXFP8, MX = Recipe(format="mxfp8"), Recipe(granularity="mx")
LAYOUTS = [CHANNEL, FP8_TENSOR, FP8_BLOCK, BLOCK, MXFP8, MX]
NAMES = ["channel", "fp8 tensor", "fp8 block", "block", "mxfp8", "mx"]
every_layout = pytest.mark.parametrize("recipe", LAYOUTS, ids=NAMES)
ENGINES = ("vLLM", "SGLang", "transformers")


def quantization(plan: Plan) -> dict[str, Any]:
    """The ``quantization_config`` of the result."""
    config: dict[str, Any] = json.loads(render_documents(plan, {})["config.json"])["quantization_config"]
    return config


def fp8(plan: Plan) -> set[str]:
    return {t.name for t in plan.tensors if t.quantize}


def reason(plan: Plan, name: str) -> str:
    (found,) = [t.reason for t in plan.tensors if t.name == name]
    return found


def readers(plan: Plan) -> list[str]:
    """Engines that read the lists of a plan's layout."""
    loads = plan.recipe.layout.readers[plan.recipe.scheme]
    return [engine for engine in ENGINES if loads.by(engine)]


def check_lists(plan: Plan, unquantized: set[str]) -> None:
    """Check that every engine finds these modules, and no FP8 module."""
    config = quantization(plan)
    for engine in readers(plan):
        for module in unquantized:
            assert in_list(config, engine, module), (engine, module)
        for name in fp8(plan):
            assert not in_list(config, engine, name.removesuffix(".weight")), (engine, name)


# ---- names of the file, and names of an engine's modules ----


def test_kept_modules_are_found_whatever_prefix_an_engine_adds_or_drops(tmp_path: Path) -> None:
    """Qwen2.5-VL: ``visual.*`` is ``model.visual.*`` in transformers; LLaVA: ``language_model.lm_head`` is ``lm_head``.

    An entry with the name of the file alone makes the engine take the kept layer for FP8 without a scale.
    """
    vision: Shapes = {
        "visual.blocks.0.attn.qkv.weight": (3 * HIDDEN, HIDDEN),
        "visual.blocks.0.norm1.weight": (HIDDEN,),
        "visual.merger.mlp.0.weight": (HIDDEN, HIDDEN),
    }
    plan = plan_repo(write(tmp_path / "qwen", {"model_type": "qwen2_5_vl"}, {**decoder(), **vision}))
    modules = {"visual.blocks.0.attn.qkv", "visual.merger.mlp.0", "lm_head"}
    check_lists(plan, {prefix + name for prefix in ("", "model.", "model.language_model.") for name in modules})

    llava: Shapes = {
        **{f"language_model.{name}": shape for name, shape in decoder().items()},
        **attention("vision_tower.vision_model.encoder.layers.0.self_attn."),
        "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight": (HIDDEN,),
        "multi_modal_projector.linear_1.weight": (HIDDEN, HIDDEN),
    }
    plan = plan_repo(write(tmp_path / "llava", {"model_type": "llava"}, llava))
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    check_lists(plan, {"lm_head", "language_model.lm_head", tower, f"model.{tower}"})
    # transformers 5 calls this module model.vision_tower.encoder...: no prefix, but the same tree.
    assert in_list(quantization(plan), "transformers", "model.vision_tower.encoder.layers.0.self_attn.q_proj")


def test_kept_modules_that_an_engine_builds_under_another_name_are_found(tmp_path: Path) -> None:
    """Gemma 3n: vLLM builds ``per_layer_model_projection`` in ``self_decoder``; whisper: ``fc1`` is in ``mlp``."""
    gemma = {
        **decoder("model.language_model."),
        "model.language_model.per_layer_model_projection.weight": (INNER, HIDDEN),
    }
    plan = plan_repo(write(tmp_path / "gemma", {"model_type": "gemma3n"}, gemma))
    check_lists(plan, {"model.language_model.per_layer_model_projection"})
    assert in_list(quantization(plan), "vLLM", "language_model.model.self_decoder.per_layer_model_projection")

    whisper: Shapes = {
        "model.decoder.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.encoder.layers.0.fc1.weight": (INNER, HIDDEN),
        "model.encoder.layers.0.fc1.bias": (INNER,),
        "model.decoder.layers.0.fc1.weight": (INNER, HIDDEN),
        "model.decoder.layers.0.fc1.bias": (INNER,),
        "model.decoder.layers.0.self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    }
    plan = plan_repo(write(tmp_path / "whisper", {"model_type": "whisper", "is_encoder_decoder": True}, whisper))
    assert fp8(plan) == {"model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.self_attn.k_proj.weight"}
    check_lists(plan, {"model.encoder.layers.0.fc1", "model.encoder.layers.0.mlp.fc1"})


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("llama", {"lm_head"}),
        ("whisper", {"proj_out"}),
        ("t5gemma", {"lm_head.out_proj"}),
        ("unheard_of", {"lm_head", "proj_out", "lm_head.out_proj", "embed_out"}),
    ],
)
def test_a_tied_head_is_listed_although_it_has_no_tensor(tmp_path: Path, kind: str, heads: set[str]) -> None:
    """transformers builds it and takes it for FP8 otherwise: infinite or NaN logits."""
    source = write(tmp_path / "source", {"model_type": kind}, decoder(head=None))
    for recipe in (CHANNEL, FP8_BLOCK):
        config = quantization(plan_repo(source, recipe))
        assert all(in_list(config, "transformers", head) for head in heads)


@every_layout
def test_names_without_the_model_prefix(tmp_path: Path, recipe: Recipe) -> None:
    """vllm 53950: ``layers.0.mlp.down_proj.weight`` is selected and listed as with the prefix."""
    bare = decoder(stem="")
    source = write(tmp_path / "source", {"model_type": "llama"}, bare)
    plan = plan_repo(source, recipe.model_copy(update={"ignore": (r"layers\.1\.mlp\.",)}))
    layers = {name for name in bare if name.endswith("_proj.weight")}
    left = {name for name in layers if name.startswith("layers.1.mlp.")}
    assert fp8(plan) == layers - left
    assert plan.share.left[0].names == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    check_lists(plan, {name.removesuffix(".weight") for name in left} | {"lm_head"})
    if recipe.format == "compressed-tensors":  # vLLM and transformers add the prefix
        check_lists(plan, {f"model.{name.removesuffix('.weight')}" for name in left})


# ---- no entry matches what is FP8 ----

SHARED: Shapes = {
    **decoder(layers=3, dense=False),
    **{f"model.layers.{i}.mlp.gate.weight": (4, HIDDEN) for i in range(3)},
    **{f"model.layers.{i}.mlp.shared_expert_gate.weight": (1, HIDDEN) for i in range(3)},
    **mlp("model.layers.0.mlp.experts.0."),
    **mlp("model.layers.1.mlp.experts.0."),
    **mlp("model.layers.1.mlp.shared_expert."),
    **mlp("model.layers.2.mlp.experts.0."),
    "model.layers.2.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
    "visual.blocks.0.mlp.gate_proj.weight": (INNER, HIDDEN),
    "visual.blocks.0.norm.weight": (HIDDEN,),
}
"""Kept modules whose names resemble those of FP8 modules."""


@every_layout
@pytest.mark.parametrize(
    "ignore", [(), (r"layers\.0\.mlp\.experts",), ("self_attn",)], ids=["", "experts", "attention"]
)
def test_no_entry_matches_an_fp8_module(tmp_path: Path, recipe: Recipe, ignore: tuple[str, ...]) -> None:
    """Model-Optimizer 2299: exactly, by prefix, by fnmatch and by re.match, under any prefix of an engine."""
    source = write(tmp_path / "source", {"model_type": "qwen3_moe", "num_hidden_layers": 2}, SHARED)
    plan = plan_repo(source, recipe.model_copy(update={"ignore": ignore}))
    config = quantization(plan)
    entries = [entry for key in ("ignore", "ignored_layers") for entry in config.get(key, [])]
    assert entries
    modules = [name.removesuffix(".weight") for name in fp8(plan)]
    for entry, module in itertools.product(entries, modules):
        assert entry != module
        assert not module.startswith(f"{entry}.")
        assert not fnmatch.fnmatchcase(module, entry)
        assert not re.match(entry.removeprefix("re:"), module)
    check_lists(plan, {name.removesuffix(".weight") for name in SHARED if "gate.weight" in name or "eh_proj" in name})


# ---- what an engine does not build as a quantized linear layer ----


def conv1d(stem: str = "transformer.", bias: bool = True, order: int = 1) -> Shapes:
    """GPT-2: ``Conv1D`` stores ``[in, out]``; with ``order`` -1, ``[out, in]`` as in a Linear."""
    shapes: Shapes = {f"{stem}wte.weight": (VOCABULARY, HIDDEN), f"{stem}wpe.weight": (64, HIDDEN)}
    parts = {"attn.c_attn": 3 * HIDDEN, "attn.c_proj": HIDDEN, "mlp.c_fc": INNER, "mlp.c_proj": HIDDEN}
    for part, outputs in parts.items():
        inputs = INNER if part == "mlp.c_proj" else HIDDEN
        shapes[f"{stem}h.0.{part}.weight"] = (inputs, outputs)[::order]
        if bias:
            shapes[f"{stem}h.0.{part}.bias"] = (outputs,)
    return {**shapes, f"{stem}h.0.ln_1.weight": (HIDDEN,)}


@pytest.mark.parametrize("kind", ["gpt2", "unheard_of"])
@pytest.mark.parametrize(
    "recipe", [CHANNEL, FP8_TENSOR, Recipe(select=("c_",)), Recipe(select=("c_",), force_select=True)]
)
def test_a_matrix_stored_in_out_stays(tmp_path: Path, kind: str, recipe: Recipe) -> None:
    """GPT-2: there would be a scale for each input, or none. Of an unknown family, the biases tell."""
    with pytest.raises(NothingSelectedError, match=r"Conv1D"):
        plan_repo(write(tmp_path / "source", {"model_type": kind}, conv1d()), recipe)


def test_a_matrix_stored_in_out_beside_linear_layers_is_left_and_told(tmp_path: Path) -> None:
    shapes = {**conv1d(), "transformer.h.0.extra.weight": (INNER, HIDDEN), "transformer.h.0.extra.bias": (INNER,)}
    plan = plan_repo(write(tmp_path / "source", {"model_type": "unheard_of"}, shapes))
    assert fp8(plan) == {"transformer.h.0.extra.weight"}
    assert "[in, out]" in reason(plan, "transformer.h.0.attn.c_proj.weight")  # square: known by its name elsewhere
    assert plan.share.is_low
    check_lists(plan, {"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"})


def test_the_same_names_stored_out_in_are_linear(tmp_path: Path) -> None:
    """GPTBigCode and StarCoder2 have the names of GPT-2 and ordinary layers."""
    plan = plan_repo(write(tmp_path / "source", {"model_type": "starcoder2"}, conv1d(order=-1)))
    assert plan.share.share == 1


def test_projections_that_engines_build_without_a_config_stay(tmp_path: Path) -> None:
    """Jamba: the whole mixer of Mamba-1, whatever is selected; with --force-select it does not stay."""
    names = {f"model.layers.0.mamba.{name}.weight" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    shapes = {**decoder(), **dict.fromkeys(names, (HIDDEN, HIDDEN))}
    source = write(tmp_path / "source", {"model_type": "jamba"}, shapes)
    for recipe in (CHANNEL, Recipe(select=(".",))):
        plan = plan_repo(source, recipe)
        assert not fp8(plan) & names
        check_lists(plan, {name.removesuffix(".weight") for name in names})
    assert fp8(plan_repo(source, Recipe(select=(".",), force_select=True))) >= names


@pytest.mark.parametrize("tower", ["audio_tower", "vision_encoder", "image_newline_encoder", "speech_projector"])
@pytest.mark.parametrize("kind", ["qwen2_audio", "unheard_of"])
def test_encoders_of_any_family_stay(tmp_path: Path, tower: str, kind: str) -> None:
    shapes = {
        **{f"language_model.{name}": shape for name, shape in decoder().items()},
        **attention(f"{tower}.layers.0.self_attn."),
        f"{tower}.layers.0.fc1.weight": (INNER, HIDDEN),
        f"{tower}.layers.0.norm.weight": (HIDDEN,),
    }
    for recipe in (CHANNEL, Recipe(select=(".",))):
        plan = plan_repo(write(tmp_path / f"{recipe.select}", {"model_type": kind}, shapes), recipe)
        assert not any(tower in name for name in fp8(plan))
        assert plan.share.share == 1  # encoders do not count
        check_lists(plan, {f"{tower}.layers.0.fc1", f"model.{tower}.layers.0.self_attn.q_proj"})


# ---- multi-token prediction ----


def predictor(stem: str) -> Shapes:
    """A layer for multi-token prediction of GLM or DeepSeek, with an expert and an attention of its own."""
    return {
        f"{stem}eh_proj.weight": (HIDDEN, 2 * HIDDEN),
        f"{stem}enorm.weight": (HIDDEN,),
        f"{stem}shared_head.head.weight": (VOCABULARY, HIDDEN),
        f"{stem}embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{stem}mlp.gate.weight": (4, HIDDEN),
        **attention(f"{stem}self_attn."),
        **mlp(f"{stem}mlp.experts.0."),
    }


SETTINGS = {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
MTP_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GLM": ("model.", {"model_type": "glm4_moe", **SETTINGS}),
    "DeepSeek": ("model.", {"model_type": "deepseek_v3", **SETTINGS}),
    "in text_config": (
        "model.language_model.",
        {"model_type": "glm4v_moe", "text_config": SETTINGS, "vision_config": {"num_hidden_layers": 24}},
    ),
    "without a number of layers": ("model.", {"model_type": "unheard_of"}),
    "without a prefix": ("", {"model_type": "unheard_of", **SETTINGS}),
}


@pytest.mark.parametrize("case", MTP_CASES)
@pytest.mark.parametrize("select", [(), (".*",), (r"layers\.2\.", r"layers\.0\.")], ids=["default", "all", "named"])
@pytest.mark.parametrize("recipe", [CHANNEL, FP8_BLOCK], ids=["channel", "fp8 block"])
def test_a_predictor_behind_the_last_layer_stays(
    tmp_path: Path, case: str, select: tuple[str, ...], recipe: Recipe
) -> None:
    """vllm 31757, 32101: it is ``layers.{num_hidden_layers}``, and listed under exactly that layer."""
    stem, config = MTP_CASES[case]
    layer = f"{stem}layers.2."
    shapes = {**decoder(stem, dense=False), **predictor(layer), **mlp(f"{stem}layers.1.mlp.experts.0.")}
    plan = plan_repo(write(tmp_path / "source", config, shapes), recipe.model_copy(update={"select": select}))
    assert f"{stem}layers.0.self_attn.q_proj.weight" in fp8(plan)
    assert not any(name.startswith(layer) for name in fp8(plan))
    linear = {
        name.removesuffix(".weight") for name in predictor(layer) if not name.endswith(("norm.weight", "tokens.weight"))
    }
    check_lists(plan, linear)
    listed = quantization(plan)
    for name in linear - {f"{layer}eh_proj", f"{layer}shared_head.head", f"{layer}mlp.gate"}:
        for engine in readers(plan) if len(select) < 2 else ():  # then layer 1 is unquantized itself
            assert not in_list(listed, engine, name.replace("layers.2.", "layers.1."))
    if not select:
        forced = recipe.model_copy(update={"also_select": (r"layers\.2\.",), "force_select": True})
        assert any(name.startswith(layer) for name in fp8(plan_repo(tmp_path / "source", forced)))


def test_an_encoder_with_more_layers_does_not_move_the_last_layer(tmp_path: Path) -> None:
    """The predictor is known by its input projection, too."""
    config = {"model_type": "unheard_of", "text_config": SETTINGS, "side_config": {"num_hidden_layers": 40}}
    plan = plan_repo(write(tmp_path / "source", config, {**decoder(), **predictor("model.layers.2.")}))
    assert not any(name.startswith("model.layers.2.") for name in fp8(plan))


# ---- coverage: names without _proj ----

COVERED: dict[str, Shapes] = {
    "mixtral": {f"block_sparse_moe.experts.{e}.w{i}": (HIDDEN, HIDDEN) for e in range(4) for i in (1, 2, 3)},
    "phi": {"self_attn.dense": (HIDDEN, HIDDEN), "mlp.fc1": (INNER, HIDDEN), "mlp.fc2": (HIDDEN, INNER)},
    "falcon": {
        "self_attention.query_key_value": (3 * HIDDEN, HIDDEN),
        "self_attention.dense": (HIDDEN, HIDDEN),
        "mlp.dense_h_to_4h": (INNER, HIDDEN),
        "mlp.dense_4h_to_h": (HIDDEN, INNER),
    },
    "gptj": {"mlp.fc_in": (INNER, HIDDEN), "mlp.fc_out": (HIDDEN, INNER)},
    "mpt": {"attn.Wqkv": (3 * HIDDEN, HIDDEN), "ffn.up_proj": (INNER, HIDDEN)},
    "recurrent_gemma": {"temporal_block.linear_x": (INNER, HIDDEN), "temporal_block.linear_out": (HIDDEN, INNER)},
    "minimax": {f"block_sparse_moe.experts.0.w{i}": (HIDDEN, HIDDEN) for i in (1, 2, 3)},
    "deepseek_v4": {"attn.wq_a": (HIDDEN, HIDDEN), "attn.wo_b": (HIDDEN, HIDDEN), "ffn.experts.0.w1": (INNER, HIDDEN)},
    "unheard_of": {"mixing.in": (INNER, HIDDEN), "mixing.out": (HIDDEN, INNER)},
}


@pytest.mark.parametrize("kind", COVERED)
def test_every_linear_weight_of_the_layers_becomes_fp8(tmp_path: Path, kind: str) -> None:
    """Mixtral: 14% of its linear bytes became FP8, without a word, because ``w1`` does not end in ``_proj``."""
    inside: Shapes = {
        f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in COVERED[kind].items()
    }
    router: Shapes = {"model.layers.0.block_sparse_moe.gate.weight": (4, HIDDEN)} if kind == "mixtral" else {}
    config = {"model_type": kind, "num_local_experts": 4, "hidden_size": HIDDEN, "num_hidden_layers": 2}
    plan = plan_repo(write(tmp_path / "source", config, {**decoder(dense=False), **inside, **router}))
    assert fp8(plan) >= inside.keys()
    assert plan.share.share is not None
    assert plan.share.share >= 0.99
    assert not plan.share.is_low
    assert {left.reason for left in plan.share.left} >= {"engines load the output layer unquantized"}


def test_linear_weights_outside_the_layers_are_listed_with_an_option(tmp_path: Path) -> None:
    """They stay, because nothing tells that engines quantize them; the option takes exactly them."""
    outside: Shapes = {"model.side.N.weight": (HIDDEN, HIDDEN), "model.w.weight": (HIDDEN, HIDDEN)}
    source = write(tmp_path / "source", {"model_type": "unheard_of"}, {**decoder(), **outside})
    plan = plan_repo(source)
    (left,) = [left for left in plan.share.left if left.option]
    assert (left.tensors, left.bytes, set(left.names)) == (2, 4 * HIDDEN * HIDDEN, {"side.N", "w"})
    assert left.option in plan.share.text()
    pattern = left.option.removeprefix("--also-select ").strip("'")
    assert fp8(plan_repo(source, Recipe(also_select=(pattern,)))) == fp8(plan) | outside.keys()


def test_layers_without_a_lookup_table_count(tmp_path: Path) -> None:
    """Without the table nothing tells that they are a decoder: left, counted, and offered."""
    shapes = {name: shape for name, shape in decoder().items() if "layers" in name}
    shapes |= {f"model.layers.{i}.mlp.mix.weight": (8 * INNER, HIDDEN) for i in range(2)}
    plan = plan_repo(write(tmp_path / "source", {"model_type": "unheard_of"}, shapes))
    assert plan.share.is_low
    assert r"mlp\.mix" in plan.share.left[0].option


def test_an_option_is_offered_only_where_it_helps(tmp_path: Path) -> None:
    """Of what --select leaves: not heads, routers and what does not divide into blocks."""
    shapes = {**decoder(), "model.layers.0.mlp.gate.weight": (4, HIDDEN), "model.layers.0.mlp.odd.weight": (96, HIDDEN)}
    config = {"model_type": "unheard_of", "num_experts": 4}
    source = write(tmp_path / "source", config, shapes)
    recipe = Recipe(format="fp8", select=("self_attn",))
    plan = plan_repo(source, recipe)
    (left,) = [left for left in plan.share.left if left.option]
    assert set(left.names) == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    pattern = left.option.removeprefix("--also-select ").strip("'")
    more = plan_repo(source, Recipe(format="fp8", select=("self_attn",), also_select=(pattern,)))
    assert fp8(more) - fp8(plan) == {name for name in shapes if "layers" in name and "mlp" in name and "_proj" in name}
    assert "does not divide" in reason(plan, "model.layers.0.mlp.odd.weight")


def test_nothing_selected_names_the_option(tmp_path: Path) -> None:
    """BERT and others without a decoder: the error offers their names; blocks that divide nothing: another layout."""
    encoder: Shapes = {"stem.0.weight": (HIDDEN, HIDDEN), "stem.1.weight": (HIDDEN, HIDDEN)}
    source = write(tmp_path / "none", {"model_type": "unheard_of"}, encoder)
    with pytest.raises(NothingSelectedError) as caught:
        plan_repo(source)
    (pattern,) = re.findall(r"--also-select '([^']+)'", str(caught.value))
    assert fp8(plan_repo(source, Recipe(also_select=(pattern,)))) == encoder.keys()
    whole = write(tmp_path / "whole", {"model_type": "llama"}, decoder())
    with pytest.raises(NothingSelectedError, match="engines fuse q_proj, k_proj, v_proj: select all of them, or none"):
        plan_repo(whole, Recipe(select=("q_proj",)))
    odd = write(tmp_path / "odd", {"model_type": "llama"}, decoder(hidden=72))
    with pytest.raises(NothingSelectedError, match=r"--granularity channel.*72x72 does not divide"):
        plan_repo(odd, FP8_BLOCK)


# ---- patterns ----

MIXTRAL: Shapes = {
    **decoder(dense=False),
    "model.layers.0.block_sparse_moe.gate.weight": (4, HIDDEN),
    **{f"model.layers.0.block_sparse_moe.experts.0.w{i}.weight": (HIDDEN, HIDDEN) for i in (1, 2, 3)},
}
QWEN: Shapes = {
    **decoder(dense=False),
    "model.layers.0.mlp.gate.weight": (4, HIDDEN),
    **mlp("model.layers.0.mlp.experts.0."),
}


@pytest.mark.parametrize(("kind", "shapes"), [("mixtral", MIXTRAL), ("qwen3_moe", QWEN), ("unheard_of", MIXTRAL)])
def test_selecting_everything_leaves_what_engines_load_unquantized(tmp_path: Path, kind: str, shapes: Shapes) -> None:
    """vLLM refused a result with FP8 routers; --force-select takes them, but never heads and lookup tables."""
    source = write(tmp_path / "source", {"model_type": kind, "num_local_experts": 4}, shapes)
    router = {name for name in shapes if name.endswith("gate.weight")}
    never = {"lm_head.weight", "model.embed_tokens.weight"}
    linear = {name for name, shape in shapes.items() if len(shape) == 2} - router - never
    everything = plan_repo(source, Recipe(select=(".*",)))
    assert fp8(everything) == linear
    assert "router" in reason(everything, *router)
    check_lists(everything, {*(name.removesuffix(".weight") for name in router), "lm_head"})
    assert fp8(plan_repo(source, Recipe(select=(".*",), force_select=True))) == linear | router
    assert fp8(plan_repo(source, Recipe(also_select=("gate",), force_select=True))) == linear | router
    assert fp8(plan_repo(source, Recipe(select=("self_attn",), also_select=(r"\.experts\.",)))) == linear
    assert fp8(plan_repo(source, Recipe(select=("self_attn",)))) == {name for name in linear if "self_attn" in name}


@pytest.mark.parametrize("field", ["select", "also_select", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(tmp_path: Path, field: str) -> None:
    """auto-round 2407: a misspelled pattern would quantize what it should protect."""
    source = write(tmp_path / "source", {"model_type": "llama"}, decoder())
    option = "--" + field.replace("_", "-")
    with pytest.raises(RecipeError, match=rf"{option} 'q_prj' matches no tensor; did you mean .*q_proj") as caught:
        plan_repo(source, CHANNEL.model_copy(update={field: ("q_prj",)}))
    assert caught.value.arguments == (field,)
    with pytest.raises(RecipeError, match=r"names look like model\.embed_tokens\.weight"):
        plan_repo(source, CHANNEL.model_copy(update={field: ("q_proj", "7{9}")}))


# ---- stacks of experts ----

EXPERTS = 4


def stacks(stem: str, transposed: bool = False, hidden: int = HIDDEN, inner: int = INNER) -> Shapes:
    """Stacks ``[experts, out, in]``, or ``[experts, in, out]``."""
    order = -1 if transposed else 1
    return {
        f"{stem}gate_up_proj": (EXPERTS, *(2 * inner, hidden)[::order]),
        f"{stem}down_proj": (EXPERTS, *(hidden, inner)[::order]),
    }


def single(stem: str) -> set[str]:
    return {f"{stem}{e}.{name}_proj.weight" for e in range(EXPERTS) for name in ("gate", "up", "down")}


def test_stacked_experts_without_weight_in_their_names_are_split(tmp_path: Path) -> None:
    """Model-Optimizer 1173: ``experts.gate_up_proj`` [4, 256, 128] was skipped."""
    stem = "model.layers.0.mlp.experts."
    plan = plan_repo(
        write(tmp_path / "source", {"model_type": "qwen3_moe"}, {**decoder(dense=False), **stacks(stem, inner=128)})
    )
    assert fp8(plan) >= single(stem)
    assert {t.shape for t in plan.tensors if t.name.startswith(stem)} == {(128, 128)}
    assert plan.share.share == 1


def test_stacks_under_other_names_are_split(tmp_path: Path) -> None:
    """Granite MoE: ``input_linear`` was neither quantized nor listed, and vLLM cast it with a scale of 1."""
    block = "model.layers.0.block_sparse_moe."
    shapes: Shapes = {
        **decoder(dense=False),
        f"{block}input_linear.weight": (EXPERTS, 2 * INNER, HIDDEN),
        f"{block}output_linear.weight": (EXPERTS, HIDDEN, INNER),
        f"{block}router.layer.weight": (EXPERTS, HIDDEN),
    }
    source = write(tmp_path / "source", {"model_type": "granitemoe", "hidden_size": HIDDEN}, shapes)
    plan = plan_repo(source)
    assert fp8(plan) >= single(f"{block}experts.")
    assert plan.share.share is not None
    assert plan.share.share > 0.99
    check_lists(plan, {f"{block}router.layer"})
    for pattern in ("output_linear", r"experts\.\d+\.gate_proj", "block_sparse_moe"):
        left = plan_repo(source, Recipe(ignore=(pattern,)))
        assert {t.name for t in left.tensors} == shapes.keys()
        assert f"matches --ignore {pattern}" in {t.reason for t in left.tensors}
        check_lists(
            left, {f"{block}experts", f"{block}experts.0.gate_proj", "model.layers.0.block_sparse_moe.router.layer"}
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_the_order_of_a_stack_is_told_by_the_hidden_size(tmp_path: Path, transposed: bool) -> None:
    """Qwen3-VL MoE: published as [in, out], saved by transformers 5.23 as [out, in]."""
    stem = "model.language_model.layers.0.mlp.experts."
    config = {
        "model_type": "qwen3_vl_moe",
        "text_config": {"hidden_size": HIDDEN},
        "vision_config": {"hidden_size": 64},
    }
    shapes = {**decoder("model.language_model.", dense=False), **stacks(stem, transposed, inner=96)}
    plan = plan_repo(write(tmp_path / "source", config, shapes))
    assert fp8(plan) >= single(stem)
    found = {t.name.rsplit(".", 2)[1]: t.shape for t in plan.tensors if t.name.startswith(stem)}
    assert found == {"gate_proj": (96, HIDDEN), "up_proj": (96, HIDDEN), "down_proj": (HIDDEN, 96)}


UNKNOWN_ORDER: dict[str, tuple[dict[str, Any], Shapes]] = {
    "all sides are equal": (
        {"text_config": {"hidden_size": HIDDEN}},
        {"gate_up_proj": (EXPERTS, HIDDEN, HIDDEN), "down_proj": (EXPERTS, HIDDEN, HIDDEN)},
    ),
    "no hidden size": ({}, {"gate_up_proj": (EXPERTS, 192, HIDDEN), "down_proj": (EXPERTS, HIDDEN, 96)}),
    "another hidden size": (
        {"text_config": {"hidden_size": 80}},
        {"gate_up_proj": (EXPERTS, 192, HIDDEN), "down_proj": (EXPERTS, HIDDEN, 96)},
    ),
    "two orders": (
        {"text_config": {"hidden_size": HIDDEN}},
        {"gate_up_proj": (EXPERTS, 192, HIDDEN), "down_proj": (EXPERTS, 96, HIDDEN)},
    ),
}


@pytest.mark.parametrize("case", UNKNOWN_ORDER)
def test_a_stack_of_unknown_order_stays_and_says_why(tmp_path: Path, case: str) -> None:
    more, stacked = UNKNOWN_ORDER[case]
    stem = "model.language_model.layers.0.mlp.experts."
    shapes = {**decoder("model.language_model.", dense=False), **{stem + n: shape for n, shape in stacked.items()}}
    source = write(tmp_path / "source", {"model_type": "qwen3_vl_moe", **more}, shapes)
    plan = plan_repo(source)
    assert {t.name for t in plan.tensors} == shapes.keys()
    assert any("hidden_size" in t.reason for t in plan.tensors if t.name.startswith(stem))
    check_lists(plan, {f"{stem}0.up_proj", stem.removesuffix(".")})
    with pytest.raises(StackedExpertsError, match="hidden_size"):
        plan_repo(source, Recipe(select=(r"\.experts\.",)))


def test_two_stacks_of_equal_sides_have_the_order_of_the_others(tmp_path: Path) -> None:
    """One stack of the checkpoint that tells is enough: here down_proj [E, 64, 128] of [in, out]."""
    stem = "model.layers.0.mlp.experts."
    shapes = {**decoder(dense=False), **stacks(stem, transposed=True, inner=HIDDEN // 2)}
    assert shapes[f"{stem}gate_up_proj"] == (EXPERTS, HIDDEN, HIDDEN)
    plan = plan_repo(write(tmp_path / "source", {"model_type": "qwen3_vl_moe", "hidden_size": HIDDEN}, shapes))
    assert {t.shape for t in plan.tensors if "up_proj" in t.name and stem in t.name} == {(HIDDEN // 2, HIDDEN)}


def test_a_stack_against_the_order_of_its_family_is_not_cut_wrongly(tmp_path: Path) -> None:
    """Llama 4 stores [in, out]; a checkpoint saved otherwise has the right sizes for wrong matrices."""
    stem = "language_model.model.layers.0.feed_forward.experts."
    config = {"model_type": "llama4", "text_config": {"hidden_size": HIDDEN}}
    for transposed in (True, False):
        stacked = stacks(stem, transposed)
        shapes = {**decoder("language_model.model.", dense=False), **stacked}
        plan = plan_repo(write(tmp_path / str(transposed), config, shapes))
        assert (fp8(plan) >= single(stem)) is transposed
        if not transposed:
            assert {t.name for t in plan.tensors} == shapes.keys()
            assert all("[in, out]" in reason(plan, name) for name in stacked)


@every_layout
@pytest.mark.parametrize("kind", ["qwen3_moe", "unheard_of"])
def test_a_layer_of_stacks_beside_a_layer_of_single_experts(tmp_path: Path, recipe: Recipe, kind: str) -> None:
    """Each layer for itself: where the stacks stay, the entry for their layer matches no other layer."""
    split, stacked = "model.layers.1.mlp.experts.", "model.layers.0.mlp.experts."
    shapes = {**decoder(dense=False), **stacks(stacked)}
    for e in range(EXPERTS):
        shapes |= mlp(f"{split}{e}.")
    plan = plan_repo(write(tmp_path / "source", {"model_type": kind}, shapes), recipe)
    assert fp8(plan) >= single(split)
    known = kind == "qwen3_moe"
    assert (fp8(plan) >= single(stacked)) is known
    config = quantization(plan)
    for engine in readers(plan):
        assert in_list(config, engine, "model.layers.0.mlp.experts") is not known
        assert not in_list(config, engine, "model.layers.1.mlp.experts")
    check_lists(plan, set() if known else {"model.layers.0.mlp.experts"})


def test_aria_keeps_its_stacks(tmp_path: Path) -> None:
    """vLLM loads them as stacks only; their names do not show that they are weights of experts."""
    stem = "language_model.model.layers.0.mlp.experts."
    stacked: Shapes = {
        f"{stem}fc1.weight": (EXPERTS, HIDDEN, INNER),
        f"{stem}fc2.weight": (EXPERTS, INNER // 2, HIDDEN),
    }
    shapes = {**decoder("language_model.model.", dense=False), **stacked}
    plan = plan_repo(write(tmp_path / "source", {"model_type": "aria", "text_config": {"hidden_size": HIDDEN}}, shapes))
    assert {t.name for t in plan.tensors} == shapes.keys()
    assert plan.share.left[0].names == ("mlp.experts.fc1", "mlp.experts.fc2")
    check_lists(plan, {stem.removesuffix("."), f"{stem}0.down_proj"})


def test_stacks_that_no_engine_takes_apart_stay_and_are_told(tmp_path: Path) -> None:
    """gpt-oss in bf16: it was refused, with an advice that matched dense layers too."""
    stem = "model.layers.0.mlp.experts."
    shapes: Shapes = {
        **decoder(dense=False),
        **stacks(stem, transposed=True),
        f"{stem}gate_up_proj_bias": (EXPERTS, 2 * INNER),
        f"{stem}down_proj_bias": (EXPERTS, HIDDEN),
        "model.layers.0.mlp.router.weight": (EXPERTS, HIDDEN),
        "model.layers.0.mlp.router.bias": (EXPERTS,),
    }
    source = write(tmp_path / "source", {"model_type": "gpt_oss", "hidden_size": HIDDEN}, shapes)
    plan = plan_repo(source)
    assert fp8(plan) == {name for name in shapes if "self_attn" in name}
    assert plan.share.is_low
    assert plan.share.left[0].names == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    check_lists(plan, {"model.layers.0.mlp.experts", "model.layers.0.mlp.router", f"{stem}0.gate_proj"})
    with pytest.raises(StackedExpertsError) as caught:
        plan_repo(source, Recipe(also_select=(r"experts\.",)))
    (advice,) = re.findall(r"--ignore '([^']+)'", str(caught.value))
    assert re.search(advice, caught.value.tensor)
    assert not any(re.search(advice, name) for name in decoder())


@pytest.mark.parametrize("recipe", [FP8_BLOCK, BLOCK], ids=["fp8", "compressed-tensors"])
@pytest.mark.parametrize(("kind", "hidden"), [("qwen3_moe", None), ("granitemoe", HIDDEN)])
def test_stacks_that_do_not_divide_into_blocks_stay_whole(
    tmp_path: Path, recipe: Recipe, kind: str, hidden: int | None
) -> None:
    """Single experts in 16 bits have names that the model's own code does not load."""
    stem = "model.layers.0.mlp.experts."
    shapes = {**decoder(dense=False), **stacks(stem, inner=96)}
    plan = plan_repo(write(tmp_path / "source", {"model_type": kind, "hidden_size": hidden}, shapes), recipe)
    assert {t.name for t in plan.tensors} == shapes.keys()
    assert reason(plan, f"{stem}gate_up_proj") == "96x128 does not divide into blocks of 128x128"
    check_lists(plan, {"model.layers.0.mlp.experts"})
    assert plan.share.is_low


def test_families_whose_experts_one_engine_does_not_put_together_say_so(tmp_path: Path) -> None:
    """Single experts, or stacks, that transformers would initialize at random.

    It builds stacks of Qwen3-VL MoE in any layout, and single experts of Llama 4 under compressed-tensors.
    """
    stem = "language_model.model.layers.0.feed_forward.experts."
    shapes = {**decoder("language_model.model.", dense=False), **stacks(stem, transposed=True)}
    llama4 = write(tmp_path / "llama4", {"model_type": "llama4", "text_config": {"hidden_size": HIDDEN}}, shapes)
    stem = "model.language_model.layers.0.mlp.experts."
    shapes = {**decoder("model.language_model.", dense=False), **stacks(stem)}
    qwen = write(tmp_path / "qwen", {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": HIDDEN}}, shapes)
    for source, form, ignore, read in (
        (qwen, "compressed-tensors", (), False),
        (qwen, "compressed-tensors", ("experts",), True),
        (qwen, "fp8", (), False),
        (llama4, "compressed-tensors", (), True),
        (llama4, "compressed-tensors", ("experts",), False),
        (llama4, "fp8", (), False),
        (llama4, "fp8", ("experts",), True),
    ):
        engines = {each.engine: each for each in plan_repo(source, Recipe(format=form, ignore=ignore)).engines}
        assert engines["vLLM"].reads
        assert engines["transformers"].reads == read, (source.name, form, ignore)
        assert read or "experts" in engines["transformers"].note


# ---- tensor-parallel sizes ----


def mixture(width: int, hidden: int, keys: int) -> Shapes:
    return {
        **ends(hidden=hidden),
        "model.layers.0.input_layernorm.weight": (hidden,),
        "model.layers.0.mlp.gate.weight": (2, hidden),
        **attention("model.layers.0.self_attn.", hidden, keys),
        **mlp("model.layers.0.mlp.experts.0.", hidden, width),
        **mlp("model.layers.0.mlp.experts.1.", hidden, width),
    }


TP_CASES = {
    # width of the experts, hidden size, rows of the keys, heads, heads of keys
    "experts of 768: 6 blocks": ((768, 2048, 512), (32, 4), "at most 2"),
    "experts of 384: 3 blocks": ((384, 2048, 512), (32, 4), "at most 1"),
    "experts of 1024, replicated keys": ((1024, 2048, 512), (16, 4), "at most 8"),
    "keys of 64 must have two heads on a device": ((1024, 2048, 512), (32, 8), "at most 4"),
    "12 heads, 24 blocks": ((3072, 1536, 512), (12, 4), "at most 12 (1, 2, 4, 12)"),
    "6 heads, 6 blocks": ((768, 768, 768), (6, 6), "at most 6 (1, 2, 3, 6)"),
    "no heads known": ((1024, 2048, 512), (None, None), "at most 4"),
    "experts of 320 stay: the attention decides": ((320, 2048, 512), (16, 4), "at most 16"),
}


@pytest.mark.parametrize("recipe", [FP8_BLOCK, BLOCK], ids=["fp8", "compressed-tensors"])
@pytest.mark.parametrize("case", TP_CASES)
def test_the_largest_tensor_parallel_size_is_told(tmp_path: Path, recipe: Recipe, case: str) -> None:
    """vllm 54178: vLLM rejects parts that are no whole blocks, after it has loaded the model."""
    (width, hidden, rows), (heads, keys), told = TP_CASES[case]
    config = {"model_type": "qwen3_moe", "num_experts": 2, "num_attention_heads": heads, "num_key_value_heads": keys}
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in mixture(width, hidden, rows).items()}
    plan = plan_repo(write(tmp_path / "source", config, {}, zeros), recipe)
    (vllm,) = [each for each in plan.engines if each.engine == "vLLM"]
    assert vllm.reads
    assert vllm.note == f"with a tensor-parallel size of {told}"
    assert (width % 128 == 0) is any("experts" in name for name in fp8(plan))
    if width == 320:
        assert reason(plan, "model.layers.0.mlp.experts.0.up_proj.weight").startswith("320x2048 does not divide")


FUSED_CASES = {
    # rows of qkv_proj, heads, heads of keys, rows of gate_up_proj; what stays; the tensor-parallel size
    "whole blocks": ((1024, 4, 2, 1024), set(), "at most 4"),
    "halves of two blocks": ((1024, 4, 2, 512), set(), "at most 2"),
    "halves of 320 rows": ((1024, 4, 2, 640), {"mlp.gate_up_proj"}, "at most 4"),
    "keys of 64 rows": ((384, 4, 1, 1024), {"self_attn.qkv_proj"}, "at most 4"),
    "no heads known": ((384, None, None, 1024), set(), "at most 1"),
}


@pytest.mark.parametrize("recipe", [FP8_BLOCK, BLOCK], ids=["fp8", "compressed-tensors"])
@pytest.mark.parametrize("case", FUSED_CASES)
def test_each_part_of_a_stored_fused_weight_has_whole_blocks(tmp_path: Path, recipe: Recipe, case: str) -> None:
    """Phi-3 and GLM-4 store gate and up, or queries, keys and values, in one matrix; vLLM checks each part."""
    (qkv, heads, keys, gate_up), left, told = FUSED_CASES[case]
    hidden = 256
    shapes: Shapes = {
        **ends(hidden=hidden),
        "model.layers.0.input_layernorm.weight": (hidden,),
        "model.layers.0.self_attn.qkv_proj.weight": (qkv, hidden),
        "model.layers.0.self_attn.o_proj.weight": (hidden, 512),
        "model.layers.0.mlp.gate_up_proj.weight": (gate_up, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, 512),
    }
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    config = {"model_type": "phi3", "num_attention_heads": heads, "num_key_value_heads": keys}
    plan = plan_repo(write(tmp_path / "source", config, {}, zeros), recipe)
    kept = {"self_attn.qkv_proj", "mlp.gate_up_proj"} - {name[len("model.layers.0.") : -7] for name in fp8(plan)}
    assert kept == left
    for module in left:
        assert "which engines load by itself" in reason(plan, f"model.layers.0.{module}.weight")
    (vllm,) = [each for each in plan.engines if each.engine == "vLLM"]
    assert vllm.note == f"with a tensor-parallel size of {told}"


# ---- NVIDIA's own selection for Nemotron 3 ----


def hybrid(pattern: str, latent: bool) -> Shapes:
    """Nemotron-H by its pattern: M a Mamba mixer, * attention, E experts, - a feed-forward part."""
    shapes: Shapes = {
        "backbone.embeddings.weight": (VOCABULARY, HIDDEN),
        "backbone.norm_f.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    inner = 64 if latent else HIDDEN
    for i, kind in enumerate(pattern):
        stem = f"backbone.layers.{i}."
        shapes[f"{stem}norm.weight"] = (HIDDEN,)
        stem += "mixer."
        if kind == "M":
            shapes |= {
                f"{stem}in_proj.weight": (2 * HIDDEN, HIDDEN),
                f"{stem}out_proj.weight": (HIDDEN, HIDDEN),
                f"{stem}conv1d.weight": (96, 1, 4),
                f"{stem}A_log": (8,),
            }
        elif kind == "*":
            shapes |= attention(stem)
        elif kind == "-":
            shapes |= {f"{stem}up_proj.weight": (INNER, HIDDEN), f"{stem}down_proj.weight": (HIDDEN, INNER)}
        else:
            shapes[f"{stem}gate.weight"] = (2, HIDDEN)
            for expert in range(2):
                shapes[f"{stem}experts.{expert}.up_proj.weight"] = (INNER, inner)
                shapes[f"{stem}experts.{expert}.down_proj.weight"] = (inner, INNER)
            if latent:
                shapes[f"{stem}fc1_latent_proj.weight"] = (inner, HIDDEN)
                shapes[f"{stem}fc2_latent_proj.weight"] = (HIDDEN, inner)
    if latent:
        shapes |= {"mtp.layers.0.eh_proj.weight": (HIDDEN, 2 * HIDDEN), **attention("mtp.layers.0.mixer.")}
        shapes |= {"mtp.layers.1.mixer.in_proj.weight": (HIDDEN, HIDDEN)}
    return shapes


PATTERN = "MEMM*EMEM*E"


@pytest.mark.parametrize("stated", [True, False], ids=["with the pattern", "without"])
@pytest.mark.parametrize("latent", [False, True], ids=["Nano", "Super"])
@pytest.mark.parametrize("recipe", [CHANNEL, FP8_TENSOR], ids=["channel", "fp8 tensor"])
def test_nvidias_selection_for_nemotron_3(tmp_path: Path, stated: bool, latent: bool, recipe: Recipe) -> None:
    """Attention stays; in Nano also the Mamba mixer directly before each attention; everything else is FP8."""
    shapes = hybrid(PATTERN, latent)
    config: dict[str, Any] = {"model_type": "nemotron_h", "num_hidden_layers": len(PATTERN), "n_routed_experts": 2}
    if stated:
        config["hybrid_override_pattern"] = PATTERN
    source = write(tmp_path / "source", config, shapes)
    plan = plan_repo(source, recipe.model_copy(update={"selection": "nvidia"}))
    default = fp8(plan_repo(source, recipe))
    kept = {i for i, kind in enumerate(PATTERN) if kind == "*" or (not latent and PATTERN[i + 1 : i + 2] == "*")}
    assert kept == ({4, 9} if latent else {3, 4, 8, 9})
    left = {name for name in default if int(name.split(".")[2]) in kept}
    assert {name.split(".")[4] for name in left} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert fp8(plan) == default - left
    assert all("NVIDIA" in reason(plan, name) for name in left)
    listed = {name.removesuffix(".weight") for name in left} | {"lm_head", "backbone.layers.1.mixer.gate"}
    if latent:
        listed |= {"backbone.layers.1.mixer.fc1_latent_proj", "mtp.layers.0.mixer.q_proj"}
    check_lists(plan, listed)
    config_of_result = quantization(plan)
    assert not in_list(config_of_result, "vLLM", "backbone.layers.0.mixer.in_proj")
    added = plan_repo(
        source, recipe.model_copy(update={"selection": "nvidia", "also_select": (r"mixer\.[qkvo]_proj",)})
    )
    assert fp8(added) == default - {name for name in left if "in_proj" in name or "out_proj" in name}


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("llama", decoder()),
        ("nemotron", decoder()),
        ("nemotron_h", hybrid("*-*-", False)),
        ("mamba", hybrid("MM", False)),
    ],
    ids=["llama", "nemotron", "attention alone", "mamba alone"],
)
def test_nvidias_selection_is_for_nemotron_3_only(tmp_path: Path, kind: str, shapes: Shapes) -> None:
    with pytest.raises(RecipeError, match="selection 'nvidia' is NVIDIA's choice for Nemotron 3") as caught:
        plan_repo(write(tmp_path / "source", {"model_type": kind}, shapes), Recipe(selection="nvidia"))
    assert caught.value.arguments == ("selection",)


def test_nvidias_selection_excludes_another(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="also_select"):
        Recipe(selection="nvidia", select=("mixer",))
