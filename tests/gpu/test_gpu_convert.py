"""The CUDA engine on a CUDA device: the bytes of the CPU engine, whatever the recipe, the budget, the devices."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from nemotron_fp8 import quantize_repo, verify_repo
from nemotron_fp8.api import plan_repo
from nemotron_fp8.destinations.folder_staging import FolderStaging
from nemotron_fp8.engines.cuda.device import CudaDevice
from nemotron_fp8.engines.cuda.engine import CudaEngine
from nemotron_fp8.engines.devices import usable_cuda_devices
from nemotron_fp8.errors import NonFiniteError
from nemotron_fp8.sources.files import FolderOpener
from tests.support.random_weights import BIG, KEEP, RECIPES, contents, write
from tests.support.recipes import PUBLISHED
from tests.support.run import make_shard

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8 import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("NEMOTRON_FP8_TEST_GPU") != "1" or not torch.cuda.is_available(),
        reason="needs a CUDA device and NEMOTRON_FP8_TEST_GPU=1",
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "source"
    write(folder, BIG)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("memory", ["12MiB", None])
def test_same_bytes_as_the_cpu(source: Path, tmp_path: Path, recipe: Recipe, memory: str | None) -> None:
    """With room for every tensor, and with so little that the largest are streamed twice."""
    quantize_repo(source, tmp_path / "cpu", recipe, "cpu")
    quantize_repo(source, tmp_path / "gpu", recipe, "cuda:0", "16MiB", max_device_memory=memory)
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")


@pytest.mark.parametrize("recipe", KEEP, ids=str)
def test_what_is_not_finite_stays(tmp_path: Path, recipe: Recipe) -> None:
    write(tmp_path / "source", BIG, bad="model.layers.0.self_attn.q_proj.weight")
    quantize_repo(tmp_path / "source", tmp_path / "cpu", recipe, "cpu")
    quantize_repo(tmp_path / "source", tmp_path / "gpu", recipe, "cuda:0", "16MiB")
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")
    with pytest.raises(NonFiniteError, match="q_proj"):
        quantize_repo(tmp_path / "source", tmp_path / "none", device="cuda:0")


def test_a_worker_process_for_each_device(source: Path, tmp_path: Path) -> None:
    devices = ",".join(f"cuda:{i}" for i in usable_cuda_devices()[:2])
    quantize_repo(source, tmp_path / "cpu", device="cpu")
    quantize_repo(source, tmp_path / "gpu", device=devices)
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")
    assert verify_repo(source, tmp_path / "gpu").ok


def test_memory_on_the_device_keeps_to_its_budget(source: Path, tmp_path: Path) -> None:
    """The engine's own buffers, as torch's allocator counts what was asked for; kernels add a scale or an amax."""
    budget = 12 << 20
    (tmp_path / "out").mkdir()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with CudaEngine(CudaDevice("cuda:0"), 16 << 20, budget, 4) as engine:
        for shard_task in plan_repo(source, PUBLISHED).shard_tasks:
            make_shard(shard_task, FolderOpener(source), FolderStaging(tmp_path / "out", digests=False), engine)
    assert torch.cuda.max_memory_allocated() - before <= budget + (1 << 20)
    assert torch.cuda.memory_allocated() == before
