"""The whole pipeline: any checkpoint, any budget, the bytes that the specification gives."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Progress, Recipe, plan_repo, quantize_repo, verify_repo
from nemotron_fp8._utils import peak_resident_bytes
from nemotron_fp8.planning.tasks import Slicing
from nemotron_fp8.sources.files import FolderOpener
from tests.support.checkpoints import (
    CONFIG,
    INDEX,
    ONE,
    Shards,
    checkpoint_files,
    contents,
    model,
    projections,
    quantized,
    read_tensors,
    same_bits,
    saved,
    weight,
    write_checkpoint,
)
from tests.support.fakes import MemoryDestination
from tests.support.recipes import PUBLISHED, listed, spelled
from tests.support.run import carry
from tests.support.strategies import Checkpoint, checkpoints

if TYPE_CHECKING:
    from pathlib import Path

NAN, INF = float("nan"), float("inf")
RECIPES = [Recipe(), PUBLISHED]
"""The default, and the layout of the published checkpoint."""
EACH_RECIPE = pytest.mark.parametrize("recipe", RECIPES, ids=["default", "published"])


def wanted_shards(shards: Shards, keep: frozenset[str] = frozenset(), recipe: Recipe = PUBLISHED) -> Shards:
    return {name: quantized(held, projections(held) - keep, recipe.granularity) for name, held in shards.items()}


# ---- any checkpoint ----


@EACH_RECIPE
@given(checkpoints(), st.sampled_from(["3MiB", "1GiB"]), st.tuples(st.integers(1, 4), st.integers(1, 5000)))
@settings(max_examples=40)
def test_any_checkpoint_gives_the_bytes_of_the_reference(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, case: Checkpoint, memory: str, slices: tuple[int, int]
) -> None:
    """Each shard is what ``save_file`` writes for the tensors of the kernel reference.

    Whatever the dtypes, values, alignment, budget and threads, and however small the slices.
    """
    folder = tmp_path_factory.mktemp("case")
    source = write_checkpoint(folder / "s", case.shards, metadata=case.metadata, lead=case.lead)
    shards = wanted_shards(case.shards, recipe=recipe)
    wanted = {name: saved(t, case.metadata[name], folder) for name, t in shards.items()}
    plan = plan_repo(source, recipe, max_memory=memory, threads=slices[0])
    slicing = Slicing(*slices, recipe.weight_format.numbers)
    tiny = tuple(dataclasses.replace(shard_task, slicing=slicing) for shard_task in plan.shard_tasks)
    results = []
    for made in (plan, dataclasses.replace(plan, shard_tasks=tiny)):
        destination = MemoryDestination()
        carry(made, FolderOpener(source), destination)
        assert destination.staged == wanted
        results.append(destination.published)
    assert results[0] == results[1]


@EACH_RECIPE
@given(checkpoints(), st.booleans(), st.integers(1, 4))
@settings(max_examples=12)
def test_any_checkpoint_from_folder_to_folder(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, case: Checkpoint, digests: bool, threads: int
) -> None:
    """The same through folders; the report's figures are those of the files; verify agrees."""
    folder = tmp_path_factory.mktemp("case")
    source = write_checkpoint(folder / "s", case.shards, metadata=case.metadata, lead=case.lead)
    report = quantize_repo(source, folder / "d", recipe, threads=threads, digests=digests)
    found = contents(folder / "d")
    for name, tensors in wanted_shards(case.shards, recipe=recipe).items():
        assert found[name] == saved(tensors, case.metadata[name], folder)
    assert report.tensors_quantized == sum(len(projections(held)) for held in case.shards.values())
    assert report.tensors_kept == sum(map(len, case.shards.values())) - report.tensors_quantized
    assert report.bytes_written == sum(map(len, found.values()))
    assert report.bytes_read == sum((source / name).stat().st_size for name in case.shards)
    assert not digests or plan_repo(source, recipe).disk_bytes == report.bytes_written
    assert verify_repo(source, folder / "d", threads=2).ok


