"""Check of the outputs of a list of tensors, before anything is written to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import OutputsError
from .reference import check_out

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch


def check_outputs(tensors: Sequence[torch.Tensor], out: Sequence[torch.Tensor] | None) -> None:
    """Reject outputs that do not fit the tensors, and outputs whose memory overlaps.

    Raises:
        OutputsError: the number of outputs is not that of the tensors, or an output shares memory with another one,
            with a tensor of the list, or with itself.
        UnsupportedDtypeError, ShapeError, DeviceError, LayoutError: an output does not fit its tensor.
    """
    from .cpu import check_layout  # the CPU path imports this module

    if out is None:
        return
    if len(out) != len(tensors):
        raise OutputsError(f"{len(out)} outputs for {len(tensors)} tensors")
    for w, q in zip(tensors, out, strict=True):
        check_layout(check_out(q, w), "out")
    labeled = [(f"output {index}", True, q) for index, q in enumerate(out)]
    labeled += [(f"tensor {index}", False, w) for index, w in enumerate(tensors)]
    # Spans of whole tensors first: only column slices of one matrix have spans that overlap without a common byte.
    if _overlap((*_span(tensor), written, label) for label, written, tensor in labeled):
        found = _overlap((*row, written, label) for label, written, tensor in labeled for row in _rows(tensor))
        if found:
            raise OutputsError(f"{found[0]} and {found[1]} share memory")
    for label, written, tensor in labeled:
        if written and tensor.ndim == 2 and tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
            raise OutputsError(f"the rows of {label} share memory")


def _overlap(spans: Iterator[tuple[int, int, bool, str]]) -> tuple[str, str] | None:
    """Return the labels of two spans that overlap, at least one of them written; None if there are none.

    Args:
        spans: begin, end, whether it is written, label.
    """
    # The spans so far that end last: of those that are written, and of those that are read.
    ends = {True: (0, ""), False: (0, "")}
    for begin, end, written, label in sorted(span for span in spans if span[0] < span[1]):
        for other in (True, False) if written else (True,):
            if begin < ends[other][0]:
                return ends[other][1], label
        ends[written] = max(ends[written], (end, label))
    return None


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and of the one after the last byte."""
    begin, count = tensor.data_ptr(), 0 if tensor.is_meta else tensor.numel()
    if count and not tensor.is_contiguous():
        count = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return begin, begin + count * tensor.element_size()


def _rows(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Yield the spans of the rows of a tensor with dense rows; one span of any other tensor."""
    if tensor.is_contiguous() or tensor.ndim != 2 or tensor.stride(1) != 1:
        yield _span(tensor)
        return
    begin, size = tensor.data_ptr(), tensor.element_size()
    for row in range(tensor.shape[0]):
        first = begin + row * tensor.stride(0) * size
        yield first, first + tensor.shape[1] * size
