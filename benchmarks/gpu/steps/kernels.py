"""Times of the kernels on single weights, between two rounds of roofs of the same shape."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.cases import ROUNDINGS
from benchmarks.gpu.timing import buffers, figure, roofs, timed, warm
from nemotron_fp8_kernels import reference

if TYPE_CHECKING:
    from benchmarks.gpu.run import Run

FLOOR = {"tensor": 5, "channel": 3, "block": 3}
"""Bytes per bf16 element that must cross the memory bus: read (twice for one scale per tensor) and written."""

GRANULARITIES = ("channel", "block", "tensor")


def go(run: Run, _stage: str, _job: str) -> None:
    """Measure all shapes: roofs, our kernels, a device copy, roofs; then rounded scales, ragged widths and others."""
    warm(run)
    for name, shape in run.shapes.items():
        with run.step("kernels", shape=name):
            _shape(run, name, shape, "ours")
    for name, shape in run.rounded.items():
        with run.step("rounded", shape=name):
            _rounded(run, name, shape)
    for name, shape in run.ragged.items():
        with run.step("ragged", shape=name):
            _shape(run, name, shape, "ragged")
    with run.step("odd addresses", shape=run.odd):
        _shape(run, run.odd, run.shapes[run.odd], "at odd addresses", shift=1)
    for name, shape in run.float32.items():
        with run.step("float32", shape=name):
            _shape(run, name, shape, "ours, float32", dtype=torch.float32, granularities=("channel",))


def _shape(
    run: Run,
    name: str,
    shape: tuple[int, int],
    operation: str,
    dtype: torch.dtype = torch.bfloat16,
    shift: int = 0,
    granularities: tuple[str, ...] = GRANULARITIES,
) -> None:
    from nemotron_fp8_kernels.gpu import ops

    inputs, outs = buffers(run, shape, dtype, shift)
    elements = shape[0] * shape[1]
    fields: dict[str, Any] = {"shape": name, "dtype": str(dtype).removeprefix("torch.")}
    roofs(run, name, inputs, outs)
    for granularity in granularities:
        with run.step(operation, granularity=granularity, **fields):
            ops.quantize(inputs[0], granularity, out=outs[0])
            calls = [partial(ops.quantize, w, granularity, out=q) for w, q in zip(inputs, outs, strict=True)]
            floor = FLOOR[granularity] + (dtype.itemsize - 2) * (2 if granularity == "tensor" else 1)
            figure(run, operation, granularity, timed(run, calls), elements, floor, **fields)
            check(run, inputs, outs, granularity, **fields)
    with run.step("device copy", **fields):
        targets = [torch.empty_like(w) for w in inputs[:2]]
        copies = [partial(target.copy_, w) for target, w in zip(targets, inputs, strict=False)]
        figure(run, "device copy", "-", timed(run, copies, 9), elements, 2 * dtype.itemsize, **fields)
        del targets, copies
    roofs(run, name, inputs, outs)
    run.emit_clock(**fields)
    run.report_compared("bytes beside the timings")


def _rounded(run: Run, name: str, shape: tuple[int, int]) -> None:
    """Measure blocks with scales that are powers of two."""
    from nemotron_fp8_kernels.gpu import ops

    inputs, outs = buffers(run, shape)
    roofs(run, name, inputs, outs)
    for label, (granularity, block, rounding) in ROUNDINGS.items():
        with run.step("ours, rounded", shape=name, granularity=label):
            ops.quantize(inputs[0], granularity, block, out=outs[0], rounding=rounding)
            calls = [
                partial(ops.quantize, w, granularity, block, out=q, rounding=rounding)
                for w, q in zip(inputs, outs, strict=True)
            ]
            floor = FLOOR[granularity] + 4 / (block[0] * block[1])
            figure(run, "ours, rounded", label, timed(run, calls), shape[0] * shape[1], floor, shape=name)
            part = inputs[0][:128].cpu()
            expected = reference.quantize(part, granularity, block, rounding=rounding)[0]
            run.compare(outs[0][:128], expected, f"quantize by {label}", shape=name)
    roofs(run, name, inputs, outs)
    run.report_compared("bytes beside the timings")


def check(run: Run, inputs: list[torch.Tensor], outs: list[torch.Tensor], granularity: str, **fields: Any) -> None:
    """Compare the first 128 rows, which are whole rows and blocks, of the first and the last result of a timing."""
    for w, q in ((inputs[0], outs[0]), (inputs[-1], outs[-1])):
        part = w[:128].cpu()
        if granularity == "tensor":
            low, high = w.aminmax()
            amax = torch.maximum(low.abs(), high.abs()).float().cpu()
        else:
            amax = reference.amax(part, granularity)
        expected = reference.quantize_with_amax(part, amax, granularity)[0]
        run.compare(q[:128], expected, f"quantize by {granularity}", **fields)
        if run.mode != "device":
            break  # only the first buffer was used
