"""Needs of an evaluation: laws of the formulas, and figures of published checkpoints from names and shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulation.needs import MODELS, inventory
from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.cli.demo import write_checkpoint as write_demo
from nemotron_fp8.cli.main import cli
from nemotron_fp8.cli.show_needs import PredictedNeeds, show_needs
from nemotron_fp8.errors import EvaluationBudgetError, RecipeError, UnsupportedArchitectureError
from nemotron_fp8.inference import skeleton
from nemotron_fp8.inference.machine import measure_machine
from nemotron_fp8.inference.needs import (
    ASSUMED,
    ITEMSIZES,
    EvaluationNeeds,
    Rates,
    evaluation_needs,
    needs_layer_files,
    predict,
)
from nemotron_fp8.sources.open import open_source

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.checkpoint.inventory import Inventory

Stored = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by tensor name."""
SIZES = {"BF16": 2, "F16": 2, "F32": 4}


@cache
def model(name: str) -> Inventory:
    return MODELS[name]()


def made(tensors: Stored, **config: Any) -> Inventory:
    stated = {"vocab_size": 96, "hidden_size": 16, "num_attention_heads": 4, **config}
    return inventory("made", stated, ((name, dtype, shape) for name, (dtype, shape) in tensors.items()))


def decoder(dtype: str = "BF16", layers: int = 2, inner: int = 40, tied: bool = False) -> Stored:
    found: Stored = {"model.embed_tokens.weight": (dtype, (96, 16)), "model.norm.weight": (dtype, (16,))}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        for part, shape in (("q", (16, 16)), ("k", (8, 16)), ("v", (8, 16)), ("o", (16, 16))):
            found[f"{stem}self_attn.{part}_proj.weight"] = dtype, shape
        found[f"{stem}mlp.up_proj.weight"] = dtype, (inner, 16)
        found[f"{stem}mlp.down_proj.weight"] = dtype, (16, inner)
        found[f"{stem}input_layernorm.weight"] = dtype, (16,)
    return found if tied else {**found, "lm_head.weight": (dtype, (96, 16))}


def experts(count: int, stacked: bool) -> Stored:
    """Return the experts of the first layer: three matrices of 8 x 16 each."""
    stem = "model.layers.0.mlp.experts."
    if stacked:
        return {f"{stem}gate_up_proj": ("BF16", (count, 16, 16)), f"{stem}down_proj": ("BF16", (count, 16, 8))}
    return {
        f"{stem}{expert}.{part}_proj.weight": ("BF16", (16, 8) if part == "down" else (8, 16))
        for expert in range(count)
        for part in ("gate", "up", "down")
    }


# ---- published checkpoints ----

GB, TERA = 1e9, 1e12


def test_nemotron_4_340b() -> None:
    """A layer of 3.454 G weights, head, source, result, and the arithmetic of three samples."""
    needs = evaluation_needs(model("Nemotron-4-340B"), 1, 16, 512)
    assert needs.layers == 96
    assert needs.layer_bytes == 2 * (2 * 18432**2 + 2 * 1536 * 18432 + 2 * 73728 * 18432 + 4 * 18432)
    assert needs.layer_bytes == pytest.approx(6.91 * GB, rel=1e-3)
    assert needs.output_bytes == pytest.approx(9.44 * GB, rel=1e-3)
    assert needs.source_read == pytest.approx(682 * GB, rel=1e-3)
    assert needs.result_reads[0] == pytest.approx(350 * GB, rel=3e-3)
    assert needs.outside_bytes == 2 * 2 * 2 * 18432  # weight and bias of the norm, of two checkpoints
    assert needs.hidden_bytes == 2 * 16 * 512 * 18432 * 2
    for sequences, length, operations in ((16, 512, 5.5e15), (64, 512, 22.1e15), (128, 2048, 178e15)):
        found = evaluation_needs(model("Nemotron-4-340B"), 1, sequences, length)
        assert found.stream_flops == pytest.approx(operations, rel=5e-3)
    assert 8 * GB < needs.memory_bytes < 12 * GB
    amx = predict(replace(needs, results=0), ASSUMED[1])
    assert amx.compute_seconds == pytest.approx(1.0 * 3600, rel=0.05)


def test_llama_3_1_405b() -> None:
    needs = evaluation_needs(model("Llama 3.1 405B"))
    assert needs.source_read == pytest.approx(405.85e9 * 2, rel=1e-3)
    assert needs.layers == 126
    met = 405.85e9 - 128256 * 16384  # all but the embedding
    attention = 126 * 128 * 2 * 128 * 512 / 2
    assert needs.stream_flops == pytest.approx(2 * 8192 * (met + attention), rel=1e-3)


