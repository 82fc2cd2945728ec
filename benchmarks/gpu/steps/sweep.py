"""Times of alternative configurations beside those of the package, between two rounds of roofs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.steps.kernels import FLOOR
from benchmarks.gpu.steps.lists import check as check_list
from benchmarks.gpu.steps.lists import expectation, list_roofs, weights
from benchmarks.gpu.timing import buffers, figure, roofs, timed, warm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu.cases import Lists
    from benchmarks.gpu.run import Run
    from nemotron_fp8_kernels.gpu.configs import Rows

OURS, LIST = "swept: ours", "swept: quantize_many"
"""Operations of the package's configurations in this stage, which the alternatives are compared with."""


def go(run: Run, _stage: str, _job: str) -> None:
    """Measure the alternatives on every list and weight."""
    warm(run)
    for name, sizes in run.lists.items():
        with run.step("sweep", shape=name):
            _list(run, name, sizes)
    for name, shape in run.shapes.items():
        with run.step("sweep", shape=name):
            _shape(run, name, shape)


@contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    """Replace attributes of a module that it reads at every call."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _shape(run: Run, name: str, shape: tuple[int, int]) -> None:
    from nemotron_fp8_kernels.gpu import configs, ops

    inputs, outs = buffers(run, shape)
    elements = shape[0] * shape[1]
    pairs = list(zip(inputs, outs, strict=True))

    def measure(operation: str, granularity: str) -> None:
        with run.step(operation, shape=name, granularity=granularity):
            calls = [partial(ops.quantize, w, granularity, out=q) for w, q in pairs]
            figure(run, operation, granularity, timed(run, calls, 9), elements, FLOOR[granularity], shape=name)

    roofs(run, name, inputs, outs)
    measure(OURS, "channel")
    own = configs.rows_plan(shape[1], 2)
    for plan in _plans(shape[1], own):
        with changed(configs, rows_plan=lambda _columns, _itemsize, plan=plan: plan):
            label = f"{plan.height} x {plan.tile} x {plan.pieces}, {plan.warps} warps"
            measure(f"ours, {label}", "channel")
    measure(OURS, "block")
    for warps in (4, 16):
        with changed(configs, BLOCKS=replace(configs.BLOCKS, warps=warps)):
            measure(f"ours, {warps} warps", "block")
    measure(OURS, "tensor")
    with changed(configs, KEPT_BYTES=(0, 1 << 60)):
        measure("ours, L2 asked for all", "tensor")
    with changed(configs, KEPT_BYTES=(1 << 60, 0)):
        measure("ours, L2 asked for nothing", "tensor")
    bits = torch.zeros((), dtype=torch.int32, device=run.device)
    scale = torch.empty((), device=run.device)
    for config in configs.SWEEP["amax"]:
        label = f"amax alone, {config.tile} x {config.tiles}, {config.warps} warps"
        with run.step(label, shape=name):
            calls = [partial(ops.launch_amax, w, bits, pdl=False, config=config) for w in inputs]
            figure(run, label, "tensor", timed(run, calls, 9), elements, 2, shape=name)
    for config in configs.SWEEP["cast"]:
        label = f"cast alone, {config.tile} x {config.tiles}, {config.warps} warps"
        with run.step(label, shape=name):
            calls = [
                partial(ops.launch_cast, w, q, bits, scale, original=False, pdl=False, config=config) for w, q in pairs
            ]
            figure(run, label, "tensor", timed(run, calls, 9), elements, 3, shape=name)
    roofs(run, name, inputs, outs)


def _plans(columns: int, own: Rows) -> list[Rows]:
    """Return divisions of rows with half and twice the warps, as far as their pieces fit in registers."""
    from nemotron_fp8_kernels.gpu.configs import MOST_PIECES

    found = []
    for warps in (own.warps // 2, own.warps * 2):
        tile, height = 256 * warps, own.height
        pieces = -(-columns // tile)
        if 1 <= warps <= 32 and own.held and own.height == 1 and pieces <= MOST_PIECES:
            found.append(replace(own, height=height, tile=tile, pieces=pieces, warps=warps))
    return found


def _list(run: Run, name: str, sizes: Lists) -> None:
    from nemotron_fp8_kernels.gpu import configs, many

    tensors, codes = weights(run, sizes)
    elements = sizes.count * sizes.size
    groups = [[i] for i in range(sizes.count)]
    expected = expectation(tensors)

    def measure(operation: str, config: Any = configs.GROUPED, **values: Any) -> None:
        with run.step(operation, shape=name), changed(configs, **values):
            many._plan.cache_clear()
            prepared = many.prepare(tensors, codes, groups, config=config)
            figure(run, operation, "tensor", timed(run, [prepared.run]), elements, 3, shape=name)
            check_list(run, expected, codes, name)

    with run.step("roof", shape=name):
        list_roofs(run, name, elements)
    measure(LIST)
    million = 1 << 18
    for label, values in {
        "lead 1.5 M": {"LEAD": 6 * million},
        "lead 4 M": {"LEAD": 16 * million},
        "2 programs an SM": {"PROGRAMS_PER_SM": 2},
        "4 programs an SM": {"PROGRAMS_PER_SM": 4},
        "never from the end": {"L2_BYTES": 1 << 60},
        "always from the end": {"L2_BYTES": 0},
    }.items():
        measure(f"quantize_many, {label}", **values)
    for config in configs.SWEEP["grouped"]:
        if config != configs.GROUPED:
            label = f"{config.tile} x {config.tiles}, {config.warps} warps"
            measure(f"quantize_many, {label}", config)
    many._plan.cache_clear()
    with run.step("roof", shape=name):
        list_roofs(run, name, elements)
    run.report_compared("bytes beside the timings")
