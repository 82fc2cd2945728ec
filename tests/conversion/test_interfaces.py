"""The three seams, each with a second implementation: readings, scales and publishing go through these alone."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.checkpoint.inventory import Inventory, Shard
from nemotron_fp8.checkpoint.tensor_view import TensorView, contiguous
from nemotron_fp8.destinations.base import Staging
from nemotron_fp8.destinations.file_sink import FileSink
from nemotron_fp8.errors import NonFiniteError, SourceReadError
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.planning.receipt import ShardReceipt
from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask, Slicing, TensorTask, layout_of
from nemotron_fp8.sources.folder import read_folder
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import (
    NAMES,
    ONE,
    Tensors,
    contents,
    model,
    quantized,
    raw,
    saved,
    weight,
    write_checkpoint,
)
from tests.support.fakes import MemoryDestination, MemoryOpener
from tests.support.recipes import PUBLISHED
from tests.support.run import carry, engine, make_shard
from tests.support.strategies import pieces, weights

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.destinations.base import Sink
    from nemotron_fp8.sources.files import Opener
    from nemotron_fp8_kernels.formats import Granularity

KEEP = PUBLISHED.model_copy(update={"nonfinite": "keep"})
FAST = Slicing(3, 700)
"""Slices so small that every tensor of a test has several."""

# ---- 1. views: a source that is no folder ----


@st.composite
def scattered(draw: st.DrawFn) -> tuple[Tensors, dict[str, TensorView], dict[str, bytes]]:
    """Tensors whose bytes lie in strided pieces of several files, and views that say where."""
    tensors: Tensors = {}
    for i in range(draw(st.integers(1, 3))):
        tensors[f"model.layers.{i}.self_attn.o_proj.weight"] = draw(weights())
    tensors["model.norm.weight"] = weight(draw(st.integers(0, 40)))
    views: dict[str, TensorView] = {}
    files: dict[str, bytes] = {}
    for name, tensor in tensors.items():
        case = draw(pieces((NAMES[tensor.dtype],), tuple(tensor.shape), raw(tensor), name))
        views[name] = case.view
        files |= case.files
    return tensors, views, files


@pytest.mark.parametrize("recipe", [Recipe(), PUBLISHED], ids=["default", "published"])
@given(scattered(), st.booleans(), st.tuples(st.integers(1, 4), st.integers(1, 3000)))
@settings(max_examples=60, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
def test_a_source_of_strided_pieces_gives_the_same_shard(
    tmp_path_factory: pytest.TempPathFactory,
    recipe: Recipe,
    case: tuple[Tensors, dict[str, TensorView], dict[str, bytes]],
    mapped: bool,
    slices: tuple[int, int],
) -> None:
    """Where a tensor's bytes lie shows in no byte of the result: not the file, stride, band or column."""
    tensors, views, files = case
    shard = Shard(ONE, 0, (("format", "pt"),), tuple(views.values()))
    inventory = Inventory("memory", (shard,), None, None, (), ())
    plan = make_plan(inventory, recipe, 1 << 30, 1)
    slicing = Slicing(*slices, recipe.weight_format.numbers)
    plan = replace(plan, shard_tasks=tuple(replace(shard_task, slicing=slicing) for shard_task in plan.shard_tasks))
    opener, destination = MemoryOpener(files, mapped), MemoryDestination()
    carry(plan, opener, destination)
    wanted = quantized(tensors, {name for name in tensors if "proj" in name}, recipe.granularity)
    folder = tmp_path_factory.mktemp("wanted")
    assert destination.staged == {ONE: saved(wanted, {"format": "pt"}, folder)}
    assert destination.published is not None
    for file in opener.opened:
        assert file.closed
        assert file.windows == file.released


