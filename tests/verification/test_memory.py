"""Memory of a verification does not grow with the size of a tensor."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from nemotron_fp8 import Recipe, quantize_repo
from tests.support.checkpoints import weight, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

ROWS, COLUMNS = 8192, 16384
MEASURE = """
import sys
from nemotron_fp8 import verify_repo

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

small, large = sys.argv[1:]
verify_repo(f"{small}/source", f"{small}/result", max_memory="64MiB", threads=2)
before = peak()
assert verify_repo(f"{large}/source", f"{large}/result", max_memory="64MiB", threads=2).ok
print(peak() - before)
"""


def test_codes_compared_do_not_pile_up(tmp_path: Path) -> None:
    """New memory for the codes of each strip left 134 MB behind for this tensor, between sums that stay."""
    for name, rows in (("small", 128), ("large", ROWS)):
        values = weight(128, COLUMNS).repeat(rows // 128, 1)
        tensors = {"model.layers.0.mlp.down_proj.weight": values}
        write_checkpoint(tmp_path / name / "source", {"model.safetensors": tensors}, config={"model_type": "llama"})
        quantize_repo(tmp_path / name / "source", tmp_path / name / "result", Recipe(), device="cpu", digests=False)
        del values, tensors
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 48 << 20
