"""Results with scales from a calibration: their values, the same bytes on every way, and the runs that may go on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import Recipe, dequantize_repo, quantize_repo, verify_repo
from nemotron_fp8.errors import AlreadyQuantizedError
from nemotron_fp8.errors.destination import OtherRunError
from nemotron_fp8.planning.amaxes import read_amaxes
from nemotron_fp8.planning.stored_scales import scale_of
from tests.support.amaxes import amaxes_of
from tests.support.checkpoints import contents, edit, read_tensors, same_bits
from tests.support.decoders import HIDDEN, INNER, decoder, filled, mlp, write
from tests.support.stops import StoppedError, stop_at

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.planning.amaxes import Amaxes

AMAXES = "nemotron_fp8.amaxes.json"
FORMATS = ("fp8", "compressed-tensors", "modelopt")
LLAMA = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 2}
SECOND = "model-00002-of-00002.safetensors"


def static(format: str, kv_cache: str = "fp8", **fields: object) -> Recipe:
    return Recipe(format=format, granularity="tensor", activations="static", kv_cache=kv_cache, **fields)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", LLAMA, decoder())


def stored(source: Path, recipe: Recipe, amaxes: Amaxes, folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of the result of a source."""
    quantize_repo(source, folder / "straight", recipe, amaxes=amaxes, overwrite=True)
    return tensors_of(folder / "straight")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in read_tensors(path).items()}


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_result_differs_from_the_dynamic_one_in_its_scales_only(
    source: Path, tmp_path: Path, format: str, kv_cache: str
) -> None:
    """Weights and their scales are those of granularity tensor; the scales divide the amaxes by 448."""
    amaxes = amaxes_of(source)
    quantize_repo(source, tmp_path / "static", static(format, kv_cache), amaxes=amaxes)
    quantize_repo(source, tmp_path / "dynamic", Recipe(format="fp8", granularity="tensor"))
    ours, dynamic = tensors_of(tmp_path / "static"), tensors_of(tmp_path / "dynamic")
    for name, tensor in dynamic.items():
        assert same_bits(ours.pop(name).reshape(tensor.shape), tensor), name
    inputs = {name: tensor for name, tensor in ours.items() if name.endswith("input_scale")}
    assert len(inputs) == 14
    assert len(ours) - len(inputs) == (4 if kv_cache == "fp8" else 0)
    for name, tensor in inputs.items():
        module = name.removesuffix(".input_scale")
        wanted = torch.tensor(amaxes.inputs[module], dtype=torch.float32) / 448
        assert tensor.dtype == torch.float32
        assert tensor.item() == wanted.item()
    config = json.loads((tmp_path / "static" / "config.json").read_text())["quantization_config"]
    assert ("kv_cache_scheme" in config) == (kv_cache == "fp8" and format != "fp8")
    assert (tmp_path / "static" / "hf_quant_config.json").exists() == (format == "modelopt")
    for against in (None, source):
        assert verify_repo(against, tmp_path / "static").problems == ()


def test_the_amaxes_lie_in_the_result_as_they_were_given(source: Path, tmp_path: Path) -> None:
    """From a file or from memory: the same bytes, also of the card, whose command names the file."""
    amaxes = amaxes_of(source)
    file = tmp_path / "amaxes.json"
    file.write_bytes(amaxes.render())
    quantize_repo(source, tmp_path / "one", static("modelopt"), amaxes=file)
    quantize_repo(source, tmp_path / "two", static("modelopt"), amaxes=amaxes)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (tmp_path / "one" / AMAXES).read_bytes() == file.read_bytes()
    assert read_amaxes(tmp_path / "one" / AMAXES) == amaxes
    card = (tmp_path / "one" / "README.md").read_text()
    assert f"--activations static --kv-cache fp8 --amaxes {AMAXES}" in card
    assert "128 tokens of `words.txt`" in card


@pytest.mark.parametrize("options", [{"threads": 1}, {"max_memory": "3MiB"}, {"digests": False}])
def test_bytes_depend_on_no_option(source: Path, tmp_path: Path, options: dict[str, object]) -> None:
    amaxes = amaxes_of(source)
    quantize_repo(source, tmp_path / "one", static("compressed-tensors"), amaxes=amaxes)
    quantize_repo(source, tmp_path / "two", static("compressed-tensors"), amaxes=amaxes, **options)  # type: ignore[arg-type]
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    names = [name for name in one if name.endswith((".safetensors", "config.json", AMAXES))]
    assert {name: one[name] for name in names} == {name: two[name] for name in names}


def test_a_run_goes_on_with_the_same_amaxes_only(checkpoint: Path, tmp_path: Path) -> None:
    amaxes = amaxes_of(checkpoint)
    recipe, destination = static("fp8"), tmp_path / "result"
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, destination, recipe, amaxes=amaxes, threads=1, progress=stop_at(SECOND))
    with pytest.raises(OtherRunError, match="recipe"):
        quantize_repo(checkpoint, destination, recipe, amaxes=amaxes.times(1.5))
    report = quantize_repo(checkpoint, destination, recipe, amaxes=amaxes)
    assert report.resumed == 1
    quantize_repo(checkpoint, tmp_path / "straight", recipe, amaxes=amaxes)
    assert contents(destination) == contents(tmp_path / "straight")


