"""Quantize and dequantize on the CPU."""

from __future__ import annotations

from dataclasses import replace
from threading import Event, Lock, local
from typing import TYPE_CHECKING

import torch

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.engines.base import (
    Emit,
    as_bytes,
    blank_amax,
    has_nonfinite,
    merge_amax,
    one_torch_thread,
    scale_row,
    scale_rows,
    slice_amax,
)
from nemotron_fp8.engines.error_stats import cast_slice, quantize_rows
from nemotron_fp8.planning.tasks import TensorTask
from nemotron_fp8.sources.reader import TORCH_DTYPES
from nemotron_fp8_kernels.cpu import scales

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.engines.base import PutErrors, PutScale
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.sources.reader import Reader


def _jobs(tensor_tasks: Iterable[TensorTask], shard_task: ShardTask) -> Iterator[tuple[TensorTask, int, int]]:
    """Yield the slices of tensors, in order: tensor, first byte, end."""
    for tensor_task in tensor_tasks:
        for begin, end in shard_task.slicing.slices(tensor_task):
            yield tensor_task, begin, end


def _flat(codes: memoryview, shard_task: ShardTask) -> torch.Tensor:
    """Return a buffer as codes."""
    dtype = TORCH_DTYPES[shard_task.numbers.element.dtype]
    return torch.frombuffer(codes, dtype=dtype) if codes else torch.empty(0, dtype=dtype)


