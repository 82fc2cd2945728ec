"""Read views: map files lazily, return elements as torch tensors, drop pages after each slice.

A view with an encoding is read as the float32 values of its codes and scales, by every method alike.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.errors import SourceChangedError
from nemotron_fp8.sources.decoding import cells_of, codes_from_pairs, decode
from nemotron_fp8.sources.files import FolderOpener, Identity, MappedFile, Opener, OpenFiles, SourceFile, identify
from nemotron_fp8.sources.scale_values import STORED, unpack_scales

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from typing_extensions import Self

    from nemotron_fp8.checkpoint.tensor_view import Encoding, Run, TensorView
    from nemotron_fp8.sources.decoding import Cells


__all__ = ["TORCH_DTYPES", "FolderOpener", "Identity", "MappedFile", "Opener", "Reader", "SourceFile", "identify"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "U8": torch.uint8,
}
"""torch dtypes of the tensors that are computed on, exponents as bytes; all other tensors are copied as bytes."""


DECODED_BYTES = 1 << 20
"""Bytes of values that are decoded at a time on their way to a buffer."""


class Reader:
    """Reads elements of views and keeps few files open. A context manager.

    Raises:
        SourceReadError: a file cannot be opened or ends early.
        SourceChangedError: a file changed between opening and closing, at the latest on leaving the context.
    """

    def __init__(self, opener: Opener) -> None:
        self._files = OpenFiles(opener)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._files.close()
        except SourceChangedError:
            if error is None:  # else the first error is raised
                raise

    def file(self, name: str) -> SourceFile:
        """Return the file of an extent, open until the context is left."""
        return self._files.keep(name)

    @contextmanager
    def elements(self, view: TensorView, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield elements ``[start, stop)`` of a view, flat, in its own dtype.

        Elements in one aligned piece are mapped, others are copied into a buffer of their size. The tensor is valid,
        and its pages are resident, inside the ``with`` block only.
        """
        if view.encoding is not None:
            yield self.decoded(view, start, stop, torch.float32)
            return
        dtype = TORCH_DTYPES[view.dtype]  # callers read tensors of these dtypes only
        with self.raw(view, start * view.itemsize, stop * view.itemsize, view.itemsize) as data:
            yield torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)

    def decoded(self, view: TensorView, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return elements ``[start, stop)`` of a view with an encoding, flat: float32 code times scale, as ``dtype``.

        Only the scales of these elements are read.
        """
        encoding = view.encoding
        assert encoding is not None
        parts = [
            self._decode(encoding, cells, dtype)
            for cells in cells_of(view.rows, view.row_elements, encoding, start, stop)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)

    def _decode(self, encoding: Encoding, cells: Cells, dtype: torch.dtype) -> torch.Tensor:
        """Return the values of some cells, flat."""
        scale = self.scales(encoding.scales, cells.scales_from, cells.scales_to)
        if encoding.packed:
            first = cells.begin // 2
            with self.raw(encoding.codes, first, -(-cells.end // 2)) as pairs:
                codes = codes_from_pairs(torch.frombuffer(pairs, dtype=torch.uint8))
            return decode(codes[cells.begin - 2 * first : cells.end - 2 * first], scale, cells, dtype)
        with self.elements(encoding.codes, cells.begin, cells.end) as codes:
            values = decode(codes, scale, cells, dtype)
            del codes
        return values

    def scales(self, view: TensorView, start: int, stop: int) -> torch.Tensor:
        """Return scales ``[start, stop)`` of a tensor of scales, flat, as float32."""
        dtype = STORED[view.dtype]
        with self.raw(view, start * view.itemsize, stop * view.itemsize, view.itemsize) as data:
            if not len(data):
                return torch.empty(0)
            return unpack_scales(torch.frombuffer(data, dtype=dtype).clone(), view.dtype)

    @contextmanager
    def raw(self, view: TensorView, begin: int, end: int, align: int = 1) -> Iterator[memoryview]:
        """Yield bytes ``[begin, end)`` of a view, valid inside the ``with`` block only."""
        if view.encoding is not None:
            held = memoryview(bytearray(end - begin))
            self.gather(view, begin, end, held)
            yield held
            return
        runs = list(view.runs(begin, end))
        if len(runs) == 1 and runs[0].count == 1 and runs[0].offset % align == 0:
            run = runs[0]
            with self._files.use(run.file) as file:
                window = file.window(run.offset, run.length)
                if window is not None:
                    try:
                        yield window
                    finally:
                        file.release(run.offset, run.length)
                    return
        buffer = memoryview(bytearray(end - begin))
        self.gather(view, begin, end, buffer)
        yield buffer

    def gather(self, view: TensorView, begin: int, end: int, buffer: memoryview) -> None:
        """Copy bytes ``[begin, end)`` of a view into a buffer of their size."""
        if view.encoding is not None:
            for first in range(begin, end, DECODED_BYTES):
                last = min(first + DECODED_BYTES, end)
                self._gather_decoded(view, first, last, buffer[first - begin : last - begin])
            return
        for run in view.runs(begin, end):
            with self._files.use(run.file) as file:
                _copy(file, run, buffer)

    def _gather_decoded(self, view: TensorView, begin: int, end: int, buffer: memoryview) -> None:
        size = view.itemsize
        values = self.decoded(view, begin // size, -(-end // size), torch.float32).view(torch.uint8)
        first = begin % size
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(values[first : first + end - begin])


def _copy(file: SourceFile, run: Run, buffer: memoryview) -> None:
    """Copy the runs of a rectangle to their places in ``buffer``."""
    if run.count == 1 and not run.item:
        file.read_into(run.offset, buffer[run.target : run.target + run.length])
        return
    window = file.window(run.offset, run.span)
    if window is not None:
        _gather(window, run, buffer)
        file.release(run.offset, run.span)
    elif run.item:
        held = memoryview(bytearray(run.span))
        file.read_into(run.offset, held)
        _gather(held, run, buffer)
    else:
        for i in range(run.count):
            target = run.target + i * run.pitch
            file.read_into(run.offset + i * run.stride, buffer[target : target + run.length])


def _gather(source: memoryview, run: Run, buffer: memoryview) -> None:
    """Copy a rectangle of rows out of ``source``, which begins at its first byte; items in a row may have a step."""
    item, step = run.item or 1, run.step if run.item else 1
    shape = (run.count, run.length // item, item)
    there = torch.frombuffer(source, dtype=torch.uint8).as_strided(shape, (run.stride, step, 1))
    here = torch.frombuffer(buffer, dtype=torch.uint8).as_strided(shape, (run.pitch, item, 1), run.target)
    if item > 1 and all(n % item == 0 for n in (run.stride, run.step, run.pitch, run.target)):
        # Whole items move several times faster than their bytes one by one.
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(item)
        if whole is not None and there.data_ptr() % item == 0 and here.data_ptr() % item == 0:
            there, here = there.view(whole), here.view(whole)
    here.copy_(there)
