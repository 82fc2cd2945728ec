"""Quantization error of a tensor: sums over the cells of a grid, or over all bit patterns of its dtype.

The sums depend neither on the order of the parts nor on the threads that measure them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.engines.base import matrix, one_torch_thread, scale_rows
from nemotron_fp8.planning.receipt import TensorStats
from nemotron_fp8.sources.reader import TORCH_DTYPES
from nemotron_fp8_kernels.cpu import quantize_with_amax
from nemotron_fp8_kernels.reference import expand, scale_from_amax
from nemotron_fp8_kernels.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.number_format import Coverage
    from nemotron_fp8.planning.recipe import Numerics
    from nemotron_fp8.planning.tasks import ShardTask, TensorTask
    from nemotron_fp8.sources.reader import Reader


PATTERNS = 1 << 16
"""Bit patterns of a 16-bit dtype."""
COUNTED_FROM = 1 << 18
"""Smallest tensor, in elements, whose bit patterns are counted. All patterns cost as much as 65,536 elements measured
one by one, and counting an element costs a tenth of measuring the element."""

_scratch = Scratch()


def _buffer(dtype: torch.dtype, shape: torch.Size, which: int = 0) -> torch.Tensor:
    """Return a scratch tensor of a shape."""
    return _scratch.buffer(dtype, shape.numel(), which).view(shape)


@dataclass(frozen=True, slots=True)
class Cell:
    """Sums over a part of a tensor.

    Attributes:
        signal: sum of the squares of the values.
        noise: sum of the squares of the errors.
        max_abs_error: the largest error.
        clamped: values that the clamp changed.
        flushed_to_zero: nonzero values that became 0.
    """

    signal: float
    noise: float
    max_abs_error: float
    clamped: int
    flushed_to_zero: int


def measure(
    values: torch.Tensor,
    codes: torch.Tensor,
    mult: torch.Tensor,
    scale: torch.Tensor,
    counts: torch.Tensor | None = None,
) -> Cell:
    """Return the error sums of values and their codes.

    Args:
        values: bf16, fp16 or fp32.
        codes: 8-bit floats of the same shape.
        mult: multiplier of the values before the cast, in the dtype of the product; broadcasts against ``values``.
        scale: float32 scale of the codes; broadcasts against ``values``.
        counts: int64 number of occurrences of each value, of the same shape; None for one each.
    """
    shape = values.shape
    if not values.numel():
        return Cell(0.0, 0.0, 0.0, 0, 0)
    flags, others = _buffer(torch.bool, shape), _buffer(torch.bool, shape, 1)
    product = _buffer(values.dtype if mult.dtype == values.dtype else torch.float32, shape)
    torch.gt(product.copy_(values).mul_(mult).abs_(), torch.finfo(codes.dtype).max, out=flags)
    clamped = _number(flags, counts)
    q = _decoded(codes)
    torch.eq(q, 0, out=flags)
    torch.ne(values, 0, out=others)
    flushed = _number(flags.logical_and_(others), counts)
    w, error = _buffer(torch.float64, shape), _buffer(torch.float64, shape, 1)
    w.copy_(values)
    error.copy_(q.mul_(scale)).sub_(w)
    worst = max(abs(float(end)) for end in torch.aminmax(error))
    return Cell(_squares(w, counts), _squares(error, counts), worst, clamped, flushed)


def _decoded(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of codes in scratch: float32, of their shape."""
    index = _buffer(torch.int32, codes.shape).copy_(codes.view(torch.uint8))
    q = _buffer(torch.float32, codes.shape)
    torch.index_select(_values(codes.dtype), 0, index.view(-1), out=q.view(-1))
    return q


