"""Tensor views: the name of a tensor and the byte ranges of its files.

Tensors of a safetensors shard, ranges of a remote file, partner tensors in another shard, slices of a
stacked array and matrices cut into zarr chunks are all views. Only views refer to files and offsets of the
input. The plan of a 680 GB checkpoint is made of views.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.checkpoint.dtypes import BITS, nbytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.checkpoint.header import Entry


class Extent(NamedTuple):
    """``runs`` runs of ``length`` bytes, ``stride`` bytes apart in a file, placed in consecutive rows of a view.

    The view is a matrix of bytes (see `TensorView.rows`, `TensorView.row_bytes`). Run ``i`` is read from
    ``offset + i * stride`` of the file and lies in row ``row + i`` from byte ``column`` on.

    Attributes:
        file: the source's own key of the file (a path relative to its root).
        offset: byte of the file where the first run begins.
        stride: bytes from the beginning of one run to that of the next.
        runs: number of runs.
        length: bytes in a run.
        row: row of the view that the first run belongs to.
        column: byte of that row where the run begins.
        item: bytes of an item, if the items of a run do not follow each other in the file (a transposed
            matrix); else 0.
        step: bytes from the beginning of one item to that of the next; only with ``item``.
    """

    file: str
    offset: int
    stride: int
    runs: int
    length: int
    row: int = 0
    column: int = 0
    item: int = 0
    step: int = 0

    def at(self, run: int, byte: int) -> int:
        """Return the byte of the file that holds byte ``byte`` of run ``run``; the first one of an item with a step."""
        inside = byte // self.item * self.step if self.item else byte
        return self.offset + run * self.stride + inside


@dataclass(frozen=True, slots=True)
class Run:
    """Rectangle to read: ``count`` runs of ``length`` bytes from ``offset``, to ``target`` in the buffer.

    Runs are ``stride`` apart in the file and ``pitch`` apart in the buffer; all in bytes. With ``item``, a run
    consists of items of that many bytes, ``step`` apart in the file.
    """

    file: str
    offset: int
    stride: int
    count: int
    length: int
    target: int
    pitch: int
    item: int = 0
    step: int = 0

    @property
    def span(self) -> int:
        """Bytes of the file from the first to the last byte read."""
        inside = (self.length // self.item - 1) * self.step + self.item if self.item else self.length
        return (self.count - 1) * self.stride + inside


E2M1 = "F4"
"""Elements of 4 bits, two in a byte, the lower half first."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Codes and scales that the values of a view are stored as: every value is code times scale.

    Attributes:
        elements: safetensors name of the elements: ``F8_E4M3``, or `E2M1` packed in bytes.
        codes: the codes, row by row as the view: of its shape, or with half as many columns in bytes.
        scales: the scales, one for each cell, row by row; a stack counts as one matrix.
        cell: rows and columns under one scale; None for all of them. Cells at the edges may be ragged.
    """

    elements: str
    codes: TensorView
    scales: TensorView
    cell: tuple[int | None, int | None]

    @property
    def packed(self) -> bool:
        """True if a byte holds two codes."""
        return self.elements == E2M1

    @property
    def cell_elements(self) -> int:
        """Elements under one scale at least, as far as the cell tells: 1 for a side without bound."""
        return (self.cell[0] or 1) * (self.cell[1] or 1)


class TensorView(NamedTuple):
    """Tensor and the extents that contain its bytes, in row-major order.

    Attributes:
        name: name of the tensor in the output.
        dtype: safetensors name of its dtype.
        shape: dimensions; ``()`` for a scalar.
        extents: rectangles that tile the view's byte matrix exactly once; empty for a view with an encoding.
        encoding: codes and scales that a reader computes the values from, as float32; None for values as they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    encoding: Encoding | None = None

    @property
    def stored(self) -> tuple[TensorView, ...]:
        """The views whose bytes are in files: codes and scales of an encoding, or this view itself."""
        return (self,) if self.encoding is None else (self.encoding.codes, self.encoding.scales)

    @property
    def held_itemsize(self) -> int:
        """Most bytes in memory for each element while elements are read: with an encoding, codes and scales too."""
        if self.encoding is None:
            return self.itemsize
        scales = self.encoding.scales.itemsize + BITS["F32"] // 8
        return self.itemsize + (3 if self.encoding.packed else 1) + -(-scales // self.encoding.cell_elements)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return nbytes(self.dtype, self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 for a sub-byte dtype, whose tensors are only copied."""
        return BITS[self.dtype] // 8

    @property
    def row_elements(self) -> int:
        """Elements of one row: the last dimension of a tensor of two or more, all elements of a vector or scalar."""
        return self.shape[-1] if len(self.shape) > 1 else self.numel

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the view's byte matrix."""
        return self.nbytes // self.rows if self.rows else 0

    @property
    def rows(self) -> int:
        """Rows of the byte matrix: all dimensions but the last, multiplied.

        1 for vectors, for scalars, and for sub-byte dtypes, whose rows may end inside a byte.
        """
        return prod(self.shape[:-1]) if len(self.shape) > 1 and BITS[self.dtype] >= 8 else 1

    def runs(self, begin: int, end: int) -> Iterator[Run]:
        """Yield the rectangles to read for the bytes ``[begin, end)`` of the tensor; targets count from ``begin``.

        A span of whole rows of one extent is one run: a contiguous tensor of any size costs one run.
        """
        width = self.row_bytes
        if end <= begin or not width:
            return
        for extent in self.extents:
            first = max(extent.row, begin // width)
            last = min(extent.row + extent.runs, (end + width - 1) // width)
            if first >= last:
                continue
            if extent.length == extent.stride == width and not extent.item:  # dense: one span, cut at both ends
                low, high = max(begin, first * width), min(end, last * width)
                start = extent.offset + low - extent.row * width
                yield Run(extent.file, start, high - low, 1, high - low, low - begin, high - low)
                continue
            yield from _clipped(extent, first, last, width, begin, end)


def _clipped(extent: Extent, first: int, last: int, width: int, begin: int, end: int) -> Iterator[Run]:
    """Yield runs of rows ``[first, last)``: all whole rows as one rectangle, and a cut first or last row separately."""
    whole_from = first if begin <= first * width + extent.column else first + 1
    whole_to = last if end >= (last - 1) * width + extent.column + extent.length else last - 1
    for row in sorted({first, last - 1}):
        if whole_from <= row < whole_to:
            continue
        left = row * width + extent.column
        low, high = max(begin, left), min(end, left + extent.length)
        if low < high:
            start = extent.at(row - extent.row, low - left)
            size = high - low
            yield Run(extent.file, start, size, 1, size, low - begin, size, extent.item, extent.step)
    if whole_from < whole_to:
        yield Run(
            extent.file,
            extent.at(whole_from - extent.row, 0),
            extent.stride,
            whole_to - whole_from,
            extent.length,
            whole_from * width + extent.column - begin,
            width,
            extent.item,
            extent.step,
        )


def encoded(name: str, shape: tuple[int, ...], encoding: Encoding) -> TensorView:
    """Return a view of float32 values that are stored as codes and scales."""
    return TensorView(name, "F32", shape, (), encoding)


def contiguous(file: str, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> TensorView:
    """Return the view of a contiguous row-major tensor at byte ``offset`` of ``file``."""
    total = nbytes(dtype, shape)
    if not total:
        return TensorView(name, dtype, shape, ())
    # `TensorView.rows`, written out: a plan calls this function 100,000 times.
    rows = prod(shape[:-1]) if len(shape) > 1 and BITS[dtype] >= 8 else 1
    width = total // rows
    return TensorView(name, dtype, shape, (Extent(file, offset, width, rows, width),))


def of_entry(file: str, entry: Entry, data_start: int) -> TensorView:
    """Return the view of a tensor of a safetensors file whose data section begins at byte ``data_start``."""
    return contiguous(file, entry.name, entry.dtype, entry.shape, data_start + entry.start)
