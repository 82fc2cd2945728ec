"""Quantization error of a tensor: sums over its rows, measured with the cast.

The sums depend neither on the slices nor on the threads that measure them: a row is never divided, and the sum over
rows is rounded once. The elements of a tensor with one scale count as rows of `FLAT` elements.
"""

from __future__ import annotations

import math
from threading import Lock
from typing import TYPE_CHECKING

import torch

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.engines.base import matrix, one_torch_thread, scale_rows, slice_amax
from nemotron_fp8.planning.receipt import TensorStats
from nemotron_fp8.planning.tasks import MIN_SLICE_ELEMENTS
from nemotron_fp8.sources.reader import TORCH_DTYPES
from nemotron_fp8_kernels.cpu import cast, cast_and_measure, quantize_finding_amax
from nemotron_fp8_kernels.error_sums import ErrorSums, error_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.number_format import Coverage, NumberFormat, ScaleRounding
    from nemotron_fp8.planning.recipe import Numerics
    from nemotron_fp8.planning.tasks import ShardTask, TensorTask
    from nemotron_fp8.sources.reader import Reader


FLAT = MIN_SLICE_ELEMENTS
"""Elements of a row of a tensor with one scale: every slice of such a tensor begins at a multiple of it."""


def measured_cast(
    values: torch.Tensor,
    view: TensorView,
    coverage: Coverage,
    amax: torch.Tensor,
    numerics: Numerics,
    out: torch.Tensor,
    rounding: ScaleRounding = "none",
) -> list[ErrorSums]:
    """Quantize a slice of a tensor, and return the error sums of its rows.

    Args:
        values: elements of the slice, flat: whole rows, or from a multiple of `FLAT` on.
        view: the tensor.
        coverage: elements under one scale.
        amax: amaxes of the slice, int32 bits of float32.
        numerics: arithmetic of the quantization.
        out: codes of the slice, flat.
        rounding: rounding of the scales.
    """
    return [
        cast_and_measure(x, amax, coverage.granularity, coverage.block, numerics, out=q, rounding=rounding)[1]
        for x, q in zip(_rows(values, view, coverage), _rows(out, view, coverage), strict=True)
    ]


def cast_slice(
    values: torch.Tensor,
    view: TensorView,
    coverage: Coverage,
    amax: torch.Tensor,
    numerics: Numerics,
    out: torch.Tensor,
    measure: bool,
    rounding: ScaleRounding = "none",
) -> list[ErrorSums]:
    """Quantize a slice; return the error sums of its rows with ``measure``. Other arguments as for `measured_cast`."""
    if measure:
        return measured_cast(values, view, coverage, amax, numerics, out, rounding)
    rows, codes = (matrix(x, view, coverage) for x in (values, out))
    cast(rows, amax, coverage.granularity, coverage.block, numerics, out=codes, rounding=rounding)
    return []


def quantize_rows(
    values: torch.Tensor, view: TensorView, numbers: NumberFormat, out: torch.Tensor, measure: bool
) -> tuple[torch.Tensor, list[ErrorSums]]:
    """Quantize a slice of whole rows with its own amaxes, or with best scales, in float32.

    Args:
        values: elements of the slice, flat: whole rows, from the first row under a scale on.
        view: the tensor.
        numbers: number format of the codes.
        out: codes of the slice, flat.
        measure: whether to measure the errors.

    Returns:
        Amaxes of the slice, int32 bits of float32, and the error sums of its rows; none without ``measure``.
    """
    coverage = numbers.coverage
    if numbers.scale_choice == "best":
        bits = slice_amax(values, view, coverage, "best")
        return bits, cast_slice(values, view, coverage, bits, "float32", out, measure, numbers.scale_rounding)
    rows, codes = (matrix(x, view, coverage) for x in (values, out))
    _, bits, errors = quantize_finding_amax(
        rows, coverage.granularity, coverage.block, codes, measure, numbers.scale_rounding
    )
    return bits, [] if errors is None else [errors]


def measured(
    values: torch.Tensor,
    codes: torch.Tensor,
    view: TensorView,
    coverage: Coverage,
    mult: torch.Tensor,
    scale: torch.Tensor,
) -> list[ErrorSums]:
    """Return the error sums of the rows of a slice and any codes; arguments as for `measured_cast`."""
    return [
        error_sums(x, q, mult, scale, coverage.granularity, coverage.block)
        for x, q in zip(_rows(values, view, coverage), _rows(codes, view, coverage), strict=True)
    ]


