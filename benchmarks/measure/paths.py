"""Compiled kernels against torch, in every layout, beside ``cp``: ``python -m benchmarks.measure.paths``.

Every round runs each contestant once, in turn, on the same source in the page cache: a conversion by the compiled
kernels and by torch, with digests, with error statistics, and ``cp`` with fsync. Seconds of processors are those of
this process, all threads and the kernel's part included. Ratios are of the same round. ``--work /dev/shm`` shows a disk
that costs nothing.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, Recorder, machine

if TYPE_CHECKING:
    from collections.abc import Callable

LAYOUTS = {"tensor": "fp8", "channel": "compressed-tensors", "block": "fp8"}
"""Layout of each granularity: that of the original script, the default, and that of DeepSeek."""

VARIANTS = ("compiled", "torch", "compiled, digests", "compiled, statistics")

Sample = dict[str, float]


def processor_seconds() -> float:
    """Return the seconds of processors that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Bench:
    """The source, a folder for results, and the contestants."""

    def __init__(self, source: Path, work: Path) -> None:
        from nemotron_fp8_kernels import native

        self.source, self.target = source, work / "out"
        self.shard = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        self.kernels = native.load()
        if self.kernels is None:
            raise SystemExit("there are no compiled kernels; run kernels/compile_kernels.py")

    def run(self, call: Callable[[], Sample]) -> Sample:
        shutil.rmtree(self.target, ignore_errors=True)
        os.sync()
        fd = os.open(self.shard, os.O_RDONLY)
        while os.read(fd, 1 << 20):
            pass
        os.close(fd)
        return call()

    def copy(self) -> Sample:
        self.target.mkdir()
        copied = self.target / self.shard.name
        started = time.perf_counter()
        subprocess.run(["cp", str(self.shard), str(copied)], check=True)
        between = time.perf_counter()
        subprocess.run(["sync", str(copied)], check=True)
        return {"seconds": time.perf_counter() - started, "fsync_seconds": time.perf_counter() - between}

    def convert(self, granularity: str, variant: str) -> Sample:
        from nemotron_fp8 import Recipe, quantize_repo
        from nemotron_fp8_kernels import native

        kernels = None if variant == "torch" else self.kernels
        native.load = lambda: kernels  # type: ignore[assignment]  # the benchmark chooses for the processor
        recipe = Recipe(format=LAYOUTS[granularity], granularity=granularity, stats="statistics" in variant)
        started, before = time.perf_counter(), processor_seconds()
        quantize_repo(self.source, self.target, recipe, digests="digests" in variant)
        return {"processor_seconds": processor_seconds() - before, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, help="folder for source and results; a temporary one by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "paths-cpu.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as made:
        work = Path(made)
        size = write_checkpoint(work / "source", nemotron(options.gigabytes, 1))
        bench = Bench(work / "source", work)
        kinds = [(granularity, variant) for granularity in LAYOUTS for variant in VARIANTS]
        samples: dict[tuple[str, str], list[Sample]] = {kind: [] for kind in kinds}
        copies: list[Sample] = []
        for number in range(options.rounds + 1):
            copied = bench.run(bench.copy)
            found = {kind: bench.run(lambda kind=kind: bench.convert(*kind)) for kind in kinds}  # type: ignore[misc]
            if number:  # the first round warms up imports, the page cache and the disk
                copies.append(copied)
                for kind, sample in found.items():
                    samples[kind].append(sample)
        record = Recorder(options.out, {**machine("cpu"), "gigabytes": size / 1e9, "rounds": options.rounds})
        for key in ("seconds", "fsync_seconds"):
            _write(record, f"cp {key}", "-", key, [copy[key] for copy in copies], {})
        for (granularity, variant), mine in samples.items():
            for key in ("seconds", "processor_seconds"):
                values = [sample[key] for sample in mine]
                ratios = {
                    "compiled": [a / b[key] for a, b in zip(values, samples[granularity, "compiled"], strict=True)]
                }
                ratios["torch"] = [a / b[key] for a, b in zip(values, samples[granularity, "torch"], strict=True)]
                if key == "seconds":
                    ratios["cp"] = [a / b[key] for a, b in zip(values, copies, strict=True)]
                _write(record, variant, granularity, key, values, ratios)


def _write(
    record: Recorder, contestant: str, granularity: str, what: str, values: list[float], ratios: dict[str, list[float]]
) -> None:
    """Record the median of a quantity with the lowest and the highest of its rounds, and of its ratios to others."""
    fields = {"value": statistics.median(values), "low": min(values), "high": max(values)}
    for name, found in ratios.items():
        fields |= {f"to_{name}": statistics.median(found), f"to_{name}_low": min(found), f"to_{name}_high": max(found)}
    record.write(contestant=contestant, granularity=granularity, what=what, **fields)


if __name__ == "__main__":
    main()
