"""Compressed chunks, which tensorstore decodes (extra ``nemo``)."""

from __future__ import annotations

import sys
import tarfile
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import convert_repo, plan_repo, quantize_repo, verify_repo
from nemotron_fp8.errors import BudgetError
from nemotron_fp8.errors.nemo import TensorStoreError
from nemotron_fp8.sources.open import open_source
from tests.sources.nemo.test_name_mapping import assert_same, read_all
from tests.support.nemo_writer import LAYOUTS, Sizes, hf_tensors, write_nemo

if TYPE_CHECKING:
    from pathlib import Path

COMPRESSORS: list[dict[str, object]] = [{"id": "zlib", "level": 1}, {"id": "gzip", "level": 5}]


def test_without_tensorstore_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(layers=1)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes, compress=COMPRESSORS[0])
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(TensorStoreError, match=r"nemotron_fp8\[nemo\]"):
        convert_repo(tmp_path / "nemo", tmp_path / "out")


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


@pytest.mark.parametrize("compress", COMPRESSORS, ids=lambda value: str(value["id"]))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compressed_chunks_give_the_same(tmp_path: Path, layout: str, compress: dict[str, object]) -> None:
    pytest.importorskip("tensorstore")
    sizes = Sizes()
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "nemo", tensors, sizes, layout, compress=compress)
    assert_same(read_all(open_source(tmp_path / "nemo")), tensors)


def test_fp8_from_compressed_chunks_and_from_an_archive(tmp_path: Path) -> None:
    pytest.importorskip("tensorstore")
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


@pytest.mark.parametrize("how", ["cut", "changed", "short"])
def test_damaged_chunk(tmp_path: Path, how: str) -> None:
    pytest.importorskip("tensorstore")
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
    with pytest.raises(TensorStoreError) as caught:
        convert_repo(tmp_path / "nemo", tmp_path / "out")
    assert caught.value.array == "model.output_layer.weight"
