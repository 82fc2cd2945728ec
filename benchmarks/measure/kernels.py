"""Speed of the CPU path: ``python -m benchmarks.measure.kernels [--blocks]``; `benchmarks.gpu` measures on a device.

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
from nemotron_fp8_kernels.formats import DEFAULT_BLOCK, MX_BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8_kernels.formats import ScaleRounding

SHAPES = {"1 M": (1024, 1024), "expert 8 M (2048x4096)": (2048, 4096)}
"""Rows x columns of weights."""

BLOCK_SHAPES = {"in cache (128x1024)": (128, 1024), "in memory (8192x8192)": (8192, 8192)}
"""Rows x columns of weights for the comparison of blocks and roundings."""

BLOCKS: dict[str, tuple[tuple[int, int], ScaleRounding]] = {
    "block": (DEFAULT_BLOCK, "none"),
    "block, power-of-two": (DEFAULT_BLOCK, "power-of-two"),
    "MX": (MX_BLOCK, "mx"),
}
"""Block and rounding of its scale."""


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


def bench_blocks(recorder: Recorder, samples: int) -> None:
    """Measure blocks with and without rounded scales on one thread: a cast with its own amaxes, and dequantization."""
    torch.set_num_threads(1)
    for name, shape in BLOCK_SHAPES.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            w = (torch.randn(shape) * 0.02).to(dtype)
            out = torch.empty(shape, dtype=torch.float8_e4m3fn)
            write = partial(recorder.write, shape=name, elements=w.numel(), dtype=str(dtype)[6:])
            for label, (block, rounding) in BLOCKS.items():
                expected, scale = reference.quantize(w, "block", block, rounding=rounding)
                quantize = partial(cpu.quantize_finding_amax, w, "block", block, out, rounding=rounding)
                for operation, call in {
                    "quantize": quantize,
                    "quantize, error sums": partial(quantize, measure=True),
                    "dequantize": partial(cpu.dequantize, out, scale, "block", block, dtype),
                }.items():
                    call()
                    assert_bytes(out, expected)
                    # Short calls are repeated, so that the clock is fine enough.
                    count = max(1, (1 << 24) // w.numel())
                    found = time_host(_repeated(call, count), samples, time.thread_time)
                    one = Timing(found.median / count, found.low / count, found.high / count, found.samples)
                    _write(write, operation, label, one, w.numel(), w.itemsize + 1)


def _repeated(call: Callable[[], object], count: int) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(count):
            call()

    return repeat


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
    """Measure and write ``results/kernels-cpu.jsonl``, or with ``--blocks`` ``results/kernels-blocks-cpu.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--blocks", action="store_true", help="measure blocks with and without rounded scales")
    parser.add_argument("--output", type=Path, help="file of the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    name = "kernels-blocks-cpu.jsonl" if options.blocks else "kernels-cpu.jsonl"
    recorder = Recorder(options.output or RESULTS / name, machine("cpu"))
    (bench_blocks if options.blocks else bench)(recorder, options.samples)


if __name__ == "__main__":
    main()
