"""Compare a result with its source quantized again, slice by slice."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.engines.base import blank_amax, has_nonfinite, merge_amax, one_torch_thread, scale_rows, slice_amax
from nemotron_fp8.engines.error_stats import GRID, TensorSums, measured, measured_cast, strip_elements, strips
from nemotron_fp8.engines.nonfinite import unravel
from nemotron_fp8.errors import BudgetError
from nemotron_fp8.planning.number_format import Coverage
from nemotron_fp8.planning.tasks import ScaleGroup
from nemotron_fp8.sources.reader import TORCH_DTYPES, Reader
from nemotron_fp8.verification.problems import Problem
from nemotron_fp8_kernels.errors import MultiplierOverflowError
from nemotron_fp8_kernels.reference import scale_from_amax

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.receipt import TensorStats
    from nemotron_fp8.planning.recipe import Numerics, Recipe
    from nemotron_fp8.progress import Advance, StageProgress
    from nemotron_fp8.sources.files import Opener
    from nemotron_fp8.verification.problems import Pair
    from nemotron_fp8_kernels.error_sums import ErrorSums


BYTES_PER_ELEMENT = 48
"""Working bytes of a comparison for each element without the compiled kernels, which need three."""
COMPARED_BYTES = 1 << 20
"""Bytes of an unquantized tensor that are compared at a time."""
NUMERICS: tuple[Numerics, ...] = ("float32", "original")


class _Way(NamedTuple):
    """Arithmetic by which a tensor may have been quantized."""

    numerics: Numerics
    amax: torch.Tensor
    mult: torch.Tensor
    scale: torch.Tensor


class _Job(NamedTuple):
    """Cell of a tensor to compare."""

    pair: int
    begin: int
    end: int


def check_quantized_values(
    source: Opener,
    destination: Opener,
    pairs: list[Pair],
    family: Family,
    budget: int,
    threads: int,
    gauge: StageProgress,
    recorded: Recipe | None = None,
) -> tuple[tuple[TensorStats, ...], int, list[Problem]]:
    """Compare all pairs, in order.

    Args:
        source: opens the files of the source.
        destination: opens the files of the result.
        pairs: pairs to compare.
        family: model family of the source.
        budget: bytes that all working buffers together may take.
        threads: wanted workers.
        gauge: tracks the progress.
        recorded: recipe with the arithmetic of the result; None to accept every arithmetic.

    Returns:
        Statistics of the FP8 tensors, the number of unquantized tensors that equal the source's, and the differences.

    Raises:
        BudgetError: the budget cannot hold one strip.
        SourceReadError: a file ends early or cannot be read.
    """
    need = max([GRID * BYTES_PER_ELEMENT, *(_strip_bytes(pair) for pair in pairs)])
    if budget < need and pairs:
        raise BudgetError(pairs[0].source.name, need, budget)
    workers = max(1, min(threads, budget // need))
    with (
        Reader(source) as before,
        Reader(destination) as after,
        one_torch_thread(),
    ):
        once = sum(pair.source.nbytes for pair in pairs)
        again = sum(pair.source.nbytes for pair in pairs if pair.scale is not None)  # read once more, for the amax
        advance = gauge.stage("values", once + again, once)
        return _Comparison(pairs, family, before, after, workers, advance, recorded).run()


def _strip_bytes(pair: Pair) -> int:
    """Return the working bytes to compare one strip of a pair: two sets of codes, and a flag for each."""
    return 3 * strip_elements(pair.source, pair.numbers.coverage) if pair.scale is not None else 0


class _Comparison:
    """State of one comparison; results are stored by index, so that they do not depend on threads."""

    def __init__(
        self,
        pairs: list[Pair],
        family: Family,
        before: Reader,
        after: Reader,
        workers: int,
        advance: Advance,
        recorded: Recipe | None,
    ) -> None:
        self._pairs, self._before, self._after, self._workers = pairs, before, after, workers
        self._family = family
        self._advance = advance
        self._recorded = recorded
        self._lock = Lock()

    def run(self) -> tuple[tuple[TensorStats, ...], int, list[Problem]]:
        ways, problems = self._ways(self._amaxes())
        sums, wrong = self._compare(ways)
        stats, unquantized = [], 0
        for i, pair in enumerate(self._pairs):
            if pair.scale is None:
                if wrong[i][0]:
                    what = f"unquantized, but {wrong[i][0]:,} bytes differ from the source's"
                    problems.append(Problem(pair.source.name, what))
                unquantized += not wrong[i][0]
            elif ways[i]:
                stats.append(sums[i].stats())
                if all(wrong[i]):
                    codes = f"{min(wrong[i]):,} of {pair.source.numel:,} codes differ from the source, quantized again"
                    problems.append(Problem(pair.source.name, codes))
        return tuple(stats), unquantized, problems

    def _amaxes(self) -> list[torch.Tensor]:
        """Compute the amaxes of the source of every FP8 tensor, in the shape of its scales."""
        found = [
            blank_amax(ScaleGroup("", (pair.source,), ""), pair.numbers.coverage if pair.scale else Coverage())
            for pair in self._pairs
        ]

        def one(job: _Job) -> None:
            pair = self._pairs[job.pair]
            view, coverage, size = pair.source, pair.numbers.coverage, pair.source.itemsize
            with self._before.elements(view, job.begin, job.end) as values:
                bits = slice_amax(values, view, coverage)
                del values
            with self._lock:
                merge_amax(found[job.pair], bits, view, coverage, job.begin * size, job.end * size)
            self._advance((job.end - job.begin) * size)

        parallel_for(self._workers, (job for job in self._jobs() if self._pairs[job.pair].scale is not None), one)
        return found

    def _ways(self, amaxes: list[torch.Tensor]) -> tuple[list[list[_Way]], list[Problem]]:
        """Find the arithmetics that yield the stored scale of every FP8 tensor; add a problem if none does."""
        shared: dict[str, torch.Tensor] = {}
        for pair, amax in zip(self._pairs, amaxes, strict=True):
            if pair.scale is not None and pair.numbers.coverage.whole:
                merged = self._family.fused_matrix_of(pair.source.name)
                shared[merged] = torch.maximum(shared.get(merged, amax), amax)
        ways: list[list[_Way]] = []
        problems = []
        for pair, amax in zip(self._pairs, amaxes, strict=True):
            ways.append([])
            if pair.scale is None:
                continue
            if has_nonfinite(amax):
                problems.append(Problem(pair.source.name, "is FP8, although the source holds NaN or Inf"))
                continue
            with self._after.elements(pair.scale, 0, pair.scale.numel) as read:
                stored = read.clone().reshape(amax.shape)
                del read
            together = shared.get(self._family.fused_matrix_of(pair.source.name), amax)
            candidates: list[tuple[Numerics, torch.Tensor]] = [
                (numerics, amax) for numerics in NUMERICS if numerics == "float32" or not amax.ndim
            ]
            if not torch.equal(together, amax):
                candidates.append(("float32", together))
            if self._recorded is not None:
                candidates = [(self._recorded.numerics, together if self._recorded.share_scales else amax)]
            for numerics, bits in candidates:
                way = _way(numerics, bits, stored, pair)
                if way is not None:
                    ways[-1].append(way)
            if not ways[-1]:
                problems.append(Problem(pair.scale.name, _difference(stored, scale_from_amax(amax)[1])))
        return ways, problems

    def _compare(self, ways: list[list[_Way]]) -> tuple[list[TensorSums], list[list[int]]]:
        """Return error sums of every pair and the number of differences by arithmetic."""
        sums = [TensorSums(pair.source) for pair in self._pairs]
        wrong = [[0] * max(1, len(fitting)) for fitting in ways]

        def one(job: _Job) -> None:
            pair, fitting = self._pairs[job.pair], ways[job.pair]
            if pair.scale is None:
                with (
                    self._before.raw(pair.source, job.begin, job.end) as a,
                    self._after.raw(pair.result, job.begin, job.end) as b,
                ):
                    counts = [differing(a, b)]
            elif fitting:
                with (
                    self._before.elements(pair.source, job.begin, job.end) as values,
                    self._after.elements(pair.result, job.begin, job.end) as codes,
                ):
                    counts = _compare_codes(pair, job, values, codes, fitting, sums[job.pair])
                    del values, codes
            else:  # no arithmetic yields the scale, so the codes cannot be compared
                counts = [0]
            with self._lock:
                wrong[job.pair] = [a + b for a, b in zip(wrong[job.pair], counts, strict=True)]
            self._advance((job.end - job.begin) * (1 if pair.scale is None else pair.source.itemsize))

        parallel_for(self._workers, self._jobs(), one)
        return sums, wrong

    def _jobs(self) -> Iterator[_Job]:
        for index, pair in enumerate(self._pairs):
            view = pair.source
            if pair.scale is None:
                for begin in range(0, view.nbytes, COMPARED_BYTES):
                    yield _Job(index, begin, min(begin + COMPARED_BYTES, view.nbytes))
            else:
                for strip in strips(view, pair.numbers.coverage):
                    yield _Job(index, *strip)


def _way(numerics: Numerics, amax: torch.Tensor, stored: torch.Tensor, pair: Pair) -> _Way | None:
    """Return the arithmetic if it yields the stored scale; else None."""
    try:
        mult, scale = scale_from_amax(amax, numerics, TORCH_DTYPES[pair.source.dtype])
    except MultiplierOverflowError:
        return None
    return _Way(numerics, amax, mult, stored) if torch.equal(scale, stored) else None


def _compare_codes(
    pair: Pair, job: _Job, values: torch.Tensor, codes: torch.Tensor, fitting: list[_Way], sums: TensorSums
) -> list[int]:
    """Count the codes that differ, by arithmetic; add the error sums of the job to ``sums``."""
    view, coverage = pair.source, pair.numbers.coverage
    begin, end = job.begin * view.itemsize, job.end * view.itemsize
    again, counts = torch.empty_like(codes), []
    found: list[ErrorSums] = []
    for way in fitting:
        amax = scale_rows(way.amax, view, coverage, begin, end)
        parts = measured_cast(values, view, coverage, amax, way.numerics, again)
        a, b = again.view(torch.uint8), codes.view(torch.uint8)
        counts.append(0 if torch.equal(a, b) else int((a != b).sum()))
        found = found or ([] if counts[-1] else parts)
    if not found:
        mult, scale = (scale_rows(x, view, coverage, begin, end) for x in (fitting[0].mult, fitting[0].scale))
        found = measured(values, codes, view, coverage, mult, scale)
    sums.add(job.end - job.begin, found)
    return counts


def differing(a: memoryview, b: memoryview) -> int:
    """Count the bytes at which two spans differ."""
    left, right = torch.frombuffer(a, dtype=torch.uint8), torch.frombuffer(b, dtype=torch.uint8)
    return int((left != right).sum())


def _difference(stored: torch.Tensor, derived: torch.Tensor) -> str:
    """Describe the first difference between a stored scale and the derived one."""
    different = (stored != derived).flatten()
    first = int(different.to(torch.uint8).argmax())
    where = f"at {list(unravel(first, tuple(stored.shape)))} " if stored.numel() > 1 else ""
    values = f"{float(stored.flatten()[first]):.9g}, must be {float(derived.flatten()[first]):.9g} by the source"
    many = f" ({int(different.sum()):,} of {stored.numel():,} differ)" if stored.numel() > 1 else ""
    return f"{where}is {values}{many}"
