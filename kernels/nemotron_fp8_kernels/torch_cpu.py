"""CPU path in torch, for machines without the compiled kernels: tables for 16-bit weights, reused scratch buffers.

Large 16-bit weights at granularity ``tensor`` are looked up in a table of all 65,536 codes for the multiplier. The
table is exact by construction: one look-up includes clamp, rounding and NaN. All other weights are cast through
float32 scratch, piece by piece. `nemotron_fp8_kernels.cpu` checks the arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .formats import E4M3_MAX, NAN_BITS, NAN_CODE, Granularity, Numerics, fitted, scale_shape
from .scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    LookUp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

PIECE = 1 << 18
"""Elements of a scratch buffer of a thread, float32 or int32: 1 MiB each.

Smaller pieces that fit in L2 are slower. Five torch calls per piece take about 20 microseconds, half of the time of
32,768 elements (0.45 G elements/s on AVX2, against 0.75 with this size; 1.0 and 1.1 with the table).
"""

TABLE_FROM = 1 << 18
"""Smallest tensor for the table: four times the elements whose cast takes as long as the table (about 65,536)."""


class _Scratch(Scratch):
    """Scratch buffers and the last table of a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.table_key: tuple[object, ...] | None = None
        self.table = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


def amax_bits(w: torch.Tensor, granularity: Granularity, block: tuple[int, int]) -> torch.Tensor:
    """Return the amax bits of a tensor that has elements, without a float32 copy."""
    shape = scale_shape(w.shape, granularity, block)
    if granularity == "tensor":
        # Comparing floats is exact, NaN propagates, and 16-bit aminmax is vectorized. An integer maximum would
        # need a copy without signs.
        found = _magnitude(*torch.aminmax(w))
    elif granularity == "channel":
        # torch vectorizes amax and amin along a dimension, but not aminmax.
        found = _magnitude(torch.amin(w, dim=1, keepdim=True), torch.amax(w, dim=1, keepdim=True))
    elif block[0] == 1:
        found = _row_blocks(w, shape, fitted(block, w.shape)[1])
    else:
        rows, block = [], fitted(block, w.shape)
        for start in range(0, w.shape[0], block[0]):
            part = w[start : start + block[0]]
            columns = _magnitude(torch.amin(part, dim=0), torch.amax(part, dim=0))
            padded = columns.new_zeros(shape[1] * block[1])
            padded[: w.shape[1]] = columns
            rows.append(padded.view(shape[1], block[1]).amax(dim=1))
        found = torch.stack(rows)
    return torch.where(found.isnan(), NAN_BITS, found.view(torch.int32)).to(torch.int32)


def cast(
    w: torch.Tensor,
    q: torch.Tensor,
    mult: torch.Tensor,
    granularity: Granularity,
    block: tuple[int, int],
    numerics: Numerics,
    look_up: LookUp,
) -> None:
    """Cast ``w`` to codes ``q``: by a table for large 16-bit weights at granularity ``tensor``, else by scratch."""
    if granularity != "tensor":
        for sources, targets, factors in _row_pieces(w, q, mult, granularity, block):
            _cast(sources, targets, factors, numerics)
    elif w.dtype != torch.float32 and w.numel() >= TABLE_FROM:
        table = _table(mult, w.dtype, numerics)
        for source, target in _pieces(w, q, PIECE):
            look_up(source, table, target.view(torch.uint8))
    else:
        for source, target in _pieces(w, q, PIECE):
            _cast(source, target, mult, numerics)


def look_up(w: torch.Tensor, table: torch.Tensor, q: torch.Tensor) -> None:
    """Replace each element of a 16-bit ``w``, at most `PIECE` of them, by its code in a table of 65,536."""
    index = _scratch.buffer(torch.int32, w.numel())
    index.copy_(w.view(torch.uint16))
    torch.index_select(table, 0, index, out=q)


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, w: torch.Tensor, granularity: Granularity, block: tuple[int, int]
) -> None:
    """Dequantize piece by piece through float32 scratch."""
    if granularity == "tensor":
        for source, target in _pieces(q, w, PIECE):
            target.copy_(_scratch.buffer(torch.float32, source.numel()).copy_(source).mul_(scale))
    else:
        for source, target, factors in _row_pieces(q, w, scale, granularity, block):
            scratch = _scratch.buffer(torch.float32, source.numel()).view(source.shape)
            target.copy_(scratch.copy_(source).mul_(factors))


