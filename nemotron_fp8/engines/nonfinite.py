"""Count of NaN and Inf in a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nemotron_fp8.planning.receipt import NonFinite

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.sources.reader import Reader


STEP = 1 << 20
"""Elements of a whole tensor that are read at a time."""


def count_nonfinite(view: TensorView, slices: Iterable[tuple[int, int]], reader: Reader) -> NonFinite | None:
    """Return count and first position of the NaN and Inf of a tensor; None if every value is finite.

    Args:
        view: the tensor.
        slices: byte ranges ``[begin, end)`` to read, in order.
        reader: reads the tensor.
    """
    count, first, value = 0, -1, ""
    for begin, end in slices:
        start = begin // view.itemsize
        with reader.elements(view, start, end // view.itemsize) as values:
            bad = ~torch.isfinite(values)
            here = int(bad.sum())
            if here and first < 0:
                index = int(bad.to(torch.uint8).argmax())
                first, value = start + index, str(float(values[index]))
            del values
        count += here
    return NonFinite(view.name, count, unravel(first, view.shape), value) if count else None


def count_all(view: TensorView, reader: Reader) -> NonFinite | None:
    """Return count and first position of the NaN and Inf of a whole tensor, read `STEP` elements at a time."""
    step = STEP * view.itemsize
    slices = ((begin, min(begin + step, view.nbytes)) for begin in range(0, view.nbytes, step))
    return count_nonfinite(view, slices, reader)


def unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the position of a flat index in a row-major tensor, one number for each dimension."""
    position = []
    for dimension in reversed(shape):
        index, rest = divmod(index, dimension)
        position.append(rest)
    return tuple(reversed(position))