def test_deepseek_v3() -> None:
    """671 G weights without the layer of multi-token prediction, 37 G of them for a token; values count, not codes."""
    needs = evaluation_needs(model("DeepSeek-V3 (FP8)"))
    assert needs.layers == 61
    assert needs.source_read == pytest.approx(671e9 + 2 * 129280 * 7168, rel=1e-3)  # embedding and head have 16 bits
    assert needs.memory_bytes < 1.05 * needs.layer_bytes
    routed = 2 * 256 * 3 * 2048 * 7168
    assert routed < needs.layer_bytes < 1.03 * routed
    assert needs.result_reads[0] == pytest.approx(needs.source_read, rel=0.01)
    assert needs.stream_flops / 2 / 8192 == pytest.approx(37e9, rel=0.02)


def test_qwen3_30b_a3b() -> None:
    needs = evaluation_needs(model("Qwen3-30B-A3B"))
    assert needs.source_read == pytest.approx(30.5e9 * 2, rel=2e-3)
    assert needs.layer_bytes == pytest.approx(2 * 128 * 3 * 768 * 2048, rel=0.05)
    embedding = 151936 * 2048
    assert needs.stream_flops / 2 / 8192 == pytest.approx(3.35e9 - embedding, rel=0.04)


def test_smollm2_135m() -> None:
    """A tied head is the embedding: it is read once, and computed with."""
    needs = evaluation_needs(model("SmolLM2-135M"))
    assert needs.source_read == pytest.approx(134.5e6 * 2, rel=1e-3)
    assert needs.output_bytes == 2 * 49152 * 576
    assert needs.stream_flops / 2 / 8192 == pytest.approx(134.5e6 + 30 * 576 * 512, rel=0.04)


# ---- laws ----


@given(
    st.sampled_from(["SmolLM2-135M", "Nemotron-4-340B"]),
    st.integers(0, 4),
    st.integers(1, 300),
    st.integers(2, 5000),
    st.sampled_from(["results", "sequences", "length"]),
)
def test_more_of_anything_needs_no_less(name: str, results: int, sequences: int, length: int, more: str) -> None:
    counts = {"results": results, "sequences": sequences, "length": length}
    few = evaluation_needs(model(name), **counts)
    many = evaluation_needs(model(name), **{**counts, more: counts[more] + 1})
    for key in ("hidden_bytes", "forward_bytes", "score_bytes", "embedding_bytes", "read_bytes", "flops"):
        assert getattr(few, key) <= getattr(many, key), key
    if more != "length":  # longer sequences have slices of fewer words
        assert few.head_bytes <= many.head_bytes
        assert few.memory_bytes <= many.memory_bytes
    assert few.hidden_bytes < many.hidden_bytes
    assert few.flops < many.flops
    assert few.layer_bytes == many.layer_bytes
    for rates in ASSUMED:
        assert (predict(few, rates).seconds or 0.0) <= (predict(many, rates).seconds or 0.0)


@given(
    st.sampled_from(sorted(SIZES)),
    st.integers(1, 5),
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.booleans(),
)
def test_a_layer_is_the_sum_of_its_tensors(dtype: str, layers: int, widths: list[int], tied: bool) -> None:
    """The largest layer counts; the parts beside it are the norm, and the memory is the sum at its peak."""
    tensors = decoder(dtype, layers, tied=tied)
    for layer, width in enumerate(widths[:layers]):
        tensors[f"model.layers.{layer}.mlp.gate_proj.weight"] = dtype, (width, 16)
    needs = evaluation_needs(made(tensors), 2)
    sums = [
        sum(SIZES[dtype] * prod(shape) for name, (_, shape) in tensors.items() if f"layers.{layer}." in name)
        for layer in range(layers)
    ]
    assert needs.layer_bytes == max(sums)
    assert needs.itemsize == SIZES[dtype]
    assert needs.outside_bytes == 3 * 16 * SIZES[dtype]
    assert needs.source_read == sum(SIZES[dtype] * prod(shape) for _, shape in tensors.values())
    sizes = {part.name: part.size for part in needs.parts}
    others = [sizes.pop(name) for name in ("a slice of the output layer", "the rows of the embedding")]
    both = needs.outside_bytes + needs.hidden_bytes
    assert needs.memory_bytes == max(sum(sizes.values()), both + max(others))
    ahead = evaluation_needs(made(tensors), 2, ahead=True)
    assert replace(ahead, ahead=False) == needs
    assert ahead.memory_bytes - needs.memory_bytes <= needs.layer_bytes
    sizes = {part.name: part.size for part in ahead.parts}
    assert sizes["the largest decoder layer, twice"] == 2 * needs.layer_bytes