def test_a_finished_result_is_left_alone(source: Path, tmp_path: Path) -> None:
    amaxes, recipe = amaxes_of(source), static("fp8")
    quantize_repo(source, tmp_path / "result", recipe, amaxes=amaxes)
    assert quantize_repo(source, tmp_path / "result", recipe, amaxes=amaxes).unchanged


def test_in_place_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    amaxes = amaxes_of(source)
    quantize_repo(source, tmp_path / "result", static("modelopt"), amaxes=amaxes)
    quantize_repo(source, None, static("modelopt"), amaxes=amaxes, in_place=True)
    assert contents(source) == contents(tmp_path / "result")


def test_in_place_a_finished_result_of_other_amaxes_is_no_result_of_these(source: Path) -> None:
    """The recipe is the same; the scales in the folder are not those that were asked for."""
    amaxes, recipe = amaxes_of(source), Recipe(format="compressed-tensors", granularity="tensor", kv_cache="fp8")
    first = quantize_repo(source, None, recipe, amaxes=amaxes, in_place=True)
    again = quantize_repo(source, None, recipe, amaxes=amaxes, in_place=True)
    assert again.unchanged
    assert (again.tensors_quantized, again.tensors_kept) == (first.tensors_quantized, first.tensors_kept)
    before = contents(source)
    for other in (amaxes.times(1.5), None):
        with pytest.raises(AlreadyQuantizedError):
            quantize_repo(source, None, recipe, amaxes=other, in_place=True)
    assert contents(source) == before


@pytest.mark.parametrize("format", FORMATS)
def test_scales_of_a_cache_do_not_depend_on_those_in_the_source(tmp_path: Path, format: str) -> None:
    """Where one projection gives queries, keys and values, the first tensor of attention in a source is a scale."""
    shapes = {}
    for name, shape in decoder().items():
        if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            shapes[name] = shape
        elif name.endswith("q_proj.weight"):
            shapes[name.replace("q_proj", "qkv_proj")] = (3 * HIDDEN, HIDDEN)
    source = write(tmp_path / "source", {**LLAMA, "model_type": "phi3"}, shapes)
    cached = {f"model.layers.{i}.self_attn": 3.0 + i for i in range(2)}
    amaxes = replace(amaxes_of(source), k=cached, v=cached)
    for first in FORMATS:
        quantize_repo(source, tmp_path / first, static(first), amaxes=amaxes)
        quantize_repo(tmp_path / first, tmp_path / f"{first} again", static(format), amaxes=amaxes)
        assert tensors_of(tmp_path / f"{first} again").keys() >= {
            f"{module}.{kind}_scale" for module in cached for kind in "kv"
        }
        assert verify_repo(tmp_path / first, tmp_path / f"{first} again").ok


@pytest.mark.parametrize("config", [{}, {"kv_lora_rank": 64}])
@pytest.mark.parametrize("format", FORMATS)
def test_the_cache_of_a_source_is_calibrated_too(tmp_path: Path, config: dict[str, int], format: str) -> None:
    """Its scales are replaced in every format, unless engines read none of this model: those of the source stay."""
    source = write(tmp_path / "source", LLAMA, decoder())
    amaxes = amaxes_of(source)
    for first in FORMATS:
        before = tmp_path / first
        quantize_repo(source, before, static(first), amaxes=amaxes)
        tree = json.loads((before / "config.json").read_text())
        (before / "config.json").write_text(json.dumps(tree | config))
        after = tmp_path / f"{first} again"
        quantize_repo(before, after, static(format, "none"), amaxes=amaxes.times(2.0))
        found = {name: tensor for name, tensor in tensors_of(after).items() if name.endswith(("k_scale", "v_scale"))}
        expected = tensors_of(before) if config else stored(source, static(format), amaxes.times(2.0), tmp_path)
        assert found.keys() == {name for name in expected if name.endswith(("k_scale", "v_scale"))}
        assert all(same_bits(found[name], expected[name]) for name in found)
        for against in (before, None):
            assert verify_repo(against, after).ok


def test_a_factor_scales_every_scale(source: Path, tmp_path: Path) -> None:
    amaxes = amaxes_of(source).times(1.25)
    quantize_repo(source, tmp_path / "result", static("compressed-tensors"), amaxes=amaxes)
    found = tensors_of(tmp_path / "result")
    name = "model.layers.0.mlp.down_proj"
    assert found[f"{name}.input_scale"].item() == scale_of(amaxes.inputs[name], 1.25)
    module = "model.layers.1.self_attn"
    assert found[f"{module}.v_scale"].item() == scale_of(amaxes.v[module], 1.25)


