"""Error and speed of best scales, beside those of amaxes: ``python -m benchmarks.measure.best_scales [FOLDER ...]``.

The error is that of weights of known distributions, by the length of their rows, and of the matrices in the layers of
each given checkpoint. For the speed, every round converts the same source in the page cache in each way in turn, by the
compiled kernels, and verifies the result. Seconds of processors are those of this process.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, Recorder, machine
from benchmarks.measure.paths import Bench, Sample, processor_seconds
from benchmarks.measure.requantization import TITLES, matrices
from nemotron_fp8_kernels import cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

COLUMNS = (256, 1024, 4096, 16384)
ELEMENTS = 1 << 22
"""Elements of each weight of a known distribution."""
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "no digests": ({}, False),
    "digests": ({}, True),
    "no digests, statistics": ({"stats": True}, False),
}
"""Recipe and digests of each way of a conversion."""
VERIFY = "verification"


def distributions() -> dict[str, list[torch.Tensor]]:
    """Return bf16 weights with rows of each length: normal, and Student's t with 4 degrees."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[torch.Tensor]] = {"normal": [], "Student's t": []}
    for columns in COLUMNS:
        normal = torch.randn(5, ELEMENTS // columns, columns, generator=generator) * 0.02
        found["normal"].append(normal[0].bfloat16())
        found["Student's t"].append((normal[0] / (normal[1:] / 0.02).square().mean(0).sqrt()).bfloat16())
    return found


def errors(weights: Iterable[torch.Tensor]) -> dict[int, dict[str, float]]:
    """Return sums of squares of weights, and of their errors by the choice of scales, by the columns of a row."""
    found: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys(("signal", "amax", "best", "values"), 0.0))
    for w in weights:
        sums = found[w.shape[1]]
        for choice, bits in (("amax", cpu.amax_bits(w, "channel")), ("best", cpu.best_amax_bits(w))):
            measured = cpu.cast_and_measure(w, bits, "channel")[1]
            sums[choice] += float(measured.noise.sum())
        sums["signal"] += float(measured.signal.sum())
        sums["values"] += w.numel()
    return found


def measure_errors(record: Recorder, folders: Iterable[Path]) -> None:
    cases: dict[str, Iterable[torch.Tensor]] = dict(distributions())
    cases |= {TITLES.get(folder.name, folder.name): matrices(folder) for folder in folders}
    for name, weights in cases.items():
        for columns, sums in sorted(errors(weights).items()):
            relative = {choice: math.sqrt(sums[choice] / sums["signal"]) for choice in ("amax", "best")}
            record.write(what="error", weights=name, columns=columns, values=int(sums["values"]), **relative)


def run(call: Callable[[], object]) -> Sample:
    started, before = time.perf_counter(), processor_seconds()
    call()
    return {"processor_seconds": processor_seconds() - before, "seconds": time.perf_counter() - started}


def sample(bench: Bench) -> dict[tuple[str, str], Sample]:
    """Run every way once, with both choices in turn."""
    from nemotron_fp8 import Recipe, quantize_repo, verify_repo

    found = {}
    for way, (recipe, digests) in WAYS.items():
        for scales in ("amax", "best"):
            chosen = Recipe(scales=scales, **recipe)  # type: ignore[arg-type]  # a choice
            found[way, scales] = bench.run(
                lambda chosen=chosen, digests=digests: run(  # type: ignore[misc]  # binds the loop's values
                    lambda: quantize_repo(bench.source, bench.target, chosen, digests=digests, device="cpu")
                )
            )
            if way == "no digests":
                found[VERIFY, scales] = run(lambda: verify_repo(bench.source, bench.target))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--gigabytes", type=float, default=1.4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for source and results; a temporary one by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "best-scales-cpu.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as made:
        work = Path(made)
        size = write_checkpoint(work / "source", nemotron(options.gigabytes, 1))
        bench = Bench(work / "source", work)
        rounds = [sample(bench) for _ in range(options.rounds + 1)][1:]  # the first one warms up
    record = Recorder(options.out, {**machine("cpu"), "gigabytes": size / 1e9, "rounds": options.rounds})
    for way in (*WAYS, VERIFY):
        for key in ("processor_seconds", "seconds"):
            values = {scales: [found[way, scales][key] for found in rounds] for scales in ("amax", "best")}
            ratios = [best / amax for amax, best in zip(values["amax"], values["best"], strict=True)]
            spread = {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
            medians = {scales: statistics.median(each) for scales, each in values.items()}
            record.write(what=key, way=way, **medians, **spread)
    measure_errors(record, options.folders)


if __name__ == "__main__":
    main()
