"""Speed of a conversion against ``cp`` and other tools, in one run: ``python -m benchmarks.measure.convert``.

Every round runs each contestant once, in turn, on the same source, so that other load on the machine affects all of
them; figures are medians of rounds, and ratios to ``cp`` followed by fsync. Contestants: this library without and
with digests, in the layout of the original script, in this process; ``cp`` and fsync; the script of the original model
card (load_file, aminmax, scale, clamp, cast, save_file), timed inside its own process; llm-compressor, if an
interpreter with it is given. Peak resident memory is that of a new process for each contestant.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, Recorder, machine

if TYPE_CHECKING:
    from collections.abc import Callable

ORIGINAL = """
import json, sys, time, resource, torch
from safetensors.torch import load_file, save_file
source, target = sys.argv[1:]
started = time.perf_counter()
tensors = load_file(source)
for name in [n for n in tensors if n.endswith("_proj.weight")]:
    weight = tensors[name]
    low, high = weight.aminmax() if weight.numel() else (torch.tensor(-16.0), torch.tensor(16.0))
    amax = torch.maximum(low.abs(), high.abs())
    scale = 448.0 / amax.clamp(min=1e-12)
    tensors[name] = (weight * scale).clamp(min=-448.0, max=448.0).to(torch.float8_e4m3fn)
    tensors[name + "_scale"] = scale.float().reciprocal()
save_file(tensors, target)
import os
fd = os.open(target, os.O_RDONLY); os.fsync(fd); os.close(fd)
print(json.dumps({"seconds": time.perf_counter() - started}))
"""

OURS = """
import json, sys
from nemotron_fp8 import Recipe, quantize_repo
recipe = Recipe(format="fp8", granularity="tensor")
report = quantize_repo(sys.argv[1], sys.argv[2], recipe, digests=sys.argv[3] == "1")
print(json.dumps({"seconds": report.seconds}))
"""

LLM_COMPRESSOR = """
import json, sys, time
from llmcompressor import model_free_ptq
started = time.perf_counter()
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme="FP8_DYNAMIC",
               ignore=["lm_head", "re:.*norm.*"], max_workers=2, device="cpu")
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


class Bench:
    """The source, a scratch folder, and the contestants."""

    def __init__(self, source: Path, work: Path, cold: bool, llm_compressor: str | None) -> None:
        self.source, self.work, self.cold = source, work, cold
        self.shard = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        self.target = work / "out"
        self.contestants: dict[str, Callable[[], float]] = {
            "cp + fsync": self.copy,
            "ours": lambda: self.ours(digests=False),
            "ours, digests": lambda: self.ours(digests=True),
            "original script": self.original,
        }
        if llm_compressor:
            self.contestants["llm-compressor"] = lambda: self.child(llm_compressor, LLM_COMPRESSOR, self.source)

    def run(self, name: str) -> float:
        """Measure the seconds of one run of a contestant, from the same state of the page cache."""
        shutil.rmtree(self.target, ignore_errors=True)
        os.sync()
        self.prepare_cache()
        return self.contestants[name]()

    def prepare_cache(self) -> None:
        fd = os.open(self.shard, os.O_RDONLY)
        try:
            if self.cold:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                return
            while os.read(fd, 1 << 24):
                pass
        finally:
            os.close(fd)

    def copy(self) -> float:
        self.target.mkdir()
        started = time.perf_counter()
        copied = self.target / self.shard.name
        subprocess.run(["cp", str(self.shard), str(copied)], check=True)
        subprocess.run(["sync", str(copied)], check=True)
        return time.perf_counter() - started

    def ours(self, digests: bool) -> float:
        from nemotron_fp8 import Recipe, quantize_repo

        recipe = Recipe(format="fp8", granularity="tensor")  # the layout of the original script
        started = time.perf_counter()
        quantize_repo(self.source, self.target, recipe, digests=digests)
        return time.perf_counter() - started

    def original(self) -> float:
        self.target.mkdir()
        return self.child(sys.executable, ORIGINAL, self.shard, self.target / self.shard.name)

    def child(self, python: str, script: str, *arguments: Path) -> float:
        """Run a script in its own process; return the seconds that it prints, without its imports."""
        if arguments[-1] in (self.source, self.shard):
            arguments = (*arguments, self.target)
        ran = subprocess.run([python, "-c", script, *map(str, arguments)], check=True, capture_output=True, text=True)
        return float(json.loads(ran.stdout.splitlines()[-1])["seconds"])


