"""Compare a result with its source quantized again, slice by slice."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.engines.base import blank_amax, has_nonfinite, merge_amax, one_torch_thread, scale_rows, slice_amax
from nemotron_fp8.engines.error_stats import (
    GRID,
    TensorSums,
    measured,
    measured_cast,
    quantize_rows,
    strip_elements,
    strips,
)
from nemotron_fp8.engines.nonfinite import unravel
from nemotron_fp8.errors import BudgetError
from nemotron_fp8.planning.number_format import Coverage
from nemotron_fp8.planning.tasks import ScaleGroup
from nemotron_fp8.sources.reader import TORCH_DTYPES, Reader
from nemotron_fp8.sources.scale_values import unpack_scales
from nemotron_fp8.verification.problems import Problem
from nemotron_fp8_kernels.errors import MultiplierOverflowError
from nemotron_fp8_kernels.reference import scale_from_amax
from nemotron_fp8_kernels.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.number_format import ScaleChoice, ScaleRounding
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
NONFINITE = "is FP8, although the source holds NaN or Inf"


_scratch = Scratch()
"""Codes of a thread. New ones for each strip would leave holes between the sums that stay, of the size of a tensor."""


class _Way(NamedTuple):
    """Arithmetic by which a tensor may have been quantized.

    Attributes:
        numerics: arithmetic of the formula.
        rounding: rounding of the scales.
        amax: amaxes, or the larger ones of best scales, int32 bits of float32; empty where a tensor has too many scales
            to hold.
    """

    numerics: Numerics
    rounding: ScaleRounding
    amax: torch.Tensor


class _Tally(NamedTuple):
    """Differences of a part of a tensor, for one arithmetic: elements or bytes, and scales."""

    codes: int = 0
    scales: int = 0
    nonfinite: int = 0

    def plus(self, other: _Tally) -> _Tally:
        """Return the sum of both."""
        return _Tally(self.codes + other.codes, self.scales + other.scales, self.nonfinite + other.nonfinite)


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
        again = sum(pair.source.nbytes for pair in pairs if _is_read_twice(pair))
        advance = gauge.stage("values", once + again, once)
        return _Comparison(pairs, family, before, after, workers, advance, recorded).run()


def _strip_bytes(pair: Pair) -> int:
    """Return the working bytes to compare one strip of a pair: two sets of codes, and a flag for each."""
    return 3 * strip_elements(pair.source, pair.numbers.coverage) if pair.scale is not None else 0


def _is_read_twice(pair: Pair) -> bool:
    """Return True if the source of a pair is read once more before the comparison, for its amaxes."""
    return pair.scale is not None and not pair.numbers.coverage.fine


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
                if wrong[i][0].codes:
                    what = f"unquantized, but {wrong[i][0].codes:,} bytes differ from the source's"
                    problems.append(Problem(pair.source.name, what))
                unquantized += not wrong[i][0].codes
            elif ways[i]:
                best = min(wrong[i])
                if best.nonfinite:
                    problems.append(Problem(pair.source.name, NONFINITE))
                    continue
                stats.append(sums[i].stats())
                if best.codes:
                    codes = f"{best.codes:,} of {pair.source.numel:,} codes differ from the source, quantized again"
                    problems.append(Problem(pair.source.name, codes))
                if best.scales:
                    what = f"{best.scales:,} of {pair.scale.numel:,} scales differ from those of the source"
                    problems.append(Problem(pair.scale.name, what))
        return tuple(stats), unquantized, problems

    def _amaxes(self) -> list[torch.Tensor]:
        """Compute the amaxes of the source of every FP8 tensor, except those with too many scales to hold."""
        found = [
            blank_amax(ScaleGroup("", (pair.source,), ""), pair.numbers.coverage if pair.scale else Coverage())
            for pair in self._pairs
        ]

        def one(job: _Job) -> None:
            pair = self._pairs[job.pair]
            self._raise_amax(found[job.pair], pair, job.begin, job.end, pair.numbers.scale_choice)
            self._advance((job.end - job.begin) * pair.source.itemsize)

        parallel_for(self._workers, (job for job in self._jobs() if _is_read_twice(self._pairs[job.pair])), one)
        return found

    def _raise_amax(self, amax: torch.Tensor, pair: Pair, begin: int, end: int, choice: ScaleChoice) -> None:
        """Merge the amaxes of a strip of the source into those of its tensor."""
        view, coverage, size = pair.source, pair.numbers.coverage, pair.source.itemsize
        with self._before.elements(view, begin, end) as values:
            bits = slice_amax(values, view, coverage, choice)
            del values
        with self._lock:
            merge_amax(amax, bits, view, coverage, begin * size, end * size)

    def _best_amax(self, pair: Pair) -> torch.Tensor:
        """Return the amaxes of a tensor with best scales."""
        found = blank_amax(ScaleGroup("", (pair.source,), ""), pair.numbers.coverage)
        parallel_for(
            self._workers,
            strips(pair.source, pair.numbers.coverage),
            lambda strip: self._raise_amax(found, pair, *strip, "best"),
        )
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
            if pair.numbers.coverage.fine:  # compared with the codes
                ways[-1].append(_Way("float32", pair.numbers.scale_rounding, torch.empty(0, dtype=torch.int32)))
                continue
            if has_nonfinite(amax):
                problems.append(Problem(pair.source.name, NONFINITE))
                continue
            with self._after.elements(pair.scale, 0, pair.scale.numel) as read:
                stored = unpack_scales(read, pair.scale.dtype).clone().reshape(amax.shape)
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
                ways[-1] += _ways(numerics, bits, stored, pair, self._recorded)
            if not ways[-1] and self._recorded is None and _may_be_best(pair):
                ways[-1] += _ways("float32", self._best_amax(pair), stored, pair, None)
            if not ways[-1]:
                derived = scale_from_amax(amax, rounding=pair.numbers.scale_rounding)[1]
                problems.append(Problem(pair.scale.name, _difference(stored, derived)))
        return ways, problems

    def _compare(self, ways: list[list[_Way]]) -> tuple[list[TensorSums], list[list[_Tally]]]:
        """Return error sums of every pair and the differences by arithmetic."""
        sums = [TensorSums(pair.source) for pair in self._pairs]
        wrong = [[_Tally()] * max(1, len(fitting)) for fitting in ways]

        def one(job: _Job) -> None:
            pair, fitting = self._pairs[job.pair], ways[job.pair]
            if pair.scale is None:
                with (
                    self._before.raw(pair.source, job.begin, job.end) as a,
                    self._after.raw(pair.result, job.begin, job.end) as b,
                ):
                    counts = [_Tally(differing(a, b))]
            elif fitting:
                with (
                    self._before.elements(pair.source, job.begin, job.end) as values,
                    self._after.elements(pair.result, job.begin, job.end) as codes,
                ):
                    if pair.numbers.coverage.fine:
                        counts = [self._compare_fine(pair, job, values, codes, sums[job.pair])]
                    else:
                        counts = _compare_codes(pair, job, values, codes, fitting, sums[job.pair])
                    del values, codes
            else:  # no arithmetic yields the scale, so the codes cannot be compared
                counts = [_Tally()]
            with self._lock:
                wrong[job.pair] = [a.plus(b) for a, b in zip(wrong[job.pair], counts, strict=True)]
            self._advance((job.end - job.begin) * (1 if pair.scale is None else pair.source.itemsize))

        parallel_for(self._workers, self._jobs(), one)
        return sums, wrong

    def _compare_fine(
        self, pair: Pair, job: _Job, values: torch.Tensor, codes: torch.Tensor, sums: TensorSums
    ) -> _Tally:
        """Compare codes and scales of whole rows of a tensor that has too many scales to hold."""
        assert pair.scale is not None
        view, numbers = pair.source, pair.numbers
        again = _scratch.shaped(codes.dtype, codes.shape)
        bits, parts = quantize_rows(values, view, numbers, again, measure=True)
        if has_nonfinite(bits):
            return _Tally(nonfinite=1)
        mult, scale = scale_from_amax(bits, rounding=numbers.scale_rounding)
        first = job.begin // view.row_elements // (numbers.coverage.rows or 1) * scale.shape[1]
        with self._after.elements(pair.scale, first, first + scale.numel()) as read:
            scales = int((unpack_scales(read, pair.scale.dtype).view(scale.shape) != scale).sum())
            del read
        different = _different(again, codes)
        if different:
            parts = measured(values, codes, view, numbers.coverage, mult, scale)
        sums.add(job.end - job.begin, parts)
        return _Tally(different, scales)

    def _jobs(self) -> Iterator[_Job]:
        for index, pair in enumerate(self._pairs):
            view = pair.source
            if pair.scale is None:
                for begin in range(0, view.nbytes, COMPARED_BYTES):
                    yield _Job(index, begin, min(begin + COMPARED_BYTES, view.nbytes))
            else:
                for strip in strips(view, pair.numbers.coverage):
                    yield _Job(index, *strip)


def _may_be_best(pair: Pair) -> bool:
    """Return True if scales of a tensor whose recipe is unknown may be best scales, which have not been tried."""
    return pair.numbers.coverage.granularity == "channel" and pair.numbers.scale_choice == "amax"


def _ways(
    numerics: Numerics, amax: torch.Tensor, stored: torch.Tensor, pair: Pair, recorded: Recipe | None
) -> list[_Way]:
    """Return the arithmetics that yield the stored scale; without a recorded recipe, with any rounding of blocks."""
    roundings: tuple[ScaleRounding, ...] = (pair.numbers.scale_rounding,)
    if recorded is None and pair.numbers.coverage.columns is not None:
        roundings = ("none", "power-of-two")
    ways = []
    for rounding in roundings:
        try:
            _, scale = scale_from_amax(amax, numerics, TORCH_DTYPES[pair.source.dtype], rounding)
        except MultiplierOverflowError:
            continue
        if torch.equal(scale, stored):
            ways.append(_Way(numerics, rounding, amax))
    return ways


def _compare_codes(
    pair: Pair, job: _Job, values: torch.Tensor, codes: torch.Tensor, fitting: list[_Way], sums: TensorSums
) -> list[_Tally]:
    """Count the codes that differ, by arithmetic; add the error sums of the job to ``sums``."""
    view, coverage = pair.source, pair.numbers.coverage
    begin, end = job.begin * view.itemsize, job.end * view.itemsize
    again, counts = _scratch.shaped(codes.dtype, codes.shape), []
    found: list[ErrorSums] = []
    for way in fitting:
        amax = scale_rows(way.amax, view, coverage, begin, end)
        parts = measured_cast(values, view, coverage, amax, way.numerics, again, way.rounding)
        counts.append(_Tally(_different(again, codes)))
        found = found or ([] if counts[-1].codes else parts)
    if not found:
        way = fitting[0]
        amax = scale_rows(way.amax, view, coverage, begin, end)
        mult, scale = scale_from_amax(amax, way.numerics, TORCH_DTYPES[view.dtype], way.rounding)
        found = measured(values, codes, view, coverage, mult, scale)
    sums.add(job.end - job.begin, found)
    return counts


def _different(again: torch.Tensor, codes: torch.Tensor) -> int:
    """Count the codes that differ."""
    a, b = again.view(torch.uint8), codes.view(torch.uint8)
    return 0 if torch.equal(a, b) else int((a != b).sum())


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
