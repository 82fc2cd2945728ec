"""Plans: every decision of a conversion, within the budget or refused with names and numbers."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, plan_repo
from nemotron_fp8._utils import parse_bytes
from nemotron_fp8.checkpoint.dtypes import RANK, nbytes
from nemotron_fp8.checkpoint.inventory import Inventory, Shard
from nemotron_fp8.checkpoint.tensor_view import contiguous
from nemotron_fp8.errors import AlreadyQuantizedError, BudgetError, NothingSelectedError, RecipeError
from nemotron_fp8.planning.plan import SCRATCH_BYTES, Plan
from nemotron_fp8.planning.quantize import make_plan
from tests.support.checkpoints import model, write_checkpoint
from tests.support.strategies import MODULES, OTHER_NAMES

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    """Shapes from nothing to hundreds of GB: a plan never sees a byte of them."""
    sides = st.one_of(st.integers(0, 300), st.sampled_from([4096, 18432, 73728, 256_000]))
    names = [f"model.layers.{i}.{module}.weight" for i in range(3) for module in MODULES]
    floats = st.sampled_from(["BF16", "F16", "F32"])
    found = {name: (draw(floats), (draw(sides), draw(sides))) for name in draw(st.sets(st.sampled_from(names)))}
    for name in draw(st.sets(st.sampled_from(OTHER_NAMES))):
        found[name] = (draw(st.sampled_from(["U8", "BF16", "I64", "BOOL"])), (draw(sides), 4))
    found["o_proj.weight"] = (draw(floats), (draw(sides), draw(sides)))
    # Every pattern of `recipes` matches a tensor, since one that matches none is an error.
    found |= dict.fromkeys(("q_proj.bias", "model.layers.1.norm.bias"), ("BF16", (draw(sides),)))
    count = draw(st.integers(1, 3))
    shards: list[list[str]] = [[] for _ in range(count)]
    for name in draw(st.permutations(sorted(found))):
        draw(st.sampled_from(shards)).append(name)
    return Inventory(
        "fake",
        tuple(
            Shard(
                f"s{i}.safetensors",
                1000,
                draw(st.sampled_from([None, (("format", "pt"),)])),
                tuple(contiguous(f"s{i}", name, *found[name], 0) for name in names_of),
            )
            for i, names_of in enumerate(shards)
        ),
        {},
        {"model_type": "nemotron"},
        (),
        (),
    )


budgets = st.one_of(st.integers(1, 4 * MIB), st.integers(MIB, 2**36))
recipes = st.builds(
    Recipe,
    nonfinite=st.sampled_from(["error", "keep"]),
    ignore=st.sampled_from([(), ("q_proj",), ("layers.1",)]),
    format=st.just("fp8"),
    granularity=st.just("tensor"),
    share_scales=st.booleans(),
) | st.builds(
    Recipe,
    format=st.just("compressed-tensors"),
    granularity=st.just("channel"),
    nonfinite=st.sampled_from(["error", "keep"]),
)


@given(inventories(), recipes, budgets, st.integers(1, 200))
@settings(max_examples=150)
def test_peak_within_the_budget_or_refused(inventory: Inventory, recipe: Recipe, budget: int, threads: int) -> None:
    """The buffers fit the budget, or an error names a tensor and the bytes short: exactly those suffice."""
    try:
        plan = make_plan(inventory, recipe, budget, threads)
    except BudgetError as error:
        views = {view.name: view for view in inventory.views}
        assert error.tensor in views
        assert error.budget == budget < error.needed
        if recipe.granularity == "tensor":  # 65,536 elements and their codes are enough for any
            assert error.needed <= SCRATCH_BYTES + nbytes("F32", (1 << 16,)) + (1 << 16)
        assert error.tensor.isascii() is False or error.tensor in str(error)
        assert f"{error.needed - budget:,} more" in str(error)
        plan = make_plan(inventory, recipe, error.needed, threads)
        assert plan.buffer_bytes <= error.needed
        with pytest.raises(BudgetError):
            make_plan(inventory, recipe, error.needed - 1, threads)
        return
    assert 0 < plan.buffer_bytes <= budget
    slicing = plan.shard_tasks[0].slicing
    assert 1 <= slicing.workers <= threads
    costs = [slicing.cost(tensor_task) for shard_task in plan.shard_tasks for tensor_task in shard_task.tensor_tasks]
    assert slicing.workers * (SCRATCH_BYTES + max(costs)) == plan.buffer_bytes


@given(inventories(), recipes, budgets, st.integers(1, 64))
@settings(max_examples=75)
def test_slices_tile_each_tensor(inventory: Inventory, recipe: Recipe, budget: int, threads: int) -> None:
    """The slices of a tensor are its bytes in order, none twice, whole rows under a scale where it is quantized."""
    try:
        plan = make_plan(inventory, recipe, max(budget, 2 * MIB), threads)
    except BudgetError:
        assume(False)
    for shard_task in plan.shard_tasks:
        for tensor_task in shard_task.tensor_tasks:
            view = tensor_task.view
            size = shard_task.slicing.slice_bytes(tensor_task)
            if view.nbytes // size > 10_000:  # the law is the same, only longer
                continue
            slices = list(shard_task.slicing.slices(tensor_task))
            assert sum(end - begin for begin, end in slices) == view.nbytes
            assert all(a[1] == b[0] for a, b in pairwise(slices))
            assert all(0 < end - begin <= size for begin, end in slices)
            assert not slices or (slices[0][0], slices[-1][1]) == (0, view.nbytes)
            if tensor_task.group is not None:
                assert all(begin % tensor_task.row_quantum(shard_task.numbers) == 0 for begin, _ in slices)
            assert shard_task.slicing.cost(tensor_task) <= shard_task.slicing.share


@given(inventories(), recipes)
@settings(max_examples=75)
def test_layouts_tile_the_files(inventory: Inventory, recipe: Recipe) -> None:
    """Every output byte belongs to one tensor; with any bundle kept, still; order is the format's."""
    plan = make_plan(inventory, recipe, 2**40, 2)
    assert [shard_task.name for shard_task in plan.shard_tasks] == [shard.name for shard in inventory.shards]
    fused_modules = sorted({group.fused_module for shard_task in plan.shard_tasks for group in shard_task.groups})
    for shard_task, shard in zip(plan.shard_tasks, inventory.shards, strict=True):
        assert {tensor_task.view.name for tensor_task in shard_task.tensor_tasks} == {view.name for view in shard.views}
        for kept in (frozenset[str](), frozenset(fused_modules[:1]), frozenset(fused_modules)):
            chosen = plan.quantized(kept)
            layout = shard_task.header_without(kept)
            end = 0
            for entry in layout.entries:
                assert entry.start == end
                end = entry.end
                assert entry.end - entry.start == nbytes(entry.dtype, entry.shape)
            assert layout.file_size == layout.data_start + end
            assert layout.data_start % 8 == 0
            order = [(RANK[entry.dtype], entry.name.encode()) for entry in layout.entries]
            assert order == sorted(order)
            wanted = {view.name: ("F8_E4M3" if view.name in chosen else view.dtype, view.shape) for view in shard.views}
            for view in shard.views:
                if view.name in chosen:
                    shape = () if recipe.granularity == "tensor" else (view.shape[0], 1)
                    wanted[f"{view.name}_scale"] = ("F32", shape)
            assert {entry.name: (entry.dtype, entry.shape) for entry in layout.entries} == wanted
            assert layout.metadata == shard.metadata