@EACH_RECIPE
def test_a_tensor_of_many_slices(tmp_path: Path, recipe: Recipe) -> None:
    """Slices of the smallest budget that there is: 65,536 elements, across rows, on several threads."""
    tensors = {
        "a.o_proj.weight": weight(700, 611, dtype=torch.float32, seed=1),
        "b.o_proj.weight": weight(611, 700, dtype=torch.bfloat16, seed=2),
        "c.weight": weight(3_000_000, dtype=torch.bfloat16, seed=3),
    }
    source = write_checkpoint(tmp_path / "s", {ONE: tensors}, lead=3)
    wanted = saved(wanted_shards({ONE: tensors}, recipe=recipe)[ONE], None, tmp_path)
    for i, (memory, threads) in enumerate([("1.4MB", 1), ("3MB", 2), ("100MB", 4)]):
        plan = plan_repo(source, recipe, max_memory=memory, threads=threads)
        assert plan.shard_tasks[0].slicing.workers == (1, 2, 4)[i]
        quantize_repo(source, tmp_path / f"d{i}", recipe, max_memory=memory, threads=threads)
        assert (tmp_path / f"d{i}" / ONE).read_bytes() == wanted


# ---- what stands beside the shards ----


NUMBERS = {"num_bits": 8, "type": "float", "symmetric": True}
CONFIGS: list[dict[str, Any]] = [
    {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["re:.*lm_head$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "float-quantized",
                "weights": NUMBERS | {"strategy": "channel", "dynamic": False},
                "input_activations": NUMBERS | {"strategy": "token", "dynamic": True},
            }
        },
    },
    {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
]


@pytest.mark.parametrize(
    ("recipe", "described"), [(None, CONFIGS[0]), (PUBLISHED, CONFIGS[1])], ids=["default", "published"]
)
def test_index_config_and_side_files(
    checkpoint: Path, destination: Path, recipe: Recipe | None, described: dict[str, Any]
) -> None:
    """Scales in the index, its other metadata kept; config in order with every kept linear module named."""
    report = quantize_repo(checkpoint, destination, recipe)
    index = json.loads((destination / INDEX).read_text())
    shards = {path.name: read_tensors(path) for path in destination.glob("*.safetensors")}
    assert index["weight_map"] == {tensor: name for name, held in shards.items() for tensor in held}
    total = sum(t.nbytes for held in shards.values() for t in held.values())
    assert index["metadata"] == {"total_parameters": 12, "total_size": total}
    assert sum(name.endswith("_scale") for name in index["weight_map"]) == report.tensors_quantized == 14

    config = json.loads((destination / "config.json").read_text(encoding="utf-8"))
    assert list(config) == [*CONFIG, "quantization_config"]
    quantization = config.pop("quantization_config")
    assert config == CONFIG
    assert list(config["zeta"]) == ["b", "a"]
    assert quantization == described
    assert list(quantization) == list(described)
    assert (destination / "tokenizer.json").read_bytes() == b"{}"
    assert (destination / "LICENSE").read_bytes() == b"free"
    assert checkpoint_files(destination).keys() == contents(checkpoint).keys()


def test_nothing_in_the_result_tells_when_where_or_how(tmp_path: Path) -> None:
    """Another place, name, budget, thread count and time give the same bytes."""
    results = []
    for i, (memory, threads) in enumerate([("2MiB", 1), ("1GiB", 3)]):
        source = write_checkpoint(tmp_path / f"{i}" / f"model{i}", model())
        for path in source.iterdir():
            os.utime(path, (i, i))
        quantize_repo(source, tmp_path / f"{i}" / f"out{i}", max_memory=memory, threads=threads)
        results.append(contents(tmp_path / f"{i}" / f"out{i}"))
    assert results[0] == results[1]
    assert not any(str(tmp_path).encode() in data for data in results[0].values())


