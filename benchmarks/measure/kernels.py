"""Speed of the CPU path: ``python -m benchmarks.measure.kernels``; `benchmarks.gpu` measures the kernels on a device.

The shapes are small and one thread works. Every case is first compared with the reference as bytes, so that no wrong
result is timed.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common import RESULTS, Recorder, Timing, machine, time_host
from nemotron_fp8_kernels import cpu, reference

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = {"1 M": (1024, 1024), "expert 8 M (2048x4096)": (2048, 4096)}
"""Rows x columns of weights."""


def quantize_formula(w: torch.Tensor, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize by the plain formula, for torch eager and torch.compile; bytes may differ by a rounding."""
    w32 = w.float()
    if granularity == "block":
        rows, columns = w.shape
        w32 = w32.view(rows // 128, 128, columns // 128, 128)
        amax = w32.abs().amax(dim=(1, 3), keepdim=True)
    elif granularity == "channel":
        amax = w32.abs().amax(dim=1, keepdim=True)
    else:
        amax = w32.abs().amax()
    mult = 448.0 / amax.clamp(min=1e-12)
    q = (w32 * mult).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return q.view(w.shape), mult.reciprocal()


def bench(recorder: Recorder, samples: int) -> None:
    """Measure one thread, in its processor seconds: amax, and cast with a given amax, the two steps of streaming."""
    torch.set_num_threads(1)
    timed = partial(time_host, samples=samples, clock=time.thread_time)
    for name, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            w = (torch.randn(shape) * 0.02).to(dtype)
            out = torch.empty(shape, dtype=torch.float8_e4m3fn)
            copy = torch.empty_like(w)
            write = partial(recorder.write, shape=name, elements=w.numel(), dtype=str(dtype)[6:])
            _write(write, "copy", "-", timed(partial(copy.copy_, w)), w.numel(), 2 * w.itemsize)
            for granularity in ("tensor", "channel", "block"):
                expected = reference.quantize(w, granularity)[0]
                amax = cpu.amax_bits(w, granularity)
                cast = partial(cpu.quantize_with_amax, w, amax, granularity, out=out)
                cast()
                assert_bytes(out, expected)
                passes: dict[str, Callable[[], object]] = {
                    "amax": partial(cpu.amax_bits, w, granularity),
                    "cast": cast,
                    "torch eager": partial(quantize_formula, w, granularity),
                }
                for operation, call in passes.items():
                    moved = w.itemsize + (operation != "amax")
                    _write(write, operation, granularity, timed(call), w.numel(), moved)


def assert_bytes(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse to time a wrong result."""
    if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
        raise SystemExit("the kernel's bytes differ from the reference's")


def _write(
    write: Callable[..., None],
    operation: str,
    granularity: str,
    timing: Timing,
    elements: int,
    moved: float,
) -> None:
    """Record times, elements and bytes a second at ``moved`` bytes per element."""
    write(
        operation=operation,
        granularity=granularity,
        seconds=timing.median,
        seconds_low=timing.low,
        seconds_high=timing.high,
        samples=timing.samples,
        elements_per_second=elements / timing.median,
        floor_bytes_per_element=moved,
        bytes_per_second=moved * elements / timing.median,
    )


def main() -> None:
    """Measure and write ``results/kernels-cpu.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels-cpu.jsonl")
    options = parser.parse_args()
    torch.manual_seed(0)
    bench(Recorder(options.output, machine("cpu")), options.samples)


if __name__ == "__main__":
    main()
