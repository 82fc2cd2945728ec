"""Times of torch eager, torch.compile and torchao beside our kernels, between two rounds of roofs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.steps.kernels import FLOOR, GRANULARITIES
from benchmarks.gpu.timing import buffers, figure, roofs, timed, warm
from benchmarks.measure.kernels import quantize_formula

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu.run import Run

OURS = "beside the others: ours"
"""Operation of our kernels in this stage, so that a ratio compares two times of the same minute."""


def compiled(run: Run, granularity: str) -> Callable[[torch.Tensor], object]:
    """Return the formula compiled by Inductor for static sizes.

    Dynamo is reset for every case. It would otherwise make the sizes dynamic from the second shape on, and fall back
    to eager execution after eight.
    """
    torch._dynamo.reset()
    backend = "aot_eager" if run.dry else "inductor"
    formula = partial(quantize_formula, granularity=granularity)
    found: Callable[[torch.Tensor], object] = torch.compile(formula, dynamic=False, fullgraph=True, backend=backend)
    return found


def go(run: Run, _stage: str, _job: str) -> None:
    """Measure the peers."""
    warm(run)
    for name in run.peers:
        with run.step("peers", shape=name):
            _shape(run, name, run.shapes[name])


def _shape(run: Run, name: str, shape: tuple[int, int]) -> None:
    from nemotron_fp8_kernels.gpu import ops

    inputs, outs = buffers(run, shape)
    elements = shape[0] * shape[1]
    roofs(run, name, inputs, outs)
    for granularity in GRANULARITIES:
        fields: dict[str, Any] = {"shape": name}

        def measure(operation: str, calls: list[Callable[[], object]], granularity: str = granularity) -> None:
            figure(run, operation, granularity, timed(run, calls), elements, FLOOR[granularity], shape=name)

        with run.step(OURS, granularity=granularity, **fields):
            ours = [partial(ops.quantize, w, granularity, out=q) for w, q in zip(inputs, outs, strict=True)]
            measure(OURS, ours)
        with run.step("torch.compile", granularity=granularity, **fields):
            function = compiled(run, granularity)
            measure("torch.compile", [partial(function, w) for w in inputs])
        if granularity == "block":
            with run.step("torchao", granularity=granularity, **fields):
                if (torchao := _torchao()) is None:
                    run.emit(case="missing", package="torchao", needed=False)
                else:
                    measure("torchao", [partial(torchao, w) for w in inputs])
        if elements <= 1 << 29:  # its float32 copies of the largest shape do not fit the device
            with run.step("torch eager", granularity=granularity, **fields):
                eager = partial(quantize_formula, granularity=granularity)
                measure("torch eager", [partial(eager, w) for w in inputs])
    roofs(run, name, inputs, outs)


def _torchao() -> Callable[[torch.Tensor], object] | None:
    try:
        from torchao.kernel.blockwise_quantization import fp8_blockwise_weight_quant
    except ImportError:
        return None
    return partial(fp8_blockwise_weight_quant, block_size=128)
