"""Conversions with best scales: the bytes of the reference whatever the way, verified exactly, resumed and recorded."""

from __future__ import annotations

import json
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.checkpoint.inventory import STATS
from nemotron_fp8.conversion import estimate
from nemotron_fp8.engines.base import one_torch_thread
from nemotron_fp8.engines.devices import check_numbers
from nemotron_fp8.errors import BudgetError, NonFiniteError, RecipeError
from nemotron_fp8.errors.destination import OtherRunError
from nemotron_fp8.planning.number_format import Coverage, NumberFormat
from nemotron_fp8.sources.open import open_source
from nemotron_fp8_kernels import cpu, native, reference
from nemotron_fp8_kernels.formats import CANDIDATES
from tests.support.checkpoints import (
    MANIFEST,
    ONE,
    contents,
    edit,
    model,
    read_tensors,
    same_bits,
    weight,
    write_checkpoint,
)
from tests.support.quantized import KINDS, checkpoint_of
from tests.support.stops import SECOND, StoppedError, stop_at, stop_when_marked

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.progress import Progress

BEST = Recipe(scales="best")
CARD = "README.md"
NAME = "model.layers.0.mlp.down_proj.weight"


def expected(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix by the reference."""
    with one_torch_thread():
        return reference.quantize_with_amax(w, reference.best_amax_bits(w), "channel")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of several slices, of odd sides, of every dtype, with a row of zeros; and one that is not quantized."""
    tensors = {
        NAME: weight(300, 2100),
        "model.layers.0.mlp.up_proj.weight": weight(67, 333, dtype=torch.float32, seed=1),
        "model.layers.0.mlp.gate_proj.weight": weight(67, 333, dtype=torch.float16, seed=2),
        "model.embed_tokens.weight": weight(40, 64, seed=3),
    }
    tensors[NAME][7] = 0
    folder = tmp_path_factory.mktemp("best") / "source"
    return write_checkpoint(folder, {ONE: tensors}, config={"model_type": "llama"})


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_the_bytes_are_those_of_the_reference(
    tmp_path: Path, source: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one thread and two, a small budget and a large one, one pass and two, with statistics and without."""
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    tensors = read_tensors(source / ONE)
    result, statistics = set(), set()
    ways = product((1, 2), ("16MiB", "256MiB"), (True, False), (False, True))
    for i, (threads, memory, digests, stats) in enumerate(ways):
        if not compiled and i % 3:
            continue
        recipe, made = Recipe(scales="best", stats=stats), tmp_path / str(i)
        more: dict[str, Any] = {"threads": threads, "max_memory": memory, "digests": digests, "device": "cpu"}
        quantize_repo(source, made, recipe, **more)
        result.add((made / ONE).read_bytes())
        if stats:
            statistics.add((made / STATS).read_bytes())
    assert (len(result), len(statistics)) == (1, 1)
    found = read_tensors(tmp_path / "0" / ONE)
    for name, tensor in tensors.items():
        if "proj" in name:
            codes, scale = expected(tensor)
            assert same_bits(found[name], codes)
            assert same_bits(found[f"{name}_scale"], scale)
        else:
            assert same_bits(found[name], tensor)


def test_the_largest_code_may_be_half_of_the_largest_number(tmp_path: Path, source: Path) -> None:
    """Verified with the source and alone: 448 / 2^(7/8) rounds to 240 or 256."""
    quantize_repo(source, tmp_path / "result", Recipe(scales="best", stats=True), device="cpu")
    found = verify_repo(source, tmp_path / "result", threads=2)
    assert found.ok, found.problems
    assert found.quantized == 3
    assert verify_repo(None, tmp_path / "result").ok
    largest = read_tensors(tmp_path / "result" / ONE)[NAME].float().abs().amax(1)
    assert set(largest.tolist()) - {0.0} <= {448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0}
    assert float(largest[largest > 0].min()) <= 256


def test_the_error_is_less_for_every_tensor(tmp_path: Path, source: Path) -> None:
    ratios = []
    for recipe in (Recipe(), BEST):
        quantize_repo(source, tmp_path / recipe.scales, recipe, device="cpu")
        ratios.append([tensor.sqnr_db for tensor in verify_repo(source, tmp_path / recipe.scales).tensors])
    assert len(ratios[1]) == 3
    assert all(best > amax + 0.15 for amax, best in zip(*ratios, strict=True))


@pytest.mark.parametrize("record", ["manifest", "card", "none"])
@pytest.mark.parametrize("made", ["amax", "best"])
@pytest.mark.parametrize("recorded", ["amax", "best"])
def test_the_choice_is_the_recorded_one(tmp_path: Path, source: Path, record: str, made: str, recorded: str) -> None:
    """A result of the other choice is rejected by its scales; without any record, both are right."""
    result = tmp_path / "result"
    quantize_repo(source, result, Recipe(scales=recorded), device="cpu", digests=False)  # type: ignore[arg-type]  # a choice
    change: dict[str, torch.Tensor | None] = {}
    names = [name for name in read_tensors(source / ONE) if "proj" in name]
    for name in names:
        w = read_tensors(source / ONE)[name]
        change[name], change[f"{name}_scale"] = expected(w) if made == "best" else reference.quantize(w, "channel")
    edit(result / ONE, change)
    if record != "manifest":
        (result / MANIFEST).unlink()
    if record == "none":
        (result / CARD).unlink()
    problems = [p.tensor for p in verify_repo(source, result).problems]
    right = made == recorded or record == "none" or (record, recorded) == ("card", "amax")
    assert problems == ([] if right else [f"{name}_scale" for name in names])


@pytest.mark.parametrize("record", [True, False])
def test_a_row_with_the_second_best_scale_is_found(tmp_path: Path, source: Path, record: bool) -> None:
    """Its codes fit its scale, and its error is less than that of the amax: only an exact search tells."""
    result = tmp_path / "result"
    quantize_repo(source, result, BEST, device="cpu", digests=False)
    w = read_tensors(source / ONE)[NAME]
    bits, plain = cpu.best_amax_bits(w), reference.amax_bits(w, "channel").view(torch.float32)
    row = int((bits[:, 0] != plain.view(torch.int32)[:, 0]).nonzero()[0])
    other = next(c for c in CANDIDATES[1:] if float(plain[row] * c) != float(bits.view(torch.float32)[row]))
    bits[row] = (plain[row] * other).view(torch.int32)
    codes, scale = reference.quantize_with_amax(w, bits, "channel")
    edit(result / ONE, {NAME: codes, f"{NAME}_scale": scale})
    if not record:
        (result / MANIFEST).unlink()
        (result / CARD).unlink()
    assert [p.tensor for p in verify_repo(source, result).problems] == [f"{NAME}_scale"]


def test_a_run_is_resumed_and_a_run_with_another_choice_is_not(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(StoppedError):
        quantize_repo(checkpoint, tmp_path / "d", BEST, threads=1, device="cpu", progress=stop_at(SECOND))
    with pytest.raises(OtherRunError):
        quantize_repo(checkpoint, tmp_path / "d", threads=1, device="cpu")
    report = quantize_repo(checkpoint, tmp_path / "d", BEST, threads=2, device="cpu")
    quantize_repo(checkpoint, tmp_path / "straight", BEST, device="cpu")
    assert report.resumed == 1
    assert contents(tmp_path / "d") == contents(tmp_path / "straight")
    assert json.loads((tmp_path / "d" / MANIFEST).read_text())["recipe"]["scales"] == "best"


def test_in_place(tmp_path: Path, checkpoint: Path) -> None:
    """Stopped at the second shard and resumed: the bytes of a conversion to a folder."""
    quantize_repo(checkpoint, tmp_path / "d", BEST, device="cpu")
    with pytest.raises(StoppedError):
        quantize_repo(
            checkpoint, None, BEST, in_place=True, threads=1, device="cpu", progress=stop_when_marked(checkpoint)
        )
    quantize_repo(checkpoint, None, BEST, in_place=True, device="cpu")
    kept = {name: data for name, data in contents(tmp_path / "d").items() if name != MANIFEST}
    assert {name: data for name, data in contents(checkpoint).items() if name in kept} == kept


def test_codes_are_kept_and_other_values_are_searched(tmp_path: Path) -> None:
    """Scales that can be repeated are not searched: the values would change. Those of blocks are, of the values."""
    kept, again = KINDS["channel"].make(64, 256, 1), KINDS["DeepSeek V3"].make(128, 384, 2)
    modules = {"model.layers.0.self_attn.o_proj": kept, "model.layers.0.mlp.down_proj": again}
    tensors = {**checkpoint_of(modules), "model.embed_tokens.weight": weight(32, 256)}
    source = write_checkpoint(tmp_path / "source", {ONE: tensors}, config={"model_type": "llama"})
    report = quantize_repo(source, tmp_path / "result", BEST, device="cpu")
    assert report.recoded is not None
    assert (report.recoded.kept, report.recoded.rounded) == (1, 1)
    found = read_tensors(tmp_path / "result" / ONE)
    assert same_bits(found["model.layers.0.self_attn.o_proj.weight"], kept.tensors["weight"])
    assert same_bits(found["model.layers.0.self_attn.o_proj.weight_scale"], kept.tensors["weight_scale"])
    codes, scale = expected(again.values)
    assert same_bits(found["model.layers.0.mlp.down_proj.weight"], codes)
    assert same_bits(found["model.layers.0.mlp.down_proj.weight_scale"], scale)
    verified = verify_repo(source, tmp_path / "result")
    assert verified.ok, verified.problems


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_rows_that_are_not_finite(tmp_path: Path, value: float) -> None:
    """Found as for other scales: an error, or a tensor that is left unquantized with those fused with it."""
    shards = model()
    bad = "model.layers.0.self_attn.q_proj.weight"
    shard = next(name for name, tensors in shards.items() if bad in tensors)
    shards[shard][bad][3, 2] = value
    source = write_checkpoint(tmp_path / "source", shards, config={"model_type": "llama"})
    with pytest.raises(NonFiniteError, match=bad):
        quantize_repo(source, tmp_path / "d", BEST, device="cpu")
    for digests in (True, False):
        made = tmp_path / f"kept-{digests}"
        quantize_repo(source, made, Recipe(scales="best", nonfinite="keep"), device="cpu", digests=digests)
        tensors = read_tensors(made / shard)
        assert same_bits(tensors[bad], shards[shard][bad])
        verified = verify_repo(source, made)
        assert verified.ok, verified.problems


def test_amaxes_close_to_the_largest_number(tmp_path: Path) -> None:
    """Candidates beyond float32 are no candidates: the row is finite, and so is its scale."""
    top = torch.finfo(torch.bfloat16).max
    values = weight(64, 256).float() * 6 * (top / 2)
    values[:, 5] = torch.linspace(0.4, 0.99, 64) * top
    source = write_checkpoint(tmp_path / "source", {ONE: {NAME: values.bfloat16()}}, config={"model_type": "llama"})
    quantize_repo(source, tmp_path / "result", BEST, device="cpu")
    assert bool(read_tensors(tmp_path / "result" / ONE)[f"{NAME}_scale"].isfinite().all())
    assert verify_repo(source, tmp_path / "result").ok


def test_the_budget_has_room_for_the_search(tmp_path: Path, source: Path) -> None:
    """The least budget that the error names is enough, and is larger than without a search."""
    needed = {}
    for recipe in (Recipe(), BEST):
        with pytest.raises(BudgetError) as caught:
            quantize_repo(source, tmp_path / recipe.scales, recipe, max_memory=4096, device="cpu")
        needed[recipe.scales] = caught.value.needed
        quantize_repo(source, tmp_path / recipe.scales, recipe, max_memory=caught.value.needed, device="cpu")
    assert needed["best"] > needed["amax"]
    assert verify_repo(source, tmp_path / "best").ok


def test_the_estimate_searches(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is quantized as the conversion does it."""
    seen = []
    original = estimate.slice_amax

    def spy(values: torch.Tensor, view: Any, coverage: Coverage, choice: Any) -> torch.Tensor:
        seen.append(choice)
        return original(values, view, coverage, choice)

    monkeypatch.setattr(estimate, "slice_amax", spy)
    found = estimate.estimate_plan(plan_repo(source, BEST), open_source(source, None, None))
    assert found.seconds > 0
    assert set(seen) == {"best"}


def test_progress_counts_every_byte(tmp_path: Path, source: Path) -> None:
    seen: list[Progress] = []
    quantize_repo(source, tmp_path / "result", BEST, device="cpu", digests=False, progress=seen.append)
    assert seen[-1].done == seen[-1].total


@pytest.mark.parametrize("coverage", [Coverage(), Coverage("block")], ids=str)
def test_no_kernel_searches_other_scales(coverage: Coverage) -> None:
    """A layout of another package may state such numbers."""
    with pytest.raises(RecipeError, match="only for each output row"):
        check_numbers(NumberFormat(coverage, scale_choice="best"))
    check_numbers(NumberFormat(Coverage("channel"), scale_choice="best"))
