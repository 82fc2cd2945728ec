"""Speed of the kernels relative to the roofs of the same run: ``python -m benchmarks.measure.kernels``.

On a CUDA device, a device copy and a kernel that only reads 2 bytes and writes 1 give the roofs. Then each
granularity and shape is measured: our kernel, torch eager, torch.compile and, if installed, torchao's Triton kernel;
then lists of tensors. Inputs rotate over more than four times the L2, outputs are allocated beforehand, and launches
are in CUDA graphs. On a CPU the shapes are small and one thread works. Every case is first compared with the
reference as bytes, so that no wrong result is timed.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import RESULTS, Recorder, Timing, machine, time_device, time_host
from nemotron_fp8_kernels import cpu, reference

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = {
    "1 M": (1024, 1024),
    "expert 8 M (2048x4096)": (2048, 4096),
    "Minitron-8B up (16384x4096)": (16384, 4096),
    "340B o_proj (18432x18432)": (18432, 18432),
    "340B up (73728x18432)": (73728, 18432),
}
"""Rows x columns of weights; the last is 1.36 G elements."""

CPU_SHAPES = {"1 M": (1024, 1024), "expert 8 M (2048x4096)": (2048, 4096)}

LISTS = {"64 x 5 M": (64, 5 << 20), "64 x 8 M": (64, 8 << 20), "64 x 12 M": (64, 12 << 20)}
"""Lists of equal tensors for quantize_many: count, elements of each."""

FLOOR = {"tensor": 5, "channel": 3, "block": 3}
"""Bytes per bf16 element that must cross the memory bus: read (twice for one scale per tensor) and written."""


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


def bench_cpu(recorder: Recorder, samples: int) -> None:
    """Measure one thread, in its processor seconds: amax, and cast with a given amax, the two steps of streaming."""
    torch.set_num_threads(1)
    timed = partial(time_host, samples=samples, clock=time.thread_time)
    for name, shape in CPU_SHAPES.items():
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


def bench_gpu(recorder: Recorder, samples: int, shapes: dict[str, tuple[int, int]], sweep: bool) -> None:
    """Measure roofs, single tensors and lists; with ``sweep`` also the alternative configurations."""
    from nemotron_fp8_kernels.gpu import configs, ops

    l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
    for name, shape in shapes.items():
        elements = shape[0] * shape[1]
        copies = max(2, -(-4 * l2 // (2 * elements)))
        inputs = [(torch.randn(shape, device="cuda") * 0.02).bfloat16() for _ in range(copies)]
        outs = [torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda") for _ in range(copies)]
        write = partial(recorder.write, shape=name, elements=elements, dtype="bfloat16")
        roof = _roofs(write, inputs, outs, samples)
        for granularity in ("tensor", "channel", "block"):
            floor = FLOOR[granularity]
            ops.quantize(inputs[0], granularity, out=outs[0])
            # 256 rows are whole rows and blocks; the amax of a tensor comes from all of it.
            part = inputs[0][:256]
            low, high = inputs[0].aminmax()
            whole = torch.maximum(low.abs(), high.abs()).float()
            amax = whole if granularity == "tensor" else reference.amax(part, granularity)
            assert_bytes(outs[0][:256], reference.quantize_with_amax(part, amax, granularity)[0])
            ours = [partial(ops.quantize, w, granularity, out=out) for w, out in zip(inputs, outs, strict=True)]
            best = time_device(ours, samples)
            _write(write, "ours", granularity, best, elements, floor, roof)
            others: dict[str, Callable[[torch.Tensor], object]] = {
                "torch eager": partial(quantize_formula, granularity=granularity),
                "torch.compile": torch.compile(partial(quantize_formula, granularity=granularity)),
            }
            if granularity == "block" and (torchao := _torchao()) is not None:
                others["torchao"] = torchao
            for operation, function in others.items():
                if operation == "torch eager" and elements > 1 << 29:
                    continue  # its float32 copies of the largest shape do not fit the device
                timing = time_device([partial(function, w) for w in inputs], samples)
                _write(write, operation, granularity, timing, elements, floor, roof)
        if sweep:
            bits = torch.zeros((), dtype=torch.int32, device="cuda")
            scale = torch.empty((), device="cuda")
            for config in configs.SWEEP["amax"]:
                calls = [partial(ops.launch_amax, w, bits, pdl=False, config=config) for w in inputs]
                _write(write, f"amax {config}", "tensor", time_device(calls, samples), elements, 2, roof)
            for config in configs.SWEEP["cast"]:
                calls = [
                    partial(ops.launch_cast, w, q, bits, scale, original=False, pdl=False, config=config)
                    for w, q in zip(inputs, outs, strict=True)
                ]
                _write(write, f"cast {config}", "tensor", time_device(calls, samples), elements, 3, roof)
        del inputs, outs
    _bench_lists(recorder, samples, sweep)


def _bench_lists(recorder: Recorder, samples: int, sweep: bool) -> None:
    from nemotron_fp8_kernels.gpu import configs, many, ops

    for name, (count, size) in LISTS.items():
        tensors = [(torch.randn(size, device="cuda") * 2.0 ** -(i % 9)).bfloat16() for i in range(count)]
        codes = [torch.empty(size, dtype=torch.float8_e4m3fn, device="cuda") for _ in tensors]
        write = partial(recorder.write, shape=name, elements=count * size, dtype="bfloat16")
        roof = _roofs(write, tensors[:8], codes[:8], samples)
        groups = [[i] for i in range(count)]
        for config in configs.SWEEP["grouped"] if sweep else (configs.GROUPED,):
            prepared = many.prepare(tensors, codes, groups, config=config)
            prepared.run()
            for index in (0, count - 1):
                assert_bytes(codes[index], reference.quantize(tensors[index])[0])
            timing = time_device([prepared.run], samples)
            operation = f"quantize_many {config}" if sweep else "quantize_many"
            _write(write, operation, "tensor", timing, count * size, 3, roof)
        in_turn = [partial(ops.quantize, w, out=q) for w, q in zip(tensors, codes, strict=True)]
        one = time_device(in_turn, samples)
        timing = Timing(count * one.median, count * one.low, count * one.high, one.samples)
        _write(write, "quantize in turn", "tensor", timing, count * size, 3, roof)


def _roofs(write: Callable[..., None], inputs: list[torch.Tensor], outs: list[torch.Tensor], samples: int) -> float:
    """Record bytes a second of a device copy and of the 2:1 kernel; return the latter."""
    import triton

    from benchmarks.measure.roof import move_kernel

    elements = inputs[0].numel()
    targets = [torch.empty_like(w) for w in inputs]
    copies = [partial(t.copy_, w) for w, t in zip(inputs, targets, strict=True)]
    _write(write, "device copy", "-", time_device(copies, samples), elements, 4)

    def move(w: torch.Tensor, q: torch.Tensor) -> None:
        move_kernel[(triton.cdiv(elements, 4096),)](
            w.view(torch.int16), q.view(torch.uint8), elements, TILE=4096, num_warps=8
        )

    timing = time_device([partial(move, w, q) for w, q in zip(inputs, outs, strict=True)], samples)
    _write(write, "2:1 roof", "-", timing, elements, 3)
    return 3 * elements / timing.median


def _torchao() -> Callable[[torch.Tensor], object] | None:
    try:
        from torchao.kernel.blockwise_quantization import fp8_blockwise_weight_quant
    except ImportError:
        return None
    return partial(fp8_blockwise_weight_quant, block_size=128)


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
    floor: float,
    roof: float | None = None,
) -> None:
    """Record times, elements and bytes a second, and the share of the roof (bytes at the floor over the 2:1 roof)."""
    fields: dict[str, Any] = {
        "operation": operation,
        "granularity": granularity,
        "seconds": timing.median,
        "seconds_low": timing.low,
        "seconds_high": timing.high,
        "samples": timing.samples,
        "elements_per_second": elements / timing.median,
        "floor_bytes_per_element": floor,
        "bytes_per_second": floor * elements / timing.median,
    }
    if roof is not None:
        fields["share_of_roof"] = fields["bytes_per_second"] / roof
    write(**fields)


def main() -> None:
    """Measure and write ``results/kernels-<device>.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--only", action="append", choices=tuple(SHAPES), help="only this shape")
    parser.add_argument("--sweep", action="store_true", help="also the alternative configurations")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    circumstances = machine(options.device)
    kind = "cpu" if options.device == "cpu" else circumstances["device"].lower().replace(" ", "-")
    recorder = Recorder(options.output or RESULTS / f"kernels-{kind}.jsonl", circumstances)
    if options.device == "cpu":
        bench_cpu(recorder, options.samples)
    else:
        shapes = {name: SHAPES[name] for name in options.only or SHAPES}
        bench_gpu(recorder, options.samples, shapes, options.sweep)


if __name__ == "__main__":
    main()
