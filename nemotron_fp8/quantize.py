"""Amaxes and casts of a unit, slice by slice: the only stage that computes.

Phase 1 fills the amaxes of the unit's scale groups, phase 2 casts. Between them stands everything that the
amaxes decide: NaN and Inf, the multiplier, the layout of the shard.
"""

from __future__ import annotations

from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import torch

from nemotron_fp8.workers import share_out
from nemotron_fp8_kernels.cpu import amax_bits, quantize_with_amax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from nemotron_fp8.read import Reader
    from nemotron_fp8.unit import Unit, Work
    from nemotron_fp8.view import TensorView

INF_BITS = 0x7F80_0000
"""float32 bits of Inf; an amax at or over it has met Inf or NaN."""
EMPTY_BITS = 0x4180_0000
"""float32 bits of 16.0, the amax of a group without elements (what the original script took)."""


class Emit(Protocol):
    """Takes the finished bytes of a tensor; called from any thread, in any order."""

    def __call__(self, name: str, begin: int, data: memoryview) -> None:
        """Put ``data`` at byte ``begin`` of the output tensor ``name``."""


class Engine(Protocol):
    """What carries out the two phases of a unit, on some device."""

    def amaxes(self, unit: Unit, reader: Reader) -> dict[str, torch.Tensor]:
        """Return the amax of every scale group of the unit: int32 bits of float32, by group id."""

    def cast(
        self,
        works: Iterable[Work],
        unit: Unit,
        reader: Reader,
        amaxes: Mapping[str, torch.Tensor],
        emit: Emit,
    ) -> None:
        """Emit the output bytes of ``works``: cast with their group's amax, or copied without one."""


class CpuEngine:
    """Worker threads over slices of mapped tensors; torch's own threads stay out of it.

    Args:
        progress: called with the input bytes of every slice that is finished, from any thread.
    """

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self._progress = progress or (lambda _: None)

    def amaxes(self, unit: Unit, reader: Reader) -> dict[str, torch.Tensor]:
        """See `Engine.amaxes`. Slices may end in any order: an integer maximum does not depend on it."""
        lock = Lock()
        found: dict[str, torch.Tensor] = {}
        for group in unit.groups:
            empty = not any(member.numel for member in group.members)
            found[group.id] = torch.tensor(EMPTY_BITS if empty else 0, dtype=torch.int32)

        def one(job: tuple[str, TensorView, int, int]) -> None:
            group, view, begin, end = job
            with reader.elements(view, begin // view.itemsize, end // view.itemsize) as values:
                bits = amax_bits(values)
                del values
            with lock:
                found[group] = torch.maximum(found[group], bits)
            self._progress(end - begin)

        jobs = (
            (group.id, member, begin, end)
            for group in unit.groups
            for member in group.members
            for begin, end in unit.slicing.slices(member, quantise=True)
        )
        with one_torch_thread():
            share_out(unit.slicing.workers, jobs, one)
        return found

    def cast(
        self,
        works: Iterable[Work],
        unit: Unit,
        reader: Reader,
        amaxes: Mapping[str, torch.Tensor],
        emit: Emit,
    ) -> None:
        """See `Engine.cast`."""

        def one(job: tuple[Work, int, int]) -> None:
            work, begin, end = job
            view = work.view
            if work.group is None:
                with reader.raw(view, begin, end) as data:
                    emit(view.name, begin, data)
            else:
                start, stop = begin // view.itemsize, end // view.itemsize
                codes = bytearray(stop - start)
                out = torch.frombuffer(codes, dtype=torch.float8_e4m3fn)
                with reader.elements(view, start, stop) as values:
                    quantize_with_amax(values, amaxes[work.group], numerics=unit.recipe.numerics, out=out)
                    del values
                emit(view.name, start, memoryview(codes))
            self._progress(end - begin)

        jobs = (
            (work, begin, end)
            for work in works
            for begin, end in unit.slicing.slices(work.view, work.group is not None)
        )
        with one_torch_thread():
            share_out(unit.slicing.workers, jobs, one)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch from starting threads of its own inside ours: a slice is too small to be worth them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
