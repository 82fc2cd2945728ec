"""The tensors of a result in a report: what is unquantized and why, engines, serving, every tensor."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner

from nemotron_fp8 import Recipe, plan_repo, quantize_repo, report_repo
from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.cli.main import cli
from nemotron_fp8.documents.expected_error import MANTISSA, expected_text, rounding_error
from nemotron_fp8.documents.stats_json import Figures
from nemotron_fp8.errors import NemotronFp8Error
from nemotron_fp8.planning.receipt import TensorStats
from nemotron_fp8.report import render_page
from nemotron_fp8.report.contents import (
    BY_DEFAULT,
    BY_PATTERN,
    FUSED_NONFINITE,
    NONFINITE,
    Contents,
    ResultTensor,
)
from nemotron_fp8.report.contents_page import MOST_TENSORS
from tests.support.checkpoints import CONFIG, ONE, Tensors, edit_json, model, weight, write_checkpoint
from tests.support.html_page import Page
from tests.support.recipes import PUBLISHED

if TYPE_CHECKING:
    from pathlib import Path


def decoder(experts: str = "", head: bool = True) -> Tensors:
    """Two layers with attention, and dense layers or experts, in shapes that divide into blocks."""
    tensors: Tensors = {"model.embed_tokens.weight": weight(256, 128), "model.norm.weight": weight(128)}
    for layer in range(2):
        stem = f"model.layers.{layer}"
        tensors[f"{stem}.input_layernorm.weight"] = weight(128)
        for i, name in enumerate("qkvo"):
            tensors[f"{stem}.self_attn.{name}_proj.weight"] = weight(128, 128, seed=i)
        if experts == "stacked":
            tensors[f"{stem}.mlp.gate.weight"] = weight(4, 128)
            tensors[f"{stem}.mlp.experts.gate_up_proj"] = torch.stack([weight(256, 128, seed=e) for e in range(4)])
            tensors[f"{stem}.mlp.experts.down_proj"] = torch.stack([weight(128, 128, seed=e) for e in range(4)])
            continue
        homes = [f"{stem}.mlp"] if not experts else [f"{stem}.{experts}.experts.{e}" for e in range(4)]
        if experts:
            tensors[f"{stem}.{experts}.gate.weight"] = weight(4, 128)
        gate, up, down = ("w1", "w3", "w2") if experts == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
        for home in homes:
            tensors[f"{home}.{gate}.weight"] = weight(128, 128, seed=5)
            tensors[f"{home}.{up}.weight"] = weight(128, 128, seed=6)
            tensors[f"{home}.{down}.weight"] = weight(128, 128, seed=7)
    if head:
        tensors["lm_head.weight"] = weight(256, 128)
    return tensors


def config_of(model_type: str, architecture: str, **more: object) -> dict[str, object]:
    sizes = {"hidden_size": 128, "vocab_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    return {"model_type": model_type, "architectures": [architecture], "num_hidden_layers": 2, **sizes, **more}


MODELS: dict[str, tuple[Tensors, object, dict[str, bytes]]] = {
    "llama": (decoder(), config_of("llama", "LlamaForCausalLM"), {}),
    "mixtral": (decoder("block_sparse_moe"), config_of("mixtral", "MixtralForCausalLM", num_local_experts=4), {}),
    "qwen3_moe": (decoder("mlp"), config_of("qwen3_moe", "Qwen3MoeForCausalLM", num_experts=4), {}),
    "stacked": (decoder("stacked"), config_of("qwen3_moe", "Qwen3MoeForCausalLM", num_experts=4), {}),
    "unknown": (decoder(), config_of("none_that_is_known", "XForCausalLM"), {}),
    "no config": (decoder(), None, {}),
    "embeddings": (
        decoder(head=False),
        config_of("qwen3", "Qwen3Model"),
        {"modules.json": b'[{"idx": 1, "path": "1_Pooling"}]'},
    ),
}
RECIPES = [
    Recipe(),
    PUBLISHED,
    Recipe(numerics="original"),
    Recipe(format="fp8"),
    Recipe(format="mxfp8"),
    Recipe(format="modelopt"),
    Recipe(kv_cache="fp8"),
    Recipe(granularity="tensor", activations="none"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "-".join(map(str, recipe.on_disk)) + recipe.numerics)
@pytest.mark.parametrize("name", MODELS)
def test_a_report_says_what_the_plan_said(tmp_path: Path, name: str, recipe: Recipe) -> None:
    """Reasons, share and engines follow from the result alone, and are those of the plan of its source."""
    tensors, config, side = MODELS[name]
    source = write_checkpoint(tmp_path / "s", {ONE: tensors}, config=config, side=side)
    if "modules.json" in side:
        (source / "1_Pooling").mkdir()
        (source / "1_Pooling" / "config.json").write_text("{}")
    try:
        plan = plan_repo(source, recipe)
    except NemotronFp8Error:
        pytest.skip("no engine loads this layout for such a model")
    quantize_repo(source, tmp_path / "d", recipe)
    contents = report_repo(tmp_path / "d").summary.contents
    assert contents is not None
    assert contents.engines == plan.engines
    assert contents.share.share == plan.share.share
    wanted = {t.name: "" if t.quantize else t.reason for t in plan.tensors}
    assert {t.name: t.reason for t in contents.tensors} == wanted
    assert sum(t.bytes for t in contents.tensors) == plan.bytes_out
    assert sum(each.tensors for each in contents.unquantized) == sum(not t.quantize for t in plan.tensors)


def test_weights_that_engines_are_not_known_to_load(tmp_path: Path) -> None:
    """A router in FP8 is loaded by no engine, as the plan said."""
    tensors, config, _ = MODELS["mixtral"]
    source = write_checkpoint(tmp_path / "s", {ONE: tensors}, config=config)
    recipe = Recipe(also_select=("block_sparse_moe.gate",), force_select=True)
    quantize_repo(source, tmp_path / "d", recipe)
    contents = report_repo(tmp_path / "d").summary.contents
    assert contents is not None
    assert contents.engines == plan_repo(source, recipe).engines
    assert not contents.readers


def test_weights_that_the_recipe_left(tmp_path: Path) -> None:
    """Patterns of a result are untrusted and not run: what they left is attributed to the recipe."""
    source = write_checkpoint(tmp_path / "s", model())
    quantize_repo(source, tmp_path / "d", Recipe(ignore=("mlp",)))
    quantize_repo(source, tmp_path / "select", Recipe(select=("o_proj",)))
    for folder, left in (("d", "mlp.down_proj"), ("select", "self_attn.q_proj")):
        contents = report_repo(tmp_path / folder).summary.contents
        assert contents is not None
        reasons = {t.name: t.reason for t in contents.tensors}
        assert reasons[f"model.layers.0.{left}.weight"] == BY_PATTERN
        assert reasons["model.layers.0.self_attn.o_proj.weight"] == ""
    (tmp_path / "d" / MANIFEST).unlink()
    contents = report_repo(tmp_path / "d").summary.contents
    assert contents is not None
    assert BY_DEFAULT in {t.reason for t in contents.tensors}


def test_a_pattern_of_a_stranger_is_not_run(tmp_path: Path) -> None:
    """It would not end in a lifetime."""
    source = write_checkpoint(tmp_path / "s", {ONE: {f"model.layers.0.{'a' * 60}_proj.weight": weight(8, 8)}})
    quantize_repo(source, tmp_path / "d", Recipe(also_select=("a",)))
    from nemotron_fp8.documents.manifest import _sealed

    value = json.loads((tmp_path / "d" / MANIFEST).read_text())
    value["recipe"]["ignore"] = ["(a*)*(a*)*$b"]
    del value["manifest_sha256"]
    (tmp_path / "d" / MANIFEST).write_bytes(_sealed(value))
    assert report_repo(tmp_path / "d").summary.asked["ignore"]


def test_nan_is_a_reason(tmp_path: Path) -> None:
    shards = model()
    first = next(iter(shards.values()))
    first["model.layers.0.mlp.gate_proj.weight"][0, 0] = float("nan")
    source = write_checkpoint(tmp_path / "s", shards)
    for stats, reason in ((True, NONFINITE), (False, FUSED_NONFINITE)):
        quantize_repo(source, tmp_path / f"{stats}", Recipe(nonfinite="keep", stats=stats))
        contents = report_repo(tmp_path / f"{stats}").summary.contents
        assert contents is not None
        reasons = {t.name: t.reason for t in contents.tensors}
        assert reasons["model.layers.0.mlp.gate_proj.weight"] == reason
        assert reasons["model.layers.0.mlp.up_proj.weight"] == FUSED_NONFINITE


def test_a_half_quantized_model_looks_like_one(tmp_path: Path) -> None:
    """A Mixtral without its experts: the page warns, and names what is left with its bytes."""
    tensors, config, _ = MODELS["mixtral"]
    source = write_checkpoint(tmp_path / "s", {ONE: tensors}, config=config)
    quantize_repo(source, tmp_path / "d", Recipe(ignore=("experts",)))
    page = Page(report_repo(tmp_path / "d").to_html())
    assert re.search(r"Only 25% of the bytes of the decoder's linear weights are FP8", page.text)
    assert "24 tensors, 768.0 KiB: block_sparse_moe.experts.N.w1" in page.text
    assert BY_PATTERN in page.text
    done = CliRunner().invoke(cli, ["report", str(tmp_path / "d")])
    assert re.search(r"linear weights in FP8 +25%", done.stdout)
    found = json.loads(CliRunner().invoke(cli, ["report", str(tmp_path / "d"), "--json"]).stdout)
    assert found["linear_share"] == pytest.approx(0.25, abs=0.001)
    assert found["unquantized"][0]["names"][0] == "block_sparse_moe.experts.N.w1"
    assert found["engines"]["vLLM"] == {"reads": True, "note": ""}


def test_a_page_names_source_model_date_and_versions(tmp_path: Path) -> None:
    """The name is that of the card, or of the folder in the call; never a path."""
    card = b"---\nbase_model: someone/model\n---\n"
    source = write_checkpoint(tmp_path / "plain-name", model(), side={"README.md": card}, config=CONFIG)
    quantize_repo(source, tmp_path / "d", base_model="me/model")
    os.utime(tmp_path / "d" / MANIFEST, (0, 86400 * 365.25 * 30))
    summary = report_repo(tmp_path / "d").summary
    assert (summary.source, summary.made) == ("me/model", "2000-01-01")
    text = Page(render_page([summary])).text
    for word in ("me/model", "2000-01-01", str(CONFIG["architectures"][0]), f"nemotron_fp8 {summary.version}"):
        assert word in text
    given = report_repo(tmp_path / "d", source)
    assert given.summary.source == "plain-name"
    assert str(tmp_path) not in given.to_html()


def test_a_page_says_how_to_serve(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "s",
        {ONE: MODELS["llama"][0]},
        config=config_of("llama", "LlamaForCausalLM", auto_map={"AutoConfig": "configuration_x.X"}),
    )
    quantize_repo(source, tmp_path / "all")
    quantize_repo(source, tmp_path / "some", PUBLISHED)
    page = Page(report_repo(tmp_path / "all").to_html())
    assert "vllm serve PATH\npython -m sglang.launch_server --model-path PATH" in page.text
    assert "transformers from 5.0 loads it" in page.text
    assert "--trust-remote-code, in transformers trust_remote_code=True." in page.text
    page = Page(report_repo(tmp_path / "some").to_html())
    assert "transformers does not support this layout" in page.text
    edit_json(tmp_path / "all" / "config.json", quantization_config={"quant_method": "fp9"})
    assert "describes no layout of this library" in Page(report_repo(tmp_path / "all").to_html()).text


def test_every_tensor_is_in_the_table(tmp_path: Path) -> None:
    """FP8 tensors by increasing SQNR, then the others by size; each cell has the number to sort by."""
    source = write_checkpoint(tmp_path / "s", model())
    quantize_repo(source, tmp_path / "d", Recipe(stats=True))
    report = report_repo(tmp_path / "d")
    text = report.to_html()
    table = text[text.index('<table class="all"') :]
    rows = re.findall(r"<tr><td.*?</tr>", table)
    contents, figures = report.summary.contents, report.summary.figures
    assert contents is not None
    assert figures is not None
    assert len(rows) == len(contents.tensors) == 19
    names = [re.findall(r"<code>(.*?)</code>", row)[0] for row in rows]
    assert names[: len(figures.tensors)] == [t.name for t in figures.worst(99)]
    sizes = {t.name: t.bytes for t in contents.tensors}
    others = [sizes[name] for name in names[len(figures.tensors) :]]
    assert others == sorted(others, reverse=True)
    first = figures.worst(1)[0]
    assert f'data-v="{first.sqnr_db:.17g}">{first.sqnr_db:.2f}</td>' in rows[0]
    assert "not a matrix: 1 dimension" in rows[-1]


def test_a_page_of_100_000_tensors_is_cut_and_says_so(tmp_path: Path) -> None:
    """The page stays small, has the tensors that matter, and names what lists the others."""
    source = write_checkpoint(tmp_path / "s", model())
    quantize_repo(source, tmp_path / "d")
    summary = report_repo(tmp_path / "d").summary
    assert summary.contents is not None
    count = 100_000
    names = [f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.up_proj.weight" for i in range(count)]
    tensors = tuple(ResultTensor(name, "F8_E4M3", (64, 64), 4352, "") for name in names)
    figures = Figures(tuple(TensorStats(name, 31 - i / count, 0.1, 1, 2) for i, name in enumerate(names)), ())
    contents = Contents(tensors, summary.contents.share, summary.contents.engines, summary.contents.serving)
    text = render_page([dataclasses.replace(summary, contents=contents, figures=figures)])
    assert text.count("<tr><td") == MOST_TENSORS
    assert len(text) < 4 << 20
    assert names[-1] in text
    assert names[0] not in text[text.index('<table class="all"') :]
    assert f"The {MOST_TENSORS:,} of 100,000 tensors with the lowest SQNR, then the largest." in Page(text).text


# ---- the expected error ----


def sqnr_of(values: torch.Tensor) -> float:
    """SQNR of values that are cast to E4M3 with the scale of their largest one, in dB."""
    scale = values.abs().max() / 448
    error = (values / scale).to(torch.float8_e4m3fn).double() * scale - values
    return 10 * float(torch.log10(values.square().sum() / error.square().sum()))


def test_the_expected_error_is_that_of_rounding() -> None:
    """Weights of many sizes have the typical error, whatever their distribution, and no other leaves the range."""
    expected = rounding_error(MANTISSA)
    generator = torch.Generator().manual_seed(1)

    def normal() -> torch.Tensor:
        return torch.randn(1 << 18, generator=generator, dtype=torch.float64)

    uniform = torch.rand(1 << 18, generator=generator, dtype=torch.float64)
    assert sqnr_of(2.0 ** (6 * uniform)) == pytest.approx(expected.typical, abs=0.6)
    phases = [sqnr_of(torch.cat([normal(), torch.tensor([8 * 2 ** (k / 16)], dtype=torch.float64)])) for k in range(16)]
    assert sum(phases) / 16 == pytest.approx(expected.typical, abs=0.05)
    samples = [normal(), uniform, uniform - 0.5, normal().sign() * normal().square(), 256 + 192 * uniform]
    assert all(expected.low < sqnr_of(values) < expected.high for values in samples)
    low, high = (
        sqnr_of(torch.cat([256 + 32 * uniform, torch.tensor([448.0])])),
        sqnr_of(torch.cat([224 + 32 * uniform, torch.tensor([448.0])])),
    )
    assert low == pytest.approx(expected.low, abs=0.6)
    assert high == pytest.approx(expected.high, abs=0.6)
    # Weights far below the largest one have coarser steps.
    assert sqnr_of(torch.cat([normal(), torch.tensor([3e4])])[:-1]) > expected.low
    small = torch.cat([normal(), torch.tensor([2e5], dtype=torch.float64)])
    scale = small.abs().max() / 448
    error = (small[:-1] / scale).to(torch.float8_e4m3fn).double() * scale - small[:-1]
    assert 10 * float(torch.log10(small[:-1].square().sum() / error.square().sum())) < expected.low


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([31.5, 31.6, 31.4], ["The median, 31.5 dB, is as expected of FP8", "gives 31.5 dB", "28.9 to 34.9 dB"]),
        ([31.5, 31.6, 20.0], ["is as expected", "1 tensor of 3 is below that"]),
        ([20.0, 21.0, 31.5], ["The median, 21.0 dB, is worse than expected", "2 tensors of 3 are below that"]),
        ([50.0, 51.0, float("inf")], ["The median, 50.0 dB, is better than rounding to FP8 gives"]),
    ],
)
def test_the_verdict_about_the_error(ratios: list[float], words: list[str]) -> None:
    figures = Figures(tuple(TensorStats(f"{i}.weight", ratio, 0.1, 0, 0) for i, ratio in enumerate(ratios)), ())
    text = expected_text(figures)
    assert all(word in text for word in words), text
    assert ("below that" in text) == any(ratio < 28 for ratio in ratios)


def test_no_verdict_without_errors() -> None:
    assert expected_text(Figures((), ())) == ""
    assert expected_text(Figures((TensorStats("a", float("nan"), 0.0, 0, 0),), ())) == ""


def test_page_card_and_command_have_the_verdict_and_explain_the_clamp(tmp_path: Path) -> None:
    values: Any = weight(512, 512)
    source = write_checkpoint(tmp_path / "s", {ONE: {"model.layers.0.mlp.up_proj.weight": values}})
    quantize_repo(source, tmp_path / "d", Recipe(stats=True))
    report = report_repo(tmp_path / "d")
    assert report.summary.clamped > 0
    page = Page(report.to_html()).text
    card = (tmp_path / "d" / "README.md").read_text()
    printed = CliRunner().invoke(cli, ["report", str(tmp_path / "d")]).stdout
    for text in (page, card, printed):
        assert "is as expected of FP8: rounding to E4M3" in text
    for text in (page, card):
        assert "the clamp sets it to that number, as rounding would" in text