def test_row_slices_of_a_stacked_array() -> None:
    """q, k and v interleaved by query group in one stacked array, as NeMo keeps them, come out one by one."""
    layers, groups, heads, width, hidden = 3, 2, 3, 4, 8  # 3 query heads a group, then one of k and one of v
    stacked = weight(layers, groups, heads + 2, width, hidden)
    bands = {"q": slice(0, heads), "k": slice(heads, heads + 1), "v": slice(heads + 1, heads + 2)}
    row = hidden * 2
    tensors: Tensors = {}
    views: list[TensorView] = []
    for layer in range(layers):
        for letter, band in bands.items():
            name = f"model.layers.{layer}.self_attn.{letter}_proj.weight"
            tensors[name] = stacked[layer, :, band].reshape(-1, hidden).contiguous()
            extents = []
            for group in range(groups):
                first = ((layer * groups + group) * (heads + 2) + band.start) * width
                rows = (band.stop - band.start) * width
                whole = contiguous("qkv", name, "BF16", (rows, hidden), first * row)
                extents += [extent._replace(row=group * rows) for extent in whole.extents]
            views.append(TensorView(name, "BF16", tuple(tensors[name].shape), tuple(extents)))
    inventory = Inventory("memory", (Shard(ONE, 0, None, tuple(views)),), None, None, (), ())
    destination = MemoryDestination()
    carry(make_plan(inventory, Recipe(), 1 << 30, 2), MemoryOpener({"qkv": raw(stacked)}), destination)
    assert destination.staged == {ONE: write_bytes(tensors)}


def write_bytes(tensors: Tensors, names: frozenset[str] | None = None, granularity: Granularity = "channel") -> bytes:
    """Serialize the reference's result with the safetensors library."""
    import safetensors.torch

    return safetensors.torch.save(quantized(tensors, frozenset(tensors) if names is None else names, granularity))


@pytest.mark.parametrize("mapped", [True, False])
def test_a_source_that_ends_early_discards_the_shard(mapped: bool) -> None:
    view = contiguous("f", "a.o_proj.weight", "BF16", (8, 8), 0)
    inventory = Inventory("memory", (Shard(ONE, 0, None, (view,)),), None, None, (), ())
    plan = make_plan(inventory, Recipe(), 1 << 30, 1)
    opener, destination = MemoryOpener({"f": bytes(100)}, mapped), MemoryDestination()
    with pytest.raises(SourceReadError):
        carry(plan, opener, destination)
    assert destination.published is None
    assert not destination.staged
    assert all(file.closed for file in opener.opened)


# ---- 2. scale groups: several members, across shards ----


def shared_units(tensors: dict[str, Tensors], recipe: Recipe) -> tuple[tuple[ShardTask, ...], dict[str, bytes]]:
    """Two shards whose projections are all of one scale group, built by hand; and the files they lie in."""
    views = {
        shard: [contiguous(f"{shard}.{name}", name, NAMES[t.dtype], tuple(t.shape), 0) for name, t in held.items()]
        for shard, held in tensors.items()
    }
    files = {f"{shard}.{name}": raw(t) for shard, held in tensors.items() for name, t in held.items()}
    members = tuple(view for held in views.values() for view in held if "proj" in view.name)
    group = ScaleGroup("qkv", members, "qkv_proj")
    shard_tasks, weights = [], recipe.weight_format
    for shard, held in views.items():
        tensor_tasks = tuple(TensorTask(view, "qkv" if view in members else None) for view in held)
        shard_tasks.append(
            ShardTask(
                shard, None, tensor_tasks, (group,), layout_of(tensor_tasks, None, weights), recipe, FAST, weights
            )
        )
    return tuple(shard_tasks), files


def shared_model() -> dict[str, Tensors]:
    return {
        "a": {"q_proj.weight": weight(16, 30, seed=1), "norm.weight": weight(30)},
        "b": {"k_proj.weight": weight(8, 30, seed=2) * 3, "v_proj.weight": weight(9, 31, seed=3).float() / 7},
    }