def _row_blocks(w: torch.Tensor, shape: tuple[int, ...], width: int) -> torch.Tensor:
    """Return the amaxes of blocks of one row and ``width`` columns, as float32.

    An integer maximum of magnitudes takes a third of the time of a minimum and a maximum of floats: torch reduces short
    runs slowly.
    """
    kind, mask = (torch.int32, 0x7FFF_FFFF) if w.dtype == torch.float32 else (torch.int16, 0x7FFF)
    found, whole = torch.empty(shape, dtype=kind), w.shape[1] // width
    height = max(1, PIECE // w.shape[1])
    for start in range(0, w.shape[0], height):
        part = w[start : start + height].view(kind)
        bits = torch.bitwise_and(part, mask, out=_scratch.shaped(kind, part.shape))
        into, runs = found[start : start + height], bits[:, : whole * width].view(len(part), whole, width)
        into[:, :whole] = runs.amax(2)
        if whole < shape[1]:
            into[:, whole] = bits[:, whole * width :].amax(1)
    return found.view(w.dtype).to(torch.float32)


def _magnitude(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.maximum(low.to(torch.float32).abs(), high.to(torch.float32).abs())


def _cast(source: torch.Tensor, target: torch.Tensor, mult: torch.Tensor, numerics: Numerics) -> None:
    """Multiply, clamp and round one piece; ``mult`` broadcasts against it."""
    # "original" multiplies and rounds in the weight's dtype; "float32" computes on a converted copy.
    dtype = torch.float32 if numerics == "float32" else source.dtype
    product = _scratch.buffer(dtype, source.numel()).view(source.shape)
    product.copy_(source).mul_(mult).clamp_(-E4M3_MAX, E4M3_MAX)
    target.copy_(product)
    codes = target.view(torch.uint8)
    if codes.numel() and int(codes.max()) == 0xFF:  # the code of a negative NaN only
        codes.masked_fill_(codes == 0xFF, NAN_CODE)


def _table(mult: torch.Tensor, dtype: torch.dtype, numerics: Numerics) -> torch.Tensor:
    """Return the E4M3 codes of all 65,536 codes of a 16-bit dtype, uint8, cached for the next slice of the thread."""
    key = (float(mult), dtype, numerics)
    if _scratch.table_key != key:
        inputs = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        table = torch.empty(1 << 16, dtype=torch.uint8)
        for source, target in _pieces(inputs, table.view(torch.float8_e4m3fn), PIECE):
            _cast(source, target, mult, numerics)
        _scratch.table, _scratch.table_key = table, key
    return _scratch.table


def _pieces(source: torch.Tensor, target: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield dense 1-D pieces of two tensors of one shape, of at most ``size`` elements each."""
    if source.is_contiguous() and target.is_contiguous():
        runs = [(source.view(-1), target.view(-1))]
    else:
        runs = list(zip(source, target, strict=True))
    for source_run, target_run in runs:
        for start in range(0, source_run.numel(), size):
            yield source_run[start : start + size], target_run[start : start + size]


def _row_pieces(
    source: torch.Tensor,
    target: torch.Tensor,
    factors: torch.Tensor,
    granularity: Granularity,
    block: tuple[int, int],
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield 2-D pieces of about ``PIECE`` elements, each with factors that broadcast against the piece."""
    rows, columns = source.shape
    if rows == 0 or columns == 0:
        return
    height, block = max(1, PIECE // columns), fitted(block, source.shape)
    if granularity == "channel" or block[0] == 1:
        for start in range(0, rows, height):
            span = slice(start, start + height)
            mine = factors[span] if granularity == "channel" else _across(factors[span], block[1], columns)
            yield source[span], target[span], mine
        return
    for top in range(0, rows, block[0]):
        across = _across(factors[top // block[0]][None], block[1], columns)
        for start in range(top, min(top + block[0], rows), height):
            span = slice(start, min(start + height, top + block[0], rows))
            yield source[span], target[span], across


def _across(factors: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """Return the factors ``[rows, blocks]`` of blocks of ``width`` columns, one for each column."""
    return factors.repeat_interleave(width, dim=1)[:, :columns]
