"""Quantized sources: the weights that stay FP8, what stays beside them, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.errors import (
    NonFiniteCodesError,
    PackedWeightsError,
    RecipeError,
    ScaleError,
)
from nemotron_fp8.planning.receipt import Recoded
from tests.support.checkpoints import INDEX, ONE, Tensors, same_bits, weight, write_checkpoint
from tests.support.fp8_sources import (
    EMBEDDING,
    MODULE,
    NAME,
    TARGETS,
    check,
    config_of,
    every_tensor,
    mixed,
    source_of,
)
from tests.support.quantized import KINDS, checkpoint_of

if TYPE_CHECKING:
    from pathlib import Path

# ---- the choice of weights ----


def test_a_mixed_source_keeps_its_choice_unless_options_change_it(tmp_path: Path) -> None:
    source, made = mixed(tmp_path / "source")
    report = quantize_repo(source, tmp_path / "same", device="cpu")
    assert report.recoded == Recoded(3)
    found = every_tensor(tmp_path / "same")
    assert {name for name, t in found.items() if t.dtype == torch.float8_e4m3fn} == {f"{m}.weight" for m in made}
    check(source, tmp_path / "same")

    recipe = Recipe(also_select=(r"layers\.1\.self_attn",), ignore=(r"layers\.1\.mlp",))
    report = quantize_repo(source, tmp_path / "other", recipe, device="cpu")
    assert (report.tensors_quantized, report.tensors_dequantized, report.tensors_kept) == (3, 1, 1)
    found = every_tensor(tmp_path / "other")
    left = found["model.layers.1.mlp.down_proj.weight"]
    assert same_bits(left, made["model.layers.1.mlp.down_proj"].values.bfloat16())
    assert found["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    verified = verify_repo(source, tmp_path / "other")
    assert verified.ok
    assert (verified.quantized, verified.plain, verified.kept) == (3, 1, 1)
    index = json.loads((tmp_path / "other" / INDEX).read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_what_a_layout_cannot_hold_is_dequantized_with_its_reason(tmp_path: Path) -> None:
    """Also what engines fuse with it; in the dtype of the other weights."""
    made = {
        f"model.layers.0.self_attn.{part}_proj": KINDS["channel"].make(rows, 128, rows)
        for part, rows in (("q", 128), ("k", 64), ("v", 128), ("o", 128))
    }
    tensors = {**checkpoint_of(made), EMBEDDING: weight(8, 128, dtype=torch.float16)}
    source = write_checkpoint(tmp_path / "source", {ONE: tensors}, config={"model_type": "llama"})
    report = quantize_repo(source, tmp_path / "fp8", Recipe(format="fp8"), device="cpu")
    assert (report.tensors_quantized, report.tensors_dequantized) == (1, 3)
    found = every_tensor(tmp_path / "fp8")
    for part in "qkv":
        module = f"model.layers.0.self_attn.{part}_proj"
        assert same_bits(found[f"{module}.weight"], made[module].values.half())
    reasons = {t.name.split(".")[-2]: t.reason for t in plan_repo(source, Recipe(format="fp8")).tensors}
    assert "64x128 does not divide into blocks" in reasons["k_proj"]
    assert "fused with" in reasons["q_proj"]
    check(source, tmp_path / "fp8")


def test_shared_scales_round_what_shares_them(tmp_path: Path) -> None:
    made = {f"model.layers.0.self_attn.{part}_proj": KINDS["tensor"].make(16, 32, ord(part)) for part in "qkvo"}
    source = source_of(tmp_path / "source", made)
    recipe = Recipe(format="fp8", granularity="tensor", share_scales=True)
    report = quantize_repo(source, tmp_path / "fp8", recipe, device="cpu")
    assert report.recoded.kept == 1
    found = every_tensor(tmp_path / "fp8")
    assert len({float(found[f"model.layers.0.self_attn.{part}_proj.weight_scale"]) for part in "qkv"}) == 1
    check(source, tmp_path / "fp8")


CACHE = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize(
    ("recipe", "declared"),
    [(Recipe(), True), (Recipe(format="modelopt"), True), (Recipe(format="fp8", granularity="tensor"), False)],
    ids=["compressed-tensors", "modelopt", "fp8"],
)
def test_scales_of_the_cache_stay_and_those_of_activations_go(tmp_path: Path, recipe: Recipe, declared: bool) -> None:
    stem, kind = "model.layers.0.self_attn.", KINDS["modelopt tensor, static"]
    cache = {f"{stem}k_proj.k_scale": torch.tensor(0.5), f"{stem}v_scale": torch.ones(1)}
    tensors = checkpoint_of({f"{stem}{part}_proj": kind.make(32, 32, 1) for part in "qkv"})
    tensors |= {**cache, f"{stem}q_scale": torch.ones(1), EMBEDDING: weight(8, 32)}
    config = {"model_type": "llama", "quantization_config": CACHE}
    source = write_checkpoint(tmp_path / "source", {ONE: tensors}, config=config)
    report = quantize_repo(source, tmp_path / "fp8", recipe, device="cpu")
    found = every_tensor(tmp_path / "fp8")
    assert {name for name in found if name.endswith(("k_scale", "v_scale"))} == cache.keys()
    assert not [name for name in found if name.endswith(("input_scale", "q_scale"))]
    assert ("kv_cache_scheme" in config_of(tmp_path / "fp8")["quantization_config"]) == declared
    assert any("4 scales of activations are dropped" in notice for notice in report.notices)
    assert any("FP8 KV cache, which format 'fp8' cannot state" in notice for notice in report.notices) != declared
    assert not any("scales of 1.0" in notice for notice in report.notices)
    check(source, tmp_path / "fp8")


def test_files_and_keys_about_the_quantization_of_the_source_go(tmp_path: Path) -> None:
    config = {
        "text_config": {"compression_config": {"quant_method": "x"}},
        "quantization_config": {"quant_method": "fp8"},
    }
    stale = {"hf_quant_config.json": b"{}", "recipe.yaml": b"a: 1\n"}
    source = source_of(tmp_path / "source", {MODULE: KINDS["tensor"].make(32, 32, 1)}, config, side=stale)
    report = quantize_repo(source, tmp_path / "fp8", device="cpu")
    written = config_of(tmp_path / "fp8")
    assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert written == {"model_type": "llama", "text_config": {}}
    assert dict(report.left_out).keys() == stale.keys()
    check(source, tmp_path / "fp8")


# ---- what is refused ----

PACKED: dict[str, tuple[str, dict[str, Any], Tensors]] = {
    "INT4": (
        "INT4.*pack-quantized.*CompressedTensorsConfig",
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"weight_packed": torch.zeros(16, 4, dtype=torch.int32), "weight_scale": weight(16, 1)},
    ),
    "NVFP4 of compressed-tensors": (
        "NVFP4.*CompressedTensorsConfig",
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {
            "weight_packed": torch.zeros(16, 16, dtype=torch.uint8),
            "weight_scale": torch.ones(16, 2).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.ones(1),
        },
    ),
    "NVFP4 of ModelOpt": (
        "NVFP4",
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            "weight": torch.zeros(16, 16, dtype=torch.uint8),
            "weight_scale": torch.ones(16, 2).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.ones(()),
        },
    ),
    "AWQ": ("AWQ.*GPTQModel", {"quant_method": "awq"}, {"qweight": torch.zeros(4, 4, dtype=torch.int32)}),
    "GPTQ": ("GPTQ.*GPTQModel", {"quant_method": "gptq"}, {"qweight": torch.zeros(4, 4, dtype=torch.int32)}),
    "bitsandbytes, 4 bits": (
        "bitsandbytes.*dequantize",
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"weight": torch.zeros(8, 1, dtype=torch.uint8), "weight.absmax": torch.zeros(4)},
    ),
    "bitsandbytes, 8 bits": (
        "bitsandbytes.*dequantize",
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"weight": torch.zeros(8, 8, dtype=torch.int8), "SCB": torch.zeros(8)},
    ),
    "INT8": (
        "INT8.*CompressedTensorsConfig",
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        {"weight": torch.zeros(8, 8, dtype=torch.int8), "weight_scale": torch.zeros(8, 1)},
    ),
    "E5M2": ("FP8 of another kind", {"quant_method": "fp8"}, {"weight": torch.ones(8, 8).to(torch.float8_e5m2)}),
}


@pytest.mark.parametrize("beside_fp8", [False, True])
@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_are_refused_by_the_name_of_their_format(tmp_path: Path, case: str, beside_fp8: bool) -> None:
    """Also beside FP8 weights, which alone would be read."""
    words, statement, tensors = PACKED[case]
    made = {MODULE: KINDS["tensor"].make(32, 32, 1)} if beside_fp8 else {}
    held = {f"model.layers.0.mlp.down_proj.{end}": tensor for end, tensor in tensors.items()}
    config = {"model_type": "llama", "quantization_config": statement}
    held |= {**checkpoint_of(made), EMBEDDING: weight(8, 16)}
    source = write_checkpoint(tmp_path / "source", {ONE: held}, config=config)
    with pytest.raises(PackedWeightsError, match=f"its weights are {words}.*start from the original") as caught:
        quantize_repo(source, tmp_path / "fp8", device="cpu")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_choices_that_need_unquantized_weights_are_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", {MODULE: KINDS["tensor"].make(32, 32, 1)})
    for recipe, words in (
        (Recipe(nonfinite="keep"), "nonfinite 'keep'.*is quantized"),
        (Recipe(numerics="original", format="fp8", granularity="tensor"), "numerics 'original'.*is quantized"),
    ):
        with pytest.raises(RecipeError, match=words):
            quantize_repo(source, tmp_path / "fp8", recipe, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("target", ["channel", "fp8 block"])
def test_codes_of_nan_are_refused_with_their_place(tmp_path: Path, target: str) -> None:
    """Kept or rounded."""
    made = KINDS["tensor"].make(128, 128, 1)
    made.tensors["weight"].view(torch.uint8)[3, 5] = 0xFF
    made.tensors["weight"].view(torch.uint8)[9, 0] = 0x7F
    source = source_of(tmp_path / "source", {MODULE: made})
    with pytest.raises(NonFiniteCodesError, match=r"2 values are NaN or Inf.*fetch it again") as caught:
        quantize_repo(source, tmp_path / "fp8", TARGETS[target][0], device="cpu")
    assert (caught.value.tensor, caught.value.position, caught.value.count) == (NAME, (3, 5), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("target", ["channel", "fp8 block"])
def test_scales_that_are_not_positive_and_finite_are_refused(tmp_path: Path, target: str, value: float) -> None:
    made = KINDS["channel"].make(128, 128, 1)
    made.tensors["weight_scale"][7, 0] = value
    source = source_of(tmp_path / "source", {MODULE: made})
    with pytest.raises(ScaleError, match="must be positive and finite") as caught:
        quantize_repo(source, tmp_path / "fp8", TARGETS[target][0], device="cpu")
    assert (caught.value.tensor, caught.value.position) == (f"{NAME}_scale", (7, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
