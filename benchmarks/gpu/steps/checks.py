"""Bytes of every kernel on real widths, against the reference on the CPU, before anything is timed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.cases import ROUNDINGS
from nemotron_fp8_kernels import reference

if TYPE_CHECKING:
    from benchmarks.gpu.run import Run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRANULARITIES = ("tensor", "channel", "block")


def go(run: Run, _stage: str, job: str) -> None:
    """Compare one share of the checks: a dtype or half of its shapes, lists, or graphs; without a name one of each."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    for share in [job] if job else ["bfloat16", "lists", "graphs"]:
        if share == "lists":
            _lists(run)
        elif share == "graphs":
            _graphs(run)
        else:
            name, _, half = share.partition(":")
            dtype = next(dtype for dtype in DTYPES if str(dtype).endswith(name))
            for shape in run.checked[int(half or 0) :: 2 if half else 1]:
                _shape(run, shape, dtype)


def _shape(run: Run, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Quantize and dequantize one shape: dense, with strided rows, at an odd address, and with non-finite elements."""
    from nemotron_fp8_kernels.gpu import ops

    rows, columns = shape
    base = (torch.randn(rows * (columns + 3) + 1) * 0.02).to(dtype)
    bad = base.clone()
    bad[3 % len(bad)], bad[-1] = float("nan"), -float("inf")
    moved, moved_bad = (values.to(run.device) for values in (base, bad))
    layouts = {
        "dense": lambda values: values[: rows * columns].view(rows, columns),
        "odd address": lambda values: values[1 : 1 + rows * columns].view(rows, columns),
        "strided rows": lambda values: values[: rows * (columns + 3)].view(rows, columns + 3)[:, :columns],
    }
    whole = [("dense", base, moved), ("dense", bad, moved_bad), ("odd address", base, moved)]
    for layout, values, on_device in [*whole, ("strided rows", base, moved)]:
        w, d = layouts[layout](values), layouts[layout](on_device)
        for granularity in GRANULARITIES:
            fields = {"shape": f"{rows}x{columns}", "dtype": str(dtype)[6:], "layout": layout}
            name = f"quantize by {granularity}"
            with run.step(name, **fields):
                q, scale = ops.quantize(d, granularity)
                bits = ops.amax_bits(d, granularity)
                again, again_scale = ops.quantize_with_amax(d, bits, granularity)
                # NaN codes have no value to compare bytes of.
                back = ops.dequantize(q, scale, granularity, dtype=dtype) if values is base else None
                run.wait()
                expected_q, expected_scale = reference.quantize(w, granularity)
                compare = partial(run.compare, **fields)
                compare(q, expected_q, name)
                compare(scale, expected_scale, name)
                compare(bits, reference.amax_bits(w, granularity), f"amax by {granularity}")
                compare(again, expected_q, f"cast by {granularity}")
                compare(again_scale, expected_scale, f"cast by {granularity}")
                if back is not None:
                    restored = reference.dequantize(expected_q, expected_scale, granularity, dtype=dtype)
                    compare(back, restored, f"dequantize by {granularity}")
        for label, (granularity, block, rounding) in ROUNDINGS.items():
            with run.step(f"quantize by {label}", shape=f"{rows}x{columns}", dtype=str(dtype)[6:], layout=layout):
                q, scale = ops.quantize(d, granularity, block, rounding=rounding)
                run.wait()
                expected_q, expected_scale = reference.quantize(w, granularity, block, rounding=rounding)
                compare = partial(run.compare, shape=f"{rows}x{columns}", dtype=str(dtype)[6:], layout=layout)
                compare(q, expected_q, f"quantize by {label}")
                compare(scale, expected_scale, f"quantize by {label}")
        run.report_compared("bytes of every kernel")


def _lists(run: Run) -> None:
    """Quantize lists again and again, also into given outputs and with shared scales: a race would not repeat."""
    from nemotron_fp8_kernels.gpu import many

    for sizes in run.checked_lists:
        for dtype in DTYPES[:1] if run.dry else DTYPES:
            fields = {"shape": f"{len(sizes)} tensors", "dtype": str(dtype)[6:]}
            with run.step("quantize_many", **fields):
                weights = [(torch.randn(size) * 2.0 ** -(i % 20)).to(dtype) for i, size in enumerate(sizes)]
                moved = [w.to(run.device) for w in weights]
                outs = [torch.empty_like(w, dtype=torch.float8_e4m3fn) for w in moved]
                shared = [[0, len(sizes) - 1]]
                runs = [
                    many.quantize_many(moved, shared=shared if number % 2 else None, out=outs if number == 2 else None)
                    for number in range(4)
                ]
                run.wait()
                plain = reference.quantize_many(weights)
                grouped = reference.quantize_many(weights, shared=shared)
                for number, found in enumerate(runs):
                    for (q, scale), expected in zip(found, grouped if number % 2 else plain, strict=True):
                        run.compare(q, expected[0], "quantize_many", **fields)
                        run.compare(scale, expected[1], "quantize_many", **fields)
            run.report_compared("bytes of every kernel")


def _graphs(run: Run) -> None:
    """Replay a graph with a dependent launch, and quantize many tensors without a pause."""
    from nemotron_fp8_kernels.gpu import many, ops

    size = 300 if run.dry else 8 << 20
    with run.step("tensor in a graph"):
        w = torch.randn(size, device=run.device).bfloat16()
        q = torch.empty_like(w, dtype=torch.float8_e4m3fn)
        ops.quantize(w, out=q)
        run.wait()
        replay = partial(ops.quantize, w, out=q)
        if run.mode == "device":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replay()
            replay = graph.replay
        for number in range(2 if run.dry else 20):
            w.mul_(0.5 if number % 2 else 2.0)
            q.view(torch.uint8).fill_(0x55)
            replay()
            run.wait()
            run.compare(q, reference.quantize(w.cpu())[0], "tensor in a graph")
    with run.step("tensors without a pause"):
        count = 3 if run.dry else 200
        sizes = [1000 if run.dry else 1 << 20] * count
        weights = [
            torch.full((n,), 2.0 ** -(i % 100), device=run.device, dtype=torch.bfloat16) for i, n in enumerate(sizes)
        ]
        found = [ops.quantize(w)[1] for w in weights]
        lists = many.quantize_many(weights)
        run.wait()
        for w, scale, (_, again) in zip(weights, found, lists, strict=True):
            expected = reference.quantize(w[:4].cpu())[1]
            run.compare(scale, expected, "tensors without a pause")
            run.compare(again, expected, "tensors without a pause")
    run.report_compared("bytes of every kernel")