def test_several_metadata_keys_survive_sorted(tmp_path: Path) -> None:
    metadata = {"z": "1", "format": "pt", "é": "\U0001f600"}
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": weight(4, 4)}}, metadata={ONE: metadata})
    quantize_repo(source, tmp_path / "d")
    data = (tmp_path / "d" / ONE).read_bytes()
    found = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert found == metadata
    assert list(found) == sorted(metadata)


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("name", [ONE, "weights.safetensors"])
def test_one_file_models(tmp_path: Path, index: bool, name: str) -> None:
    """With and without an index, under any name; there is an index in the result where there was one."""
    source = write_checkpoint(tmp_path / "s", {name: model()["model-00001-of-00002.safetensors"]}, index=index)
    quantize_repo(source, tmp_path / "d")
    assert checkpoint_files(tmp_path / "d").keys() == contents(source).keys()
    assert verify_repo(source, tmp_path / "d").ok


def test_no_config(tmp_path: Path) -> None:
    """None is made up; a notice says that engines need one."""
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": weight(4, 4)}}, config=None)
    report = quantize_repo(source, tmp_path / "d")
    assert checkpoint_files(tmp_path / "d").keys() == {ONE}
    assert any("config.json" in notice for notice in report.notices)
    assert verify_repo(source, tmp_path / "d").ok


@EACH_RECIPE
def test_the_config_names_the_linear_modules_that_stay(tmp_path: Path, recipe: Recipe) -> None:
    """2-D ``.weight`` tensors that stay, as the layout spells them; no embedding, vector, 3-D array or bias."""
    tensors = {
        "model.embed_tokens.weight": weight(4, 4),
        "model.layers.0.mixer.gate.weight": weight(4, 4),
        "model.layers.0.mixer.fc1_latent_proj.weight": weight(4, 4),
        "model.layers.0.mixer.conv1d.weight": weight(4, 1, 4),
        "model.layers.0.mixer.in_proj.weight": weight(4, 4),
        "model.layers.0.mixer.in_proj.bias": weight(4, 4),
        "model.layers.0.norm.weight": weight(4),
        "mtp.layers.0.eh_proj.weight": weight(4, 4),
        "lm_head.weight": weight(4, 4),
    }
    source = write_checkpoint(tmp_path / "s", {ONE: tensors})
    quantize_repo(source, tmp_path / "d", recipe)
    exact = [
        "lm_head",
        "model.layers.0.mixer.fc1_latent_proj",
        "model.layers.0.mixer.gate",
        "mtp.layers.0.eh_proj",
    ]
    any_layer = [
        "re:.*layers\\.\\d+\\.mixer\\.fc1_latent_proj$",
        "re:.*layers\\.\\d+\\.mixer\\.gate$",
        "re:.*lm_head$",
        "re:.*mtp\\.layers\\.\\d+\\.eh_proj$",
    ]
    assert sorted(listed(tmp_path / "d")) == (exact if recipe == PUBLISHED else any_layer)


# ---- NaN and Inf ----


def spoil(shards: Shards, name: str, *found: tuple[tuple[int, ...], float]) -> None:
    """Put values into a tensor."""
    (tensors,) = (held for held in shards.values() if name in held)
    for position, value in found:
        tensors[name][position] = value


Q, K, V = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv")
GATE, UP = (f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up"))
DOWN, HEAD = "model.layers.0.mlp.down_proj.weight", "lm_head.weight"
LOST = [
    pytest.param(Q, {Q, K, V}, id="in the first shard"),
    pytest.param(V, {Q, K, V}, id="in the second"),
    pytest.param(UP, {GATE, UP}, id="gate and up across shards"),
    pytest.param(DOWN, {DOWN}, id="alone"),
]


@EACH_RECIPE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "fused_module"), LOST)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_keep_leaves_the_whole_bundle(
    tmp_path: Path, name: str, fused_module: set[str], value: float, dtype: torch.dtype, recipe: Recipe
) -> None:
    """A tensor with NaN or Inf and those fused with it are left unquantized, in any shard. The others become FP8."""
    shards = model(dtype)
    spoil(shards, name, ((3, 5), value))
    source = write_checkpoint(tmp_path / "s", shards)
    report = quantize_repo(source, tmp_path / "d", recipe.model_copy(update={"nonfinite": "keep"}))
    for shard, tensors in wanted_shards(shards, frozenset(fused_module), recipe).items():
        assert (tmp_path / "d" / shard).read_bytes() == saved(tensors, None, tmp_path)
    modules = [name.removesuffix(".weight") for name in (*fused_module, HEAD)]
    assert sorted(listed(tmp_path / "d")) == spelled(recipe, modules)
    (finding,) = report.nonfinite
    assert (finding.tensor, finding.count, finding.position) == (name, 1, (3, 5))
    assert finding.value == str(value)
    assert report.tensors_quantized == 14 - len(fused_module)
    for follower in fused_module - {name}:
        assert any(follower in notice and name in notice for notice in report.notices), "not told"
    assert verify_repo(source, tmp_path / "d").ok