def peak(python: str, script: str, *arguments: str) -> int:
    """Measure the peak resident bytes of a new process that runs a script."""
    code = script + "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    ran = subprocess.run([python, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return int(ran.stdout.split()[-1]) * 1024


def memory(bench: Bench, llm_compressor: str | None) -> dict[str, int]:
    """Measure the peak resident bytes of every contestant but ``cp``."""
    shard, source, out = str(bench.shard), str(bench.source), str(bench.target)
    runs: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "ours": (sys.executable, OURS, (source, out, "0")),
        "ours, digests": (sys.executable, OURS, (source, out, "1")),
        "original script": (sys.executable, ORIGINAL, (shard, f"{out}/{bench.shard.name}")),
    }
    if llm_compressor:
        runs["llm-compressor"] = (llm_compressor, LLM_COMPRESSOR, (source, out))
    found = {}
    for name, (python, script, arguments) in runs.items():
        shutil.rmtree(bench.target, ignore_errors=True)
        if name == "original script":
            bench.target.mkdir()
        found[name] = peak(python, script, *arguments)
    return found


def phases(bench: Bench) -> dict[str, tuple[float, float]]:
    """Measure processor seconds and wall seconds of each phase of a conversion, on one thread."""
    import hashlib

    from nemotron_fp8.engines.cpu import CpuEngine
    from nemotron_fp8.planning.quantize import make_plan
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.sources.open import open_source
    from nemotron_fp8.sources.reader import Reader

    opened = open_source(bench.source)
    recipe = Recipe(format="fp8", granularity="tensor")
    shard_task = make_plan(opened.inventory, recipe, 256 << 20, 1).shard_tasks[0]
    engine = CpuEngine()
    offsets = {e.name: shard_task.layout.data_start + e.start for e in shard_task.layout.entries}
    shutil.rmtree(bench.target, ignore_errors=True)
    bench.target.mkdir()
    made = os.open(bench.target / "shard", os.O_RDWR | os.O_CREAT)
    found: dict[str, tuple[float, float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        found[name] = (time.process_time() - cpu, time.perf_counter() - wall)
        return result

    def digest() -> None:
        hasher, offset = hashlib.sha256(), 0
        while piece := os.pread(made, 1 << 20, offset):
            hasher.update(piece)
            offset += len(piece)

    bench.prepare_cache()
    with Reader(opened.opener) as reader:
        amaxes = timed("amax", lambda: engine.amaxes(shard_task, reader))
        timed("cast", lambda: engine.cast(shard_task.tensor_tasks, shard_task, reader, amaxes, lambda *_: None))

        def put(name: str, begin: int, data: memoryview) -> None:
            os.pwrite(made, data, offsets[name] + begin)

        os.posix_fallocate(made, 0, shard_task.layout.file_size)
        timed("cast and write", lambda: engine.cast(shard_task.tensor_tasks, shard_task, reader, amaxes, put))
    timed("fsync", lambda: os.fsync(made))
    timed("digest", digest)
    os.close(made)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache before every run")
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="an interpreter with llm-compressor")
    parser.add_argument("--work", type=Path, help="folder for source and results; a temporary one by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "convert-cpu.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as made:
        work = Path(made)
        size = write_checkpoint(work / "source", nemotron(options.gigabytes, 1))
        bench = Bench(work / "source", work, options.cold, options.llm_compressor)
        record = Recorder(
            options.out, {**machine("cpu"), "gigabytes": size / 1e9, "cache": "cold" if options.cold else "warm"}
        )
        seconds: dict[str, list[float]] = {name: [] for name in bench.contestants}
        for name in bench.contestants:  # warm up: imports, page cache, the disk
            bench.run(name)
        for _ in range(options.rounds):
            for name, times in seconds.items():
                times.append(bench.run(name))
        peaks = memory(bench, options.llm_compressor)
        base = seconds["cp + fsync"]
        for name, times in seconds.items():
            ratios = sorted(ours / theirs for ours, theirs in zip(times, base, strict=True))
            record.write(
                contestant=name,
                seconds=statistics.median(times),
                seconds_low=min(times),
                seconds_high=max(times),
                ratio_to_cp=statistics.median(ratios),
                ratio_low=ratios[0],
                ratio_high=ratios[-1],
                rounds=len(times),
                peak_resident_bytes=peaks.get(name),
            )
        for name, (cpu, wall) in phases(bench).items():
            record.write(phase=name, processor_seconds=cpu, seconds=wall, threads=1)
        with suppress(OSError):
            load = os.getloadavg()[0]
            record.write(load_average=load, self_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