@given(inventories(), recipes, st.integers(1, 9), st.integers(4 * MIB, 2**32))
@settings(max_examples=50)
def test_a_plan_is_a_value(inventory: Inventory, recipe: Recipe, threads: int, budget: int) -> None:
    """Made twice it is equal, also after pickling; threads and budget decide the slices and nothing else."""
    plan = make_plan(inventory, recipe, 2**32, 4)
    assert pickle.loads(pickle.dumps(plan)) == plan == make_plan(inventory, recipe, 2**32, 4)

    def essence(plan: Plan) -> Plan:
        slicing = plan.shard_tasks[0].slicing
        shard_tasks = tuple(dataclasses.replace(shard_task, slicing=slicing) for shard_task in plan.shard_tasks)
        return dataclasses.replace(plan, shard_tasks=shard_tasks, buffer_bytes=0)

    other = make_plan(inventory, recipe, budget, threads)
    slicing = plan.shard_tasks[0].slicing
    shard_tasks = tuple(dataclasses.replace(shard_task, slicing=slicing) for shard_task in other.shard_tasks)
    assert dataclasses.replace(other, shard_tasks=shard_tasks, buffer_bytes=0) == essence(plan)


def test_a_plan_does_not_depend_on_the_hash_seed(checkpoint: Path) -> None:
    """Processes with other hash seeds (workers, another day) make the same plan, bundles across shards too."""
    code = (
        "import sys, pathlib;"
        "from nemotron_fp8.planning.quantize import make_plan;"
        "from nemotron_fp8.planning.recipe import Recipe;"
        "from nemotron_fp8.sources.folder import read_folder;"
        "inventory = read_folder(pathlib.Path(sys.argv[1]));"
        "print(make_plan(inventory, Recipe(nonfinite='keep'), 1 << 28, 2))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(checkpoint)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for seed in "12"
    }
    assert len(found) == 1


