"""Measures what quantising does to the values of a tensor, in figures that are the same on every run.

Partial sums are taken over a fixed grid of elements and added in its order, in float64: neither the memory
budget nor the number of threads shows in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.figures import TensorStats
from nemotron_fp8.layouts import BLOCK
from nemotron_fp8.quantize import matrix, one_torch_thread, scale_rows
from nemotron_fp8.read import TORCH_DTYPES
from nemotron_fp8.workers import share_out
from nemotron_fp8_kernels.cpu import quantize_with_amax
from nemotron_fp8_kernels.reference import expand, scale_from_amax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch

    from nemotron_fp8.read import Reader
    from nemotron_fp8.recipe import Granularity
    from nemotron_fp8.unit import Unit, Work
    from nemotron_fp8.view import TensorView

GRID = 1 << 18
"""Elements of one cell of the grid."""
PANEL = BLOCK[0]
"""Rows measured at a time where scales belong to rows; ``GRID // PANEL`` columns of them make a cell."""
E4M3_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Cell:
    """Partial sums over one cell of the grid.

    Attributes:
        signal: sum of the squares of the values.
        noise: sum of the squares of the errors.
        max_abs_error: the largest error.
        clamped: values that the clamp changed.
        flushed_to_zero: values other than 0 that became 0.
    """

    signal: float
    noise: float
    max_abs_error: float
    clamped: int
    flushed_to_zero: int


def measure(values: torch.Tensor, codes: torch.Tensor, mult: torch.Tensor, scale: torch.Tensor) -> Cell:
    """Compare values with their codes.

    Args:
        values: bf16, fp16 or fp32.
        codes: float8_e4m3fn of the same shape.
        mult: what the values were multiplied by before the cast, in its dtype; broadcasts against ``values``.
        scale: float32, what a code is multiplied by; broadcasts against ``values``.
    """
    if not values.numel():
        return Cell(0.0, 0.0, 0.0, 0, 0)
    product = values * mult if mult.dtype == values.dtype else values.float() * mult
    clamped = int((product.abs() > E4M3_MAX).sum())
    q = codes.float()
    flushed = int(((q == 0) & (values != 0)).sum())
    w = values.double()
    error = q.mul_(scale).double().sub_(w)
    worst = float(error.abs().max())
    return Cell(float(w.square_().sum()), float(error.square_().sum()), worst, clamped, flushed)


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


class Strip(NamedTuple):
    """Elements ``[begin, end)`` of a tensor: one cell of the grid, or a row of cells."""

    begin: int
    end: int


def strips(view: TensorView, granularity: Granularity) -> Iterator[Strip]:
    """The strips of a tensor, in order: cells of consecutive elements, or panels of rows if scales belong to rows."""
    step = GRID if granularity == "tensor" else PANEL * view.row_elements
    for begin in range(0, view.numel, max(step, 1)):
        yield Strip(begin, min(begin + step, view.numel))


def columns(values: torch.Tensor) -> Iterator[slice]:
    """The columns of every cell of a strip, in order."""
    width = GRID // PANEL if values.ndim == 2 else values.shape[-1]
    for column in range(0, max(values.shape[-1], 1), max(width, 1)):
        yield slice(column, column + width)


def in_cell(
    scales: torch.Tensor, view: TensorView, granularity: Granularity, strip: Strip, cell: slice
) -> torch.Tensor:
    """The scales (or amaxes, or multipliers) that cover one cell of a strip; a view of them."""
    size = view.itemsize
    rows = scale_rows(scales, view, granularity, strip.begin * size, strip.end * size)
    if granularity != "block":
        return rows
    return rows[:, cell.start // BLOCK[1] : -(-cell.stop // BLOCK[1])]


def gather(
    unit: Unit,
    works: Iterable[Work],
    amaxes: Mapping[str, torch.Tensor],
    reader: Reader,
    advance: Callable[[int], None],
) -> tuple[TensorStats, ...]:
    """Measure what quantising does to the tensors of a unit, on the CPU: a cast gives the same codes on every device.

    Args:
        unit: what they belong to.
        works: its tensors; those that are copied are passed over.
        amaxes: int32 bits of float32, by group id.
        reader: reads them.
        advance: called with the input bytes of every strip that is measured, from any thread.
    """
    granularity, numerics = unit.recipe.granularity, unit.recipe.numerics
    chosen = [work for work in works if work.group is not None]
    scales = {
        work.group: scale_from_amax(amaxes[work.group], numerics, TORCH_DTYPES[work.view.dtype])
        for work in chosen
        if work.group is not None
    }
    cells: list[dict[tuple[int, int], Cell]] = [{} for _ in chosen]
    lock = Lock()

    def one(job: tuple[int, Strip]) -> None:
        index, strip = job
        view, group = chosen[index].view, chosen[index].group
        assert group is not None  # chosen so
        mult, scale = scales[group]
        found: dict[tuple[int, int], Cell] = {}
        with reader.elements(view, strip.begin, strip.end) as read:
            values = matrix(read, view, granularity)
            for cell in columns(values):
                v = values[..., cell]
                amax, m, s = (in_cell(x, view, granularity, strip, cell) for x in (amaxes[group], mult, scale))
                codes, _ = quantize_with_amax(v, amax, granularity, BLOCK, numerics)
                wide = (expand(x, v.shape, granularity, BLOCK) for x in (m, s))
                found[strip.begin, cell.start] = measure(v, codes, *wide)
                del v
            del read, values
        with lock:
            cells[index].update(found)
        advance((strip.end - strip.begin) * view.itemsize)

    jobs = ((i, strip) for i, work in enumerate(chosen) for strip in strips(work.view, granularity))
    with one_torch_thread():
        share_out(unit.slicing.workers, jobs, one)
    return tuple(
        reduce(work.view.name, (found[place] for place in sorted(found)))
        for work, found in zip(chosen, cells, strict=True)
    )
