"""Fair timing on a device: full clocks, inputs from memory and not from L2, replays of a CUDA graph, several roofs."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.gpu.lines import ROOF

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.run import Run

WARM_SECONDS = 0.3
"""Work before the first timing: the clocks of an idle device are a fifth of those under load."""

ROTATED_BYTES = 300 << 20
"""Bytes of inputs and outputs that the calls of a timing rotate over: six times the L2 of an H100."""

GRAPH_SECONDS = 4e-3
"""Shortest graph: the resolution of events is half a microsecond."""

ROOFS = (
    (4096, 8, False, ""),
    (4096, 8, True, "evict_first"),
    (8192, 8, False, "evict_first"),
    (2048, 4, True, ""),
)
"""Roof kernels: tile, warps, whether a thread moves 8 elements instead of 16, eviction policy."""


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    least: float
    most: float
    samples: int


def warm(run: Run) -> None:
    """Multiply matrices until the clocks are up."""
    if run.mode != "device":
        return
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    until = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < until:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()


def timed(run: Run, calls: Sequence[Callable[[], object]], samples: int = 15) -> Timing:
    """Measure one of ``calls``, which do the same on different buffers, by replays of a graph of all of them.

    The graph excludes the launches of the host. It holds the calls several times if they are short.

    Raises:
        NoDeviceError: the calls have been compiled, and there is no device.
    """
    if run.mode != "device":
        started = time.perf_counter()
        for call in calls if run.mode == "until-launch" else calls[:1]:
            call()
        run.wait()
        return Timing(*[time.perf_counter() - started] * 3, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
    torch.cuda.synchronize()
    rounds = max(1, min(50, round(1e3 * GRAPH_SECONDS / max(0.02, begin.elapsed_time(end)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(2):
        graph.replay()
    seconds = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / rounds / len(calls))
    return Timing(statistics.median(seconds), min(seconds), max(seconds), samples)


def buffers(
    run: Run, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, shift: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return inputs and outputs that rotate over `ROTATED_BYTES`, at least two of each.

    Args:
        shift: elements between an aligned address and the first element of each.
    """
    elements = 1
    for length in shape:
        elements *= length
    count = max(2, min(64, -(-ROTATED_BYTES // ((dtype.itemsize + 1) * elements))))
    count = count if run.mode == "device" else 2
    inputs, outs = [], []
    for _ in range(count):
        w = torch.randn(elements + shift, device=run.device, dtype=dtype).mul_(0.02)
        q = torch.empty(elements + shift, device=run.device, dtype=torch.float8_e4m3fn)
        inputs.append(w[shift:].view(shape))
        outs.append(q[shift:].view(shape))
    return inputs, outs


def figure(
    run: Run, operation: str, granularity: str, timing: Timing, elements: int, floor: float, **fields: Any
) -> float:
    """Write the line of a time; return its bytes per second at ``floor`` bytes per element."""
    rate = floor * elements / timing.median
    run.emit(
        operation=operation,
        granularity=granularity,
        elements=elements,
        samples=timing.samples,
        seconds=timing.median,
        seconds_least=timing.least,
        seconds_most=timing.most,
        floor_bytes_per_element=floor,
        elements_per_second=elements / timing.median,
        bytes_per_second=rate,
        **{"dtype": "bfloat16"} | fields,
    )
    return rate


def roofs(run: Run, shape: str, inputs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], samples: int = 9) -> None:
    """Measure every roof kernel: it reads each element and writes one byte per element, as a cast in one pass does."""
    from benchmarks.measure.roof import move_kernel

    elements = inputs[0].numel()
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    itemsize = inputs[0].dtype.itemsize
    integers = {2: torch.int16, 4: torch.int32}[itemsize]
    for tile, warps, eight, policy in ROOFS:

        def move(w: torch.Tensor, q: torch.Tensor, tile: int = tile, warps: int = warps) -> None:
            move_kernel[(-(-elements // tile),)](
                w.view(-1).view(integers),
                q.view(-1).view(torch.uint8),
                elements,
                TILE=tile,
                EIGHT=eight,  # noqa: B023  (called before the next round of the loop)
                POLICY=policy,  # noqa: B023
                num_warps=warps,
            )

        name = f"{ROOF} {tile}, {warps} warps" + ", 8 elements a thread" * eight + (f", {policy}" if policy else "")
        calls = [partial(move, w, q) for w, q in zip(inputs, outs, strict=True)]
        with run.step(name, shape=shape, dtype=dtype):
            figure(run, name, "-", timed(run, calls, samples), elements, itemsize + 1, shape=shape, dtype=dtype)
