"""Codes that a result keeps from its source: the test whether it can, the repeated scales, and the check for NaN.

Scales are read in parts: those of a Microscaling format are too many to hold for a tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.engines.base import one_torch_thread
from nemotron_fp8.engines.nonfinite import count_all, unravel
from nemotron_fp8.errors import NonFiniteCodesError, ScaleError
from nemotron_fp8.sources.scale_values import are_powers_of_two

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.number_format import NumberFormat
    from nemotron_fp8.sources.reader import Reader


SCALES_AT_ONCE = 1 << 16
"""Scales that are read at a time."""
CODES_AT_ONCE = 1 << 18
"""Codes that are checked at a time."""
NAN = 0x7F
"""E4M3 code of NaN, without its sign."""


def check_scales(view: TensorView, reader: Reader) -> bool:
    """Return True if all scales of a quantized tensor are powers of two.

    Args:
        view: the tensor, with an encoding.
        reader: reads the source.

    Raises:
        ScaleError: a scale is not positive and finite.
    """
    assert view.encoding is not None
    scales, powers = view.encoding.scales, True
    for begin in range(0, scales.numel, SCALES_AT_ONCE):
        values = reader.scales(scales, begin, min(begin + SCALES_AT_ONCE, scales.numel))
        bad = ~(torch.isfinite(values) & (values > 0))
        if bool(bad.any()):
            first = int(bad.to(torch.uint8).argmax())
            raise ScaleError(scales.name, unravel(begin + first, scales.shape), str(float(values[first])))
        powers = powers and are_powers_of_two(values)
    return powers


def fits(powers_of_two: bool, numbers: NumberFormat) -> bool:
    """Return True if scales of the source may be scales of a number format.

    Args:
        powers_of_two: True if all scales of the source are powers of two.
        numbers: number format of the result.
    """
    return powers_of_two or numbers.scale_rounding == "none"


def repeated_scales(view: TensorView, numbers: NumberFormat, reader: Reader) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the scales of the source, repeated for the cells of a number format: first row, and scales of some rows.

    Args:
        view: the tensor, with an encoding whose cells hold those of the format
            (`nemotron_fp8.planning.carried_codes.may_keep_codes`).
        numbers: number format of the result.
        reader: reads the source.
    """
    assert view.encoding is not None
    coverage, (tall, wide) = numbers.coverage, view.encoding.cell
    scales, columns = view.encoding.scales, view.row_elements
    if coverage.rows is None:
        yield 0, reader.scales(scales, 0, 1).reshape(())
        return
    # A config may state blocks larger than any tensor, and than the integers of torch.
    tall, wide = min(tall or view.rows, view.rows), min(wide or columns, columns)
    across = -(-columns // wide)
    down, right = coverage.scale_shape((view.rows, columns))
    place = torch.arange(right) * (coverage.columns or columns) // wide
    step = max(1, SCALES_AT_ONCE // right)
    for first in range(0, down, step):
        last = min(first + step, down)
        rows = torch.arange(first, last) * coverage.rows // tall
        begin, end = int(rows[0]), int(rows[-1]) + 1
        held = reader.scales(scales, begin * across, end * across).view(-1, across)
        yield first, held[rows - begin][:, place]


def check_codes(views: Sequence[TensorView], reader: Reader, workers: int) -> frozenset[str]:
    """Return the names of the tensors in which a code stands for another value than 0.

    Args:
        views: tensors with encodings of E4M3 elements.
        reader: reads the source.
        workers: threads.

    Raises:
        NonFiniteCodesError: a code is NaN; of the first such tensor.
    """
    with_signal: set[str] = set()
    with_nan: set[str] = set()

    def one(part: tuple[TensorView, int]) -> None:
        view, begin = part
        assert view.encoding is not None
        with reader.raw(view.encoding.codes, begin, min(begin + CODES_AT_ONCE, view.numel)) as data:
            codes = torch.frombuffer(data, dtype=torch.uint8) & NAN
        if bool((codes == NAN).any()):
            with_nan.add(view.name)
        if bool(codes.any()):
            with_signal.add(view.name)

    parts = ((view, begin) for view in views for begin in range(0, view.numel, CODES_AT_ONCE))
    with one_torch_thread():
        parallel_for(workers, parts, one)
    for view in views:
        if view.name in with_nan:
            raise nonfinite_codes(view, reader)
    return frozenset(with_signal)


def nonfinite_codes(view: TensorView, reader: Reader) -> NonFiniteCodesError:
    """Return the error about a quantized tensor with values that are NaN or Inf."""
    found = count_all(view, reader)
    assert found is not None
    return NonFiniteCodesError(found.tensor, found.count, found.position, found.value)
