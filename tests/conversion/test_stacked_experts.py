"""Stacked experts to FP8 and back: the source's names and shapes, and bits equal to code times scale.

The expected values are made by torch alone from the tensors of the FP8 checkpoint.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from nemotron_fp8 import Recipe, dequantize_repo, quantize_repo, verify_repo
from tests.support.checkpoints import INDEX, MANIFEST, ONE, Tensors, read_tensors, same_bits, weight, write_checkpoint
from tests.support.decoders import decoder, filled

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS, HIDDEN = 3, 128
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LAYOUTS = {
    "channel": Recipe(),
    "tensor": Recipe(granularity="tensor", activations="none"),
    "block": Recipe(granularity="block"),
    "fp8 tensor": Recipe(format="fp8", granularity="tensor"),
    "fp8 block": Recipe(format="fp8"),
}


class Kind(NamedTuple):
    """A family with stacked experts.

    Attributes:
        config: config.json.
        stem: start of the names of its decoder.
        stacks: names of the two stacks in a layer.
        experts: module of the single experts in a layer.
        transposed: True for ``[in, out]``.
        always: True if it has stacks without any record.
    """

    config: dict[str, Any]
    stem: str
    stacks: tuple[str, str]
    experts: str
    transposed: bool
    always: bool


TEXT = {"text_config": {"hidden_size": HIDDEN}}
STACKS = ("experts.gate_up_proj", "experts.down_proj")
KINDS = {
    "Qwen3 MoE": Kind(
        {"model_type": "qwen3_moe"},
        "model.",
        tuple(f"mlp.{s}" for s in STACKS),
        "mlp.experts",
        False,
        False,  # type: ignore[arg-type]  # two
    ),
    "Granite MoE": Kind(
        {"model_type": "granitemoe", "hidden_size": HIDDEN},
        "model.",
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        "block_sparse_moe.experts",
        False,
        True,
    ),
    "Qwen3-VL MoE as published": Kind(
        {"model_type": "qwen3_vl_moe", **TEXT},
        "model.language_model.",
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "mlp.experts",
        True,
        True,
    ),
    "Qwen3-VL MoE saved by transformers": Kind(
        {"model_type": "qwen3_vl_moe", **TEXT},
        "model.language_model.",
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "mlp.experts",
        False,
        False,  # without a record it comes back as published
    ),
    "Llama 4": Kind(
        {"model_type": "llama4", **TEXT},
        "language_model.model.",
        ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        "feed_forward.experts",
        True,
        True,
    ),
}


def names_of(kind: Kind, layer: int = 0) -> tuple[str, str, str]:
    """The two stacks of a layer, and the start of the names of its single experts."""
    inside = f"{kind.stem}layers.{layer}."
    return inside + kind.stacks[0], inside + kind.stacks[1], f"{inside}{kind.experts}."


def source_of(kind: Kind, inner: int, layers: int = 1) -> Tensors:
    """A checkpoint with two stacks in each layer."""
    tensors = filled(decoder(kind.stem, layers, dense=False))
    for layer in range(layers):
        gate_up, down, _ = names_of(kind, layer)
        tensors[gate_up] = weight(EXPERTS, 2 * inner, HIDDEN, seed=40 + layer)
        tensors[down] = weight(EXPERTS, HIDDEN, inner, seed=50 + layer)
        if kind.transposed:
            for name in (gate_up, down):
                tensors[name] = tensors[name].transpose(1, 2).contiguous()
    return tensors


def held(folder: Path) -> Tensors:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in read_tensors(path).items()}


def products(tensors: Tensors) -> Tensors:
    """Code times scale of every FP8 matrix; other tensors but scales as they are."""
    found: Tensors = {}
    for name, codes in tensors.items():
        if name.endswith(("_scale", "_scale_inv")):
            continue
        if codes.dtype != torch.float8_e4m3fn:
            found[name] = codes
            continue
        scale = tensors[f"{name}_scale" if f"{name}_scale" in tensors else f"{name}_scale_inv"]
        rows, columns = codes.shape
        if scale.numel() > 1 and scale.shape != (rows, 1):
            scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        found[name] = (codes.float() * (scale if scale.numel() > 1 else scale.reshape(()))).bfloat16()
    return found


def stacked(kind: Kind, plain: Tensors, layers: int = 1) -> Tensors:
    """The tensors of a source, from single experts."""
    found = dict(plain)
    for layer in range(layers):
        gate_up, down, stem = names_of(kind, layer)
        parts = {
            (e, p): found.pop(f"{stem}{e}.{p}_proj.weight")
            for e, p in itertools.product(range(EXPERTS), ("gate", "up", "down"))
        }
        found[gate_up] = torch.stack([torch.cat([parts[e, "gate"], parts[e, "up"]]) for e in range(EXPERTS)])
        found[down] = torch.stack([parts[e, "down"] for e in range(EXPERTS)])
        if kind.transposed:
            for name in (gate_up, down):
                found[name] = found[name].transpose(1, 2).contiguous()
    return found


def check_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not same_bits(found[name], tensor)] == []


def check_index(folder: Path) -> None:
    """The index places every tensor where it is."""
    places = {name: path.name for path in folder.glob("*.safetensors") for name in read_tensors(path)}
    assert json.loads((folder / INDEX).read_text())["weight_map"] == places


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_stacks_come_back(tmp_path: Path, kind: Kind, layout: str) -> None:
    """Of two shards: the stacks of a layer are in different ones. With a manifest, and without it."""
    source = source_of(kind, inner=256)
    home = {name: FIRST if "gate_up" in name or "input" in name else SECOND for name in source}
    shards = {shard: {n: t for n, t in source.items() if home[n] == shard} for shard in (FIRST, SECOND)}
    write_checkpoint(tmp_path / "source", shards, config=kind.config)
    quantize_repo(tmp_path / "source", tmp_path / "fp8", LAYOUTS[layout], device="cpu", threads=2)
    assert verify_repo(tmp_path / "source", tmp_path / "fp8").ok
    codes = held(tmp_path / "fp8")
    stem = names_of(kind)[2]
    assert {name for name in codes if name.startswith(stem) and codes[name].dtype == torch.float8_e4m3fn} == {
        f"{stem}{e}.{p}_proj.weight" for e in range(EXPERTS) for p in ("gate", "up", "down")
    }
    wanted = stacked(kind, products(codes))
    dequantize_repo(tmp_path / "fp8", tmp_path / "plain", threads=2)
    found = held(tmp_path / "plain")
    check_same(found, wanted)
    check_index(tmp_path / "plain")
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in source.items()}
    for origin in (tmp_path / "fp8", None):
        assert verify_repo(origin, tmp_path / "plain").ok

    (tmp_path / "fp8" / MANIFEST).unlink()
    dequantize_repo(tmp_path / "fp8", tmp_path / "again", threads=2)
    if kind.always:
        check_same(held(tmp_path / "again"), wanted)
    elif kind.config["model_type"] == "qwen3_moe":  # engines load single experts, too
        check_same(held(tmp_path / "again"), products(codes))
    else:
        check_same(held(tmp_path / "again"), stacked(kind._replace(transposed=True), products(codes)))
    assert verify_repo(tmp_path / "fp8", tmp_path / "again").ok


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stacks_come_back_in_another_dtype(tmp_path: Path, dtype: str) -> None:
    kind = KINDS["Llama 4"]
    write_checkpoint(tmp_path / "source", {ONE: source_of(kind, inner=96)}, config=kind.config)
    quantize_repo(tmp_path / "source", tmp_path / "fp8", device="cpu", threads=1)
    dequantize_repo(tmp_path / "fp8", tmp_path / "plain", dtype, threads=1)
    codes, found = held(tmp_path / "fp8"), held(tmp_path / "plain")
    stem = names_of(kind)[2]
    name = f"{stem}1.down_proj.weight"
    wanted = (codes[name].float() * codes[f"{name}_scale"]).to(getattr(torch, dtype))
    assert same_bits(found[names_of(kind)[1]][1].T.contiguous(), wanted)


# ---- checkpoints of other tools ----


def by_another_tool(kind: Kind, inner: int, layers: int = 1) -> Tensors:
    """Single experts in FP8 with blocks of 128x128, ragged at the edges, as DeepSeek writes them."""
    generator = torch.Generator().manual_seed(7)
    tensors = filled(decoder(kind.stem, layers, dense=False))
    for layer, expert in itertools.product(range(layers), range(EXPERTS)):
        stem = f"{names_of(kind, layer)[2]}{expert}."
        for name, shape in (("gate", (inner, HIDDEN)), ("up", (inner, HIDDEN)), ("down", (HIDDEN, inner))):
            codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
            blocks = -(-shape[0] // 128), -(-shape[1] // 128)
            tensors[f"{stem}{name}_proj.weight"] = codes
            tensors[f"{stem}{name}_proj.weight_scale_inv"] = torch.rand(blocks, generator=generator) + 0.5
    return tensors


RAGGED = {
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
}
STACKED = [name for name, kind in KINDS.items() if kind.always]


@pytest.mark.parametrize("inner", [96, 200, 256])
@pytest.mark.parametrize("name", STACKED)
def test_blocks_that_do_not_divide_the_rows_of_an_expert(tmp_path: Path, name: str, inner: int) -> None:
    """A part begins in the middle of a block of the stack, where its own blocks begin anew."""
    kind = KINDS[name]
    tensors = by_another_tool(kind, inner)
    write_checkpoint(tmp_path / "fp8", {ONE: tensors}, config={**kind.config, **RAGGED})
    dequantize_repo(tmp_path / "fp8", tmp_path / "plain", threads=2, max_memory="4MiB")
    check_same(held(tmp_path / "plain"), stacked(kind, products(tensors)))
    assert verify_repo(tmp_path / "fp8", tmp_path / "plain").ok


@pytest.mark.parametrize("name", STACKED)
def test_experts_of_a_layer_in_several_shards(tmp_path: Path, name: str) -> None:
    """Weights, and scales apart from their weights; two layers, and the index of what comes back."""
    kind = KINDS[name]
    tensors = by_another_tool(kind, 192, layers=2)
    shards: dict[str, Tensors] = {FIRST: {}, SECOND: {}}
    for i, (tensor, value) in enumerate(tensors.items()):
        shards[(FIRST, SECOND)[i % 5 % 2]][tensor] = value
    write_checkpoint(tmp_path / "fp8", shards, config={**kind.config, **RAGGED})
    dequantize_repo(tmp_path / "fp8", tmp_path / "plain", threads=2)
    check_same(held(tmp_path / "plain"), stacked(kind, products(tensors), layers=2))
    check_index(tmp_path / "plain")
    assert verify_repo(tmp_path / "fp8", tmp_path / "plain").ok


@pytest.mark.parametrize("missing", ["an expert", "a projection", "one is not FP8"])
def test_an_incomplete_layer_stays_apart(tmp_path: Path, missing: str) -> None:
    """A stack with a gap would hold experts under wrong numbers."""
    kind = KINDS["Granite MoE"]
    tensors = by_another_tool(kind, 128, layers=2)
    stem = names_of(kind, 1)[2]
    gone = {
        "an expert": f"{stem}1.",
        "a projection": f"{stem}2.up_proj",
        "one is not FP8": f"{stem}0.down_proj",
    }[missing]
    for tensor in [tensor for tensor in tensors if tensor.startswith(gone)]:
        del tensors[tensor]
    if missing == "one is not FP8":
        tensors[f"{gone}.weight"] = weight(HIDDEN, 128)
    write_checkpoint(tmp_path / "fp8", {ONE: tensors}, config={**kind.config, **RAGGED})
    dequantize_repo(tmp_path / "fp8", tmp_path / "plain", threads=1)
    found, plain = held(tmp_path / "plain"), products(tensors)
    second = {tensor: value for tensor, value in plain.items() if tensor.startswith(stem)}
    first = stacked(kind, {tensor: value for tensor, value in plain.items() if tensor not in second})
    check_same(found, {**first, **second})


def test_the_new_names_take_part_in_a_run_again(tmp_path: Path) -> None:
    """Source to FP8 to the source's names to FP8: the same codes, with the scale of a tensor's amax kept."""
    kind = KINDS["Granite MoE"]
    write_checkpoint(tmp_path / "source", {ONE: source_of(kind, 256)}, config=kind.config)
    quantize_repo(tmp_path / "source", tmp_path / "fp8", LAYOUTS["fp8 tensor"], device="cpu", threads=1)
    dequantize_repo(tmp_path / "fp8", tmp_path / "plain", "float32", threads=1)
    quantize_repo(tmp_path / "plain", tmp_path / "again", LAYOUTS["fp8 tensor"], device="cpu", threads=1)
    first, again = held(tmp_path / "fp8"), held(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(same_bits(t, again[name]) for name, t in first.items() if t.dtype == torch.float8_e4m3fn)
