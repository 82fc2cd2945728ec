"""torch_dist checkpoints, written by torch.distributed.checkpoint itself."""

from __future__ import annotations

import io
import pickle
import re
import struct
import tarfile
import zipfile
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from nemotron_fp8 import quantize_repo
from nemotron_fp8.errors.nemo import (
    ChunkSizeError,
    ForbiddenPickleError,
    MalformedArrayError,
    MalformedDistError,
    MissingArrayError,
    MissingChunkError,
    StrayChunkError,
)
from nemotron_fp8.sources.nemo.files import files_of_folder
from nemotron_fp8.sources.nemo.inert_pickle import read_pickle
from nemotron_fp8.sources.nemo.torch_save import SavedTensor, read_saved
from nemotron_fp8.sources.open import open_source
from tests.sources.nemo.test_name_mapping import assert_same, read_all
from tests.support.nemo_writer import Sizes, hf_tensors, nemo_arrays, write_nemo

if TYPE_CHECKING:
    from pathlib import Path


def blocks_of(tensor: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """Blocks by the index of their first element, as parallel training leaves them: layers apart, then rows and
    columns by two thirds.
    """
    height, width = tensor.shape[-2:]
    rows, columns = max(1, height * 2 // 3), max(1, width * 2 // 3)
    found = {}
    for layer in range(tensor.shape[0]) if tensor.ndim == 3 else (None,):
        for row in range(0, height, rows):
            for column in range(0, width, columns):
                part = (slice(row, row + rows), slice(column, column + columns))
                lead = () if layer is None else (slice(layer, layer + 1),)
                at = (row, column) if layer is None else (layer, row, column)
                found[at] = tensor[(*lead, *part)].clone()
    return found


def write_dist(
    root: Path,
    sizes: Sizes,
    tensors: dict[str, torch.Tensor],
    *,
    blocks: bool,
    prefix: str = "model.",
    stacked: bool = True,
) -> dict[str, torch.Tensor]:
    """A NeMo checkpoint whose weights torch.distributed.checkpoint wrote."""
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    root.mkdir()
    (root / "model_config.yaml").write_text(sizes.yaml())
    weights = root / "model_weights"
    arrays = nemo_arrays(tensors, sizes, prefix, stacked=stacked)
    state: dict[str, Any] = dict(arrays)
    if blocks:
        for name, tensor in arrays.items():
            if tensor.ndim < 2 or "layer_norm" in name:
                continue
            cut = blocks_of(tensor)
            described = [ShardMetadata(list(at), list(block.shape), "rank:0/cpu") for at, block in cut.items()]
            properties = TensorProperties(dtype=tensor.dtype)
            state[name] = ShardedTensor._init_from_local_shards_and_global_metadata(  # type: ignore[attr-defined]
                [Shard(block, meta) for block, meta in zip(cut.values(), described, strict=True)],
                ShardedTensorMetadata(described, tensor.shape, properties),
            )
    state[f"{prefix}decoder.layers.self_attention.linear_qkv._extra_state/shard_0_3"] = io.BytesIO(b"never opened")
    dcp.save(state, checkpoint_id=weights)
    (weights / "metadata.json").write_text('{"sharded_backend": "torch_dist", "common_backend": "torch"}')
    (weights / "common.pt").write_bytes(b"never opened")
    return arrays


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Any:
    """A group of one process: torch's sharded tensors want one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("prefix", ["model.", "module.", ""])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("blocks", [False, True])
def test_what_torch_wrote_is_read(tmp_path: Path, blocks: bool, stacked: bool, prefix: str) -> None:
    sizes = Sizes()
    tensors = hf_tensors(sizes)
    write_dist(tmp_path / "nemo", sizes, tensors, blocks=blocks, stacked=stacked, prefix=prefix)
    assert_same(read_all(open_source(tmp_path / "nemo")), tensors)


def test_fp8_is_that_of_the_zarr_checkpoint(tmp_path: Path) -> None:
    sizes = Sizes()
    tensors = hf_tensors(sizes)
    write_dist(tmp_path / "dist", sizes, tensors, blocks=True)
    write_nemo(tmp_path / "zarr", tensors, sizes)
    for kind in ("dist", "zarr"):
        quantize_repo(tmp_path / kind, tmp_path / f"from-{kind}")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "from-dist" / name).read_bytes() == (tmp_path / "from-zarr" / name).read_bytes()


def test_in_an_archive(tmp_path: Path) -> None:
    sizes = Sizes()
    tensors = hf_tensors(sizes)
    write_dist(tmp_path / "nemo", sizes, tensors, blocks=True)
    with tarfile.open(tmp_path / "it.nemo", "w:") as archive:
        archive.add(tmp_path / "nemo", arcname=".")
    assert_same(read_all(open_source(tmp_path / "it.nemo")), tensors)


@pytest.fixture
def nemo(tmp_path: Path) -> Path:
    """A checkpoint in blocks."""
    sizes = Sizes()
    write_dist(tmp_path / "nemo", sizes, hf_tensors(sizes), blocks=True)
    return tmp_path / "nemo"


QKV = "model.decoder.layers.self_attention.linear_qkv.weight"


def change(nemo: Path, how: Any) -> None:
    """Change the metadata and write it back."""
    path = nemo / "model_weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    how(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_missing_file(nemo: Path) -> None:
    path = next((nemo / "model_weights").glob("*.distcp"))
    path.unlink()
    with pytest.raises(MissingChunkError) as caught:
        open_source(nemo)
    assert caught.value.chunk == path.name


def test_cut_file(nemo: Path) -> None:
    path = next((nemo / "model_weights").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((ChunkSizeError, MalformedDistError)):
        open_source(nemo)


def test_missing_block(nemo: Path) -> None:
    change(nemo, lambda metadata: metadata.state_dict_metadata[QKV].chunks.pop(1))
    with pytest.raises(MissingChunkError) as caught:
        open_source(nemo)
    assert caught.value.array == QKV


def test_block_without_a_place(nemo: Path) -> None:
    change(nemo, lambda metadata: metadata.storage_data.pop(MetadataIndex(QKV, (0, 0, 0))))
    with pytest.raises(MissingChunkError) as caught:
        open_source(nemo)
    assert (caught.value.array, caught.value.chunk) == (QKV, "[0, 0, 0]")


def test_overlapping_blocks(nemo: Path) -> None:
    def how(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata[QKV].chunks
        chunks.append(chunks[0])

    change(nemo, how)
    with pytest.raises(StrayChunkError) as caught:
        open_source(nemo)
    assert caught.value.array == QKV


def test_block_outside(nemo: Path) -> None:
    def how(metadata: Any) -> None:
        metadata.state_dict_metadata[QKV].chunks[0].offsets = torch.Size((2, 79, 0))

    change(nemo, how)
    with pytest.raises(StrayChunkError):
        open_source(nemo)


def test_blocks_of_other_places(nemo: Path) -> None:
    """Two blocks of unlike shapes whose places are exchanged."""

    def how(metadata: Any) -> None:
        first, last = MetadataIndex(QKV, (0, 0, 0)), MetadataIndex(QKV, (0, 53, 32))
        places = metadata.storage_data
        places[first], places[last] = places[last], places[first]

    change(nemo, how)
    with pytest.raises(MalformedArrayError, match="holds"):
        open_source(nemo)


@pytest.mark.parametrize("file", ["../../x.distcp", "/etc/passwd", "x.pt", ".distcp", "a/b.distcp", 7])
def test_hostile_paths(nemo: Path, file: object) -> None:
    def how(metadata: Any) -> None:
        metadata.storage_data[MetadataIndex(QKV, (0, 0, 0))].relative_path = file

    change(nemo, how)
    with pytest.raises(MalformedDistError):
        open_source(nemo)


@pytest.mark.parametrize(("field", "value"), [("offset", -1), ("offset", 1 << 62), ("length", 0), ("length", "9")])
def test_hostile_places(nemo: Path, field: str, value: object) -> None:
    change(nemo, lambda metadata: setattr(metadata.storage_data[MetadataIndex(QKV, (0, 0, 0))], field, value))
    with pytest.raises(MalformedDistError):
        open_source(nemo)


def test_compressed_blocks_are_refused(nemo: Path) -> None:
    def how(metadata: Any) -> None:
        metadata.storage_data[MetadataIndex(QKV, (0, 0, 0))].transform_descriptors = ["zstd"]

    change(nemo, how)
    with pytest.raises(MalformedDistError, match="zstd"):
        open_source(nemo)


def test_array_that_is_bytes(nemo: Path) -> None:
    change(nemo, lambda metadata: metadata.state_dict_metadata.update({QKV: BytesStorageMetadata()}))
    with pytest.raises(MissingArrayError) as caught:
        open_source(nemo)
    assert caught.value.array == QKV


def test_pickle_inside_a_block(nemo: Path) -> None:
    """``data.pkl`` of a block is held to the same rules."""
    path = next((nemo / "model_weights").glob("*.distcp"))
    data = path.read_bytes()
    name = b"_rebuild_tensor_v2"
    assert name in data
    path.write_bytes(data.replace(name, b"_rebuild_tensor_v9"))
    with pytest.raises(ForbiddenPickleError, match="v9"):
        open_source(nemo)


def test_compressed_zip_is_refused(tmp_path: Path, nemo: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    _put_first(nemo, buffer.getvalue())
    with pytest.raises(MalformedDistError, match="compressed"):
        open_source(nemo)


@pytest.mark.parametrize(
    "data", [b"PK\x05\x06" + b"\xff" * 18, b"x" * 64, b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 46, 0, 0)]
)
def test_hostile_zip(nemo: Path, data: bytes) -> None:
    _put_first(nemo, data)
    with pytest.raises(MalformedDistError):
        open_source(nemo)


def _put_first(nemo: Path, data: bytes) -> None:
    """Let every block of qkv lie in a file of these bytes."""
    (nemo / "model_weights" / "__9_0.distcp").write_bytes(data)

    def how(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == QKV:
                info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(data)

    change(nemo, how)


def test_big_blocks_are_found_through_zip64(tmp_path: Path) -> None:
    """torch writes zip64 records for large blocks; here one is put into a small archive by hand."""
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    data = buffer.getvalue()
    end = data.rindex(b"PK\x05\x06")
    count, size, at = struct.unpack("<HII", data[end + 10 : end + 20])
    body = data[: at + size]
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, at)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(body), 1)
    last = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "x.distcp"
    path.write_bytes(b"before" + body + record + locator + last)
    files, _ = files_of_folder(tmp_path)
    found = read_saved(files, path.name, 6, path.stat().st_size - 6)
    raw = path.read_bytes()[found.offset : found.offset + 24]
    assert (found.dtype, found.shape, found.strides) == ("F32", (2, 3), (12, 4))
    assert raw == tensor.numpy().tobytes()


def saved(tmp_path: Path, data: bytes) -> SavedTensor:
    """The tensor of an archive that is all of a file."""
    path = tmp_path / "x.distcp"
    path.write_bytes(data)
    files, _ = files_of_folder(tmp_path)
    return read_saved(files, path.name, 0, len(data))


@pytest.fixture
def archive() -> bytes:
    """A tensor as torch saves it."""
    buffer = io.BytesIO()
    torch.save(torch.arange(6, dtype=torch.float32), buffer)
    return buffer.getvalue()


def headers_of(archive: bytes, signature: bytes) -> list[int]:
    return [found.start() for found in re.finditer(re.escape(signature), archive)]


@pytest.mark.parametrize(
    ("signature", "field", "says"),
    [(b"PK\x01\x02", 8, "is encrypted"), (b"PK\x03\x04", 6, "another name or encryption")],
    ids=["directory", "local header"],
)
@pytest.mark.parametrize("bit", [0, 6, 13])
def test_encrypted_entry_is_refused(
    tmp_path: Path, archive: bytes, signature: bytes, field: int, says: str, bit: int
) -> None:
    changed = bytearray(archive)
    for at in headers_of(archive, signature):
        changed[at + field + bit // 8] |= 1 << bit % 8
    with pytest.raises(MalformedDistError, match=says):
        saved(tmp_path, bytes(changed))


def test_local_header_of_another_name_is_refused(tmp_path: Path, archive: bytes) -> None:
    """Two readers that trust one header each would understand two archives."""
    assert saved(tmp_path, archive).shape == (6,)
    at = archive.index(b"data/0")
    with pytest.raises(MalformedDistError, match="another name"):
        saved(tmp_path, archive[:at] + b"data/1" + archive[at + 6 :])


def test_archive_after_other_bytes_is_refused(tmp_path: Path, archive: bytes) -> None:
    with pytest.raises(MalformedDistError, match="not at the beginning"):
        saved(tmp_path, b"before" + archive)


def test_archive_of_many_entries_is_refused(tmp_path: Path) -> None:
    for count, says in ((65, "65 entries"), (5000, "more entries than a saved tensor has")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as written:
            for i in range(count):
                written.writestr(f"archive/data/{i}", b"")
        with pytest.raises(MalformedDistError, match=says):
            saved(tmp_path, buffer.getvalue())


def test_entry_that_stands_twice_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for folder in ("a", "b"):
            written.writestr(f"{folder}/data.pkl", b"x")
    with pytest.raises(MalformedDistError, match="occurs twice"):
        saved(tmp_path, buffer.getvalue())


@given(st.data())
def test_damaged_archive_is_refused_or_understood(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """No other exception, and never a place outside of the file."""
    buffer = io.BytesIO()
    torch.save(torch.arange(6, dtype=torch.float32), buffer)
    changed = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    stop = data.draw(st.sampled_from([len(changed), data.draw(st.integers(0, len(changed)))]))
    try:
        found = saved(tmp_path_factory.mktemp("damaged"), bytes(changed[:stop]))
    except MalformedDistError:
        return
    assert 0 <= found.offset <= stop - 4 * prod(found.shape)


def test_every_global_that_torch_writes_is_known(nemo: Path) -> None:
    """The list of classes holds no more than names; this shows that it holds those of the torch that is installed."""
    from nemotron_fp8.sources.nemo.torch_dist import ALLOWED

    data = (nemo / "model_weights" / ".metadata").read_bytes()
    record = read_pickle(data, "x", ALLOWED)
    assert record.kind.endswith("metadata.Metadata")
    assert re.search("TensorStorageMetadata", str(record))
