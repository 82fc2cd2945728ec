"""Measures what quantising does to the values of a tensor, in figures that are the same on every run.

Sums are taken over a fixed grid of elements and added in its order, in float64, or the bit patterns of a tensor are
counted: neither the memory budget nor the number of threads shows in them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import share_out
from nemotron_fp8.planning.layouts import BLOCK
from nemotron_fp8.quantize import matrix, one_torch_thread, scale_rows
from nemotron_fp8.sources.reader import TORCH_DTYPES
from nemotron_fp8.sums import COUNTED_FROM, TensorSums, measure, pattern_counts
from nemotron_fp8_kernels.cpu import quantize_with_amax
from nemotron_fp8_kernels.reference import expand, scale_from_amax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.receipt import TensorStats
    from nemotron_fp8.planning.recipe import Granularity
    from nemotron_fp8.planning.tasks import Unit, Work
    from nemotron_fp8.sources.reader import Reader
    from nemotron_fp8.sums import Cell


GRID = 1 << 18
"""Elements of one cell of the grid."""
PANEL = BLOCK[0]
"""Rows measured at a time where scales belong to rows; ``GRID // PANEL`` columns of them make a cell."""


class Strip(NamedTuple):
    """Elements ``[begin, end)`` of a tensor: one cell of the grid, or a row of cells."""

    begin: int
    end: int


def is_counted(view: TensorView, granularity: Granularity) -> bool:
    """Whether the bit patterns of a tensor are counted: all have one scale, and there are few patterns, often had."""
    return granularity == "tensor" and view.itemsize == 2 and view.numel >= COUNTED_FROM


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
    sums = [TensorSums(work.view, [(amaxes[work.group or ""], numerics)]) for work in chosen]

    def one(job: tuple[int, Strip]) -> None:
        index, strip = job
        view, group = chosen[index].view, chosen[index].group
        assert group is not None  # chosen so
        found: dict[tuple[int, int], Cell] = {}
        counts = None
        with reader.elements(view, strip.begin, strip.end) as read:
            values = matrix(read, view, granularity)
            if is_counted(view, granularity):
                counts = pattern_counts(values)
            else:
                mult, scale = scales[group]
                for cell in columns(values):
                    v = values[..., cell]
                    amax, m, s = (in_cell(x, view, granularity, strip, cell) for x in (amaxes[group], mult, scale))
                    codes, _ = quantize_with_amax(v, amax, granularity, BLOCK, numerics)
                    wide = (expand(x, v.shape, granularity, BLOCK) for x in (m, s))
                    found[strip.begin, cell.start] = measure(v, codes, *wide)
                    del v
            del read, values
        sums[index].add(strip.end - strip.begin, found, counts)
        advance((strip.end - strip.begin) * view.itemsize)

    jobs = ((i, strip) for i, work in enumerate(chosen) for strip in strips(work.view, granularity))
    with one_torch_thread():
        share_out(unit.slicing.workers, jobs, one)
    return tuple(each.stats() for each in sums)
