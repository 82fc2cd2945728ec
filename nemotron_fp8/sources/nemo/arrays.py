"""Stored arrays: boxes of bytes that make up an array, and tensors cut out of them as views.

zarr, tar and torch_dist share this model once their headers are read.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.checkpoint.tensor_view import Extent, TensorView
from nemotron_fp8.errors.nemo import MalformedArrayError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


MAX_EXTENTS = 1 << 20
"""Cap on the extents of one chunk; a larger number is a mistake or an attack."""


@dataclass(frozen=True, slots=True)
class Box:
    """Block of an array in one file.

    Attributes:
        start: index of its first element, one number per dimension of the array.
        shape: elements in every dimension, without the padding of a chunk.
        file: the source's own key of the file.
        offset: byte of the file where the first element begins.
        strides: bytes from one element to the next, in every dimension; the last is the item size.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Band:
    """Band of rows ``[source, source + count)`` of a stored matrix that become rows of a view from ``target`` on."""

    source: int
    count: int
    target: int


@dataclass(frozen=True)
class Stored:
    """Array of a checkpoint.

    Attributes:
        name: name of the array.
        dtype: safetensors name of its dtype.
        shape: dimensions.
        boxes: blocks that tile it exactly once; a scalar has one of one dimension and one element.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    _by_layer: dict[int, list[Box]] = field(default_factory=dict, repr=False, compare=False)

    def layer(self, index: int) -> Stored:
        """Return the array at one index of its first dimension."""
        if not self._by_layer:
            found: defaultdict[int, list[Box]] = defaultdict(list)
            for box in self.boxes:
                for at in range(box.start[0], box.start[0] + box.shape[0]):
                    found[at].append(box)
            self._by_layer.update(found)
        boxes = tuple(
            Box(
                box.start[1:],
                box.shape[1:],
                box.file,
                box.offset + (index - box.start[0]) * box.strides[0],
                box.strides[1:],
            )
            for box in self._by_layer[index]
        )
        return Stored(f"{self.name}[{index}]", self.dtype, self.shape[1:], boxes)

    def matrix(self, name: str, rows: int, bands: Iterable[Band]) -> TensorView:
        """Return the matrix ``[rows, shape[1]]`` of bands of this matrix's rows."""
        extents = []
        for band in bands:
            for box in self.boxes:
                first = max(band.source, box.start[0])
                last = min(band.source + band.count, box.start[0] + box.shape[0])
                if first < last:
                    row = band.target + first - band.source
                    extents.append(_extent(box, (first - box.start[0],), last - first, row))
        return _view(name, self.dtype, (rows, self.shape[1]), extents)

    def whole(self, name: str) -> TensorView:
        """Return the whole array, of any number of dimensions, as a view."""
        if len(self.shape) < 2:
            extents = [_extent(_as_row(box), (0,), 1, 0) for box in self.boxes]
        else:
            extents = [extent for box in self.boxes for extent in self._pieces(box)]
        return _view(name, self.dtype, self.shape, extents)

    def _pieces(self, box: Box) -> Iterator[Extent]:
        """Yield the extents of a box: one for every index of the dimensions before the last two."""
        if (count := prod(box.shape[:-2])) > MAX_EXTENTS:
            problem = f"a chunk of shape {list(box.shape)} has {count:,} pieces, the limit is {MAX_EXTENTS:,}"
            raise MalformedArrayError(self.name, problem)
        for lead in product(*map(range, box.shape[:-2])):
            row = 0
            for at, start, size in zip((*lead, 0), box.start[:-1], self.shape[:-1], strict=True):
                row = row * size + start + at
            yield _extent(box, (*lead, 0), box.shape[-2], row)


def _as_row(box: Box) -> Box:
    """Return a box of a vector as a box of a matrix with one row."""
    return replace(box, start=(0, *box.start), shape=(1, *box.shape), strides=(0, *box.strides))


def _extent(box: Box, at: tuple[int, ...], count: int, row: int) -> Extent:
    """Return the extent of ``count`` rows of a box from index ``at`` of all its dimensions but the last."""
    offset = box.offset + sum(i * stride for i, stride in zip(at, box.strides, strict=False))
    item = box.strides[-1]
    return Extent(box.file, offset, box.strides[-2], count, box.shape[-1] * item, row, box.start[-1] * item)


def _view(name: str, dtype: str, shape: tuple[int, ...], extents: list[Extent]) -> TensorView:
    ordered = tuple(sorted(extents, key=lambda extent: (extent.row, extent.column)))
    return TensorView(name, dtype, shape, ordered)


def row_major(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Return the byte strides of a dense row-major array."""
    item = BITS[dtype] // 8
    return tuple(prod(shape[i + 1 :]) * item for i in range(len(shape)))