def _rows(values: torch.Tensor, view: TensorView, coverage: Coverage) -> list[torch.Tensor]:
    """Return a slice as matrices of the rows that are measured."""
    if not values.numel():
        return []
    if not coverage.whole:
        return [matrix(values, view, coverage)]
    whole = values.numel() // FLAT * FLAT
    parts = [values[:whole].view(-1, FLAT), values[whole:].view(1, -1)]
    return [part for part in parts if part.numel()]


class TensorSums:
    """Error sums of a tensor, added slice by slice from any thread.

    Args:
        view: the tensor.
    """

    def __init__(self, view: TensorView) -> None:
        self._view, self._left = view, view.numel
        self._parts: list[ErrorSums] = []
        self._stats: TensorStats | None = None if view.numel else _stats(view.name, [])
        self._lock = Lock()

    def add(self, count: int, parts: Iterable[ErrorSums]) -> None:
        """Add the sums of the rows of ``count`` elements."""
        with self._lock:
            self._parts += parts
            self._left -= count
            if not self._left:  # frees 40 bytes for each row
                self._stats, self._parts = _stats(self._view.name, self._parts), []

    def stats(self) -> TensorStats:
        """Return the statistics of the whole tensor, after every element was added."""
        assert self._stats is not None
        return self._stats


def _stats(name: str, parts: list[ErrorSums]) -> TensorStats:
    """Return the statistics of a tensor from the sums of its rows, in any order."""
    if not parts:
        return TensorStats(name, math.nan, 0.0, 0, 0)
    rows = ErrorSums(*(torch.cat(each) for each in zip(*parts, strict=True)))
    # Rounded once, so that the order of the rows does not show.
    signal, noise = math.fsum(rows.signal.tolist()), math.fsum(rows.noise.tolist())
    if not noise:
        sqnr = math.inf if signal else math.nan
    elif not signal or math.isinf(noise):  # q * scale may round up past the largest float32
        sqnr = -math.inf
    else:
        sqnr = 10 * math.log10(signal / noise)
    counts = int(rows.clamped.sum()), int(rows.flushed_to_zero.sum())
    return TensorStats(name, sqnr, float(rows.max_abs_error.max()), *counts)


GRID = 1 << 18
"""Elements of a strip, except where the rows of a scale have more."""


def strips(view: TensorView, coverage: Coverage) -> Iterator[tuple[int, int]]:
    """Yield the elements ``[begin, end)`` of strips of a tensor, in order: whole rows, or multiples of `FLAT`."""
    step = strip_elements(view, coverage)
    for begin in range(0, view.numel, step):
        yield begin, min(begin + step, view.numel)


def strip_elements(view: TensorView, coverage: Coverage) -> int:
    """Return the elements of a strip of a tensor."""
    if coverage.rows is None:
        return GRID
    quantum = max(1, view.row_elements * coverage.rows)
    return max(1, GRID // quantum) * quantum


def gather(
    shard_task: ShardTask,
    tensor_tasks: Iterable[TensorTask],
    amaxes: Mapping[str, torch.Tensor],
    reader: Reader,
    advance: Callable[[int], None],
) -> tuple[TensorStats, ...]:
    """Return the quantization error of the tensors of a shard that another device casts.

    The CPU measures, because a cast produces the same codes on every device.

    Args:
        shard_task: task of the shard.
        tensor_tasks: tensors of the shard; copied tensors are ignored.
        amaxes: int32 bits of float32, by group id.
        reader: reads the source.
        advance: called with the input bytes of every measured strip, from any thread.
    """
    numbers, numerics = shard_task.numbers, shard_task.recipe.numerics
    chosen = [tensor_task for tensor_task in tensor_tasks if tensor_task.group is not None]
    sums = [TensorSums(tensor_task.view) for tensor_task in chosen]

    def one(job: tuple[int, tuple[int, int]]) -> None:
        index, (begin, end) = job
        view, group, size = chosen[index].view, chosen[index].group, chosen[index].view.itemsize
        assert group is not None  # only quantized tensors are selected
        codes = torch.empty(end - begin, dtype=TORCH_DTYPES[numbers.element.dtype])
        with reader.elements(view, begin, end) as values:
            if numbers.coverage.fine:
                _, found = quantize_rows(values, view, numbers, codes, measure=True)
            else:
                part = scale_rows(amaxes[group], view, numbers.coverage, begin * size, end * size)
                found = measured_cast(values, view, numbers.coverage, part, numerics, codes, numbers.scale_rounding)
            del values
        sums[index].add(end - begin, found)
        advance((end - begin) * size)

    jobs = ((i, strip) for i, tensor_task in enumerate(chosen) for strip in strips(tensor_task.view, numbers.coverage))
    with one_torch_thread():
        parallel_for(shard_task.slicing.workers, jobs, one)
    return tuple(each.stats() for each in sums)
