"""verify on results of every task, quantized, converted and dequantized, alone and against the source."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from nemotron_fp8 import Recipe, convert_repo, dequantize_repo, quantize_repo, verify_repo
from tests.support.checkpoints import INDEX, MANIFEST, edit, edit_json, model, read_tensors, weight

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FIRST, SECOND = (f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
Q, O_PROJ = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qo")
NORM = "model.norm.weight"
TASKS = ("quantize", "convert", "dequantize")
TENSORS, FP8 = sum(map(len, model().values())), 14


class ShardMade(NamedTuple):
    """A result and what it was made from."""

    task: str
    source: Path
    path: Path


@pytest.fixture(params=TASKS)
def made(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> ShardMade:
    source, path = checkpoint, tmp_path / "result"
    if request.param == "convert":
        convert_repo(source, path)
    elif request.param == "quantize":
        quantize_repo(source, path)
    else:
        quantize_repo(checkpoint, tmp_path / "fp8", Recipe(granularity="channel", format="compressed-tensors"))
        source = tmp_path / "fp8"
        dequantize_repo(source, path, "float16")
    return ShardMade(request.param, source, path)


def test_a_copy_is_told_from_a_conversion(checkpoint: Path, tmp_path: Path) -> None:
    """convert takes a checkpoint of Hugging Face too, and says that it quantizes nothing."""
    (notice,) = convert_repo(checkpoint, tmp_path / "copy").notices
    assert "not a NeMo checkpoint" in notice
    assert "use quantize" in notice


def flip(path: Path, name: str, byte: int) -> None:
    tensor = read_tensors(path)[name].clone()
    tensor.view(-1).view(torch.uint8)[byte] ^= 1
    edit(path, {name: tensor})


def swap(path: Path, a: str, b: str) -> None:
    tensors = read_tensors(path)
    edit(path, {a: tensors[b], b: tensors[a]})


def stale(root: Path) -> None:
    tree = json.loads((root / INDEX).read_text())
    tree["weight_map"]["gone.weight"] = FIRST
    (root / INDEX).write_text(json.dumps(tree))


def forge(root: Path, recipe: dict[str, Any] | None = None) -> None:
    """Write the manifest anew, all digests right: it tells nothing of a change, and may claim another task."""
    value = json.loads((root / MANIFEST).read_text())
    del value["manifest_sha256"]
    value["recipe"] = recipe or value["recipe"]
    value["files"] = {}
    for path in sorted(root.iterdir()):
        if path.name != MANIFEST:
            data = path.read_bytes()
            value["files"][path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def text() -> str:
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    value["manifest_sha256"] = hashlib.sha256(text().encode()).hexdigest()
    (root / MANIFEST).write_text(text())


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # what is done, what the manifest says of it, what a comparison with the source says of it
    "a flipped bit": (lambda d: flip(d / FIRST, O_PROJ, 37), FIRST, O_PROJ),
    "a kept tensor in one byte": (lambda d: flip(d / SECOND, NORM, 31), SECOND, NORM),
    "two tensors swapped": (lambda d: swap(d / FIRST, Q, O_PROJ), FIRST, Q),
    "a tensor missing": (lambda d: edit(d / SECOND, {NORM: None}), SECOND, NORM),
    "a tensor too many": (lambda d: edit(d / FIRST, {"new.weight": weight(2, 2)}), FIRST, "new.weight"),
    "another dtype": (lambda d: edit(d / SECOND, {NORM: weight(16, dtype=torch.float32)}), SECOND, NORM),
    "another shape": (lambda d: edit(d / SECOND, {NORM: weight(4, 4)}), SECOND, NORM),
    "a stale index entry": (stale, INDEX, "gone.weight"),
    "no index": (lambda d: (d / INDEX).unlink(), INDEX, INDEX),
    "a shard cut off": (lambda d: (d / FIRST).write_bytes((d / FIRST).read_bytes()[:-1]), FIRST, FIRST),
    "a shard missing": (lambda d: (d / FIRST).unlink(), FIRST, FIRST),
    "a shard too many": (
        lambda d: (d / "x.safetensors").write_bytes((d / FIRST).read_bytes()),
        "x.safetensors",
        "x.safetensors",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json", "config.json"),
    "config: another value": (lambda d: edit_json(d / "config.json", hidden_act="silu"), "config.json", "config.json"),
    "config: not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json", "config.json"),
}


SCALE = f"{O_PROJ}_scale"
FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing scale": (lambda d: lose(d, SCALE), O_PROJ),
    "a scale of NaN": (lambda d: edit(d / FIRST, {SCALE: torch.tensor(float("nan"))}), SCALE),
    "a scale of zero": (lambda d: edit(d / FIRST, {SCALE: torch.tensor(0.0)}), SCALE),
    "a negative scale": (lambda d: edit(d / FIRST, {SCALE: torch.tensor(-1.0)}), SCALE),
    "a scale in bf16": (lambda d: edit(d / FIRST, {SCALE: torch.tensor(1.0, dtype=torch.bfloat16)}), SCALE),
    "a scale of shape [1]": (lambda d: edit(d / FIRST, {SCALE: torch.ones(1)}), SCALE),
    "a scale of nothing": (lambda d: lose(d, O_PROJ), SCALE),
    "no quantization_config": (lambda d: edit_json(d / "config.json", quantization_config=None), "config.json"),
    "a stale index entry": (stale, FIRST),
}
"""Damage that a result shows by itself, whatever its digests are."""


def lose(root: Path, name: str) -> None:
    """Take a tensor out of its shard and out of the index."""
    edit(root / FIRST, {name: None})
    tree = json.loads((root / INDEX).read_text())
    del tree["weight_map"][name]
    (root / INDEX).write_text(json.dumps(tree))


def about(source: Path | None, path: Path) -> set[str]:
    return {problem.tensor for problem in verify_repo(source, path, threads=2).problems}


def test_every_result_is_what_it_claims(made: ShardMade) -> None:
    alone, beside = verify_repo(None, made.path), verify_repo(made.source, made.path)
    assert alone.ok, alone.problems
    assert beside.ok, beside.problems
    fp8, plain = {"quantize": (FP8, 0), "convert": (0, 0), "dequantize": (0, FP8)}[made.task]
    assert (alone.quantized, alone.kept) == (fp8, TENSORS - fp8)
    assert (beside.quantized, beside.plain, beside.kept) == (fp8, plain, TENSORS - fp8 - plain)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found(made: ShardMade, case: str) -> None:
    """By the manifest without the source, by the source without the manifest; and it is told what is damaged."""
    damage, file, tensor = DAMAGE[case]
    damage(made.path)
    assert file in about(None, made.path)
    (made.path / MANIFEST).unlink()
    assert tensor in about(made.source, made.path)


@pytest.mark.parametrize("case", FORGED)
@pytest.mark.parametrize("made", ["quantize"], indirect=True)
def test_what_a_result_shows_by_itself(made: ShardMade, case: str) -> None:
    """Digests taken of a damaged result hide nothing that it must have to be one."""
    damage, what = FORGED[case]
    damage(made.path)
    forge(made.path)
    assert about(None, made.path) == {what}


def test_without_a_manifest_only_the_source_tells(made: ShardMade) -> None:
    """Alone that is the one problem. Beside its source a plain copy may as well be what was never quantized."""
    (made.path / MANIFEST).unlink()
    (problem,) = verify_repo(None, made.path).problems
    assert problem.tensor == MANIFEST
    assert "verify SRC DST" in problem.problem
    found = [problem.problem for problem in verify_repo(made.source, made.path).problems]
    lost = f"has no quantization_config, and no {MANIFEST} records an unquantized result"
    assert found == ([lost] if made.task == "convert" else [])


@pytest.mark.parametrize("made", ["dequantize"], indirect=True)
def test_one_bit_of_a_dequantized_tensor_is_one_byte_of_it(made: ShardMade) -> None:
    forge(made.path)
    flip(made.path / FIRST, O_PROJ, 37)
    forge(made.path)
    assert verify_repo(None, made.path).ok  # digests are taken of what is there: that is all a manifest can tell
    (problem,) = verify_repo(made.source, made.path).problems
    assert (problem.tensor, problem.problem) == (O_PROJ, "1 bytes differ from code times scale")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_nan_of_other_bits_is_the_same_nan(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    """Processors and libraries give it different bits; a NaN in the place of a number is a difference."""
    fp8, path = tmp_path / "fp8", tmp_path / "result"
    quantize_repo(checkpoint, fp8, Recipe(granularity="channel", format="compressed-tensors"))
    codes = read_tensors(fp8 / FIRST)[O_PROJ].clone()
    codes.view(-1).view(torch.uint8)[3] = 0x7F
    edit(fp8 / FIRST, {O_PROJ: codes})
    (fp8 / MANIFEST).unlink()
    dequantize_repo(fp8, path, dtype)
    plain = read_tensors(path / FIRST)[O_PROJ].clone()
    assert plain.view(-1).isnan().nonzero().tolist() == [[3]]
    for place, same in ((3, True), (4, False)):
        bits = plain.view(-1).view(torch.int32 if dtype == "float32" else torch.int16)
        bits[place] = -1  # NaN with another sign and payload
        edit(path / FIRST, {O_PROJ: plain})
        forge(path)
        assert verify_repo(fp8, path).ok is same


def test_the_manifest_says_whether_there_must_be_fp8(made: ShardMade) -> None:
    """A result of one task with the manifest of another: digests right, and yet not what it says that it is."""
    claims: dict[str, dict[str, Any]] = {
        "quantize": Recipe().model_dump(mode="json"),
        "convert": {"task": "convert"},
        "dequantize": {"task": "dequantize", "dtype": "bfloat16"},
    }
    forge(made.path)
    assert verify_repo(None, made.path).ok
    for claimed, recipe in claims.items():
        forge(made.path, recipe)
        assert verify_repo(None, made.path).ok == ((claimed == "quantize") == (made.task == "quantize"))


@pytest.mark.parametrize("made", ["dequantize"], indirect=True)
def test_a_plain_source_of_a_dequantized_result_is_told_so(made: ShardMade, checkpoint: Path) -> None:
    """Who names the checkpoint before FP8 must learn what to name instead."""
    (problem,) = verify_repo(checkpoint, made.path).problems
    assert problem.tensor == MANIFEST
    assert "FP8 checkpoint" in problem.problem
