"""Speed of a whole conversion on one CUDA device: ``python -m benchmarks.measure.gpu_convert``.

From tmpfs to tmpfs, so that no disk hides the pipeline. The same run measures the rates that bound it: pinned copies
to the device and back, and copies within host memory. A conversion moves every input byte through host memory to the
device, and half as many bytes back; ``of_slowest`` is its input bytes a second divided by the slowest of the three
rates. llm-compressor's ``model_free_ptq`` follows on the same device if it is installed.

``--device cpu`` tries the script on a machine without a device, without the rates of the bus.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, Recorder, Timing, machine
from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8._utils import parse_bytes, usable_cores
from nemotron_fp8.engines.cuda.memory_plan import MAX_READERS, MAX_SLOT_BYTES, MAX_WRITERS

if TYPE_CHECKING:
    from collections.abc import Callable

PEER = """
import sys
from llmcompressor import model_free_ptq
source, destination, device = sys.argv[1:]
model_free_ptq(model_stub=source, save_directory=destination, scheme="FP8", ignore=["lm_head"], max_workers=8,
               device=device)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=16.0, help="size of the checkpoint in 1e9 bytes")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--max-memory", default="1GiB")
    parser.add_argument("--digests", action="store_true", help="compute SHA-256 digests")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="scratch folder; a tmpfs")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_convert.jsonl")
    options = parser.parse_args()
    recorder = Recorder(options.out, machine(options.device))
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        size = write_checkpoint(folder / "source", nemotron(options.gigabytes, options.shards))
        rates = roofs(options.device)
        for name, rate in rates.items():
            recorder.write(case=name, gigabytes_per_second=rate / 1e9)
        seconds, recipe = [], Recipe(format="fp8", granularity="tensor")
        for sample in range(options.samples + 1):
            started = time.perf_counter()
            quantize_repo(
                folder / "source",
                folder / "out",
                recipe,
                device=options.device,
                max_memory=options.max_memory,
                digests=options.digests,
            )
            if sample:  # the first one compiles the kernels
                seconds.append(time.perf_counter() - started)
            shutil.rmtree(folder / "out")
        timing = Timing.of(seconds)
        slowest = min(rates, key=lambda name: rates[name])
        recorder.write(
            case="conversion",
            seconds=timing.median,
            low=timing.low,
            high=timing.high,
            samples=timing.samples,
            bytes_in=size,
            shards=options.shards,
            digests=options.digests,
            max_memory=parse_bytes(options.max_memory),
            gigabytes_per_second=size / timing.median / 1e9,
            slowest=slowest,
            of_slowest=size / timing.median / rates[slowest],
        )
        peer(recorder, folder, options.device, timing.median)
    finally:
        shutil.rmtree(folder)


def roofs(device: str) -> dict[str, float]:
    """Measure bytes a second of pinned copies to and from the device, and of copies within host memory by threads."""
    rates = {"host memcpy": host_rate()}
    if device == "cpu":
        return rates
    size, times = MAX_SLOT_BYTES, 32
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    for name, target, source in (("pinned H2D", there, host), ("pinned D2H", host, there)):

        def copies(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            for _ in range(times):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)

        rates[name] = size * times / fastest(copies)
    return rates


def host_rate() -> float:
    """Measure bytes a second of copies between buffers, with the number of reader and writer threads of the engine."""
    threads = min(MAX_READERS + MAX_WRITERS, usable_cores())
    size = MAX_SLOT_BYTES
    pairs = [(bytearray(size), bytearray(size)) for _ in range(threads)]
    torch.set_num_threads(1)
    tensors = [tuple(torch.frombuffer(b, dtype=torch.uint8) for b in pair) for pair in pairs]
    with ThreadPoolExecutor(threads) as pool:
        return size * threads / fastest(lambda: list(pool.map(lambda pair: pair[0].copy_(pair[1]), tensors)))


def fastest(call: Callable[[], object], samples: int = 5) -> float:
    """Return the seconds of the fastest call: a roof is the best possible rate."""
    call()
    seconds = []
    for _ in range(samples):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def peer(recorder: Recorder, folder: Path, device: str, ours: float) -> None:
    """Measure llm-compressor on the same checkpoint, in its own process, without its imports."""
    if importlib.util.find_spec("llmcompressor") is None:
        recorder.write(case="llm-compressor", seconds=None, note="not installed")
        return
    imports = [sys.executable, "-c", "import llmcompressor"]
    command = [sys.executable, "-c", PEER, str(folder / "source"), str(folder / "peer"), device]
    loading = fastest(lambda: subprocess.run(imports, check=True), 2)
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started - loading
    recorder.write(case="llm-compressor", seconds=seconds, times_ours=seconds / ours)


if __name__ == "__main__":
    main()
