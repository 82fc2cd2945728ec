"""A result of any number of tensors and shards is checked with few open files: 1,024 are the usual limit."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import quantize_repo
from tests.support.checkpoints import weight, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Shards

TENSORS = 100
CHECK = """
import resource, sys
from nemotron_fp8 import verify_repo
from nemotron_fp8.report.summary import read_summary
import nemotron_fp8.conversion.estimate, nemotron_fp8.verification.quantized_values

limit, source, result = int(sys.argv[1]), *sys.argv[2:]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
alone = verify_repo(None, result, threads=2)
beside = verify_repo(source, result, threads=2)
shown = read_summary(result, source, threads=2)
print(alone.ok, alone.quantized, beside.ok, beside.quantized, shown.scales.count, len(shown.problems))
"""


@pytest.mark.parametrize(("shards", "limit"), [(3, 64), (TENSORS, 200)], ids=["tensors", "shards"])
def test_more_fp8_tensors_than_files_can_be_open(tmp_path: Path, shards: int, limit: int) -> None:
    """Alone, against the source (two readers, each of whose files takes two descriptors) and for a report."""
    files: Shards = {}
    for i in range(TENSORS):
        name = f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        files.setdefault(name, {})[f"model.layers.{i}.mlp.up_proj.weight"] = weight(16, 16, seed=i)
    source, result = write_checkpoint(tmp_path / "source", files), tmp_path / "result"
    quantize_repo(source, result, device="cpu", threads=1)
    command = [sys.executable, "-c", CHECK, str(limit), source, result]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    scales = 16 * TENSORS
    assert done.stdout.split() == ["True", f"{TENSORS}", "True", f"{TENSORS}", f"{scales}", "0"], done.stderr
