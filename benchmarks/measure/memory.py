"""Peak resident memory of whole conversions: ``python -m benchmarks.measure.memory [--work DIR] [--quick]``.

Every conversion runs the command line in its own process, and the figure is its ``VmHWM``: interpreter, torch,
buffers and mapped pages together. The digest of the result must not depend on the budget. A figure above its target
ends the run with an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, Recorder, machine
from nemotron_fp8.api import DEFAULT_MEMORY

if TYPE_CHECKING:
    from benchmarks.checkpoints import Shapes

MIB = 1 << 20
BUDGETS = ("32MiB", "256MiB", "1GiB")
IDLE = """
import nemotron_fp8.conversion.run, nemotron_fp8.engines.cpu
from nemotron_fp8._utils import peak_resident_bytes
print(peak_resident_bytes())
"""
"""Script that loads all modules and converts nothing; prints its peak memory."""


@dataclass(frozen=True)
class Case:
    """A checkpoint to convert.

    Attributes:
        name: label in the table.
        shapes: tensors by shard.
        budgets: values of ``--max-memory``.
    """

    name: str
    shapes: Shapes
    budgets: tuple[str, ...] = (DEFAULT_MEMORY,)


CASES = (
    Case("1.4 GB, one shard", nemotron(1.4, 1, hidden=2048), BUDGETS),
    Case("6 GB, four shards", nemotron(6.0, 4), BUDGETS),
    Case("4 GB, one tensor", [[("model.layers.0.mlp.down_proj.weight", (32768, 65536))]], BUDGETS),
)
QUICK = (
    Case("0.1 GB, one shard", nemotron(0.1, 1, hidden=1024), BUDGETS),
    Case("0.3 GB, one tensor", [[("model.layers.0.mlp.down_proj.weight", (8192, 16384))]]),
)


def digest(folder: Path) -> str:
    """Return the SHA-256 of names and bytes of the files of a folder."""
    hasher = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        hasher.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(MIB):
                hasher.update(piece)
    return hasher.hexdigest()


def idle_bytes() -> int:
    """Measure the peak memory of a process that converts nothing."""
    ran = subprocess.run([sys.executable, "-c", IDLE], check=True, capture_output=True, text=True)
    return int(ran.stdout)


def convert(source: Path, destination: Path, budget: str) -> dict[str, Any]:
    """Run the command; return its report."""
    command = [sys.executable, "-m", "nemotron_fp8", "quantize", str(source), str(destination)]
    options = ["--format", "fp8", "--granularity", "tensor", "--device", "cpu", "--max-memory", budget, "--json"]
    ran = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(ran.stdout)
    return report


def measure(case: Case, work: Path, record: Recorder, idle: int) -> list[dict[str, Any]]:
    """Convert one checkpoint with each budget; record and return the figures."""
    source, found = work / "source", []
    source_bytes = write_checkpoint(source, case.shapes)
    for budget in case.budgets:
        destination = work / "result"
        report = convert(source, destination, budget)
        fields = {
            "case": case.name,
            "budget": budget,
            "source_bytes": source_bytes,
            "shards": len(case.shapes),
            "largest_tensor_bytes": max(2 * rows * columns for s in case.shapes for _, (rows, columns) in pairs(s)),
            "idle_bytes": idle,
            "peak_resident_bytes": report["peak_resident_bytes"],
            "seconds": report["seconds"],
            "sha256": digest(destination),
        }
        record.write(**fields)
        found.append(fields)
        shutil.rmtree(destination)
    shutil.rmtree(source)
    return found


def pairs(shard: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, int]]]:
    """Return the matrices of a shard."""
    return [(name, (shape[0], shape[1])) for name, shape in shard if len(shape) == 2]


def failures(found: list[dict[str, Any]]) -> list[str]:
    """List the figures above their targets (docs/memory.md)."""
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for fields in found:
        by_case.setdefault(fields["case"], {})[fields["budget"]] = fields
    problems = [
        f"{name}: the bytes depend on the budget"
        for name, budgets in by_case.items()
        if len({fields["sha256"] for fields in budgets.values()}) > 1
    ]
    first, *others = (name for name in by_case if DEFAULT_MEMORY in by_case[name])
    small = by_case[first][DEFAULT_MEMORY]["peak_resident_bytes"]
    if small >= 480 * MIB:
        problems.append(f"{first}: {small:,} bytes, not under 480 MiB")
    for name in others:
        large = by_case[name][DEFAULT_MEMORY]["peak_resident_bytes"]
        if large > 1.05 * small + 16 * MIB:
            problems.append(f"{name}: {large:,} bytes, over 1.05 x {small:,} + 16 MiB")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory-cpu.jsonl")
    parser.add_argument("--work", type=Path, help="where 9 GB are free; else the folder for temporary files")
    parser.add_argument("--quick", action="store_true", help="small checkpoints, to try the script")
    options = parser.parse_args()
    record = Recorder(options.out, machine("cpu"))
    idle, found = idle_bytes(), []
    for case in QUICK if options.quick else CASES:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            found += measure(case, Path(work), record, idle)
    if problems := failures(found):
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
