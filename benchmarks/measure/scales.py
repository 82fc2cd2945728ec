"""Speed of scales that are powers of two, beside other blocks: ``python -m benchmarks.measure.scales [--work DIR]``.

Every round converts the same source in the page cache to each layout in turn, by the compiled kernels, without digests.
Seconds of processors are those of this process. Ratios are of the same round, to blocks whose scales are not rounded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, Recorder, machine
from benchmarks.measure.paths import Bench, Sample, processor_seconds

PLAIN = "block"
LAYOUTS: dict[str, dict[str, Any]] = {
    PLAIN: {"format": "fp8", "scale_rounding": "none"},
    "block, powers of two": {"format": "fp8"},
    "block, powers of two in bytes": {"format": "fp8", "scale_dtype": "e8m0"},
    "MX": {"format": "mxfp8"},
    "block, statistics": {"format": "fp8", "scale_rounding": "none", "stats": True},
    "MX, statistics": {"format": "mxfp8", "stats": True},
}
"""Recipes by the names of the table."""


def convert(bench: Bench, name: str) -> Sample:
    """Convert the source to a layout."""
    from nemotron_fp8 import Recipe, quantize_repo

    started, before = time.perf_counter(), processor_seconds()
    quantize_repo(bench.source, bench.target, Recipe(**LAYOUTS[name]), digests=False)
    return {"processor_seconds": processor_seconds() - before, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, help="folder for source and results; a temporary one by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "scales-cpu.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as made:
        work = Path(made)
        size = write_checkpoint(work / "source", nemotron(options.gigabytes, 1))
        bench = Bench(work / "source", work)
        samples: dict[str, list[Sample]] = {name: [] for name in LAYOUTS}
        for number in range(options.rounds + 1):
            for name, mine in samples.items():
                found = bench.run(lambda name=name: convert(bench, name))  # type: ignore[misc]  # binds the loop's value
                if number:  # the first round warms up imports, the page cache and the disk
                    mine.append(found)
        record = Recorder(options.out, {**machine("cpu"), "gigabytes": size / 1e9, "rounds": options.rounds})
        for name, mine in samples.items():
            base = samples["block, statistics" if "statistics" in name else PLAIN]
            for key in ("processor_seconds", "seconds"):
                values = [sample[key] for sample in mine]
                ratios = [a / b[key] for a, b in zip(values, base, strict=True)]
                spread = {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
                record.write(layout=name, what=key, value=statistics.median(values), **spread)


if __name__ == "__main__":
    main()