@given(st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_a_token_meets_its_share_of_the_experts(count: int, per_token: int, stacked: bool) -> None:
    """Stacks count like single experts; without a statement in the config, all experts count."""
    tensors = {**decoder(), **experts(count, stacked)}
    rest = evaluation_needs(made(decoder())).stream_flops
    tokens = 16 * 512
    for key in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "top_k"):
        for value in (per_token, [1, per_token]):
            needs = evaluation_needs(made(tensors, **{key: value}))
            assert needs.stream_flops - rest == 2 * tokens * 3 * 8 * 16 * min(per_token, count)
    nested = evaluation_needs(made(tensors, ffn_config={"moe_top_k": per_token}))
    assert nested.stream_flops - rest == 2 * tokens * 3 * 8 * 16 * min(per_token, count)
    assert evaluation_needs(made(tensors)).stream_flops - rest == 2 * tokens * 3 * 8 * 16 * count


def test_quantized_sources_count_their_values() -> None:
    plain = evaluation_needs(made(decoder()))
    tensors = decoder()
    for name, (_, shape) in list(tensors.items()):
        if name.endswith("_proj.weight"):
            tensors[name] = "F8_E4M3", shape
            tensors[f"{name}_scale"] = "F32", (shape[0], 1)
    needs = evaluation_needs(made(tensors))
    for key in ("layer_bytes", "outside_bytes", "memory_bytes", "stream_flops"):
        assert getattr(needs, key) == getattr(plain, key), key
    bits = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    assert needs.source_read == sum(bits[dtype] * prod(shape) for dtype, shape in tensors.values())


def test_packed_experts_count_their_values() -> None:
    """MXFP4 of gpt-oss: four bits in the file, 16 in memory."""
    packed: Stored = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (4, 16, 1, 16)),
        "model.layers.0.mlp.experts.gate_up_proj_scales": ("U8", (4, 16, 1)),
    }
    found = evaluation_needs(made({**decoder(), **packed}, model_type="gpt_oss", num_experts_per_tok=2), 0)
    plain = evaluation_needs(made(decoder()), 0)
    assert found.layer_bytes - plain.layer_bytes == 2 * 4 * 16 * 32
    assert found.source_read - plain.source_read == 4 * 16 * 17
    assert found.stream_flops - plain.stream_flops == 2 * 16 * 512 * 2 * 16 * 32


def test_encoders_and_predictors_are_neither_held_nor_read() -> None:
    beside: Stored = {
        "vision_tower.encoder.layers.0.mlp.fc1.weight": ("BF16", (4000, 4000)),
        "mtp.layers.0.eh_proj.weight": ("BF16", (16, 32)),
        "model.layers.2.mlp.up_proj.weight": ("BF16", (4000, 16)),
    }
    plain = evaluation_needs(made(decoder(), num_hidden_layers=2))
    assert evaluation_needs(made({**decoder(), **beside}, num_hidden_layers=2)) == plain


def test_other_tables_than_that_of_the_words_are_held() -> None:
    """Positions, and embeddings of each layer as in Gemma 3n, which are larger than those of the words."""
    others: Stored = {
        "model.embed_tokens_per_layer.weight": ("BF16", (96, 400)),
        "model.embed_positions.weight": ("BF16", (500, 16)),
    }
    for tied in (False, True):
        plain, found = (evaluation_needs(made({**decoder(tied=tied), **more}), 0) for more in ({}, others))
        assert found.outside_bytes - plain.outside_bytes == 2 * (96 * 400 + 500 * 16)
        assert found.output_bytes == plain.output_bytes
        assert found.stream_flops == plain.stream_flops


def test_layers_without_attention_have_no_scores() -> None:
    tensors = {name: stored for name, stored in decoder().items() if "self_attn" not in name}
    needs = evaluation_needs(made(tensors))
    assert needs.score_bytes == 0
    met = sum(prod(shape) for _, shape in tensors.values() if len(shape) == 2) - 96 * 16
    assert needs.stream_flops == 2 * 16 * 512 * met


