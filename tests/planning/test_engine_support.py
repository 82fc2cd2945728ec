"""Statements about engines are true: weights not loaded in FP8, families not known, files that are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import Recipe, plan_repo, quantize_repo
from nemotron_fp8.errors import NothingSelectedError
from nemotron_fp8.planning.engine_support import support_text
from tests.planning.test_known_faults import (
    BLOCK,
    CHANNEL,
    ENGINES,
    FP8_BLOCK,
    FP8_TENSOR,
    check_lists,
    every_layout,
    fp8,
    hybrid,
    quantization,
    reason,
)
from tests.support.decoders import HIDDEN, INNER, Shapes, attention, decoder, ends, filled, in_list, write

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8 import Plan
    from nemotron_fp8.planning.number_format import Granularity

ROUTED: Shapes = {
    **decoder(dense=False),
    "model.layers.0.block_sparse_moe.gate.weight": (4, HIDDEN),
    **{
        f"model.layers.0.block_sparse_moe.experts.{e}.w{i}.weight": (HIDDEN, HIDDEN)
        for e in range(4)
        for i in (1, 2, 3)
    },
}


def reading(plan: Plan) -> set[str]:
    return {each.engine for each in plan.engines if each.reads}


@pytest.mark.parametrize("recipe", [CHANNEL, FP8_TENSOR], ids=["channel", "fp8 tensor"])
def test_weights_that_force_select_takes_are_not_said_to_be_read(tmp_path: Path, recipe: Recipe) -> None:
    """vLLM has no parameter for the scale of a router."""
    source = write(tmp_path / "s", {"model_type": "mixtral", "num_local_experts": 4}, ROUTED)
    plan = plan_repo(source, recipe.model_copy(update={"also_select": ("gate",), "force_select": True}))
    assert "model.layers.0.block_sparse_moe.gate.weight" in fp8(plan)
    assert reading(plan) == set()
    assert "is not known to load block_sparse_moe.gate in FP8" in support_text(plan.engines)
    assert "vLLM" in reading(
        plan_repo(source, recipe.model_copy(update={"also_select": ("w1",), "force_select": True}))
    )


def test_the_original_rule_says_which_weights_vllm_does_not_load(tmp_path: Path) -> None:
    """Jamba: the mixer of Mamba-1 ends in ``_proj`` too."""
    shapes = {**decoder(), "model.layers.0.mamba.x_proj.weight": (16, HIDDEN)}
    plan = plan_repo(write(tmp_path / "s", {"model_type": "jamba"}, shapes), Recipe(numerics="original"))
    assert "model.layers.0.mamba.x_proj.weight" in fp8(plan)
    assert "vLLM" not in reading(plan)


def test_without_a_config_no_engine_reads_the_result(tmp_path: Path) -> None:
    source = write(tmp_path / "s", {"model_type": "llama"}, decoder())
    (source / "config.json").unlink()
    plan = plan_repo(source)
    assert reading(plan) == set()
    assert "needs config.json" in support_text(plan.engines)
    quantize_repo(source, tmp_path / "d")
    assert "vllm serve" not in (tmp_path / "d" / "README.md").read_text()


def test_an_unknown_family_is_named_as_such(tmp_path: Path) -> None:
    known = plan_repo(write(tmp_path / "known", {"model_type": "llama"}, decoder()))
    unknown = plan_repo(write(tmp_path / "unknown", {"model_type": "unheard_of"}, decoder()))
    assert support_text(known.engines) == "read by vLLM, SGLang, transformers"
    assert "whose family is not known here" in support_text(unknown.engines)


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_experts_without_a_gate_that_stay_are_found_by_vllm(tmp_path: Path, granularity: Granularity) -> None:
    """Nemotron 3: vLLM looks for three projections of the first expert, and calls the one that is missing None."""
    shapes = hybrid("MEM*E", latent=False)
    config = {"model_type": "nemotron_h", "num_hidden_layers": 5, "n_routed_experts": 2}
    recipe = Recipe(granularity=granularity, ignore=(r"layers\.1\.mixer\.experts",))
    plan = plan_repo(write(tmp_path / "s", config, shapes), recipe)
    listed = quantization(plan)
    for part in ("up_proj", "down_proj", "None"):
        assert in_list(listed, "vLLM", f"model.layers.1.mixer.experts.0.{part}")
        assert not in_list(listed, "vLLM", f"model.layers.4.mixer.experts.0.{part}")


def test_experts_of_compressed_tensors_blocks_are_not_read_by_transformers(tmp_path: Path) -> None:
    source = write(tmp_path / "s", {"model_type": "mixtral", "num_local_experts": 4}, ROUTED)
    assert reading(plan_repo(source, BLOCK)) == {"vLLM", "SGLang"}
    assert reading(plan_repo(source, CHANNEL)) == set(ENGINES)
    dense = write(tmp_path / "dense", {"model_type": "llama"}, decoder())
    assert reading(plan_repo(dense, BLOCK)) == set(ENGINES)


@pytest.mark.parametrize("heads", [("score.0", "score.2"), ("model.score.0",)])
def test_output_layers_of_reward_models(tmp_path: Path, heads: tuple[str, ...]) -> None:
    """Qwen2ForRewardModel: vLLM builds them without a name, which only an entry for the empty name finds."""
    shapes = {name: shape for name, shape in decoder().items() if "lm_head" not in name}
    shapes |= {f"{head}.weight": (HIDDEN, HIDDEN) for head in heads}
    source = write(tmp_path / "s", {"model_type": "qwen2", "architectures": ["Qwen2ForRewardModel"]}, shapes)
    plan = plan_repo(source)
    assert not {f"{head}.weight" for head in heads} & fp8(plan)
    check_lists(plan, set(heads))
    assert in_list(quantization(plan), "vLLM", "")
    assert reading(plan) == set(ENGINES)
    for recipe in (FP8_TENSOR, FP8_BLOCK):
        assert "vLLM" not in reading(plan_repo(source, recipe))


def test_folders_that_modules_json_names_are_missed(tmp_path: Path) -> None:
    """Sentence Transformers: without pooling and the layers behind it, engines compute other embeddings."""
    source = write(tmp_path / "s", {"model_type": "qwen3"}, decoder())
    (source / "modules.json").write_text('[{"idx": 1, "path": "1_Pooling"}]')
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    plan = plan_repo(source)
    assert reading(plan) == set()
    assert "without the folders 1_Pooling of modules.json; copy them" in support_text(plan.engines)


@pytest.mark.parametrize("field", ["select", "also_select"])
def test_a_pattern_that_takes_nothing_is_told(tmp_path: Path, field: str) -> None:
    """It matches, but what it matches stays: the reason, and the option that takes it, if there is one."""
    shapes = {**ROUTED, "visual.blocks.0.mlp.fc1.weight": (INNER, HIDDEN), "visual.blocks.0.norm.weight": (HIDDEN,)}
    source = write(tmp_path / "s", {"model_type": "mixtral", "num_local_experts": 4}, shapes)

    def notices(*patterns: str) -> list[str]:
        texts = (*patterns, "w1", "w2", "w3") if field == "select" else patterns
        fields: dict[str, Any] = {field: texts}
        return [text for text in plan_repo(source, Recipe(**fields)).notices if "matches becomes FP8" in text]

    (visual,) = notices(r"visual\.blocks")
    assert r"none of the 2 tensors" in visual
    assert "encoders and connectors keep their dtype" in visual
    assert visual.endswith("to take them: --force-select")
    (head,) = notices("lm_head")
    assert "output layer" in head
    assert "--force-select" not in head
    assert notices("self_attn") == []


def test_what_stays_in_every_layer_is_one_line(tmp_path: Path) -> None:
    """Fused weights that a part leaves: the reason has no number of a layer."""
    shapes = {**ends()}
    for layer in range(3):
        shapes |= {**attention(f"model.layers.{layer}.self_attn.", keys=64)}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
    plan = plan_repo(write(tmp_path / "s", {"model_type": "llama"}, shapes), FP8_BLOCK)
    fused = [left for left in plan.share.left if left.reason.startswith("fused with")]
    assert [(left.names, left.tensors) for left in fused] == [(("self_attn.q_proj",), 3)]


def test_nan_counts_in_the_share(tmp_path: Path) -> None:
    """The report and the card tell what became FP8, not what was planned."""
    shapes = decoder()
    tensors = filled(shapes)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    source = write(tmp_path / "s", {"model_type": "llama"}, shapes, tensors)
    recipe = Recipe(nonfinite="keep")
    planned = plan_repo(source, recipe).share
    report = quantize_repo(source, tmp_path / "d", recipe)
    assert planned.share == 1
    assert report.share is not None
    left = {name: left for left in report.share.left if left.in_decoder for name in left.names}
    assert left.keys() == {"mlp.gate_proj", "mlp.up_proj"}
    assert "NaN or Inf" in left["mlp.up_proj"].reason
    assert report.share.quantized_bytes == report.share.linear_bytes - left["mlp.up_proj"].bytes
    card = (tmp_path / "d" / "README.md").read_text()
    assert "100% of the bytes" not in card
    assert "`mlp.gate_proj`" in card


def test_layers_in_a_module_called_encoder(tmp_path: Path) -> None:
    """ChatGLM and GLM-4-9b: ``transformer.encoder.layers`` is the decoder."""
    stem = "transformer.encoder.layers.0."
    shapes: Shapes = {
        "transformer.embedding.word_embeddings.weight": (512, HIDDEN),
        f"{stem}input_layernorm.weight": (HIDDEN,),
        f"{stem}self_attention.query_key_value.weight": (3 * HIDDEN, HIDDEN),
        f"{stem}self_attention.dense.weight": (HIDDEN, HIDDEN),
        f"{stem}mlp.dense_h_to_4h.weight": (2 * INNER, HIDDEN),
        f"{stem}mlp.dense_4h_to_h.weight": (HIDDEN, INNER),
        "transformer.vision.transformer.layers.0.mlp.fc1.weight": (INNER, HIDDEN),
        "transformer.output_layer.weight": (512, HIDDEN),
    }
    plan = plan_repo(write(tmp_path / "s", {"model_type": "chatglm"}, shapes))
    assert fp8(plan) == {name for name, shape in shapes.items() if name.startswith(stem) and len(shape) == 2}
    with pytest.raises(NothingSelectedError):
        plan_repo(write(tmp_path / "bert", {"model_type": "bert"}, shapes))


@pytest.mark.parametrize("name", ["projector_config", "adapter_config", "connector_config"])
def test_the_layers_of_a_connector_are_not_those_of_the_decoder(tmp_path: Path, name: str) -> None:
    """Granite Speech: a projector of two layers made the third layer of the decoder one for prediction."""
    shapes = {**ends()}
    for layer in range(4):
        shapes |= {**attention(f"model.layers.{layer}.self_attn."), f"model.layers.{layer}.norm.weight": (HIDDEN,)}
    config = {"model_type": "unheard_of", name: {"num_hidden_layers": 2}, "text_config": {"vocab_size": 512}}
    plan = plan_repo(write(tmp_path / "s", config, shapes))
    assert "model.layers.3.self_attn.q_proj.weight" in fp8(plan)
    assert reason(plan, "model.layers.3.self_attn.q_proj.weight") == "a linear weight"


@pytest.mark.parametrize(
    ("parts", "inner"), [(("in_proj_qkv", "in_proj_z"), "linear_attn"), (("c_fc_0", "c_fc_1"), "mlp")]
)
@every_layout
def test_parts_that_engines_merge_stay_together(
    tmp_path: Path, recipe: Recipe, parts: tuple[str, str], inner: str
) -> None:
    """Qwen3.5 and EXAONE: vLLM refused a merged matrix of which a pattern left a part, or read it without a scale."""
    shapes = {**decoder(), **{f"model.layers.0.{inner}.{part}.weight": (HIDDEN, HIDDEN) for part in parts}}
    source = write(tmp_path / "s", {"model_type": "unheard_of"}, shapes)
    plan = plan_repo(source, recipe.model_copy(update={"ignore": (parts[0],)}))
    assert not {name for name in fp8(plan) if parts[0] in name or parts[1] in name}
    assert {name for name in fp8(plan_repo(source, recipe)) if inner in name} >= {
        f"model.layers.0.{inner}.{part}.weight" for part in parts
    }


@every_layout
@pytest.mark.parametrize("last", ["output", "dense_output"])
def test_the_name_of_a_tied_head_may_be_that_of_a_layers_module(tmp_path: Path, recipe: Recipe, last: str) -> None:
    """ProphetNet and RWKV: heads without a tensor are listed under every usual name, but never an FP8 module."""
    shapes = {name: shape for name, shape in decoder().items() if "lm_head" not in name}
    shapes[f"model.layers.0.feed_forward.{last}.weight"] = (HIDDEN, HIDDEN)
    plan = plan_repo(write(tmp_path / "s", {"model_type": "unheard_of"}, shapes), recipe)
    assert f"model.layers.0.feed_forward.{last}.weight" in fp8(plan)
    check_lists(plan, {"lm_head", "embed_out"})