@cache
def _values(dtype: torch.dtype) -> torch.Tensor:
    """Return the value of every code of an 8-bit dtype: a lookup takes a fifth of the time of torch's conversion."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _number(flags: torch.Tensor, counts: torch.Tensor | None) -> int:
    return int(flags.count_nonzero() if counts is None else counts[flags].sum())


def _squares(values: torch.Tensor, counts: torch.Tensor | None) -> float:
    """Return the sum of the squares of float64 values, and overwrite the values."""
    values.square_()
    return float(values.sum() if counts is None else values.mul_(counts).sum())


def pattern_counts(values: torch.Tensor) -> torch.Tensor:
    """Return the number of occurrences of each bit pattern: int64 of `PATTERNS`, for values of a 16-bit dtype."""
    index = _buffer(torch.int32, values.shape).copy_(values.view(torch.uint16))
    return torch.bincount(index.view(-1), minlength=PATTERNS)


def measure_patterns(counts: torch.Tensor, dtype: torch.dtype, amax: torch.Tensor, numerics: Numerics) -> Cell:
    """Return the error sums of values given by the counts of their bit patterns, quantized with one scale.

    Args:
        counts: result of `pattern_counts`.
        dtype: bf16 or fp16.
        amax: int32 bits of float32, without dimensions.
        numerics: arithmetic of the quantization.
    """
    present = counts.nonzero().view(-1)
    values = present.to(torch.int16).view(dtype)
    codes, _ = quantize_with_amax(values, amax, numerics=numerics)
    return measure(values, codes, *scale_from_amax(amax, numerics, dtype), counts[present])


class TensorSums:
    """Error sums of a tensor, added part by part from any thread.

    Args:
        view: the tensor.
        ways: amax and arithmetic of every possible quantization of the counted elements.
    """

    def __init__(self, view: TensorView, ways: Sequence[tuple[torch.Tensor, Numerics]]) -> None:
        self._view, self._ways, self._left = view, ways, view.numel
        self._cells: dict[tuple[int, int], Cell] = {}
        self._counts: dict[int, torch.Tensor] = {}
        self._lock = Lock()

    def add(
        self, count: int, cells: Mapping[tuple[int, int], Cell], counts: torch.Tensor | None = None, way: int = 0
    ) -> None:
        """Add the sums of some elements.

        Args:
            count: number of elements.
            cells: sums of elements that were measured one by one, by row and column of their cell.
            counts: `pattern_counts` of the other elements.
            way: index of their quantization in ``ways``.
        """
        with self._lock:
            self._cells.update(cells)
            if counts is not None:
                held = self._counts.get(way)
                self._counts[way] = counts if held is None else held.add_(counts)
            self._left -= count
            if not self._left:  # frees half a megabyte for each tensor
                for key, held in self._counts.items():
                    self._cells[-1, key] = measure_patterns(held, TORCH_DTYPES[self._view.dtype], *self._ways[key])
                self._counts.clear()

    def stats(self) -> TensorStats:
        """Return the statistics of the whole tensor, after every element was added."""
        return reduce(self._view.name, (cell for _, cell in sorted(self._cells.items(), key=lambda item: item[0])))


def reduce(name: str, cells: Iterable[Cell]) -> TensorStats:
    """Add up the cells of a tensor, in the order of the grid."""
    signal = noise = worst = 0.0
    clamped = flushed = 0
    for cell in cells:
        signal += cell.signal
        noise += cell.noise
        worst = max(worst, cell.max_abs_error)
        clamped += cell.clamped
        flushed += cell.flushed_to_zero
    if not noise:
        sqnr = math.inf if signal else math.nan
    elif not signal or math.isinf(noise):  # q * scale may round up past the largest float32
        sqnr = -math.inf
    else:
        sqnr = 10 * math.log10(signal / noise)
    return TensorStats(name, sqnr, worst, clamped, flushed)


GRID = 1 << 18
"""Elements of one cell of the grid."""
PANEL = 128
"""Rows measured at a time if scales belong to rows, rounded up to whole blocks."""


class Strip(NamedTuple):
    """Elements ``[begin, end)`` of a tensor: one cell of the grid, or a row of cells."""

    begin: int
    end: int


def is_counted(view: TensorView, coverage: Coverage) -> bool:
    """Return True if the bit patterns of a tensor are counted: one scale, and many more elements than patterns."""
    return coverage.whole and view.itemsize == 2 and view.numel >= COUNTED_FROM


def strips(view: TensorView, coverage: Coverage) -> Iterator[Strip]:
    """Yield the strips of a tensor in order: cells of elements, or panels of rows if scales belong to rows."""
    step = GRID if coverage.rows is None else _panel(coverage) * view.row_elements
    for begin in range(0, view.numel, max(step, 1)):
        yield Strip(begin, min(begin + step, view.numel))


def _panel(coverage: Coverage) -> int:
    rows = coverage.rows or 1
    return -(-PANEL // rows) * rows


def columns(values: torch.Tensor, coverage: Coverage) -> Iterator[slice]:
    """Yield the columns of every cell of a strip, in order: whole blocks of them."""
    step = coverage.columns or 1
    width = max(GRID // _panel(coverage) // step, 1) * step if values.ndim == 2 else values.shape[-1]
    for column in range(0, max(values.shape[-1], 1), max(width, 1)):
        yield slice(column, column + width)


def in_cell(scales: torch.Tensor, view: TensorView, coverage: Coverage, strip: Strip, cell: slice) -> torch.Tensor:
    """Return a view of the scales (or amaxes, or multipliers) of one cell of a strip."""
    size = view.itemsize
    rows = scale_rows(scales, view, coverage, strip.begin * size, strip.end * size)
    if coverage.columns is None:
        return rows
    width = coverage.columns
    return rows[:, cell.start // width : -(-cell.stop // width)]


def gather(
    shard_task: ShardTask,
    tensor_tasks: Iterable[TensorTask],
    amaxes: Mapping[str, torch.Tensor],
    reader: Reader,
    advance: Callable[[int], None],
) -> tuple[TensorStats, ...]:
    """Return the quantization error of the tensors of a shard.

    The CPU measures, because a cast produces the same codes on every device.

    Args:
        shard_task: task of the shard.
        tensor_tasks: tensors of the shard; copied tensors are ignored.
        amaxes: int32 bits of float32, by group id.
        reader: reads the source.
        advance: called with the input bytes of every measured strip, from any thread.
    """
    coverage, numerics = shard_task.numbers.coverage, shard_task.recipe.numerics
    covers = (coverage.granularity, coverage.block)
    chosen = [tensor_task for tensor_task in tensor_tasks if tensor_task.group is not None]
    scales = {
        tensor_task.group: scale_from_amax(amaxes[tensor_task.group], numerics, TORCH_DTYPES[tensor_task.view.dtype])
        for tensor_task in chosen
        if tensor_task.group is not None
    }
    sums = [TensorSums(tensor_task.view, [(amaxes[tensor_task.group or ""], numerics)]) for tensor_task in chosen]

    def one(job: tuple[int, Strip]) -> None:
        index, strip = job
        view, group = chosen[index].view, chosen[index].group
        assert group is not None  # only quantized tensors are selected
        found: dict[tuple[int, int], Cell] = {}
        counts = None
        with reader.elements(view, strip.begin, strip.end) as read:
            values = matrix(read, view, coverage)
            if is_counted(view, coverage):
                counts = pattern_counts(values)
            else:
                mult, scale = scales[group]
                for cell in columns(values, coverage):
                    v = values[..., cell]
                    amax, m, s = (in_cell(x, view, coverage, strip, cell) for x in (amaxes[group], mult, scale))
                    codes, _ = quantize_with_amax(v, amax, *covers, numerics)
                    wide = (expand(x, v.shape, *covers) for x in (m, s))
                    found[strip.begin, cell.start] = measure(v, codes, *wide)
                    del v
            del read, values
        sums[index].add(strip.end - strip.begin, found, counts)
        advance((strip.end - strip.begin) * view.itemsize)

    jobs = ((i, strip) for i, tensor_task in enumerate(chosen) for strip in strips(tensor_task.view, coverage))
    with one_torch_thread():
        parallel_for(shard_task.slicing.workers, jobs, one)
    return tuple(each.stats() for each in sums)
