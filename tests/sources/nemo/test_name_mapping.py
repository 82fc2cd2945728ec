"""NeMo's zarr layout against the tensors that it was written from."""

from __future__ import annotations

import json
import os
import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Progress, Report, convert_repo
from nemotron_fp8.errors.destination import OtherRunError
from nemotron_fp8.errors.nemo import (
    ArrayShapeError,
    ChunkSizeError,
    DuplicateArrayError,
    ExtraArrayError,
    MalformedArrayError,
    MissingArrayError,
    MissingChunkError,
    StrayChunkError,
)
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.sources.reader import Reader
from tests.support.nemo_writer import LAYOUTS, Sizes, hf_tensors, nemo_arrays, write_nemo, write_zarr

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nemotron_fp8.sources.base import Source

QKV = "model.decoder.layers.self_attention.linear_qkv.weight"


def read_all(source: Source) -> dict[str, torch.Tensor]:
    """Every tensor of a source, in its order."""
    made = {}
    with Reader(source.opener) as reader:
        for view in source.inventory.views:
            with reader.elements(view, 0, view.numel) as values:
                made[view.name] = values.clone().reshape(view.shape)
    return made


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_tensors_it_was_written_from(
    tmp_path: Path, layout: str, stacked: bool, separator: str
) -> None:
    sizes = Sizes()
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "nemo", tensors, sizes, layout, stacked=stacked, separator=separator)
    assert_same(read_all(open_source(tmp_path / "nemo")), tensors)


@pytest.mark.parametrize("prefix", ["model.", "module.", "model.module.", ""])
def test_names_of_nemo_and_of_megatron(tmp_path: Path, prefix: str) -> None:
    sizes = Sizes(layers=2)
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "nemo", tensors, sizes, prefix=prefix)
    assert_same(read_all(open_source(tmp_path / "nemo")), tensors)


@st.composite
def models(draw: st.DrawFn) -> tuple[Sizes, dict[str, tuple[int, ...]], int]:
    """Sizes of a model, a chunk shape for every array, a size of slices."""
    groups = draw(st.integers(1, 4))
    sizes = Sizes(
        layers=draw(st.integers(1, 3)),
        heads=groups * draw(st.integers(1, 4)),
        groups=groups,
        head_dim=draw(st.integers(1, 7)),
        hidden=draw(st.integers(1, 24)),
        inner=draw(st.integers(1, 24)),
        vocabulary=draw(st.integers(1, 12)),
    )
    arrays = nemo_arrays(hf_tensors(sizes), sizes)
    chunks = {name: tuple(draw(st.integers(1, side + 2)) for side in array.shape) for name, array in arrays.items()}
    return sizes, chunks, draw(st.integers(1, 40))


@settings(max_examples=40)
@given(model=models(), salt=st.integers(0, 1 << 30))
def test_any_heads_groups_sizes_and_chunk_grids(
    tmp_path_factory: pytest.TempPathFactory, model: tuple[Sizes, dict[str, tuple[int, ...]], int], salt: int
) -> None:
    """Whatever the heads, query groups, head size and chunk grids: the tensors of the model, whole and in slices."""
    sizes, chunks, step = model
    tensors = hf_tensors(sizes, salt)
    root = tmp_path_factory.mktemp("model") / "nemo"
    write_nemo(root, tensors, sizes, chunks)
    source = open_source(root)
    assert_same(read_all(source), tensors)
    with Reader(source.opener) as reader:
        for view in source.inventory.views:
            parts = []
            for begin in range(0, view.numel, step):
                with reader.elements(view, begin, min(begin + step, view.numel)) as values:
                    parts.append(values.clone())
            assert torch.equal(torch.cat(parts), tensors[view.name].reshape(-1)), view.name


def test_another_process_can_open_it(tmp_path: Path) -> None:
    """The source that opens the files is pickled for the workers. The copy reads the same tensors."""
    sizes = Sizes(layers=1)
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "nemo", tensors, sizes, "input")
    source = open_source(tmp_path / "nemo")
    assert_same(read_all(pickle.loads(pickle.dumps(source))), tensors)


def test_run_that_stopped_is_carried_on(tmp_path: Path) -> None:
    """Finished shards are taken over, and not when a chunk has changed since."""
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)

    def stop(progress: Progress) -> None:
        if progress.shard.startswith("model-00003"):
            raise KeyboardInterrupt

    def convert(progress: Callable[[Progress], None] | None = None) -> Report:
        return convert_repo(tmp_path / "nemo", tmp_path / "out", progress=progress, shard_size=20_000, threads=1)

    with pytest.raises(KeyboardInterrupt):
        convert(stop)
    chunk = tmp_path / "nemo" / "model_weights" / "model.output_layer.weight" / "0.0"
    before = chunk.stat()
    os.utime(chunk, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(OtherRunError, match="output_layer"):
        convert()
    os.utime(chunk, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert convert().resumed == 2
    convert_repo(tmp_path / "nemo", tmp_path / "straight", shard_size=20_000)
    for path in (tmp_path / "straight").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_shards_divide_as_asked(tmp_path: Path) -> None:
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    shards = open_source(tmp_path / "nemo", 20_000).inventory.shards
    assert [shard.name for shard in shards] == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert all(shard.size <= 20_000 for shard in shards)
    assert open_source(tmp_path / "nemo").inventory.shards[0].name == "model.safetensors"


@pytest.fixture
def nemo(tmp_path: Path) -> Path:
    """A checkpoint whose qkv is split in two by rows."""
    sizes = Sizes()
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes, "output")
    return tmp_path / "nemo" / "model_weights"


def test_missing_chunk_is_named(nemo: Path) -> None:
    (nemo / QKV / "1.1.0").unlink()
    with pytest.raises(MissingChunkError, match=r"linear_qkv.weight'.*'1\.1\.0'.*5 of 6") as caught:
        open_source(nemo.parent)
    assert (caught.value.array, caught.value.chunk) == (QKV, "1.1.0")
    assert (caught.value.present, caught.value.expected) == (5, 6)


@pytest.mark.parametrize("change", [-2, 2])
def test_chunk_of_another_size_is_named(nemo: Path, change: int) -> None:
    path = nemo / QKV / "2.0.0"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"xx")
    with pytest.raises(ChunkSizeError) as caught:
        open_source(nemo.parent)
    assert (caught.value.array, caught.value.chunk) == (QKV, "2.0.0")
    assert (caught.value.size, caught.value.expected) == (len(data) + change, len(data))