def test_keep_without_cause_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    quantize_repo(checkpoint, tmp_path / "a", Recipe(nonfinite="keep"))
    quantize_repo(checkpoint, tmp_path / "b")
    assert checkpoint_files(tmp_path / "a") == checkpoint_files(tmp_path / "b")


@given(st.data())
@settings(max_examples=15)
def test_nan_and_inf_are_counted_and_the_first_is_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The count and the first position of a tensor's NaN and Inf, whatever the slices."""
    spots = data.draw(
        st.dictionaries(
            st.tuples(st.integers(0, 299), st.integers(0, 499)), st.sampled_from([NAN, INF, -INF]), min_size=1
        )
    )
    shards: Shards = {ONE: {"a.o_proj.weight": weight(300, 500)}}
    spoil(shards, "a.o_proj.weight", *spots.items())
    folder = tmp_path_factory.mktemp("nan")
    source = write_checkpoint(folder / "s", shards)
    report = quantize_repo(source, folder / "d", Recipe(nonfinite="keep"), max_memory="1.3MB")
    (finding,) = report.nonfinite
    assert (finding.count, finding.position) == (len(spots), min(spots))
    assert finding.value == str(spots[min(spots)])


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_nan_in_a_tensor_that_stays_is_its_own_business(tmp_path: Path, name: str) -> None:
    shards = model()
    spoil(shards, name, ((0,), NAN))
    source = write_checkpoint(tmp_path / "s", shards)
    report = quantize_repo(source, tmp_path / "d")
    assert report.nonfinite == ()
    assert verify_repo(source, tmp_path / "d").ok


# ---- ignore, across shards ----


@EACH_RECIPE
@pytest.mark.parametrize(("name", "fused_module"), LOST)
def test_ignore_leaves_the_whole_bundle(tmp_path: Path, name: str, fused_module: set[str], recipe: Recipe) -> None:
    source = write_checkpoint(tmp_path / "s", model())
    report = quantize_repo(source, tmp_path / "d", recipe.model_copy(update={"ignore": (f"^{name}$",)}))
    for shard, tensors in wanted_shards(model(), frozenset(fused_module), recipe).items():
        assert all(same_bits(t, tensors[n]) for n, t in read_tensors(tmp_path / "d" / shard).items())
    modules = [name.removesuffix(".weight") for name in (*fused_module, HEAD)]
    assert sorted(listed(tmp_path / "d")) == spelled(recipe, modules)
    for follower in fused_module - {name}:
        assert any(follower in notice and name in notice for notice in report.notices)


# ---- progress and report ----


def test_progress_ends_at_its_total(checkpoint: Path, destination: Path) -> None:
    """Done only grows, and ends at the total that was told from the start."""
    told: list[Progress] = []
    quantize_repo(checkpoint, destination, progress=told.append, threads=1)
    assert told[-1].done == told[-1].total == told[0].total > 0
    assert all(a.done <= b.done for a, b in itertools.pairwise(told))
    assert {p.shard for p in told} == {path.name for path in destination.glob("*.safetensors")}


def test_progress_with_keep_across_shards_ends_at_its_total(checkpoint: Path, destination: Path) -> None:
    """Partners that are read for their amax alone count too, or the line would stop short or run over."""
    told: list[Progress] = []
    quantize_repo(checkpoint, destination, Recipe(nonfinite="keep"), progress=told.append, threads=1)
    assert told[-1].done == told[-1].total == told[0].total


def test_peak_memory_is_told() -> None:
    peak = peak_resident_bytes()
    assert peak is not None
    assert peak > 10 << 20