def wanted_shared(tensors: dict[str, Tensors]) -> dict[str, bytes]:
    """The shards when all projections share the largest amax, by the kernel reference."""
    import safetensors.torch

    every = [t for held in tensors.values() for name, t in held.items() if "proj" in name]
    amax = torch.stack([reference.amax_bits(t) for t in every]).max()
    result = {}
    for shard, held in tensors.items():
        out: Tensors = {}
        for name, t in held.items():
            if "proj" in name:
                out[name], out[f"{name}_scale"] = reference.quantize_with_amax(t, amax)
            else:
                out[name] = t
        result[shard] = safetensors.torch.save({n: t.clone() for n, t in out.items()})
    return result


def test_members_of_a_group_share_one_amax_across_shards() -> None:
    """Each shard alone, from its unit alone, is cast with the largest amax of all members anywhere."""
    tensors = shared_model()
    shard_tasks, files = shared_units(tensors, PUBLISHED)
    destination = MemoryDestination()
    for shard_task in reversed(shard_tasks):  # in any order
        make_shard(shard_task, MemoryOpener(files), destination, engine())
    wanted = wanted_shared(tensors)
    assert destination.staged == wanted
    alone = write_bytes(tensors["a"], frozenset({"q_proj.weight"}), "tensor")
    assert wanted["a"] != alone, "or a shared scale would not show"


@given(st.permutations(range(6)), st.integers(1, 4))
@settings(max_examples=20)
def test_the_amax_does_not_depend_on_order(order: list[int], workers: int) -> None:
    """Members in any order, slices on any number of threads: the same integer maximum."""
    tensors = {f"t{i}_proj.weight": weight(5, 40, seed=i) * (i + 1) for i in range(6)}
    views = [contiguous(n, n, "BF16", (5, 40), 0) for n in tensors]
    group = ScaleGroup("g", tuple(views[i] for i in order), "g")
    tensor_tasks = tuple(TensorTask(view, "g") for view in views)
    weights = PUBLISHED.weight_format
    layout = layout_of(tensor_tasks, None, weights)
    shard_task = ShardTask(ONE, None, tensor_tasks, (group,), layout, PUBLISHED, Slicing(workers, 200), weights)
    destination = MemoryDestination()
    opener = MemoryOpener({n: raw(t) for n, t in tensors.items()})
    make_shard(shard_task, opener, destination, engine())
    assert destination.staged == {ONE: wanted_shared({ONE: tensors})[ONE]}


@pytest.mark.parametrize("where", ["q_proj.weight", "v_proj.weight"])
def test_nan_in_a_member_elsewhere_decides_a_shard(where: str) -> None:
    """With ``keep`` both shards keep every member, whichever holds the NaN; else both are refused."""
    tensors = shared_model()
    next(held[where] for held in tensors.values() if where in held).view(-1)[77] = float("nan")
    shard_tasks, files = shared_units(tensors, KEEP)
    destination = MemoryDestination()
    for shard_task in shard_tasks:
        receipt = make_shard(shard_task, MemoryOpener(files), destination, engine())
        assert receipt.unquantized == {"qkv_proj"}
        assert [(f.tensor, f.count) for f in receipt.nonfinite] == [(where, 1)]
    assert destination.staged == {name: write_bytes(held, frozenset()) for name, held in tensors.items()}
    for shard_task in shared_units(tensors, PUBLISHED)[0]:
        nothing = MemoryDestination()
        with pytest.raises(NonFiniteError) as caught:
            make_shard(shard_task, MemoryOpener(files), nothing, engine())
        assert caught.value.tensor == where
        assert not nothing.staged


def test_an_empty_group_has_amax_16() -> None:
    """A group without elements has amax 16; an empty member beside others adds nothing."""
    for other in ([], [weight(3, 8)]):
        tensors: Tensors = {"e_proj.weight": torch.empty(0, 8, dtype=torch.bfloat16)}
        tensors |= {f"o{i}_proj.weight": t for i, t in enumerate(other)}
        shard_tasks, files = shared_units({"a": tensors}, PUBLISHED)
        destination = MemoryDestination()
        make_shard(shard_tasks[0], MemoryOpener(files), destination, engine())
        amax = reference.amax(other[0]) if other else torch.tensor(16.0)
        _, scale = reference.scale_from_amax(amax)
        import safetensors.torch

        found = safetensors.torch.load(destination.staged["a"])
        assert torch.equal(found["e_proj.weight_scale"], scale)


