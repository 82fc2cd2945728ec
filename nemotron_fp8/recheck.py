"""Compare the bytes of a result with what the source gives when it is quantised again, slice by slice."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch

from nemotron_fp8.errors import BudgetError
from nemotron_fp8.quantize import EMPTY_BITS, INF_BITS, one_torch_thread
from nemotron_fp8.read import TORCH_DTYPES, FolderOpener, Reader
from nemotron_fp8.stats import GRID, Cell, TensorStats, measure, reduce
from nemotron_fp8.verify import Problem
from nemotron_fp8.workers import share_out
from nemotron_fp8_kernels.cpu import amax_bits, quantize_with_amax
from nemotron_fp8_kernels.errors import MultiplierOverflowError
from nemotron_fp8_kernels.reference import scale_from_amax

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nemotron_fp8.recipe import Numerics
    from nemotron_fp8.verify import Pair

BYTES_PER_ELEMENT = 48
"""Working bytes of a comparison for each element: values, two sets of codes, errors in float64."""
COPY_BYTES = 1 << 20
NUMERICS: tuple[Numerics, ...] = ("float32", "original")


class _Way(NamedTuple):
    """One arithmetic by which a tensor may have been quantised."""

    numerics: Numerics
    amax: torch.Tensor
    mult: torch.Tensor
    scale: torch.Tensor


class _Job(NamedTuple):
    """A cell of a tensor to compare."""

    pair: int
    begin: int
    end: int


def recheck(
    source: Path, destination: Path, pairs: list[Pair], budget: int, threads: int
) -> tuple[tuple[TensorStats, ...], int, list[Problem]]:
    """Compare every pair, in the order given.

    Returns:
        Figures of the FP8 tensors, the number of kept tensors whose bytes are the source's, and what differs.

    Raises:
        BudgetError: the budget cannot hold one cell.
        SourceReadError: a file ends early or cannot be read.
    """
    need = GRID * BYTES_PER_ELEMENT
    if budget < need and pairs:
        raise BudgetError(pairs[0].source.name, need, budget)
    workers = max(1, min(threads, budget // need))
    with (
        Reader(FolderOpener(source)) as before,
        Reader(FolderOpener(destination)) as after,
        one_torch_thread(),
    ):
        return _Comparison(pairs, before, after, workers).run()


class _Comparison:
    """State of one comparison; results are kept by index, so that threads change nothing in them."""

    def __init__(self, pairs: list[Pair], before: Reader, after: Reader, workers: int) -> None:
        self._pairs, self._before, self._after, self._workers = pairs, before, after, workers
        self._lock = Lock()

    def run(self) -> tuple[tuple[TensorStats, ...], int, list[Problem]]:
        amaxes = self._amaxes()
        ways, problems = self._ways(amaxes)
        cells, wrong = self._compare(ways)
        stats, kept = [], 0
        for i, pair in enumerate(self._pairs):
            if pair.scale is not None:
                if not ways[i]:
                    continue
                stats.append(reduce(pair.source.name, (cells[i][c] for c in sorted(cells[i]))))
                if all(wrong[i]):
                    fewest = min(wrong[i])
                    codes = (
                        f"{fewest:,} of {pair.source.numel:,} codes differ from the source quantised again"
                    )
                    problems.append(Problem(pair.source.name, codes))
            elif any(wrong[i]):
                where = f"kept, but {wrong[i][0]:,} bytes differ from the source's"
                problems.append(Problem(pair.source.name, where))
            else:
                kept += 1
        return tuple(stats), kept, problems

    def _amaxes(self) -> list[torch.Tensor]:
        found = [torch.tensor(0 if p.source.numel else EMPTY_BITS, dtype=torch.int32) for p in self._pairs]

        def one(job: _Job) -> None:
            view = self._pairs[job.pair].source
            with self._before.elements(view, job.begin, job.end) as values:
                bits = amax_bits(values)
                del values
            with self._lock:
                found[job.pair] = torch.maximum(found[job.pair], bits)

        share_out(
            self._workers, (job for job in self._jobs() if self._pairs[job.pair].scale is not None), one
        )
        return found

    def _ways(self, amaxes: list[torch.Tensor]) -> tuple[list[list[_Way]], list[Problem]]:
        """The arithmetics that give the scale on disk, for every FP8 tensor; a problem where none does."""
        ways: list[list[_Way]] = []
        problems = []
        for pair, amax in zip(self._pairs, amaxes, strict=True):
            fitting: list[_Way] = []
            ways.append(fitting)
            if pair.scale is None:
                continue
            with self._after.elements(pair.scale, 0, 1) as read:
                stored = read.clone().reshape(())
                del read
            if int(amax) >= INF_BITS:
                problems.append(
                    Problem(pair.source.name, "holds NaN or Inf in the source, and is FP8 all the same")
                )
                continue
            for numerics in NUMERICS:
                try:
                    mult, scale = scale_from_amax(amax, numerics, TORCH_DTYPES[pair.source.dtype])
                except MultiplierOverflowError:
                    continue
                if torch.equal(scale, stored):
                    fitting.append(_Way(numerics, amax, mult, stored))
            if not fitting:
                _, derived = scale_from_amax(amax, "float32")
                values = f"is {float(stored):.9g}, the source gives {float(derived):.9g}"
                problems.append(Problem(pair.scale.name, values))
        return ways, problems

    def _compare(self, ways: list[list[_Way]]) -> tuple[list[dict[int, Cell]], list[list[int]]]:
        """Figures of every cell, and for every pair how much differs, by arithmetic."""
        cells: list[dict[int, Cell]] = [{} for _ in self._pairs]
        wrong = [[0] * max(1, len(fitting)) for fitting in ways]

        def one(job: _Job) -> None:
            pair = self._pairs[job.pair]
            if pair.scale is None:
                with (
                    self._before.raw(pair.source, job.begin, job.end) as a,
                    self._after.raw(pair.result, job.begin, job.end) as b,
                ):
                    left, right = (
                        torch.frombuffer(a, dtype=torch.uint8),
                        torch.frombuffer(b, dtype=torch.uint8),
                    )
                    count = int((left != right).sum())
                    del left, right
                self._note(wrong, job.pair, 0, count)
                return
            fitting = ways[job.pair]
            if not fitting:
                return
            with (
                self._before.elements(pair.source, job.begin, job.end) as values,
                self._after.elements(pair.result, job.begin, job.end) as codes,
            ):
                for i, way in enumerate(fitting):
                    again, _ = quantize_with_amax(values, way.amax, numerics=way.numerics)
                    count = int((again.view(torch.uint8) != codes.view(torch.uint8)).sum())
                    self._note(wrong, job.pair, i, count)
                cell = measure(values, codes, fitting[0].mult, fitting[0].scale)
                del values, codes
            with self._lock:
                cells[job.pair][job.begin] = cell

        share_out(self._workers, self._jobs(), one)
        return cells, wrong

    def _note(self, wrong: list[list[int]], index: int, way: int, count: int) -> None:
        with self._lock:
            wrong[index][way] += count

    def _jobs(self) -> Iterator[_Job]:
        for index, pair in enumerate(self._pairs):
            view = pair.source
            total, step = (view.numel, GRID) if pair.scale is not None else (view.nbytes, COPY_BYTES)
            for begin in range(0, total, step):
                yield _Job(index, begin, min(begin + step, total))