def test_chunk_outside_the_grid_is_named(nemo: Path) -> None:
    (nemo / QKV / "3.0.0").write_bytes(b"")
    with pytest.raises(StrayChunkError) as caught:
        open_source(nemo.parent)
    assert (caught.value.array, caught.value.chunk) == (QKV, "3.0.0")


def test_missing_array_is_named(nemo: Path) -> None:
    (nemo / QKV).rename(nemo.parent / "elsewhere")
    with pytest.raises(MissingArrayError) as caught:
        open_source(nemo.parent)
    assert caught.value.array == QKV


@pytest.mark.parametrize(
    "name", ["model.decoder.layers.self_attention.linear_qkv.bias", "model.embedding.position_embeddings.weight"]
)
def test_array_that_would_change_the_model_is_named(nemo: Path, name: str) -> None:
    write_zarr(nemo / name, torch.zeros(3, 4, dtype=torch.bfloat16), (1, 4))
    with pytest.raises(ExtraArrayError) as caught:
        open_source(nemo.parent)
    assert caught.value.array == name


def test_the_same_array_twice_is_named(nemo: Path) -> None:
    name = "decoder.final_layernorm.bias"
    write_zarr(nemo / name, torch.zeros(48, dtype=torch.bfloat16), (48,))
    with pytest.raises(DuplicateArrayError) as caught:
        open_source(nemo.parent)
    assert {caught.value.first, caught.value.second} == {name, f"model.{name}"}


def test_stacked_and_by_layer_at_once(nemo: Path) -> None:
    name = QKV.replace("layers.", "layers.1.")
    write_zarr(nemo / name, torch.zeros(80, 48, dtype=torch.bfloat16), (80, 48))
    with pytest.raises(DuplicateArrayError) as caught:
        open_source(nemo.parent)
    assert {caught.value.first, caught.value.second} == {name, QKV}


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_layers", 4), ("num_query_groups", 3), ("kv_channels", 4), ("hidden_size", 96), ("ffn_hidden_size", 81)],
)
def test_config_and_arrays_that_disagree(nemo: Path, key: str, value: int) -> None:
    path = nemo.parent / "model_config.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*lines, f"{key}: {value}"]))
    with pytest.raises(ArrayShapeError) as caught:
        open_source(nemo.parent)
    assert caught.value.shape != caught.value.expected


BROKEN = {
    "no JSON": "{",
    "version 3": {"zarr_format": 3},
    "Fortran order": {"order": "F"},
    "filters": {"filters": [{"id": "delta"}]},
    "unpatched bf16": {"dtype": "<V2"},
    "big-endian": {"dtype": ">f4"},
    "structured": {"dtype": [["a", "<f4"]]},
    "shape of text": {"shape": ["3", 80, 48]},
    "negative": {"shape": [3, -80, 48]},
    "bool": {"chunks": [True, 40, 48]},
    "zero chunk": {"chunks": [0, 40, 48]},
    "huge": {"shape": [1 << 62, 80, 48]},
    "no shape": {"shape": None},
    "other rank": {"chunks": [1, 40]},
    "nine dimensions": {"shape": [1] * 9, "chunks": [1] * 9},
    "separator": {"dimension_separator": "../"},
    "compressor": {"compressor": "zlib"},
    "unknown compressor": {"compressor": {"id": "../../x"}},
    "float": {"shape": [3.0, 80, 48]},
}


@pytest.mark.parametrize("what", BROKEN)
def test_hostile_zarray(nemo: Path, what: str) -> None:
    path, change = nemo / QKV / ".zarray", BROKEN[what]
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    with pytest.raises(MalformedArrayError) as caught:
        open_source(nemo.parent)
    assert caught.value.array == QKV


def test_huge_grid_ends_at_the_first_missing_chunk(nemo: Path) -> None:
    """2^48 chunks are asked for and six are there: an error at once, not a search."""
    path = nemo / QKV / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [3, 1 << 48, 48], "chunks": [1, 1, 48]}))
    for chunk in (nemo / QKV).glob("*.*.*"):
        chunk.unlink()
    with pytest.raises(MissingChunkError) as caught:
        open_source(nemo.parent)
    assert caught.value.expected == 3 << 48


def test_more_chunks_than_files_can_be_open(tmp_path: Path) -> None:
    """A fine grid, thousands of chunk files in one output shard: only so many are open at a time."""
    import resource

    sizes = Sizes(layers=1, hidden=48, inner=160)
    tensors = hf_tensors(sizes)
    chunks = {name: tuple(min(side, 2) for side in array.shape) for name, array in nemo_arrays(tensors, sizes).items()}
    write_nemo(tmp_path / "nemo", tensors, sizes, chunks)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert_same(read_all(open_source(tmp_path / "nemo")), tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
