"""Compressed chunks: decoded to the right bytes, or refused before they take more memory than planned."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8 import convert_repo, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.errors import BudgetError
from nemotron_fp8.errors.nemo import ChunkDecodeError
from nemotron_fp8.sources.nemo.compressed_chunks import Packed, decode
from nemotron_fp8.sources.nemo.files import Place
from nemotron_fp8.sources.nemo.zarr_metadata import read_zarray
from nemotron_fp8.sources.open import open_source
from tests.sources.nemo.test_name_mapping import assert_same, read_all
from tests.support.nemo_writer import LAYOUTS, Sizes, compressed, hf_tensors, write_nemo

ROOT = Path(__file__).parents[3]
COMPRESSORS: list[dict[str, object]] = [
    {"id": "zlib", "level": 1},
    {"id": "gzip", "level": 5},
    {"id": "bz2", "level": 1},
    {"id": "zstd", "level": 3},
    *({"id": "blosc", "cname": name, "clevel": 5, "shuffle": shuffle, "blocksize": 0}
      for name, shuffle in (("lz4", 1), ("zstd", 2), ("blosclz", 0))),
]  # fmt: skip


def label(compress: dict[str, object]) -> str:
    return "-".join(str(compress[key]) for key in ("id", "cname") if key in compress)


@pytest.mark.parametrize("compress", [c for c in COMPRESSORS if c["id"] in ("blosc", "zstd")], ids=label)
def test_without_numcodecs_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: dict[str, object]
) -> None:
    sizes = Sizes(layers=1)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes, compress=compress)
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    with pytest.raises(ChunkDecodeError, match=r"nemotron_fp8\[nemo\]"):
        convert_repo(tmp_path / "nemo", tmp_path / "out")


@pytest.mark.parametrize("compress", COMPRESSORS[:3], ids=label)
def test_stream_compressors_need_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: dict[str, object]
) -> None:
    sizes = Sizes(layers=1)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes, compress=compress)
    for name in ("numcodecs", "tensorstore"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_same(read_all(open_source(tmp_path / "nemo")), hf_tensors(sizes))


def test_whole_chunks_count_against_the_budget(tmp_path: Path) -> None:
    """The plan is made from headers alone; a budget that cannot hold the chunks is refused with the numbers."""
    sizes = Sizes(layers=2, inner=512)
    write_nemo(tmp_path / "plain", hf_tensors(sizes), sizes, "input")
    write_nemo(tmp_path / "packed", hf_tensors(sizes), sizes, "input", compress=COMPRESSORS[0])
    plain, packed = (plan_repo(tmp_path / name, max_memory="8MB", threads=1) for name in ("plain", "packed"))
    largest = 512 * 48 * 2  # bytes of the largest chunk: a layer of up_proj or of down_proj, a quarter
    held = packed.inventory.opener_bytes
    assert held >= 4 * largest // 4 + 2 * largest // 4
    assert plain.inventory.opener_bytes == 0
    assert packed.buffer_bytes - plain.buffer_bytes <= held
    assert held < packed.buffer_bytes <= 8_000_000
    with pytest.raises(BudgetError) as caught:
        plan_repo(tmp_path / "packed", max_memory=held + (1 << 20) - 1, threads=1)
    assert caught.value.needed > held + (1 << 20)


@pytest.mark.parametrize("compress", COMPRESSORS, ids=label)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compressed_chunks_give_the_same(tmp_path: Path, layout: str, compress: dict[str, object]) -> None:
    sizes = Sizes()
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "nemo", tensors, sizes, layout, compress=compress)
    assert_same(read_all(open_source(tmp_path / "nemo")), tensors)


def test_fp8_from_compressed_chunks_and_from_an_archive(tmp_path: Path) -> None:
    sizes = Sizes()
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "plain", tensors, sizes)
    write_nemo(tmp_path / "packed", tensors, sizes, "uneven", compress=COMPRESSORS[0])
    with tarfile.open(tmp_path / "packed.nemo", "w:") as archive:
        archive.add(tmp_path / "packed", arcname=".")
    results = []
    for name in ("plain", "packed", "packed.nemo"):
        quantize_repo(tmp_path / name, tmp_path / f"from-{name}", threads=2)
        assert verify_repo(tmp_path / name, tmp_path / f"from-{name}").ok
        results.append((tmp_path / f"from-{name}" / "model.safetensors").read_bytes())
    assert results[0] == results[1] == results[2]


ELEMENTS = 4096
META: dict[str, object] = {
    "zarr_format": 2, "shape": [ELEMENTS], "chunks": [ELEMENTS], "dtype": "<f2", "fill_value": None, "filters": None,
    "order": "C",
}  # fmt: skip


def chunk_of(compress: dict[str, object]) -> Packed:
    meta = read_zarray("array", json.dumps({**META, "compressor": compress}).encode())
    return Packed("array", meta, Place("0", 0, 0))


@pytest.mark.parametrize("compress", COMPRESSORS, ids=label)
@given(data=st.data())
def test_any_bytes_come_back(compress: dict[str, object], data: st.DataObject) -> None:
    """Compressed by the standard library or tensorstore, none of which decodes blosc and zstd here."""
    pattern = data.draw(st.binary(min_size=1, max_size=64))
    plain = (pattern * (2 * ELEMENTS))[: 2 * ELEMENTS]
    assert bytes(decode(chunk_of(compress), compressed(plain, compress))) == plain


@pytest.mark.parametrize("compress", COMPRESSORS, ids=label)
@pytest.mark.parametrize("size", [0, 1, 2 * ELEMENTS - 1, 2 * ELEMENTS + 1, 4 * ELEMENTS])
def test_chunk_of_another_size_is_refused(compress: dict[str, object], size: int) -> None:
    if size == 0 and compress["id"] in ("blosc", "zstd"):
        pytest.skip("tensorstore writes no empty chunk")
    with pytest.raises(ChunkDecodeError, match="'array': a chunk cannot be decoded"):
        decode(chunk_of(compress), compressed(bytes(size), compress))


@pytest.mark.parametrize("compress", COMPRESSORS, ids=label)
@given(data=st.data())
def test_damaged_chunk_is_refused_or_has_its_size(compress: dict[str, object], data: st.DataObject) -> None:
    whole = bytearray(compressed(bytes(range(256)) * (2 * ELEMENTS // 256), compress))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    stop = data.draw(st.integers(0, len(whole)))
    try:
        found = decode(chunk_of(compress), bytes(whole[:stop] if data.draw(st.booleans()) else whole))
    except ChunkDecodeError:
        return
    assert len(found) == 2 * ELEMENTS


def zstd_frame(plain: bytes) -> bytes:
    """A frame that states no content size, in raw blocks, as a writer of a stream makes it (RFC 8878)."""
    pieces = [plain[at : at + 3000] for at in range(0, len(plain), 3000)]
    blocks = ((len(piece) << 3 | (piece is pieces[-1])).to_bytes(3, "little") + piece for piece in pieces)
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(blocks)


def test_zstd_frame_without_its_size() -> None:
    plain = bytes(range(256)) * (2 * ELEMENTS // 256)
    chunk = chunk_of({"id": "zstd", "level": 3})
    assert bytes(decode(chunk, zstd_frame(plain))) == plain
    for wrong in (plain[:-1], plain + b"x"):
        with pytest.raises(ChunkDecodeError):
            decode(chunk, zstd_frame(wrong))


BOMB = """
import json, sys
from nemotron_fp8.errors.nemo import ChunkDecodeError
from nemotron_fp8.sources.nemo.compressed_chunks import decode
from tests.sources.nemo.test_compressed_chunks import chunk_of
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
compress, data = json.loads(sys.argv[1]), open(sys.argv[2], "rb").read()
try:
    decode(chunk_of(compress), b"")