def test_groups_reach_across_shards_only_where_their_fate_does(checkpoint: Path) -> None:
    """With ``keep``, a shard's bytes depend on the whole bundle, so its unit holds the members elsewhere."""
    first = "model-00001-of-00002.safetensors"
    error = {shard_task.name: {g.id for g in shard_task.groups} for shard_task in plan_repo(checkpoint).shard_tasks}
    keep = {
        shard_task.name: {g.id for g in shard_task.groups}
        for shard_task in plan_repo(checkpoint, Recipe(nonfinite="keep")).shard_tasks
    }
    assert keep[first] - error[first] == {
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    }


def test_figures_add_up(checkpoint: Path) -> None:
    """Bytes in and out are those of the tensors; FP8 takes a byte an element and four for the scale."""
    plan = plan_repo(checkpoint, Recipe(format="fp8", granularity="tensor"))
    tensors = {name: t for held in model().values() for name, t in held.items()}
    assert {t.name for t in plan.tensors} == tensors.keys()
    for t in plan.tensors:
        assert t.bytes_in == tensors[t.name].nbytes
        assert t.bytes_out == (prod(t.shape) + 4 if t.quantize else t.bytes_in)
    assert plan.bytes_in == sum(t.nbytes for t in tensors.values())
    assert plan.bytes_out == sum(t.bytes_out for t in plan.tensors)


def test_nothing_selected(checkpoint: Path) -> None:
    with pytest.raises(RecipeError, match="--select 'no such' matches no tensor"):
        plan_repo(checkpoint, Recipe(select=("no such",)))
    with pytest.raises(NothingSelectedError, match="check the --select patterns") as caught:
        plan_repo(checkpoint, Recipe(select=("norm",)))
    assert caught.value.tensors == len(plan_repo(checkpoint).tensors)
    with pytest.raises(NothingSelectedError, match=r"matches --ignore \."):
        plan_repo(checkpoint, Recipe(ignore=(".",)))


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
        ({"quantization_config": []}, "quantization_config"),
    ],
)
def test_a_quantized_config_is_refused(tmp_path: Path, change: dict[str, object], evidence: str) -> None:
    source = write_checkpoint(tmp_path / "s", model(), config={"model_type": "x", **change})
    with pytest.raises(AlreadyQuantizedError, match=evidence):
        plan_repo(source)


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_a_scale_without_a_weight_is_refused(tmp_path: Path, suffix: str) -> None:
    """Copied to the result, it would be a scale of no FP8 tensor."""
    tensors = model()
    next(iter(tensors.values()))[f"lost.weight{suffix}"] = torch.ones(1)
    source = write_checkpoint(tmp_path / "s", tensors, config={"model_type": "x"})
    with pytest.raises(AlreadyQuantizedError, match=rf"lost\.weight{suffix} is a scale.*remove what states"):
        plan_repo(source)


@pytest.mark.parametrize(
    ("text", "count"),
    [("256MiB", 256 * MIB), ("1.5GB", 1_500_000_000), (" 1 gib ", 1 << 30), ("7", 7), (7, 7), ("2kB", 2000)],
)
def test_bytes_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "0", 0, -1, "-1", "1 MiB or so", "1e3", "MiB", "1.5.2GB", True, "nan", "٣"])
def test_no_amount_of_memory(text: str | int) -> None:
    with pytest.raises(RecipeError):
        parse_bytes(text)
