"""Quantize and dequantize on the CPU."""

from __future__ import annotations

from threading import Lock, local
from typing import TYPE_CHECKING

import torch

from nemotron_fp8._utils import share_out
from nemotron_fp8.engines.base import (
    Emit,
    Settle,
    as_bytes,
    blank_amax,
    matrix,
    one_torch_thread,
    scale_of_group,
    scale_rows,
)
from nemotron_fp8.planning.layouts import BLOCK
from nemotron_fp8.planning.tasks import Work
from nemotron_fp8.sources.reader import TORCH_DTYPES
from nemotron_fp8_kernels.cpu import amax_bits, dequantize, quantize_with_amax
from nemotron_fp8_kernels.formats import scale_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from nemotron_fp8.planning.tasks import Decode, Unit
    from nemotron_fp8.sources.reader import Reader


class CpuEngine:
    """Worker threads over slices of mapped tensors; torch's own threads stay out of it.

    Args:
        progress: called with the input bytes of every slice that is finished, from any thread.
    """

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self._progress = progress or (lambda _: None)
        self._local = local()

    def convert(self, works: Iterable[Work], unit: Unit, reader: Reader, settle: Settle, emit: Emit) -> None:
        """See `Engine.convert`. Phase by phase: there is no copy that reading tensor by tensor would save."""
        amaxes = self.amaxes(unit, reader)
        for group in unit.groups:
            settle(group.id, scale_of_group(group, amaxes[group.id], unit.recipe))
        self.cast(works, unit, reader, amaxes, emit)

    def amaxes(self, unit: Unit, reader: Reader) -> dict[str, torch.Tensor]:
        """See `Engine.amaxes`. Slices may end in any order: an integer maximum does not depend on it."""
        granularity, lock = unit.recipe.granularity, Lock()
        found = {group.id: blank_amax(group, granularity) for group in unit.groups}

        def one(job: tuple[str, Work, int, int]) -> None:
            group, work, begin, end = job
            with reader.elements(work.view, begin // work.view.itemsize, end // work.view.itemsize) as values:
                bits = amax_bits(matrix(values, work.view, granularity), granularity, BLOCK)
                del values
            with lock:
                part = scale_rows(found[group], work.view, granularity, begin, end)
                torch.maximum(part, bits, out=part)
            self._progress(end - begin)

        jobs = (
            (group.id, work, begin, end)
            for group in unit.groups
            for work in (Work(member, group.id) for member in group.members)
            for begin, end in unit.slicing.slices(work)
        )
        with one_torch_thread():
            share_out(unit.slicing.workers, jobs, one)
        return found

    def cast(
        self, works: Iterable[Work], unit: Unit, reader: Reader, amaxes: Mapping[str, torch.Tensor], emit: Emit
    ) -> None:
        """See `Engine.cast`."""

        def one(job: tuple[Work, int, int]) -> None:
            work, begin, end = job
            if work.group is not None:
                self._quantise(work, begin, end, unit, reader, amaxes[work.group], emit)
            elif work.decode is not None:
                self._decode(work, begin, end, reader, work.decode, emit)
            else:
                with reader.raw(work.view, begin, end) as data:
                    emit(work.view.name, begin, data)
            self._progress(end - begin)

        jobs = ((work, begin, end) for work in works for begin, end in unit.slicing.slices(work))
        with one_torch_thread():
            share_out(unit.slicing.workers, jobs, one)

    def _quantise(
        self, work: Work, begin: int, end: int, unit: Unit, reader: Reader, amax: torch.Tensor, emit: Emit
    ) -> None:
        view, granularity = work.view, unit.recipe.granularity
        start, stop = begin // view.itemsize, end // view.itemsize
        codes = self._buffer(stop - start)
        flat = (
            torch.frombuffer(codes, dtype=torch.float8_e4m3fn) if codes else torch.empty(0, dtype=torch.float8_e4m3fn)
        )
        out = matrix(flat, view, granularity)
        part = scale_rows(amax, view, granularity, begin, end)
        with reader.elements(view, start, stop) as values:
            quantize_with_amax(
                matrix(values, view, granularity), part, granularity, BLOCK, unit.recipe.numerics, out=out
            )
            del values
        emit(view.name, start, codes)

    def _buffer(self, size: int) -> memoryview:
        """Return a buffer that this thread keeps: fresh pages for every slice would cost as much as the cast."""
        held: bytearray | None = getattr(self._local, "held", None)
        if held is None or len(held) < size:
            held = self._local.held = bytearray(size)
        return memoryview(held)[:size]

    def _decode(self, work: Work, begin: int, end: int, reader: Reader, decode: Decode, emit: Emit) -> None:
        view, granularity = work.view, decode.granularity
        dtype = TORCH_DTYPES[decode.dtype]
        with reader.elements(decode.scale, 0, decode.scale.numel) as values:
            scale = values.float().reshape(scale_shape(view.shape, granularity, decode.block))
            del values
        part = scale_rows(scale, view, granularity, begin, end, decode.block)
        with reader.elements(view, begin // view.itemsize, end // view.itemsize) as codes:
            plain = dequantize(matrix(codes, view, granularity), part, granularity, decode.block, dtype)
            del codes
        emit(view.name, begin // view.itemsize * dtype.itemsize, as_bytes(plain))
