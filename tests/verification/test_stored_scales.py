"""verify demands every scale of a calibration that an engine looks up, and knows the value of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from tests.support.amaxes import amaxes_of
from tests.support.checkpoints import MANIFEST, ONE, edit, read_tensors
from tests.support.decoders import HIDDEN, decoder, write
from tests.verification.test_corruptions import make_anew

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AMAXES = "nemotron_fp8.amaxes.json"
LLAMA = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 2}
LAYER = "model.layers.1."
CACHE = {
    "fp8": f"{LAYER}self_attn.k_proj.k_scale",
    "compressed-tensors": f"{LAYER}self_attn.k_scale",
    "modelopt": f"{LAYER}self_attn.v_proj.v_scale",
}
FORMATS = tuple(CACHE)
HOW: dict[str, Callable[[Path], object]] = {
    "as made": lambda folder: None,
    "anew": make_anew,
    "without a manifest": lambda folder: (folder / MANIFEST).unlink(),
}
"""Changes of the manifest after the change of the result."""


def made(folder: Path, format: str, kv_cache: str = "fp8") -> tuple[Path, Path]:
    """A source, and its result."""
    source = write(folder / "source", LLAMA, decoder())
    recipe = Recipe(format=format, granularity="tensor", activations="static", kv_cache=kv_cache)
    quantize_repo(source, folder / "result", recipe, amaxes=amaxes_of(source))
    return source, folder / "result"


def problems(source: Path | None, result: Path) -> dict[str, str]:
    return {problem.tensor: problem.problem for problem in verify_repo(source, result).problems}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("format", FORMATS)
def test_every_missing_scale_is_named(tmp_path: Path, format: str, how: str) -> None:
    """One at a time, with the source and without; a manifest made anew hides nothing."""
    source, result = made(tmp_path, format)
    shard = result / ONE
    tensors = read_tensors(shard)
    names = [f"{LAYER}mlp.up_proj.input_scale", f"{LAYER}self_attn.q_proj.input_scale", CACHE[format]]
    for name in names:
        edit(shard, {name: None})
        HOW[how](result)
        for against in (source, None):
            assert "missing" in problems(against, result)[name]
        edit(shard, {name: tensors[name]})
        if how == "without a manifest":
            break


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("format", FORMATS)
def test_every_other_value_is_found(tmp_path: Path, format: str, how: str) -> None:
    """The next float32, too: the amax of the calibration gives one value."""
    source, result = made(tmp_path, format)
    shard = result / ONE
    name = f"{LAYER}mlp.up_proj.input_scale"
    right = read_tensors(shard)
    for tensor in (name, CACHE[format]):
        edit(shard, {tensor: torch.nextafter(right[tensor], torch.tensor(9.0))})
        HOW[how](result)
        for against in (source, None):
            assert "gives" in problems(against, result)[tensor]
        edit(shard, {tensor: right[tensor]})
        if how == "without a manifest":
            break


@pytest.mark.parametrize("change", ["dtype", "shape", "size"])
def test_another_form_is_found(tmp_path: Path, change: str) -> None:
    source, result = made(tmp_path, "modelopt")
    name = f"{LAYER}mlp.up_proj.input_scale"
    scale = read_tensors(result / ONE)[name]
    other = {"dtype": scale.bfloat16(), "shape": scale.reshape(1), "size": scale.expand(2).contiguous()}[change]
    edit(result / ONE, {name: other})
    make_anew(result)
    for against in (source, None):
        assert problems(against, result)[name].endswith("must be F32 []")


@pytest.mark.parametrize("how", ["anew", "without a manifest"])
def test_without_its_amaxes_a_result_is_not_proved(tmp_path: Path, how: str) -> None:
    """Scales are still demanded, and those of one input must agree."""
    source, result = made(tmp_path, "fp8", "none")
    (result / AMAXES).unlink()
    name = f"{LAYER}self_attn.q_proj.input_scale"
    edit(result / ONE, {name: read_tensors(result / ONE)[name] * 2, f"{LAYER}mlp.down_proj.input_scale": None})
    HOW[how](result)
    for against in (source, None):
        found = problems(against, result)
        assert "missing" in found[AMAXES]
        assert "missing" in found[f"{LAYER}mlp.down_proj.input_scale"]
        assert "engines take one scale for both" in next(v for k, v in found.items() if "self_attn" in k)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_without_amaxes_a_scale_must_be_positive_and_finite(tmp_path: Path, value: float) -> None:
    _, result = made(tmp_path, "fp8", "none")
    (result / AMAXES).unlink()
    name = f"{LAYER}mlp.down_proj.input_scale"
    edit(result / ONE, {name: torch.tensor(value)})
    make_anew(result)
    assert "positive and finite" in problems(None, result)[name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace(b'"factor": 1.0', b'"factor": 1.5'), "gives"),
        (lambda text: text.replace(b"\n", b"\n ", 1), "not in the form"),
        (lambda _: b"{}", "no usable amaxes"),
        (lambda text: text.replace(b"layers.1", b"layers.9"), "another model"),
        (lambda text: text.replace(f'    "{LAYER}mlp.down_proj"'.encode(), b'    "model.layers.0.x"'), "another model"),
    ],
)
def test_other_amaxes_are_found(tmp_path: Path, change: Callable[[bytes], bytes], says: str) -> None:
    source, result = made(tmp_path, "compressed-tensors")
    text = (result / AMAXES).read_bytes()
    assert change(text) != text
    (result / AMAXES).write_bytes(change(text))
    make_anew(result)
    for against in (source, None):
        found = problems(against, result)
        assert any(says in problem for problem in found.values())
        assert not found.get(AMAXES, "").startswith(AMAXES)  # the name is that of the problem


def test_scales_that_nothing_announces_are_found(tmp_path: Path) -> None:
    """Of activations, whose config says that the engine scales them; of a cache that the calibration does not know."""
    source = write(tmp_path / "source", LLAMA, decoder())
    quantize_repo(source, tmp_path / "dynamic", Recipe(format="fp8", granularity="tensor"))
    name = f"{LAYER}mlp.down_proj.input_scale"
    edit(tmp_path / "dynamic" / ONE, {name: torch.tensor(1.0)})
    make_anew(tmp_path / "dynamic")
    for against in (source, None):
        assert name in problems(against, tmp_path / "dynamic")
    (tmp_path / "other").mkdir()
    source, result = made(tmp_path / "other", "modelopt")
    edit(result / ONE, {f"{LAYER}self_attn.k_scale": torch.tensor(1.0)})
    make_anew(result)
    for against in (source, None):
        assert f"{LAYER}self_attn.k_scale" in problems(against, result)


def test_amaxes_that_nothing_uses_are_found(tmp_path: Path) -> None:
    source = write(tmp_path / "source", LLAMA, decoder())
    quantize_repo(source, tmp_path / "result", Recipe(format="fp8", granularity="tensor"))
    (tmp_path / "result" / AMAXES).write_bytes(amaxes_of(source).render())
    make_anew(tmp_path / "result")
    for against in (source, None):
        assert "nothing uses it" in problems(against, tmp_path / "result")[AMAXES]


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
def test_the_recipe_of_the_manifest_counts(tmp_path: Path, kv_cache: str) -> None:
    """A manifest that records another cache than the result has is found, also where no config states it."""
    source, result = made(tmp_path, "fp8", kv_cache)
    manifest = json.loads((result / MANIFEST).read_text())
    manifest["recipe"]["kv_cache"] = "none" if kv_cache == "fp8" else "fp8"
    (result / MANIFEST).write_text(json.dumps(manifest))
    make_anew(result)
    for against in (source, None):
        assert problems(against, result)


@pytest.mark.parametrize("value", [0.0, float("nan"), -2.0])
@pytest.mark.parametrize("format", FORMATS)
def test_scales_of_a_source_must_be_usable(tmp_path: Path, format: str, value: float) -> None:
    """Without amaxes, those of keys and values must be positive and finite."""
    source = write(tmp_path / "source", LLAMA, decoder())
    recipe = Recipe(format=format, granularity="tensor" if format == "fp8" else "channel", kv_cache="fp8")
    quantize_repo(source, tmp_path / "result", recipe, amaxes=amaxes_of(source))
    shard, name = tmp_path / "result" / ONE, CACHE[format]
    right = read_tensors(shard)[name]
    (tmp_path / "result" / AMAXES).unlink()
    make_anew(tmp_path / "result")
    assert not problems(None, tmp_path / "result")
    edit(shard, {name: torch.full_like(right, value)})
    make_anew(tmp_path / "result")
    assert "positive and finite" in problems(None, tmp_path / "result")[name]
