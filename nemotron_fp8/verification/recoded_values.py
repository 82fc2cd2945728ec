"""Compare a result with its quantized source: kept codes, repeated scales, dequantized tensors, and changed values."""

from __future__ import annotations

import math
from collections import Counter
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.checkpoint.tensor_view import Encoding, encoded
from nemotron_fp8.engines.base import as_bytes, one_torch_thread
from nemotron_fp8.engines.kept_codes import NAN, check_scales, fits, repeated_scales
from nemotron_fp8.planning.carried_codes import may_keep_codes
from nemotron_fp8.planning.receipt import Recoded, TensorStats
from nemotron_fp8.sources.reader import TORCH_DTYPES, Reader
from nemotron_fp8.verification.dequantized_values import differing_values
from nemotron_fp8.verification.problems import Problem
from nemotron_fp8.verification.quantized_values import NONFINITE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.progress import Advance, StageProgress
    from nemotron_fp8.sources.files import Opener
    from nemotron_fp8.verification.problems import Pair


PART = 1 << 18
"""Elements that are compared at a time."""


class SortedPairs(NamedTuple):
    """Pairs of a quantized source, by how the result was made.

    Attributes:
        kept: pairs of FP8 tensors whose codes are those of the source.
        decoded: pairs of dequantized tensors.
        others: the other pairs: quantized again, or copied.
    """

    kept: list[Pair]
    decoded: list[Pair]
    others: list[Pair]

    @property
    def again(self) -> list[Pair]:
        """Pairs of FP8 tensors that were quantized again."""
        return [pair for pair in self.others if pair.scale is not None and pair.source.encoding is not None]


class RecodedCheck(NamedTuple):
    """Outcome of a comparison with a quantized source.

    Attributes:
        stats: quantization errors of the tensors that keep their codes, which are 0.
        plain: number of dequantized tensors that equal codes times scales of the source.
        recoded: counts of the FP8 tensors, and of the values that changed.
        problems: differences.
    """

    stats: tuple[TensorStats, ...]
    plain: int
    recoded: Recoded
    problems: list[Problem]


def sort_pairs(
    source: Opener, destination: Opener, pairs: Iterable[Pair], family: Family, recorded: Recipe | None
) -> SortedPairs:
    """Sort pairs by how the result was made, from the scales of the source.

    Args:
        source: opens the files of the source.
        destination: opens the files of the result.
        pairs: all pairs.
        family: model family of the source.
        recorded: recipe of the result; None if nothing records it: then a tensor with the scales of the source was made
            with its codes, too.

    Raises:
        ScaleError: a scale of the source is not positive and finite.
    """
    found, pairs = SortedPairs([], [], []), list(pairs)
    shared = Counter(family.fused_matrix_of(pair.source.name) for pair in pairs if pair.scale is not None)
    shares = recorded is not None and recorded.share_scales
    with Reader(source) as before, Reader(destination) as after:
        for pair in pairs:
            if pair.source.encoding is None:
                found.others.append(pair)
                continue
            powers_of_two = check_scales(pair.source, before)
            alone = not shares or shared[family.fused_matrix_of(pair.source.name)] == 1
            if pair.scale is None:
                found.decoded.append(pair)
            elif not (alone and may_keep_codes(pair.source, pair.numbers)):
                found.others.append(pair)
            elif fits(powers_of_two, pair.numbers) if recorded else not _wrong_scales(pair, before, after):
                found.kept.append(pair)
            else:
                found.others.append(pair)
    return found


def _wrong_scales(pair: Pair, before: Reader, after: Reader) -> int:
    """Count the scales of a result that are not those of the source, repeated."""
    assert pair.scale is not None
    wrong = 0
    for row, scale in repeated_scales(pair.source, pair.numbers, before):
        first = row * scale.shape[-1] if row else 0
        stored = after.scales(pair.scale, first, first + scale.numel())
        wrong += int((stored != scale.flatten()).sum())
    return wrong


def check_recoded_values(
    source: Opener, destination: Opener, pairs: SortedPairs, threads: int, gauge: StageProgress
) -> RecodedCheck:
    """Compare kept codes, scales and dequantized tensors, and count the values that changed.

    Args:
        source: opens the files of the source.
        destination: opens the files of the result.
        pairs: the pairs.
        threads: workers.
        gauge: tracks the progress.

    Raises:
        SourceReadError, SourceChangedError: a file ends early, cannot be read, or changes meanwhile.
    """
    every = (*pairs.kept, *pairs.decoded, *pairs.again)
    if not every:
        return RecodedCheck((), 0, Recoded(), [])
    advance = gauge.stage("values", sum(pair.source.numel for pair in every))
    with Reader(source) as before, Reader(destination) as after, one_torch_thread():
        return _Comparison(pairs, before, after, threads, advance).run()


