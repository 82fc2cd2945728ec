"""Times of lists of tensors: on the device without the host, and of a whole call on the host."""

from __future__ import annotations

import statistics
import time
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.timing import Timing, figure, roofs, timed, warm
from nemotron_fp8_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu.cases import Lists
    from benchmarks.gpu.run import Run


def go(run: Run, _stage: str, _job: str) -> None:
    """Measure every list: roofs of one array of the same size, one launch, tensors in turn, the host, roofs."""
    warm(run)
    for number, (name, sizes) in enumerate(run.lists.items()):
        with run.step("lists", shape=name):
            _list(run, name, sizes, first=not number)


def _list(run: Run, name: str, sizes: Lists, first: bool) -> None:
    from nemotron_fp8_kernels.gpu import many, ops

    count, size = sizes
    elements = count * size
    if first:
        with run.step("first call", shape=name):
            some = [torch.randn(1000, device=run.device).bfloat16() for _ in range(3)]
            _host(run, "quantize_many, first in the process", name, partial(many.quantize_many, some))
    tensors, codes = weights(run, sizes)
    with run.step("roof", shape=name):
        list_roofs(run, name, elements)
    with run.step("quantize_many", shape=name):
        prepared = many.prepare(tensors, codes, [[i] for i in range(count)])
        figure(run, "quantize_many", "tensor", timed(run, [prepared.run]), elements, 3, shape=name)
        check(run, expectation(tensors), codes, name)
    with run.step("quantize in turn", shape=name):
        calls = [partial(ops.quantize, w, out=q) for w, q in zip(tensors, codes, strict=True)]
        one = timed(run, calls)
        whole = Timing(count * one.median, count * one.least, count * one.most, one.samples)
        figure(run, "quantize in turn", "tensor", whole, elements, 3, shape=name)
    with run.step("host", shape=name):
        many._plan.cache_clear()
        call = partial(many.quantize_many, tensors)
        _host(run, "quantize_many, first", name, call)
        _host(run, "quantize_many, again", name, call, repeats=5)
        _host(run, "quantize_many, again into given outputs", name, partial(call, out=codes), repeats=5)
        started = time.perf_counter()
        many._plan.__wrapped__((size,) * count, (1,) * count, 2, 16_384, torch.device("cpu"))
        run.emit(host="tables of a list", host_seconds=time.perf_counter() - started, shape=name)
    with run.step("roof", shape=name):
        list_roofs(run, name, elements)
    run.emit_clock(shape=name)
    run.report_compared("bytes beside the timings")


def weights(run: Run, sizes: Lists) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors of a list, each with another amax, and outputs."""
    shape = (sizes.size,)
    tensors = [(torch.randn(shape, device=run.device) * 2.0 ** -(i % 9)).bfloat16() for i in range(sizes.count)]
    return tensors, [torch.empty(shape, dtype=torch.float8_e4m3fn, device=run.device) for _ in tensors]


def list_roofs(run: Run, name: str, elements: int) -> None:
    """Measure the roofs of one array with the elements of the whole list: no gaps between launches."""
    w = torch.empty(elements, dtype=torch.bfloat16, device=run.device).fill_(0.01)
    q = torch.empty(elements, dtype=torch.float8_e4m3fn, device=run.device)
    roofs(run, name, [w], [q])


def expectation(tensors: list[torch.Tensor]) -> Callable[[], dict[int, torch.Tensor]]:
    """Return a function that computes the codes of the first and the last tensor once, when they are needed first."""

    @cache
    def expected() -> dict[int, torch.Tensor]:
        return {index: reference.quantize(tensors[index].cpu())[0] for index in {0, len(tensors) - 1}}

    return expected


def check(run: Run, expected: Callable[[], dict[int, torch.Tensor]], codes: list[torch.Tensor], name: str) -> None:
    """Compare codes with the reference."""
    for index, wanted in expected().items():
        run.compare(codes[index], wanted, "quantize_many", shape=name)


def _host(run: Run, what: str, name: str, call: Callable[[], object], repeats: int = 1) -> None:
    """Write the seconds that the host needs until it has queued a call, and until the device is done."""
    queued, done = [], []
    for _ in range(repeats):
        if run.mode == "device":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        queued.append(time.perf_counter() - started)
        run.wait()
        done.append(time.perf_counter() - started)
    run.emit(
        host=what,
        host_seconds=statistics.median(queued),
        host_seconds_with_device=statistics.median(done),
        shape=name,
    )