class CpuEngine:
    """Engine of the CPU: worker threads over slices of mapped tensors, with one torch thread each.

    Args:
        progress: called with the input bytes of every finished slice, from any thread.
    """

    measures_errors = True

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self._progress = progress or (lambda _: None)
        self._local = local()

    def has_single_pass(self, shard_task: ShardTask, in_order: bool) -> bool:
        # A slice has all elements under its scales, if scales belong to rows, and a group is one tensor.
        single, coverage = all(len(group.members) == 1 for group in shard_task.groups), shard_task.numbers.coverage
        ordered = not in_order or coverage.fine  # scales of a slice are written with its codes in any case
        return ordered and not coverage.whole and bool(shard_task.groups) and single

    def convert(
        self,
        tensor_tasks: Iterable[TensorTask],
        shard_task: ShardTask,
        reader: Reader,
        put_scale: PutScale,
        emit: Emit,
        put_errors: PutErrors | None = None,
    ) -> bool:
        tensor_tasks, numbers = list(tensor_tasks), shard_task.numbers
        coverage, rounding = numbers.coverage, numbers.scale_rounding
        here = {tensor_task.group for tensor_task in tensor_tasks if tensor_task.group is not None}
        # Tensors of other shards decide whether engines can fuse them with tensors of this one.
        others = replace(shard_task, groups=tuple(group for group in shard_task.groups if group.id not in here))
        found = self.amaxes(others, reader)
        if any(has_nonfinite(amax) for amax in found.values()):
            return False
        if not coverage.fine:
            for group, amax in found.items():
                put_scale(group, scales(amax, rounding))
        amaxes = {group.id: blank_amax(group, coverage) for group in shard_task.groups if group.id in here}
        stopped = Event()

        def quantize(tensor_task: TensorTask, begin: int, end: int) -> None:
            assert tensor_task.group is not None
            view = tensor_task.view
            codes, bits = self._quantize(view, begin, end, shard_task, reader, put_errors)
            if has_nonfinite(bits):
                stopped.set()
                return
            emit(view.name, begin // view.itemsize, codes)
            if coverage.fine:
                put_scale(tensor_task.group, scales(bits, rounding), scale_row(view, coverage, begin))
            else:
                merge_amax(amaxes[tensor_task.group], bits, view, coverage, begin, end)  # no other slice has its rows

        def one(job: tuple[TensorTask, int, int]) -> None:
            tensor_task, begin, end = job
            if stopped.is_set():
                return
            if tensor_task.group is not None:
                quantize(tensor_task, begin, end)
                self._progress(end - begin)  # once for the amax
            elif tensor_task.decode is not None:
                self._decode(tensor_task, begin, end, reader, tensor_task.decode, emit)
            else:
                self._copy(tensor_task, begin, end, reader, emit)
            self._progress(end - begin)

        with one_torch_thread():
            parallel_for(shard_task.slicing.workers, _jobs(tensor_tasks, shard_task), one)
        if stopped.is_set():
            return False
        # Fine scales are written already, slice by slice.
        return coverage.fine or all(put_scale(group, scales(amax, rounding)) for group, amax in amaxes.items())

    def amaxes(self, shard_task: ShardTask, reader: Reader) -> dict[str, torch.Tensor]:
        # Slices may finish in any order: an integer maximum does not depend on the order.
        coverage, lock = shard_task.numbers.coverage.held, Lock()
        choice = shard_task.numbers.scale_choice
        found = {group.id: blank_amax(group, coverage) for group in shard_task.groups}

        def one(job: tuple[str, TensorTask, int, int]) -> None:
            group, tensor_task, begin, end = job
            with reader.elements(
                tensor_task.view, begin // tensor_task.view.itemsize, end // tensor_task.view.itemsize
            ) as values:
                bits = slice_amax(values, tensor_task.view, coverage, choice)
                del values
            with lock:
                merge_amax(found[group], bits, tensor_task.view, coverage, begin, end)
            self._progress(end - begin)

        jobs = (
            (group.id, tensor_task, begin, end)
            for group in shard_task.groups
            for tensor_task in (TensorTask(member, group.id) for member in group.members)
            for begin, end in shard_task.slicing.slices(tensor_task)
        )
        with one_torch_thread():
            parallel_for(shard_task.slicing.workers, jobs, one)
        return found

    def cast(
        self,
        tensor_tasks: Iterable[TensorTask],
        shard_task: ShardTask,
        reader: Reader,
        amaxes: Mapping[str, torch.Tensor],
        emit: Emit,
        put_errors: PutErrors | None = None,
        put_scale: PutScale | None = None,
    ) -> None:
        numbers = shard_task.numbers
        coverage = numbers.coverage

        def quantize_fine(view: TensorView, group: str, begin: int, end: int) -> None:
            assert put_scale is not None
            codes, bits = self._quantize(view, begin, end, shard_task, reader, put_errors)
            emit(view.name, begin // view.itemsize, codes)
            put_scale(group, scales(bits, numbers.scale_rounding), scale_row(view, coverage, begin))

        def one(job: tuple[TensorTask, int, int]) -> None:
            tensor_task, begin, end = job
            if tensor_task.group is not None and coverage.fine:
                quantize_fine(tensor_task.view, tensor_task.group, begin, end)
            elif tensor_task.group is not None:
                amax, view = amaxes[tensor_task.group], tensor_task.view
                part = scale_rows(amax, view, coverage, begin, end)
                with reader.elements(view, begin // view.itemsize, end // view.itemsize) as values:
                    codes = self._cast(values, view, shard_task, part, put_errors)
                    del values
                emit(view.name, begin // view.itemsize, codes)
            elif tensor_task.decode is not None:
                self._decode(tensor_task, begin, end, reader, tensor_task.decode, emit)
            else:
                self._copy(tensor_task, begin, end, reader, emit)
            self._progress(end - begin)

        with one_torch_thread():
            parallel_for(shard_task.slicing.workers, _jobs(tensor_tasks, shard_task), one)

    def _quantize(
        self,
        view: TensorView,
        begin: int,
        end: int,
        shard_task: ShardTask,
        reader: Reader,
        put_errors: PutErrors | None,
    ) -> tuple[memoryview, torch.Tensor]:
        """Quantize the whole rows in bytes ``[begin, end)``, and return codes, in the thread's buffer, and amaxes."""
        first, last = begin // view.itemsize, end // view.itemsize
        codes = self._buffer(last - first)
        out = _flat(codes, shard_task)
        with reader.elements(view, first, last) as values:
            bits, errors = quantize_rows(values, view, shard_task.numbers, out, measure=put_errors is not None)
            del values
        if put_errors is not None and not has_nonfinite(bits):
            put_errors(view.name, last - first, errors)
        return codes, bits

    def _cast(
        self,
        values: torch.Tensor,
        view: TensorView,
        shard_task: ShardTask,
        amax: torch.Tensor,
        put_errors: PutErrors | None,
    ) -> memoryview:
        """Quantize elements of a tensor with their amaxes, and return the codes in the buffer of the thread."""
        codes = self._buffer(values.numel())
        out, numbers = _flat(codes, shard_task), shard_task.numbers
        measure, numerics = put_errors is not None, shard_task.recipe.numerics
        parts = cast_slice(values, view, numbers.coverage, amax, numerics, out, measure, numbers.scale_rounding)
        if put_errors is not None:
            put_errors(view.name, values.numel(), parts)
        return codes

    def _copy(self, tensor_task: TensorTask, begin: int, end: int, reader: Reader, emit: Emit) -> None:
        with reader.raw(tensor_task.view, begin, end) as data:
            emit(tensor_task.view.name, begin, data)

    def _buffer(self, size: int) -> memoryview:
        """Return this thread's reusable buffer: new pages for every slice would cost as much as the cast."""
        held: bytearray | None = getattr(self._local, "held", None)
        if held is None or len(held) < size:
            held = self._local.held = bytearray(size)
        return memoryview(held)[:size]

    def _decode(self, tensor_task: TensorTask, begin: int, end: int, reader: Reader, target: str, emit: Emit) -> None:
        view, dtype = tensor_task.view, TORCH_DTYPES[target]
        plain = reader.decoded(view, begin // view.itemsize, end // view.itemsize, dtype)
        emit(view.name, begin // view.itemsize * dtype.itemsize, as_bytes(plain))
