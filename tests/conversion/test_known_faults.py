"""Faults that other tools had, from public reports, that a result or a refusal shows: smallest input, right answer."""

from __future__ import annotations

import json
import re
import sys
from math import frexp, prod
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, dequantize_repo, quantize_repo, verify_repo
from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.cli.main import main
from nemotron_fp8.errors import LayoutError, NotQuantizedError, PackedWeightsError, SourceError, StackedExpertsError
from tests.support.checkpoints import ONE, framed, raw, read_tensors, same_bits, weight, write_checkpoint
from tests.support.decoders import HIDDEN, INNER, Shapes, decoder, filled

if TYPE_CHECKING:
    from pathlib import Path

# ---- sources in other formats are not taken for unquantized ones ----

STEM = "layers.0.ffn.experts.0.w1"
FP8 = "model.layers.0.self_attn.k_proj.weight"
Dtypes = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by tensor name."""

FOREIGN: dict[str, tuple[dict[str, Any], Dtypes, str, type[Exception], type[Exception]]] = {
    # further config, tensors, what the error names, the error of quantize, and that of dequantize
    "packed FP4, scales elsewhere": (
        {"text_config": {"expert_dtype": "mxfp4"}},
        {f"{STEM}.weight": ("I8", (128, 64))},
        "expert_dtype is 'mxfp4'",
        PackedWeightsError,
        NotQuantizedError,
    ),
    "FP4": ({}, {f"{STEM}.weight": ("F4", (128, 64))}, "is F4", PackedWeightsError, NotQuantizedError),
    "packed FP4 with scales of another size": (
        {},
        {f"{STEM}.weight": ("I8", (128, 64)), f"{STEM}.scale": ("F8_E8M0", (128, 8))},
        f"with a scale {STEM}.scale",
        PackedWeightsError,
        NotQuantizedError,
    ),
    "MXFP4 in stacks of an unknown family": (
        {},
        {f"{STEM}_blocks": ("U8", (4, 64, 4, 16)), f"{STEM}_scales": ("U8", (4, 64, 4))},
        f"{STEM}",
        SourceError,
        NotQuantizedError,
    ),
    "NVFP4": (
        {},
        {f"{STEM}.weight": ("U8", (128, 64)), f"{STEM}.weight_scale_2": ("F32", ())},
        f"NVFP4 (tensor {STEM}.weight is U8",
        PackedWeightsError,
        NotQuantizedError,
    ),
    "a stack in FP8 without scales": (
        {},
        {"model.layers.0.mlp.experts.gate_up_proj": ("F8_E4M3", (2, 256, 128))},
        "gate_up_proj",
        LayoutError,
        LayoutError,
    ),
}


def foreign(folder: Path, config: dict[str, Any], dtypes: Dtypes) -> Path:
    """Write a decoder in bf16 with tensors of any dtypes of safetensors, whatever torch knows."""
    tree: dict[str, Any] = {}
    data = b""
    plain = {name: ("BF16", tuple(t.shape), raw(t)) for name, t in filled(decoder()).items() if name not in dtypes}
    others = {n: (d, shape, b"\x38" * (prod(shape) * BITS[d] // 8)) for n, (d, shape) in dtypes.items()}
    for name, (dtype, shape, content) in {**plain, **others}.items():
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    folder.mkdir()
    (folder / ONE).write_bytes(framed(json.dumps(tree).encode(), data))
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", **config}))
    return folder


@pytest.mark.parametrize("case", FOREIGN)
def test_a_source_in_another_format_is_refused_by_name(tmp_path: Path, case: str) -> None:
    config, dtypes, named, error, error_of_dequantize = FOREIGN[case]
    source = foreign(tmp_path / "source", config, dtypes)
    for recipe in (Recipe(), Recipe(select=(".*",), force_select=True)):
        with pytest.raises(error, match=re.escape(named)) as caught:
            quantize_repo(source, tmp_path / "fp8", recipe, device="cpu")
        if isinstance(caught.value, PackedWeightsError):
            assert "start from the original checkpoint" in str(caught.value)
    with pytest.raises(error_of_dequantize) as refused:
        dequantize_repo(source, tmp_path / "plain")
    assert STEM in str(refused.value) or "experts" in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("case", FOREIGN)
def test_the_refusal_is_one_error_line(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, dtypes, named, *_ = FOREIGN[case]
    source = foreign(tmp_path / "source", config, dtypes)
    for verb in ("plan", "quantize"):
        monkeypatch.setattr(sys, "argv", ["nemotron-fp8", verb, str(source), *[str(tmp_path / "D")] * (verb != "plan")])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert named in line


def test_scales_and_integers_of_unquantized_models_are_no_codes(tmp_path: Path) -> None:
    """Norms may be called ``scale``, buffers hold integers, and a bf16 model may have scales of the cache."""
    others: Dtypes = {
        "model.layers.0.attn_norm.scale": ("BF16", (HIDDEN,)),
        "model.layers.0.mlp.router.scale": ("F32", ()),
        "model.layers.0.mlp.experts.tokens": ("I32", (4, 8)),
        "model.position_ids": ("I64", (1, 64)),
        "model.layers.0.self_attn.k_proj.k_scale": ("F32", ()),
    }
    source = foreign(tmp_path / "source", {"expert_dtype": "bf16"}, others)
    quantize_repo(source, tmp_path / "fp8", device="cpu")
    before, after = read_tensors(source / ONE), read_tensors(tmp_path / "fp8" / ONE)
    assert all(same_bits(before[name], after[name]) for name in others)
    assert verify_repo(source, tmp_path / "fp8").ok


# ---- values ----


@pytest.mark.parametrize("amax", [0.7, 1.0, 3.3, 447.9])
def test_a_block_is_scaled_by_its_own_amax(tmp_path: Path, amax: float) -> None:
    """transformers 46763: a scale rounded to a power of two after the cast; here the error is that of FP8 alone."""
    tensor = weight(128, 128, dtype=torch.float32)
    tensor *= amax / tensor.abs().max()
    write_checkpoint(tmp_path / "source", {ONE: {FP8: tensor}}, config={"model_type": "llama"})
    for name, recipe in (
        ("fp8", Recipe(format="fp8")),
        ("ct", Recipe(granularity="block")),
        ("unrounded", Recipe(format="fp8", scale_rounding="none")),
    ):
        quantize_repo(tmp_path / "source", tmp_path / name, recipe, device="cpu")
        found = read_tensors(tmp_path / name / ONE)
        scale = found[f"{FP8}_scale" if name == "ct" else f"{FP8}_scale_inv"]
        assert scale.shape == (1, 1)
        if name == "unrounded":
            assert scale.item() == pytest.approx(amax / 448, rel=1e-6)
            assert frexp(scale.item())[0] != 0.5  # no power of two
        else:
            assert frexp(scale.item())[0] == 0.5  # a power of two, before the cast
            assert amax / 448 <= scale.item() * (1 + 1e-6) < 2 * amax / 448 * (1 + 1e-5)
        plain = found[FP8].float() * scale
        assert (plain - tensor).norm() / tensor.norm() < 0.04
        # Half of the last of three bits of the mantissa, or of the smallest subnormal.
        assert bool(((plain - tensor).abs() <= tensor.abs() * 2**-4 * 1.001 + scale * 2**-10 * 1.001).all())


# ---- every tensor and every file of the source is in the result ----


def test_every_name_of_the_source_is_in_the_result(tmp_path: Path) -> None:
    """llm-compressor 2735: ``mtp.0.ffn.experts.*`` was dropped."""
    shapes: Shapes = {"embed.weight": (512, HIDDEN), "norm.weight": (HIDDEN,), "head.weight": (512, HIDDEN)}
    for i, stem in enumerate(("layers.0.", "layers.1.", "mtp.0.")):
        shapes |= {
            f"{stem}attn_norm.weight": (HIDDEN,),
            f"{stem}attn.wq_a.weight": (HIDDEN, HIDDEN),
            f"{stem}ffn.gate.weight": (4, HIDDEN),
            f"{stem}ffn.gate.tid2eid": (8 + i,),
        }
        for expert in range(2):
            shapes |= {f"{stem}ffn.experts.{expert}.w{j}.weight": (HIDDEN, HIDDEN) for j in (1, 2, 3)}
    shapes |= {"mtp.0.e_proj.weight": (HIDDEN, HIDDEN), "mtp.0.head.weight": (512, HIDDEN)}
    source = filled(shapes)
    config = {"model_type": "deepseek_v4", "n_routed_experts": 4, "num_hidden_layers": 2}
    write_checkpoint(tmp_path / "source", {ONE: source}, config=config)
    for name, recipe in (("default", Recipe()), ("all", Recipe(select=(".*",)))):
        quantize_repo(tmp_path / "source", tmp_path / name, recipe, device="cpu")
        found = read_tensors(tmp_path / name / ONE)
        linear = {n for n, shape in shapes.items() if n.startswith("layers") and shape == (HIDDEN, HIDDEN)}
        assert found.keys() == shapes.keys() | {f"{n}_scale" for n in linear}
        assert all(same_bits(found[n], source[n]) for n in shapes.keys() - linear)
        assert verify_repo(tmp_path / "source", tmp_path / name).ok


PROCESSOR = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
)


def test_the_files_of_a_processor_are_copied(tmp_path: Path) -> None:
    """llm-compressor 1305: without them the model cannot be given an image."""
    side = {name: f'{{"name": "{name}"}}'.encode() for name in PROCESSOR}
    shards = {ONE: filled(decoder())}
    write_checkpoint(tmp_path / "source", shards, config={"model_type": "qwen2_5_vl"}, side=side)
    report = quantize_repo(tmp_path / "source", tmp_path / "fp8", device="cpu")
    assert report.left_out == ()
    assert {name: (tmp_path / "fp8" / name).read_bytes() for name in PROCESSOR} == side


def test_statements_of_another_quantization_are_not_passed_on(tmp_path: Path) -> None:
    """``hf_quant_config.json`` and a nested ``quantization_config`` beside bf16 tensors: engines read them."""
    stale = {"quant_method": "compressed-tensors", "config_groups": {}}
    config = {
        "model_type": "llava",
        "text_config": {"hidden_size": HIDDEN, "quantization_config": stale},
        "compression_config": stale,
    }
    side = {"hf_quant_config.json": b"{}", "recipe.yaml": b"x", "tokenizer.json": b"{}"}
    write_checkpoint(tmp_path / "source", {ONE: filled(decoder())}, config=config, side=side)
    report = quantize_repo(tmp_path / "source", tmp_path / "fp8", device="cpu")
    written = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert written.keys() == {"model_type", "text_config", "quantization_config"}
    assert written["text_config"] == {"hidden_size": HIDDEN}
    assert not {"hf_quant_config.json", "recipe.yaml"} & {path.name for path in (tmp_path / "fp8").iterdir()}
    assert {name for name, _ in report.left_out} == {"hf_quant_config.json", "recipe.yaml"}
    assert any("text_config.quantization_config" in notice for notice in report.notices)
    for origin in (tmp_path / "source", None):
        assert verify_repo(origin, tmp_path / "fp8").ok


def test_a_stack_whose_experts_are_stored_by_themselves_too_is_refused(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts."
    shapes: Shapes = {
        **decoder(dense=False),
        f"{stem}gate_up_proj": (2, 2 * INNER, HIDDEN),
        f"{stem}down_proj": (2, HIDDEN, INNER),
        f"{stem}1.down_proj.weight": (HIDDEN, INNER),
    }
    write_checkpoint(tmp_path / "source", {ONE: filled(shapes)}, config={"model_type": "qwen3_moe"})
    with pytest.raises(StackedExpertsError, match=r"'model.layers.0.mlp.experts.down_proj'.*experts\.1\.down_proj"):
        quantize_repo(tmp_path / "source", tmp_path / "fp8", device="cpu")
    assert not (tmp_path / "fp8").exists()