def test_known_results_count_as_they_are(tmp_path: Path) -> None:
    """The estimate of a result is that of the result which the recipe makes, scales included."""
    write_demo(tmp_path / "source")
    source = open_source(tmp_path / "source").inventory
    for i, recipe in enumerate(
        (Recipe(), Recipe(granularity="block"), Recipe(granularity="mx"), Recipe(ignore=("mlp",)))
    ):
        quantize_repo(tmp_path / "source", tmp_path / f"{i}", recipe, device="cpu")
        result = open_source(tmp_path / f"{i}").inventory
        estimated = evaluation_needs(source, 1, recipe=recipe)
        assert evaluation_needs(source, 1, known=[result]) == estimated
        assert estimated.result_reads == (sum(view.nbytes for view in result.views),)
        both = evaluation_needs(source, 2, known=[result], recipe=recipe)
        assert both.result_reads == estimated.result_reads * 2


def test_the_output_layer_is_read_in_slices() -> None:
    """A vocabulary smaller than a slice is one slice; long sequences have slices of fewer words."""
    assert evaluation_needs(made(decoder()), 1, 1, 2).head_bytes == 2 * 96 * 16 * 2 + 6 * 2 * 96 * 4
    for length, words in ((2, 8192), (512, 2048), (2048, 512), (1 << 20, 64)):
        large = evaluation_needs(model("Nemotron-4-340B"), 1, 1, length)
        assert large.head_bytes == words * (2 * 18432 * 2 + 6 * length * 4)


def test_item_sizes_are_those_of_the_evaluation() -> None:
    assert {name: dtype.itemsize for name, dtype in skeleton.DTYPES.items()} == ITEMSIZES


@pytest.mark.parametrize(("stated", "itemsize"), [("float32", 4), ("bfloat16", 2), ("fp7", 4), (7, 4)])
def test_the_config_states_the_dtype_of_the_model(stated: object, itemsize: int) -> None:
    """Without a statement that is understood, it is that of the tensors."""
    for config in ({"dtype": stated}, {"torch_dtype": stated}, {"text_config": {"dtype": stated}}):
        assert evaluation_needs(made(decoder("F32"), **config)).itemsize == itemsize


# ---- budget and errors ----


@given(st.sampled_from(["SmolLM2-135M", "Nemotron-4-340B"]), st.integers(1, 400), st.integers(2, 3000))
def test_the_budget_is_that_of_the_peak(name: str, sequences: int, length: int) -> None:
    """Below it, layers are in files; below all the rest, the largest part of the rest is named."""
    needs = evaluation_needs(model(name), 1, sequences, length)
    assert not needs_layer_files(needs, needs.memory_bytes)
    rest = replace(needs, layer_bytes=0)
    if rest.memory_bytes < needs.memory_bytes:
        assert needs_layer_files(needs, needs.memory_bytes - 1)
        assert needs_layer_files(needs, rest.memory_bytes)
    with pytest.raises(EvaluationBudgetError) as caught:
        needs_layer_files(needs, rest.memory_bytes - 1)
    error, largest = caught.value, max(rest.parts, key=lambda part: part.size)
    assert (error.needed, error.budget) == (rest.memory_bytes, rest.memory_bytes - 1)
    assert largest.name in error.part
    assert f"{largest.size:,}" in error.part
    assert "1 more than the budget" in str(error)
    assert "--max-memory" in error.advice


@pytest.mark.parametrize(("counts", "word"), [((1, 400, 512), "--spill"), ((1, 1, 6000), "--length")])
def test_the_advice_is_about_the_largest_part(counts: tuple[int, int, int], word: str) -> None:
    with pytest.raises(EvaluationBudgetError, match=word):
        needs_layer_files(evaluation_needs(model("Nemotron-4-340B"), *counts), 1 << 20)


@pytest.mark.parametrize("counts", [{"sequences": 0}, {"length": 1}, {"results": -1}, {"sequences": True}])
def test_wrong_numbers_are_rejected(counts: dict[str, int]) -> None:
    with pytest.raises(RecipeError) as caught:
        evaluation_needs(made(decoder()), **counts)
    assert caught.value.arguments == tuple(counts)


