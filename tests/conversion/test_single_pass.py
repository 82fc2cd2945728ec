"""A single pass of the CPU gives the bytes, statistics and findings of two passes, and gives up where it must."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.checkpoint.inventory import STATS
from nemotron_fp8.engines.cpu import CpuEngine
from nemotron_fp8.errors import NonFiniteError
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.sources.folder import read_folder
from nemotron_fp8.sources.reader import FolderOpener, Reader
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import model, read_tensors, weight, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8 import Report
    from nemotron_fp8.progress import Progress

RECIPES: dict[str, dict[str, Any]] = {
    "channel": {},
    "best": {"scales": "best"},
    "block": {"format": "fp8", "granularity": "block"},
    "channel, statistics": {"stats": True},
    "best, statistics": {"scales": "best", "stats": True},
    "block, statistics": {"format": "fp8", "granularity": "block", "stats": True},
}
FINE: dict[str, dict[str, Any]] = {"mx": {"granularity": "mx"}, "mx, statistics": {"format": "mxfp8", "stats": True}}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the engine's passes, as they begin."""
    seen: list[str] = []
    for name in ("amaxes", "cast", "convert"):
        original = getattr(CpuEngine, name)

        def call(self: CpuEngine, *args: Any, _name: str = name, _original: Any = original) -> Any:
            seen.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(CpuEngine, name, call)
    return seen


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def quantize(source: Path, target: Path, digests: bool, **recipe: Any) -> tuple[Report, list[Progress]]:
    seen: list[Progress] = []
    report = quantize_repo(source, target, Recipe(**recipe), digests=digests, progress=seen.append, threads=2)
    return report, seen


@pytest.mark.parametrize("name", RECIPES)
def test_one_pass_equals_two(tmp_path: Path, passes: list[str], name: str) -> None:
    """Digests follow the order of the bytes, where scales come first, and so take two passes."""
    tensors = {
        f"model.layers.{i}.mlp.{part}_proj.weight": weight(128 * (i + 1), 256, seed=i)
        for i in (0, 1)
        for part in ("up", "down")
    }
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors})
    quantize(source, tmp_path / "two", True, **RECIPES[name])
    assert passes == ["amaxes", "cast"]
    passes.clear()
    _, seen = quantize(source, tmp_path / "one", False, **RECIPES[name])
    assert passes[0] == "convert"
    assert "cast" not in passes
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    if "statistics" in name:
        measured = [(tmp_path / folder / STATS).read_bytes() for folder in ("one", "two")]
        assert measured[0] == measured[1]
        assert measured[0].count(b"_proj.weight") == 4
    assert seen[-1].done == seen[-1].total
    assert all(a.done <= b.done for a, b in pairwise(seen))


@pytest.mark.parametrize("name", FINE)
def test_scales_of_a_slice_are_written_with_its_codes(tmp_path: Path, passes: list[str], name: str) -> None:
    """Where scales are too many to hold, digests take no second pass: two passes are forced by a value to keep."""
    tensors = {
        f"model.layers.{i}.mlp.{part}_proj.weight": weight(96 * (i + 1), 4096, seed=i)
        for i in (0, 1)
        for part in ("up", "gate", "down")
    }
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors})
    found = []
    for digests in (True, False):
        folder = tmp_path / f"one-{digests}"
        _, seen = quantize(source, folder, digests, **FINE[name])
        assert passes == ["convert", "amaxes"]  # the amaxes of no other shard's tensors
        passes.clear()
        assert seen[-1].done == seen[-1].total
        found.append(read_tensors(folder / "model.safetensors"))
    suffix = "_scale" if name == "mx" else "_scale_inv"
    tensors["model.layers.1.self_attn.o_proj.weight"] = torch.full((1, 32), torch.nan).bfloat16()
    write_checkpoint(tmp_path / "bad", {"model.safetensors": tensors})
    quantize(tmp_path / "bad", tmp_path / "two", True, nonfinite="keep", **FINE[name])
    assert passes[-2:] == ["amaxes", "cast"]
    found.append(read_tensors(tmp_path / "two" / "model.safetensors"))
    for tensor in list(tensors)[:-1]:
        codes, scale = reference.quantize(tensors[tensor], "block", (1, 32), rounding="mx")
        for result in found:
            assert torch.equal(result[tensor].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(result[tensor + suffix], (scale.log2() + 127).to(torch.uint8))
    if "statistics" in name:
        one = json.loads((tmp_path / "one-True" / STATS).read_text())["tensors"]
        two = json.loads((tmp_path / "two" / STATS).read_text())["tensors"]
        assert one == two
        assert len(one) == 6


def test_amaxes_of_many_scales_are_not_held(tmp_path: Path) -> None:
    """One number for a tensor of 12,288 scales tells that it is finite."""
    tensors = {"model.layers.0.mlp.up_proj.weight": weight(96, 4096)}
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors})
    plan = make_plan(read_folder(source), Recipe(granularity="mx"), 64 << 20, 1)
    with Reader(FolderOpener(source)) as reader:
        (found,) = CpuEngine().amaxes(plan.shard_tasks[0], reader).values()
    assert torch.equal(found, reference.amax_bits(tensors["model.layers.0.mlp.up_proj.weight"]))


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_value_that_is_not_finite_ends_the_pass(tmp_path: Path, passes: list[str], bad: float) -> None:
    """The shard is made again in the layout that two passes decide; by default it is refused."""
    tensors = model()
    name = "model.layers.1.mlp.down_proj.weight"
    shard = next(shard for shard in tensors.values() if name in shard)
    shard[name] = shard[name].clone()
    shard[name].view(-1)[-1] = bad
    source = write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(NonFiniteError) as caught:
        quantize(source, tmp_path / "refused", False)
    assert caught.value.tensor == name
    assert not (tmp_path / "refused").exists()
    passes.clear()
    one, _ = quantize(source, tmp_path / "one", False, nonfinite="keep")
    assert "convert" in passes
    assert "cast" in passes
    two, _ = quantize(source, tmp_path / "two", True, nonfinite="keep")
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert one.nonfinite == two.nonfinite


def test_one_scale_for_a_tensor_takes_two_passes(tmp_path: Path, passes: list[str]) -> None:
    source = write_checkpoint(tmp_path / "source", model(torch.float16))
    quantize(source, tmp_path / "out", False, format="fp8", granularity="tensor")
    assert "convert" not in passes