# ---- 3. units and destinations ----


def test_a_destination_in_memory_is_what_a_folder_is(checkpoint: Path, tmp_path: Path) -> None:
    """Shards, index, config and copied files: all that a folder gets, a destination gets, at once."""
    quantize_repo(checkpoint, tmp_path / "d")
    from nemotron_fp8.sources.files import FolderOpener

    destination = MemoryDestination()
    plan = make_plan(read_folder(checkpoint), Recipe(), 1 << 28, 2)
    carry(plan, FolderOpener(checkpoint), destination)
    assert destination.published == contents(tmp_path / "d")


def test_nothing_is_published_when_the_last_unit_fails(tmp_path: Path) -> None:
    shards = model()
    shards["model-00002-of-00002.safetensors"]["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    source = write_checkpoint(tmp_path / "s", shards)
    from nemotron_fp8.sources.files import FolderOpener

    destination = MemoryDestination()
    with pytest.raises(NonFiniteError):
        carry(make_plan(read_folder(source), Recipe(), 1 << 28, 1), FolderOpener(source), destination)
    assert list(destination.staged) == ["model-00001-of-00002.safetensors"]
    assert destination.published is None


class StagingFolder(Staging):
    """A place that shards are only staged in: what a worker elsewhere would have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stage(self, name: str, size: int) -> Sink:
        return FileSink(self.folder, name, size, digests=True)


def work_elsewhere(job: bytes) -> bytes:
    """In another process: a unit, an opener and a staging, and nothing else, make a shard."""
    shard_task, opener, staging = pickle.loads(job)
    return pickle.dumps(make_shard(shard_task, opener, staging, engine()))


def run_elsewhere(shard_tasks: tuple[ShardTask, ...], opener: Opener, folder: Path) -> list[ShardReceipt]:
    folder.mkdir()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        jobs = [pickle.dumps((shard_task, opener, StagingFolder(folder))) for shard_task in shard_tasks]
        return [pickle.loads(receipt) for receipt in pool.map(work_elsewhere, jobs)]


def test_units_are_made_by_another_process(checkpoint: Path, tmp_path: Path) -> None:
    """Pickled units, run in a new process, give the shards and receipts that this one gives.

    Those of a folder, and those whose scale group reaches across shards of a source in memory; with receipts of
    what is kept.
    """
    from nemotron_fp8.sources.files import FolderOpener

    quantize_repo(checkpoint, tmp_path / "here", Recipe(nonfinite="keep"))
    plan = make_plan(read_folder(checkpoint), Recipe(nonfinite="keep"), 1 << 28, 2)
    tensors = shared_model()
    tensors["b"]["v_proj.weight"][0, 0] = float("inf")
    shared, files = shared_units(tensors, KEEP)
    receipts = run_elsewhere(plan.shard_tasks, FolderOpener(checkpoint), tmp_path / "there")
    for shard_task, receipt in zip(plan.shard_tasks, receipts, strict=True):
        data = (tmp_path / "here" / shard_task.name).read_bytes()
        assert (tmp_path / "there" / shard_task.name).read_bytes() == data
        assert replace(receipt, shared=()) == ShardReceipt(shard_task.name, len(data), hashlib.sha256(data).hexdigest())

    here = MemoryDestination()
    wanted = [make_shard(shard_task, MemoryOpener(files), here, engine()) for shard_task in shared]
    assert run_elsewhere(shared, MemoryOpener(files), tmp_path / "shared") == wanted
    assert wanted[0].unquantized == {"qkv_proj"}
    assert contents(tmp_path / "shared") == here.staged