def test_weights_that_are_not_finite_have_no_scale_of_inputs(source: Path, tmp_path: Path) -> None:
    """Those of the cache stay, since attention stays."""
    name = "model.layers.0.self_attn.k_proj.weight"
    path = source / "model.safetensors"
    spoiled = read_tensors(path)[name]
    spoiled[0, 0] = float("nan")
    edit(path, {name: spoiled})
    quantize_repo(source, tmp_path / "result", static("modelopt", nonfinite="keep"), amaxes=amaxes_of(source))
    found = tensors_of(tmp_path / "result")
    stem = "model.layers.0.self_attn."
    assert found[name].dtype == torch.bfloat16
    assert not any(f"{stem}{part}_proj.input_scale" in found for part in "qkv")
    assert f"{stem}o_proj.input_scale" in found
    assert {f"{stem}k_proj.k_scale", f"{stem}v_proj.v_scale"} <= found.keys()
    for against in (None, source):
        assert verify_repo(against, tmp_path / "result").problems == ()


def test_stacks_of_experts_become_experts_with_scales(tmp_path: Path) -> None:
    """And stay stacks where the recipe leaves them."""
    config = {"model_type": "qwen3_moe", "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_experts": 4}
    stem = "model.layers.0.mlp.experts."
    stacks = {f"{stem}gate_up_proj": (4, 2 * INNER, HIDDEN), f"{stem}down_proj": (4, HIDDEN, INNER)}
    source = write(tmp_path / "source", config, decoder(layers=1, dense=False) | stacks)
    amaxes = amaxes_of(source)
    assert f"{stem}3.up_proj" in amaxes.inputs
    quantize_repo(source, tmp_path / "result", static("fp8"), amaxes=amaxes)
    found = tensors_of(tmp_path / "result")
    assert len([name for name in found if name.startswith(stem) and name.endswith("input_scale")]) == 12
    quantize_repo(source, tmp_path / "attention", static("fp8", ignore=("experts",)), amaxes=amaxes)
    found = tensors_of(tmp_path / "attention")
    assert found[f"{stem}down_proj"].dtype == torch.bfloat16
    assert not any("experts" in name and name.endswith("scale") for name in found)
    for folder in ("result", "attention"):
        for against in (None, source):
            assert verify_repo(against, tmp_path / folder).problems == ()


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantized_source_gets_the_new_scales_only(source: Path, tmp_path: Path, format: str) -> None:
    """Codes are kept; the scales of its own calibration are replaced, under whatever names."""
    before = amaxes_of(source)
    quantize_repo(source, tmp_path / "before", static("modelopt"), amaxes=before)
    after = replace(before, inputs={n: 2 * a for n, a in before.inputs.items()}, k=dict.fromkeys(before.k, 3.0))
    quantize_repo(tmp_path / "before", tmp_path / "after", static(format), amaxes=after)
    quantize_repo(source, tmp_path / "straight", static(format), amaxes=after)
    assert tensors_of(tmp_path / "after").keys() == tensors_of(tmp_path / "straight").keys()
    one, two = tensors_of(tmp_path / "after"), tensors_of(tmp_path / "straight")
    assert all(same_bits(one[name], two[name]) for name in one)
    for against in (None, tmp_path / "before"):
        assert verify_repo(against, tmp_path / "after").problems == ()


def test_dequantizing_drops_the_scales(source: Path, tmp_path: Path) -> None:
    quantize_repo(source, tmp_path / "result", static("modelopt"), amaxes=amaxes_of(source))
    dequantize_repo(tmp_path / "result", tmp_path / "plain")
    assert tensors_of(tmp_path / "plain").keys() == tensors_of(source).keys()
    assert not (tmp_path / "plain" / AMAXES).exists()


def test_a_nemotron_3_has_experts_without_gates(tmp_path: Path) -> None:
    config = {"model_type": "nemotron_h", "hidden_size": HIDDEN, "num_hidden_layers": 1}
    shapes = {n.replace("model.", "backbone."): s for n, s in decoder(layers=0).items()}
    stem = "backbone.layers.0.mixer."
    for i in range(2):
        shapes |= {n: s for n, s in mlp(f"{stem}experts.{i}.").items() if "gate" not in n}
    shapes |= {f"{stem}gate.weight": (2, HIDDEN)}
    source = write(tmp_path / "source", config, {}, filled(shapes))
    amaxes = amaxes_of(source, seen=lambda module: "experts.1" not in module)
    quantize_repo(source, tmp_path / "result", static("modelopt", "none"), amaxes=amaxes)
    found = tensors_of(tmp_path / "result")
    for part in ("up", "down"):
        assert same_bits(
            found[f"{stem}experts.0.{part}_proj.input_scale"], found[f"{stem}experts.1.{part}_proj.input_scale"]
        )
    assert verify_repo(source, tmp_path / "result").problems == ()
