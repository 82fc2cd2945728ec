"""Growth of time and memory: ``python -m benchmarks.measure.growth``.

Plan time and memory by tensors (up to 100,000) and shards (up to 10,000); conversion time, peak memory and open files
by shards and bytes. Every case runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoints import Shapes, write_checkpoint
from benchmarks.common import RESULTS, Recorder, machine

PLAN = """
import json, sys, time
cpu, wall = time.process_time(), time.perf_counter()
from nemotron_fp8 import Recipe, plan_repo
plan = plan_repo(sys.argv[1], Recipe(format="fp8", granularity="tensor"))
print(json.dumps({"tensors": len(plan.tensors), "processor_seconds": time.process_time() - cpu,
                  "seconds": time.perf_counter() - wall}))
"""
CONVERT = """
import json, os, sys, threading, time
from nemotron_fp8 import Recipe, quantize_repo
most, stop = 0, threading.Event()
def watch():
    global most
    while not stop.wait(0.01):
        most = max(most, len(os.listdir("/proc/self/fd")))
thread = threading.Thread(target=watch); thread.start()
cpu = time.process_time()
report = quantize_repo(sys.argv[1], sys.argv[2], Recipe(format="fp8", granularity="tensor"))
stop.set(); thread.join()
print(json.dumps({"seconds": report.seconds, "processor_seconds": time.process_time() - cpu, "open_files": most}))
"""
TAIL = "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def shapes(shards: int, tensors: int, size: tuple[int, int]) -> Shapes:
    """Return shapes of ``tensors`` projections, divided among ``shards`` shards."""
    groups: Shapes = [[] for _ in range(shards)]
    for i in range(tensors):
        layer, which = divmod(i, len(NAMES))
        groups[i * shards // tensors].append((f"model.layers.{layer}.{NAMES[which]}.weight", size))
    return groups


def child(script: str, *arguments: str) -> dict[str, float]:
    """Run a script in its own process; return its measurements and its peak resident bytes."""
    ran = subprocess.run([sys.executable, "-c", script + TAIL, *arguments], check=True, capture_output=True, text=True)
    *_, line, peak = ran.stdout.split("\n")[:-1]
    return json.loads(line) | {"peak_resident_bytes": int(peak) * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "growth-cpu.jsonl")
    parser.add_argument("--quick", action="store_true", help="the smaller cases only")
    options = parser.parse_args()
    record = Recorder(options.out, machine("cpu"))
    plans = [(1, 1_000), (10, 10_000), (100, 100_000), (1_000, 10_000), (10_000, 20_000)]
    conversions = [(1, 12, (1024, 1024)), (10, 120, (1024, 1024)), (100, 1_200, (1024, 1024)), (1_000, 1_200, (64, 64))]
    sizes = [(2, 12, (2048, 2048)), (2, 12, (4096, 4096)), (2, 12, (8192, 8192))]
    if options.quick:
        plans, conversions, sizes = plans[:2], conversions[:2], sizes[:1]
    with tempfile.TemporaryDirectory() as made:
        for what, cases in (("plan", plans), ("convert", [*conversions, *sizes])):
            for number, case in enumerate(cases):
                shards, tensors, size = (*case, (8, 8)) if what == "plan" else case
                source = Path(made) / f"{what}-{number}"
                nbytes = write_checkpoint(source, shapes(shards, tensors, size))
                arguments = (str(source),) if what == "plan" else (str(source), f"{source}-out")
                figures = child(PLAN if what == "plan" else CONVERT, *arguments)
                record.write(**{"what": what, "shards": shards, "tensors": tensors, "bytes": nbytes, **figures})


if __name__ == "__main__":
    main()