def test_known_results_are_among_the_results() -> None:
    with pytest.raises(RecipeError, match="results is 1, not a number of at least 2"):
        evaluation_needs(made(decoder()), 1, known=[made(decoder())] * 2)


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        ({"model.embed_tokens.weight": ("BF16", (96, 16))}, {}, "no layers"),
        (decoder(), {"is_encoder_decoder": True, "model_type": "t5"}, "no layers"),
        ({n: s for n, s in decoder(tied=True).items() if "embed" not in n}, {}, "no output layer"),
    ],
)
def test_models_that_have_no_decoder_are_rejected(tensors: Stored, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        evaluation_needs(made(tensors, **config))


# ---- predictions ----


def test_a_prediction_is_the_sum_of_reading_and_computing_or_the_longer_one() -> None:
    needs = evaluation_needs(model("Nemotron-4-340B"))
    found = predict(needs, Rates("device", 1e12, 1e9))
    assert found.read_seconds == pytest.approx(needs.read_bytes / 1e9)
    assert found.compute_seconds == pytest.approx(2 * needs.stream_flops / 1e12)
    assert found.seconds == pytest.approx((found.read_seconds or 0) + found.compute_seconds)
    for ahead in (
        predict(needs, Rates("device", 1e12, 1e9, ahead=True)),
        predict(replace(needs, ahead=True), Rates("device", 1e12, 1e9)),
    ):
        assert ahead.seconds == max(found.read_seconds or 0, found.compute_seconds)
    assert predict(needs, Rates("device", 1e12, None)).seconds is None


@pytest.mark.parametrize("itemsize", [2, 4])
def test_this_machine_is_measured(tmp_path: Path, itemsize: int) -> None:
    write_demo(tmp_path / "source")
    rates = measure_machine(open_source(tmp_path / "source"), itemsize, 1)
    assert rates.measured
    assert 1e8 < rates.flops < 1e14
    assert rates.read is not None
    assert 1e6 < rates.read < 1e13
    remote = replace(open_source(tmp_path / "source"), root=None)
    assert measure_machine(remote, itemsize, 1).read is None


# ---- command ----


def plan(*arguments: object) -> str:
    done = CliRunner().invoke(cli, ["plan", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_plan_shows_the_needs(tmp_path: Path) -> None:
    """Text of 80 columns: parts, sums, and a row for each device; without the option, nothing of it."""
    write_demo(tmp_path / "s")
    text = plan(tmp_path / "s", "--evaluate", "--sequences", 3, "--length", 64)
    assert "evaluate SRC and 1 result, 3 sequences of 64 tokens, 4 layers:" in text
    for word in ("the largest decoder layer", "the hidden states", "this machine, measured", "one H100", "predicted"):
        assert word in text
    assert max(map(len, text.splitlines())) < 80
    assert "measured on a sample" in text
    quiet = plan(tmp_path / "s", "--evaluate", "--no-estimate")
    assert "16 sequences of 512 tokens" in quiet
    assert "this machine" not in quiet
    assert "evaluate" not in plan(tmp_path / "s")


@pytest.mark.parametrize("name", MODELS)
def test_long_runs_fit_80_columns_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    needs = evaluation_needs(model(name), 1, 1024, 4096)
    slow = (Rates("this machine", 0.0123e12, 1.23e7, measured=True), Rates("this machine", 1e12, None), *ASSUMED)
    show_needs(PredictedNeeds(needs, tuple(predict(needs, rates) for rates in slow)))
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) < 80
    assert "unknown" in "".join(shown)


def test_the_plan_has_the_needs_in_json(tmp_path: Path) -> None:
    """All fields, the sums, and the predictions; with the recipe of the plan."""
    write_demo(tmp_path / "s")
    for options, recipe in (((), Recipe()), (("--ignore", "mlp"), Recipe(ignore=("mlp",)))):
        found = json.loads(plan(tmp_path / "s", "--evaluate", "--no-estimate", "--length", 128, "--json", *options))
        needs = evaluation_needs(open_source(tmp_path / "s").inventory, 1, 16, 128, recipe=recipe)
        evaluation = found["evaluation"]
        devices = evaluation.pop("predictions")
        assert [device["device"] for device in devices] == [rates.device for rates in ASSUMED]
        assert not any(device["measured"] for device in devices)
        for device, rates in zip(devices, ASSUMED, strict=True):
            assert device["seconds"] == pytest.approx(predict(needs, rates).seconds)
        assert evaluation.keys() == {*EvaluationNeeds.__slots__, "memory_bytes", "read_bytes", "flops"}
        for key, value in evaluation.items():
            assert value == (list(getattr(needs, key)) if key == "result_reads" else getattr(needs, key)), key
        assert sum(evaluation["result_reads"]) == found["bytes_out"]
    assert "evaluation" not in json.loads(plan(tmp_path / "s", "--json", "--no-estimate"))


def test_wrong_uses_of_the_command(tmp_path: Path) -> None:
    write_demo(tmp_path / "s")
    for words, code, text in (
        (["--sequences", "3"], 2, "need --evaluate"),
        (["--evaluate", "--length", "1"], 2, "--length"),
        (["--evaluate", "--sequences", "0"], 2, "--sequences"),
    ):
        done = CliRunner().invoke(cli, ["plan", str(tmp_path / "s"), *words])
        assert done.exit_code == code
        assert text in done.stderr
