"""Speed of a whole conversion on one CUDA device: ``python -m benchmarks.measure.gpu_convert``.

From tmpfs to tmpfs, so that no disk hides the pipeline. The same run measures the rates that bound it: pinned copies
to the device and back, and copies within host memory. A conversion moves every input byte through host memory to the
device, and half as many bytes back; ``of_slowest`` is its input bytes a second divided by the slowest of the three
rates. Another conversion has timers in every step, and threads write to reserved pages of a few files.
llm-compressor's ``model_free_ptq`` follows on the same device if it is installed.

``--device cpu`` tries the script on a machine without a device, without the rates of the bus.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from unittest.mock import patch

import torch

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, Recorder, Timing, machine
from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8._utils import parse_bytes, usable_cores
from nemotron_fp8.destinations import file_sink
from nemotron_fp8.engines.cuda.device import CudaDevice, CudaStream
from nemotron_fp8.engines.cuda.memory_plan import MAX_READERS, MAX_SLOT_BYTES, MAX_WRITERS
from nemotron_fp8.engines.cuda.pipeline import Pipeline
from nemotron_fp8.engines.cuda.slot_reader import SlotReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PEER = """
import sys
from llmcompressor import model_free_ptq
source, destination, device = sys.argv[1:]
model_free_ptq(model_stub=source, save_directory=destination, scheme="FP8", ignore=["lm_head"], max_workers=8,
               device=device)
"""


class Write(Protocol):
    """Receives the fields of a record."""

    def __call__(self, **fields: Any) -> None: ...


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
        measure(
            recorder.write,
            folder,
            options.device,
            options.gigabytes,
            options.shards,
            options.samples,
            options.max_memory,
            options.digests,
        )
    finally:
        shutil.rmtree(folder)


def measure(
    write: Write,
    folder: Path,
    device: str,
    gigabytes: float,
    shards: int,
    samples: int,
    max_memory: str = "1GiB",
    digests: bool = False,
    hidden: int = 4096,
) -> None:
    """Measure the conversion and the rates that bound it; write a record after each.

    Args:
        write: receives the records.
        folder: empty scratch folder on a memory file system.
        hidden: hidden size of the checkpoint.
    """
    size = write_checkpoint(folder / "source", nemotron(gigabytes, shards, hidden))

    def convert() -> float:
        """Return the seconds of a conversion, whose result is removed."""
        started = time.perf_counter()
        quantize_repo(
            folder / "source",
            folder / "out",
            Recipe(format="fp8", granularity="tensor"),
            device=device,
            max_memory=max_memory,
            digests=digests,
        )
        seconds = time.perf_counter() - started
        shutil.rmtree(folder / "out")
        return seconds

    convert()  # compiles the kernels
    timing = Timing.of([convert() for _ in range(samples)])
    rates = roofs(device)
    for name, rate in rates.items():
        write(case=name, gigabytes_per_second=rate / 1e9)
    slowest = min(rates, key=lambda name: rates[name])
    write(
        case="conversion",
        seconds=timing.median,
        low=timing.low,
        high=timing.high,
        samples=timing.samples,
        bytes_in=size,
        shards=shards,
        digests=digests,
        max_memory=parse_bytes(max_memory),
        gigabytes_per_second=size / timing.median / 1e9,
        slowest=slowest,
        of_slowest=size / timing.median / rates[slowest],
    )
    profile = profiled(convert)
    write(case="profile", bytes_in=size, shards=shards, undisturbed=[timing.low, timing.high], **profile)
    for record in write_rates(folder, min(size // 16, 512 << 20)):
        write(case="tmpfs pwrite", **record)
    peer(write, folder, device, timing.median)


def profiled(convert: Callable[[], float]) -> dict[str, float]:
    """Return the seconds of one conversion and of its steps, by timers around the functions of each step.

    ``reserve``: pages of the output files, while nothing else runs. ``pin``: page-locking of the buffers. ``flow``:
    the passes over the shards. ``read_threads`` and ``write_threads``: sums over all threads. ``kernels``: on the
    device, by events.
    """
    totals: dict[str, float] = defaultdict(float)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    lock = threading.Lock()

    def timer(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                with lock:
                    totals[name] += time.perf_counter() - started

        return call

    def launch(stream: Any, kernel: Callable[[], None]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream._stream)
        plain_launch(stream, kernel)
        end.record(stream._stream)
        with lock:
            events.append((begin, end))

    plain_launch = CudaStream.launch
    with ExitStack() as stack:
        for owner, name, label in (
            (file_sink, "reserve", "reserve"),
            (CudaDevice, "host_buffer", "pin"),
            (Pipeline, "run", "flow"),
            (SlotReader, "fill", "read_threads"),
            (file_sink.FileSink, "write_at", "write_threads"),
        ):
            stack.enter_context(patch.object(owner, name, timer(label, getattr(owner, name))))
        if torch.cuda.is_available():
            stack.enter_context(patch.object(CudaStream, "launch", launch))
        seconds = convert()
    kernels = sum(begin.elapsed_time(end) for begin, end in events) / 1e3
    writers = min(MAX_WRITERS, usable_cores())
    steps = {name: totals[name] for name in ("reserve", "pin", "flow", "read_threads", "write_threads")}
    return {"seconds": seconds, "kernels": kernels, "writers": writers} | steps


def write_rates(folder: Path, size: int) -> Iterator[dict[str, Any]]:
    """Yield the bytes a second of threads that write to reserved pages of one, two and four files."""
    data = memoryview(bytearray(4 << 20))
    for files in (1, 2, 4):
        paths = [folder / f"rate-{number}" for number in range(files)]
        descriptors = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
        try:
            started = time.perf_counter()
            for descriptor in descriptors:
                file_sink.reserve(descriptor, size)
            reserved = time.perf_counter() - started

            def write(number: int, count: int, descriptors: list[int] = descriptors) -> None:
                for at in range(number // len(descriptors) * len(data), size, len(data) * count):
                    os.pwrite(descriptors[number % len(descriptors)], data[: size - at], at)

            threads = files * max(1, min(MAX_WRITERS, usable_cores()) // files)
            with ThreadPoolExecutor(threads) as pool:
                started = time.perf_counter()
                list(pool.map(write, range(threads), [threads // files] * threads))
                seconds = time.perf_counter() - started
            yield {
                "files": files,
                "threads": threads,
                "reserved": True,
                "gigabytes_per_second": files * size / seconds / 1e9,
                "reserve_gigabytes_per_second": files * size / reserved / 1e9,
            }
        finally:
            for descriptor, path in zip(descriptors, paths, strict=True):
                os.close(descriptor)
                path.unlink()


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


def peer(write: Write, folder: Path, device: str, ours: float) -> None:
    """Measure llm-compressor on the same checkpoint, in its own process, without its imports."""
    if importlib.util.find_spec("llmcompressor") is None:
        write(case="llm-compressor", seconds=None, note="not installed")
        return
    imports = [sys.executable, "-c", "import llmcompressor"]
    command = [sys.executable, "-c", PEER, str(folder / "source"), str(folder / "peer"), device]
    loading = fastest(lambda: subprocess.run(imports, check=True), 2)
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started - loading
    write(case="llm-compressor", seconds=seconds, times_ours=seconds / ours)


if __name__ == "__main__":
    main()
