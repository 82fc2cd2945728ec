"""Caveats of an FP8 cache without a calibration: told where the config shows a model that loses accuracy with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, plan_repo, quantize_repo
from nemotron_fp8.planning.kv_cache import kv_cache_notice, uncalibrated_risks
from tests.support.decoders import decoder, write

if TYPE_CHECKING:
    from pathlib import Path

LATENT, HEADS = "latent attention (kv_lora_rank 512)", "attention heads of 256"


@pytest.mark.parametrize(
    ("config", "risks"),
    [
        ({}, []),
        ({"hidden_size": 4096, "num_attention_heads": 32}, []),
        ({"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 256}, [HEADS]),
        ({"hidden_size": 2048, "num_attention_heads": 8}, [HEADS]),
        ({"hidden_size": 2048, "num_attention_heads": 8, "head_dim": 128}, []),
        ({"hidden_size": 2048, "num_attention_heads": 0}, []),
        ({"kv_lora_rank": 512}, [LATENT]),
        ({"kv_lora_rank": None}, []),
        ({"text_config": {"kv_lora_rank": 512}}, [LATENT]),
        ({"vision_config": {"head_dim": 256}}, []),
        ({"sliding_window": 4096}, ["sliding windows of 4,096 tokens"]),
        ({"sliding_window": 4096, "use_sliding_window": False}, []),
        ({"sliding_window": 4096, "layer_types": ["full_attention"]}, []),
        ({"sliding_window": 512, "layer_types": ["sliding_attention"]}, ["sliding windows of 512 tokens"]),
        ({"sliding_window": None}, []),
        (
            {"text_config": {"head_dim": 256, "sliding_window": 1024, "kv_lora_rank": 512}},
            [LATENT, HEADS, "sliding windows of 1,024 tokens"],
        ),
    ],
)
def test_what_a_config_shows(config: dict[str, Any], risks: list[str]) -> None:
    """DeepSeek, Gemma, Mistral and others, by the keys of their configs."""
    assert uncalibrated_risks(config) == risks
    notice = kv_cache_notice(Recipe(kv_cache="fp8"), config)
    assert "scales of 1.0" in notice
    assert all(risk in notice for risk in risks)
    assert ("a loss was seen" in notice) is bool(risks)
    assert kv_cache_notice(Recipe(), config) == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(
    ["kv_lora_rank", "head_dim", "hidden_size", "num_attention_heads", "sliding_window", "layer_types", "text_config"]
)


@given(st.dictionaries(keys, json_values))
def test_any_config_gives_an_answer(config: dict[str, Any]) -> None:
    """config.json comes from outside."""
    assert isinstance(uncalibrated_risks(config), list)


@pytest.mark.parametrize("recipe", [Recipe(kv_cache="fp8"), Recipe(format="modelopt", kv_cache="fp8")])
def test_plan_and_card_tell_it(tmp_path: Path, recipe: Recipe) -> None:
    source = write(tmp_path / "source", {"model_type": "llama", "head_dim": 256}, decoder())
    notice = plan_repo(source, recipe).notices[-1]
    assert HEADS in notice
    quantize_repo(source, tmp_path / "result", recipe)
    card = (tmp_path / "result" / "README.md").read_text()
    assert notice[1:] in card
    assert "--kv-cache fp8" in card
    assert "KV cache has scales of 1.0" not in _card_without(source, tmp_path / "other")


def _card_without(source: Path, folder: Path) -> str:
    quantize_repo(source, folder)
    return (folder / "README.md").read_text()


def test_transformers_needs_the_scales_in_the_checkpoint(tmp_path: Path) -> None:
    """It was run: without them, or with those of the projections, it takes scales from memory that nothing has set."""
    config = {"model_type": "llama"}
    cases = {"": False, "self_attn.{}_scale": True, "self_attn.{0}_proj.{0}_scale": False}
    for i, (form, reads) in enumerate(cases.items()):
        names = [f"model.layers.{layer}.{form.format(part)}" for layer in (0, 1) for part in "kv"] if form else []
        source = write(tmp_path / str(i), config, decoder(), {name: torch.ones(1) for name in names})
        plan = plan_repo(source, Recipe(kv_cache="fp8"))
        (found,) = [each for each in plan.engines if each.engine == "transformers"]
        assert found.reads is reads, form
        assert ("memory that nothing has set" in found.note) is not reads
        assert all(each.reads for each in plan.engines if each.engine != "transformers")