class _Comparison:
    """State of one comparison; counts are stored by name, so that they do not depend on threads."""

    def __init__(self, pairs: SortedPairs, before: Reader, after: Reader, threads: int, advance: Advance) -> None:
        self._pairs, self._before, self._after, self._threads = pairs, before, after, threads
        self._advance, self._lock = advance, Lock()
        self._wrong: Counter[str] = Counter()
        self._scales: Counter[str] = Counter()
        self._changed: Counter[str] = Counter()
        self._with_signal: set[str] = set()
        self._nonfinite: set[str] = set()

    def run(self) -> RecodedCheck:
        kept, decoded, again = self._pairs.kept, self._pairs.decoded, self._pairs.again
        parallel_for(self._threads, kept, self._compare_scales)
        for pairs, compare in ((kept, self._compare_codes), (decoded, self._compare_values), (again, self._count)):
            parallel_for(self._threads, _parts(pairs), compare)
        changed = [self._changed[pair.source.name] for pair in again]
        counts = Recoded(len(kept), sum(not count for count in changed), sum(map(bool, changed)), sum(changed))
        right = sum(not self._wrong[pair.source.name] for pair in decoded)
        return RecodedCheck(tuple(map(self._stats, kept)), right, counts, list(self._problems()))

    def _stats(self, pair: Pair) -> TensorStats:
        name = pair.source.name
        return TensorStats(name, math.inf if name in self._with_signal else math.nan, 0.0, 0, 0)

    def _problems(self) -> Iterator[Problem]:
        for pair in self._pairs.kept:
            name = pair.source.name
            if name in self._nonfinite:
                yield Problem(name, NONFINITE)
            if self._wrong[name]:
                what = f"{self._wrong[name]:,} of {pair.source.numel:,} codes differ from those of the source"
                yield Problem(name, what)
            if self._scales[name] and pair.scale is not None:
                what = f"{self._scales[name]:,} of {pair.scale.numel:,} scales differ from those of the source"
                yield Problem(pair.scale.name, what)
        for pair in self._pairs.decoded:
            if count := self._wrong[pair.source.name]:
                yield Problem(pair.source.name, f"{count:,} bytes differ from code times scale")

    def _compare_scales(self, pair: Pair) -> None:
        wrong = _wrong_scales(pair, self._before, self._after)
        with self._lock:
            self._scales[pair.source.name] += wrong

    def _compare_codes(self, part: tuple[Pair, int, int]) -> None:
        pair, begin, end = part
        assert pair.source.encoding is not None
        name = pair.source.name
        with (
            self._before.raw(pair.source.encoding.codes, begin, end) as a,
            self._after.raw(pair.result, begin, end) as b,
        ):
            left, right = (torch.frombuffer(x, dtype=torch.uint8) for x in (a, b))
            wrong, magnitudes = int((left != right).sum()), left & NAN
            del left, right
        with self._lock:
            self._wrong[name] += wrong
            if bool(magnitudes.any()):
                self._with_signal.add(name)
            if bool((magnitudes == NAN).any()):
                self._nonfinite.add(name)
        self._advance(end - begin)

    def _compare_values(self, part: tuple[Pair, int, int]) -> None:
        pair, begin, end = part
        dtype = TORCH_DTYPES[pair.result.dtype]
        values = self._before.decoded(pair.source, begin, end, dtype)
        with self._after.raw(pair.result, begin * dtype.itemsize, end * dtype.itemsize) as there:
            wrong = differing_values(as_bytes(values), there, dtype)
        with self._lock:
            self._wrong[pair.source.name] += wrong
        self._advance(end - begin)

    def _count(self, part: tuple[Pair, int, int]) -> None:
        pair, begin, end = part
        values = self._before.decoded(pair.source, begin, end, torch.float32)
        result = self._after.decoded(_values_of(pair), begin, end, torch.float32)
        with self._lock:
            self._changed[pair.source.name] += int((values != result).sum())
        self._advance(end - begin)


def _values_of(pair: Pair) -> TensorView:
    """Return an FP8 tensor of the result as a view of its values."""
    assert pair.scale is not None
    coverage = pair.numbers.coverage
    encoding = Encoding(pair.result.dtype, pair.result, pair.scale, (coverage.rows, coverage.columns))
    return encoded(pair.result.name, pair.result.shape, encoding)


def _parts(pairs: Iterable[Pair]) -> Iterator[tuple[Pair, int, int]]:
    """Yield the parts of tensors that are compared at a time: pair, first element, end."""
    for pair in pairs:
        for begin in range(0, pair.source.numel, PART):
            yield pair, begin, min(begin + PART, pair.source.numel)


def in_order(names: Iterable[str], *stats: tuple[TensorStats, ...]) -> tuple[TensorStats, ...]:
    """Return statistics of tensors in the order of names."""
    found: Mapping[str, TensorStats] = {each.name: each for part in stats for each in part}
    return tuple(found[name] for name in names if name in found)
