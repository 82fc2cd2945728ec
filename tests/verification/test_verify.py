"""verify: passes on what the package makes, fails on everything that is not exactly that."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, Verification, quantize_repo, verify_repo
from nemotron_fp8.errors import BudgetError, MissingShardError, RecipeError, SourceNotFoundError
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import (
    INDEX,
    MANIFEST,
    ONE,
    Shards,
    edit,
    edit_json,
    model,
    raw,
    read_tensors,
    weight,
    write_checkpoint,
)
from tests.support.strategies import FLOATS, PATTERNS, values

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.planning.recipe import Numerics

FIRST, SECOND = (f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
Q, O_PROJ = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qo")
NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture(params=["float32", "original"])
def result(request: pytest.FixtureRequest, checkpoint: Path, destination: Path) -> Path:
    """A right result, of either numerics, beside its ``checkpoint``."""
    quantize_repo(checkpoint, destination, Recipe(format="fp8", granularity="tensor", numerics=request.param))
    assert verify_repo(checkpoint, destination).ok
    return unlisted(destination)


def unlisted(result: Path) -> Path:
    """Take the manifest away: its digests would show any change, and what is to be shown is that verify looks."""
    (result / MANIFEST).unlink()
    return result


def flip(path: Path, name: str, element: int, bit: int = 0) -> None:
    """Flip a bit of one byte of a tensor."""
    tensor = read_tensors(path)[name].clone()
    tensor.view(-1).view(torch.uint8)[element] ^= 1 << bit
    edit(path, {name: tensor})


def change_scale(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = f"{O_PROJ}_scale"
    scale = read_tensors(path)[name]
    changed = change(scale)
    assert not torch.equal(changed, scale)
    edit(path, {name: changed})


def lose_scale(root: Path) -> None:
    """Take a scale out of its shard and out of the index."""
    name = f"{O_PROJ}_scale"
    edit(root / FIRST, {name: None})
    total = json.loads((root / INDEX).read_text())["metadata"]["total_size"]
    reindex(root, {name: None}, total_size=total - 4)


def swap(path: Path, a: str, b: str, *suffixes: str) -> None:
    """Let two tensors change places, or several pairs of them that are called so with a suffix."""
    tensors = read_tensors(path)
    for suffix in suffixes or ("",):
        assert tensors[a + suffix].shape == tensors[b + suffix].shape
        edit(path, {a + suffix: tensors[b + suffix], b + suffix: tensors[a + suffix]})


def reindex(root: Path, change: dict[str, str | None], **metadata: Any) -> None:
    tree = json.loads((root / INDEX).read_text())
    for name, shard in change.items():
        if shard is None:
            del tree["weight_map"][name]
        else:
            tree["weight_map"][name] = shard
    tree["metadata"].update(metadata)
    (root / INDEX).write_text(json.dumps(tree))


def reconfigure(root: Path, **changes: Any) -> None:
    """Change keys of quantization_config; a key of None goes."""
    tree = json.loads((root / "config.json").read_text())
    found = {**tree["quantization_config"], **changes}
    tree["quantization_config"] = {key: value for key, value in found.items() if value is not None}
    (root / "config.json").write_text(json.dumps(tree))


def again(root: Path) -> None:
    """Quantize a kept matrix behind the back of the config: codes, scale and index are right."""
    tensors = read_tensors(root / SECOND)
    q, scale = reference.quantize(tensors[HEAD])
    edit(root / SECOND, {HEAD: q, f"{HEAD}_scale": scale})
    total = json.loads((root / INDEX).read_text())["metadata"]["total_size"]
    reindex(root, {f"{HEAD}_scale": SECOND}, total_size=total - q.numel() + 4)


ONE_ULP = torch.tensor(float("inf"))

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    # what the list names
    "one flipped code": (lambda d: flip(d / FIRST, O_PROJ, 37), O_PROJ),
    "one flipped sign": (lambda d: flip(d / FIRST, O_PROJ, 255, bit=7), O_PROJ),
    "one changed scale": (lambda d: change_scale(d / FIRST, lambda s: s * 2), f"{O_PROJ}_scale"),
    "a scale one ulp up": (lambda d: change_scale(d / FIRST, lambda s: s.nextafter(ONE_ULP)), f"{O_PROJ}_scale"),
    "a scale one ulp down": (lambda d: change_scale(d / FIRST, lambda s: s.nextafter(-ONE_ULP)), f"{O_PROJ}_scale"),
    "a scale of NaN": (lambda d: change_scale(d / FIRST, lambda s: s * float("nan")), f"{O_PROJ}_scale"),
    "a negative scale": (lambda d: change_scale(d / FIRST, torch.neg), f"{O_PROJ}_scale"),
    "one missing scale": (
        lose_scale,
        O_PROJ,
    ),
    "two tensors swapped": (lambda d: swap(d / FIRST, Q, O_PROJ), Q),
    "two scales swapped": (lambda d: swap(d / FIRST, f"{Q}_scale", f"{O_PROJ}_scale"), f"{Q}_scale"),
    "two tensors swapped with their scales": (
        lambda d: swap(d / FIRST, Q, O_PROJ, "", "_scale"),
        f"{Q}_scale",
    ),
    "a stale index entry": (lambda d: reindex(d, {"gone.weight": FIRST}), "gone.weight"),
    "an index entry to the wrong shard": (lambda d: reindex(d, {O_PROJ: SECOND}), O_PROJ),
    "a scale not in the index": (lambda d: reindex(d, {f"{O_PROJ}_scale": None}), f"{O_PROJ}_scale"),
    "a kept tensor changed in one byte": (lambda d: flip(d / SECOND, NORM, 31), NORM),
    "a kept matrix changed in one byte": (lambda d: flip(d / SECOND, HEAD, 0), HEAD),
    # the rest of a result
    "total_size": (lambda d: reindex(d, {}, total_size=1), INDEX),
    "no index": (lambda d: (d / INDEX).unlink(), INDEX),
    "a broken index": (lambda d: (d / INDEX).write_text("{"), INDEX),
    "a missing shard": (lambda d: (d / FIRST).unlink(), FIRST),
    "a shard cut off": (lambda d: (d / FIRST).write_bytes((d / FIRST).read_bytes()[:-1]), FIRST),
    "a shard too many": (lambda d: (d / "x.safetensors").write_bytes((d / FIRST).read_bytes()), "x.safetensors"),
    "a tensor too many": (lambda d: edit(d / FIRST, {"new.weight": weight(2, 2)}), "new.weight"),
    "a tensor missing": (lambda d: edit(d / SECOND, {NORM: None}), NORM),
    "a kept tensor in another dtype": (lambda d: edit(d / SECOND, {NORM: weight(16, dtype=torch.float32)}), NORM),
    "another shape": (lambda d: edit(d / SECOND, {NORM: weight(4, 4)}), NORM),
    "a scale of shape [1]": (lambda d: change_scale_shape(d / FIRST), f"{O_PROJ}_scale"),
    "metadata lost": (lambda d: drop_metadata(d / FIRST), FIRST),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config: not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config: no quantization": (lambda d: edit_json(d / "config.json", quantization_config=None), "config.json"),
    "config: another value": (lambda d: edit_json(d / "config.json", hidden_act="silu"), "config.json"),
    "config: another key": (lambda d: edit_json(d / "config.json", extra=1), "config.json"),
    "config: the method": (lambda d: reconfigure(d, quant_method="modelopt"), "config.json"),
    "config: no activation scheme": (lambda d: reconfigure(d, activation_scheme=None), "config.json"),
    "config: static activations": (lambda d: reconfigure(d, activation_scheme="static"), "config.json"),
    "config: blocks": (lambda d: reconfigure(d, weight_block_size=[128, 128]), ""),
    "config: a strange key": (lambda d: reconfigure(d, kv_cache_scheme={}), "config.json"),
    "config: a kept module not listed": (lambda d: reconfigure(d, ignored_layers=[]), "lm_head"),
    "config: an FP8 module listed": (
        lambda d: reconfigure(d, ignored_layers=["lm_head", O_PROJ.removesuffix(".weight")]),
        O_PROJ.removesuffix(".weight"),
    ),
    "config: no list": (lambda d: reconfigure(d, ignored_layers="lm_head"), ""),
    "a kept matrix quantized without a word": (again, "lm_head"),
}


def change_scale_shape(path: Path) -> None:
    edit(path, {f"{O_PROJ}_scale": read_tensors(path)[f"{O_PROJ}_scale"].reshape(1)})


def drop_metadata(path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(read_tensors(path), path)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found(checkpoint: Path, result: Path, case: str) -> None:
    """Each change alone makes verify fail and name the tensor or file that it is about."""
    damage, about = DAMAGE[case]
    damage(result)
    found = verify_repo(checkpoint, result)
    assert not found.ok
    assert not about or about in {problem.tensor for problem in found.problems}, found.problems
    assert all(problem.problem for problem in found.problems)


def test_one_finding_for_one_fault(checkpoint: Path, result: Path) -> None:
    """A single flipped code is told as that: one problem, with the count."""
    flip(result / FIRST, O_PROJ, 37)
    (problem,) = verify_repo(checkpoint, result).problems
    assert problem.tensor == O_PROJ
    assert "1 of 256 codes" in problem.problem


@pytest.mark.parametrize("numerics", ["float32", "original"])
def test_each_code_of_a_tensor_is_looked_at(tmp_path: Path, numerics: Any) -> None:
    """First, last and those at the edges of the pieces that verify works in, wherever a flip is."""
    size = (1 << 18) + 5
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": weight(1, size), "b": weight(size)}})
    quantize_repo(source, tmp_path / "d", Recipe(numerics=numerics))
    path = unlisted(tmp_path / "d") / ONE
    right = path.read_bytes()
    for element in (0, 1, (1 << 18) - 1, 1 << 18, size - 1):
        flip(path, "a.o_proj.weight", element)
        assert [p.tensor for p in verify_repo(source, tmp_path / "d").problems] == ["a.o_proj.weight"]
        path.write_bytes(right)
        flip(path, "b", 2 * element + 1)
        assert [p.tensor for p in verify_repo(source, tmp_path / "d").problems] == ["b"]
        path.write_bytes(right)
    assert verify_repo(source, tmp_path / "d").ok


def test_the_sign_of_a_zero_is_a_difference(tmp_path: Path) -> None:
    """0 and -0 are equal as numbers, and not the same code."""
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": torch.zeros(2, 2)}})
    quantize_repo(source, tmp_path / "d")
    flip(unlisted(tmp_path / "d") / ONE, "a.o_proj.weight", 1, bit=7)
    assert [p.tensor for p in verify_repo(source, tmp_path / "d").problems] == ["a.o_proj.weight"]


def test_a_result_of_the_other_numerics_mixed_in_is_found(checkpoint: Path, destination: Path, tmp_path: Path) -> None:
    """Codes of one numerics under the scale of the other are wrong, though each is right by itself."""
    quantize_repo(checkpoint, destination)
    quantize_repo(checkpoint, tmp_path / "other", Recipe(numerics="original"))
    here, there = read_tensors(destination / FIRST), read_tensors(tmp_path / "other" / FIRST)
    codes = {n: t for n, t in there.items() if t.dtype == torch.float8_e4m3fn and raw(t) != raw(here[n])}
    scales_differ = {n for n in codes if raw(here[f"{n}_scale"]) != raw(there[f"{n}_scale"])}
    assert scales_differ, "or the case does not arise"
    edit(unlisted(destination) / FIRST, {n: codes[n] for n in scales_differ})
    assert {p.tensor for p in verify_repo(checkpoint, destination).problems} == scales_differ


def test_nan_made_fp8_is_found(tmp_path: Path) -> None:
    """A result of a tool that quantized NaN is not right, whatever its codes."""
    tensor = weight(4, 4)
    shards: Shards = {ONE: {"a.o_proj.weight": tensor, "b.o_proj.weight": weight(4, 4)}}
    source = write_checkpoint(tmp_path / "s", shards)
    quantize_repo(source, tmp_path / "d")
    tensor[0, 0] = float("nan")
    source = write_checkpoint(tmp_path / "s2", shards)
    assert [p.tensor for p in verify_repo(source, tmp_path / "d").problems] == ["a.o_proj.weight"]


# ---- figures ----


def by_hand(tensor: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> tuple[float, float, int]:
    """Signal to noise in dB, largest error, and values flushed to zero, over the whole tensor in float64."""
    w = tensor.double()
    error = (q.float() * scale).double() - w
    flushed = int(((q.float() == 0) & (tensor != 0)).sum())
    ratio = w.square().sum() / error.square().sum()
    return float(10 * ratio.log10()), float(error.abs().max()), flushed


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("pattern", sorted({*PATTERNS} - {"zero", "negative zero"}))
def test_figures_are_those_of_the_whole_tensor(tmp_path: Path, dtype: torch.dtype, pattern: str) -> None:
    tensor = values((3, 130_000), dtype, pattern, 7)  # more than one piece of verify's
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": tensor}})
    quantize_repo(source, tmp_path / "d", Recipe(format="fp8", granularity="tensor"))
    held = read_tensors(tmp_path / "d" / ONE)
    found = verify_repo(source, tmp_path / "d")
    assert found.ok
    (stats,) = found.tensors
    sqnr, worst, flushed = by_hand(tensor, held["a.o_proj.weight"], held["a.o_proj.weight_scale"])
    assert stats.sqnr_db == pytest.approx(sqnr, rel=1e-9, nan_ok=True)
    assert stats.max_abs_error == worst
    assert stats.flushed_to_zero == flushed
    mult, _ = reference.scale_from_amax(reference.amax(tensor))
    assert stats.clamped == int(((tensor.float() * mult).abs() > 448).sum())


@pytest.mark.parametrize("numerics", ["float32", "original"])
def test_figures_of_codes_that_were_altered(tmp_path: Path, numerics: Numerics) -> None:
    """Of the codes that are there, wherever in the tensor some are not what the source gives."""
    tensor = weight(3, 300_000)
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": tensor}})
    quantize_repo(source, tmp_path / "d", Recipe(numerics=numerics))
    held = read_tensors(tmp_path / "d" / ONE)
    codes = held["a.o_proj.weight"]
    codes.view(torch.uint8)[1, 7:9] ^= 0x40
    edit(unlisted(tmp_path / "d") / ONE, {"a.o_proj.weight": codes})
    found = verify_repo(source, tmp_path / "d")
    assert [p.problem for p in found.problems] == ["2 of 900,000 codes differ from the source, quantized again"]
    sqnr, worst, flushed = by_hand(tensor, codes, held["a.o_proj.weight_scale"])
    assert found.tensors[0].sqnr_db == pytest.approx(sqnr, rel=1e-9)
    assert (found.tensors[0].max_abs_error, found.tensors[0].flushed_to_zero) == (worst, flushed)


def test_figures_that_are_not_finite(tmp_path: Path) -> None:
    """No error: infinite; no signal: not a number; neither is an error of the program."""
    exact = torch.tensor([[448.0, 1.0, -2.0]])
    shards: Shards = {ONE: {"a.o_proj.weight": exact, "b.o_proj.weight": torch.zeros(2, 2)}}
    shards[ONE]["c.o_proj.weight"] = torch.empty(0, 2)
    source = write_checkpoint(tmp_path / "s", shards)
    quantize_repo(source, tmp_path / "d")
    found = {t.name[0]: t.sqnr_db for t in verify_repo(source, tmp_path / "d").tensors}
    assert found["a"] == float("inf")
    assert found["b"] != found["b"]
    assert found["c"] != found["c"]


def test_figures_do_not_depend_on_budget_and_threads(checkpoint: Path, destination: Path) -> None:
    quantize_repo(checkpoint, destination)
    found: list[Verification] = [
        verify_repo(checkpoint, destination, memory, threads) for memory, threads in [("16MiB", 1), ("1GiB", 4)]
    ]
    assert found[0] == found[1]
    assert len(found[0].tensors) == 14
    assert found[0].kept == sum(map(len, model().values())) - 14


# ---- what verify refuses ----


def test_bad_arguments(checkpoint: Path, destination: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        verify_repo(checkpoint, destination)
    quantize_repo(checkpoint, destination)
    with pytest.raises(SourceNotFoundError):
        verify_repo(tmp_path / "no", destination)
    with pytest.raises(RecipeError):
        verify_repo(checkpoint, destination, "lots")
    with pytest.raises(BudgetError):
        verify_repo(checkpoint, destination, 1000)
    (checkpoint / SECOND).unlink()
    with pytest.raises(MissingShardError):
        verify_repo(checkpoint, destination)


def test_where_all_was_kept_for_nan(tmp_path: Path) -> None:
    """Where NaN leaves nothing to quantize, the result says nothing of FP8, and verify counts none."""
    tensor = weight(4, 4)
    tensor[0, 0] = float("nan")
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": tensor}})
    report = quantize_repo(source, tmp_path / "d", Recipe(nonfinite="keep"))
    assert (report.tensors_quantized, report.tensors_kept) == (0, 1)
    assert "quantization_config" not in json.loads((tmp_path / "d" / "config.json").read_text())
    found = verify_repo(source, tmp_path / "d")
    assert found.ok, found.problems
    assert (found.quantized, found.kept) == (0, 1)


def test_the_source_is_no_result_of_itself(checkpoint: Path) -> None:
    """A copy without FP8 is no result, whatever it has in common with one."""
    assert [p.tensor for p in verify_repo(checkpoint, checkpoint).problems] == ["config.json"]