except ChunkDecodeError:
    before = peak()
try:
    decode(chunk_of(compress), data)
except ChunkDecodeError:
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc")
@pytest.mark.parametrize("compress", [*COMPRESSORS[:5], {"id": "zstd", "level": 0}], ids=label)
def test_bomb_takes_no_memory(tmp_path: Path, compress: dict[str, object]) -> None:
    """A chunk of 8 KiB whose compressed bytes decode to 128 MiB."""
    if compress == {"id": "zstd", "level": 0}:  # no size stated: blocks of 128 KiB of one byte
        blocks = ((1 << 17 << 3 | 2).to_bytes(3, "little") + b"x") * 1023
        bomb = b"\x28\xb5\x2f\xfd\x00\x58" + blocks + (1 << 17 << 3 | 3).to_bytes(3, "little") + b"x"
    else:
        bomb = compressed(bytes(128 << 20), compress)
    (tmp_path / "bomb").write_bytes(bomb)
    command = [sys.executable, "-c", BOMB, json.dumps(compress), str(tmp_path / "bomb")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < (16 << 20) + len(bomb)


@pytest.mark.parametrize("how", ["cut", "changed", "short"])
def test_damaged_chunk(tmp_path: Path, how: str) -> None:
    import zlib

    sizes = Sizes(layers=1)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes, compress=COMPRESSORS[0])
    path = tmp_path / "nemo" / "model_weights" / "model.output_layer.weight" / "0.0"
    data = path.read_bytes()
    damaged = {
        "cut": data[:-9],
        "changed": data[:40] + bytes([data[40] ^ 0xFF]) + data[41:],
        "short": zlib.compress(b"abc"),
    }
    path.write_bytes(damaged[how])
    with pytest.raises(ChunkDecodeError) as caught:
        convert_repo(tmp_path / "nemo", tmp_path / "out")
    assert caught.value.array == "model.output_layer.weight"
