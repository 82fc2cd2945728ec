"""Verdicts that the figures of an evaluation support, and no others.

A difference is called clear if it exceeds two of its standard errors, and the 95 % quantile of Student's t
distribution for the number of sequences. Two results are compared by the differences of their KL divergence in the same
sequences: sequences differ more from one another than results do, and the difference removes that. With several
comparisons the quantile is that of Bonferroni's correction, so that 95 % holds for all of them together.

The KL divergence is never negative and is 0 only for equal predictions. Its size is therefore no verdict: a divergence
above 0 states that predictions changed, and the perplexity whether they became worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, NamedTuple

from nemotron_fp8.documents.evaluation_section import VERDICTS
from nemotron_fp8.evaluation.wording import with_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.evaluation.figures import CheckpointFigures
    from nemotron_fp8.evaluation.result import Evaluation


Outcome = Literal["equal", "few", "unclear", "higher", "lower"]
"""Outcome of a comparison: no difference at all, too few sequences, within the noise, clearly higher or lower."""

FEWEST = 4
"""Fewest sequences whose standard error is worth a verdict: with three, it may be wrong by a factor of four."""
LEAST = 2.0
"""Standard errors that a clear difference exceeds at least."""
LEVEL = 0.05
"""Probability that noise alone makes any of the differences of an evaluation clear."""
MOST_PAIRS = 6
"""Most comparisons of all results with each other; of more results, each is compared with the best."""


class Difference(NamedTuple):
    """Mean of differences, its standard error, and the outcome."""

    mean: float
    error: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of two results by their KL divergence in the same sequences.

    Attributes:
        worse: number of the result with the larger divergence, counted from 0.
        better: number of the other result.
        difference: divergence of the worse result minus that of the better one.
    """

    worse: int
    better: int
    difference: Difference


def quantile(freedom: int, level: float) -> float:
    """Return the two-sided quantile of Student's t distribution, within 1 % from three degrees of freedom on.

    Source of the expansion: Abramowitz and Stegun, 26.7.5.
    """
    z = NormalDist().inv_cdf(1 - level / 2)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))


def threshold(sequences: int, comparisons: int = 1) -> float:
    """Return the standard errors that a clear difference exceeds; infinity for too few sequences."""
    if sequences < FEWEST:
        return math.inf
    return max(LEAST, quantile(sequences - 1, LEVEL / max(comparisons, 1)))


def judge(mean: float, error: float, sequences: int, comparisons: int = 1) -> Outcome:
    """Return the outcome of a difference with its standard error over sequences."""
    if sequences < FEWEST:
        return "few"
    if abs(mean) <= threshold(sequences, comparisons) * error:
        return "unclear"
    return "higher" if mean > 0 else "lower" if mean < 0 else "unclear"


def judge_perplexity(figures: CheckpointFigures, results: int = 1) -> Outcome:
    """Return the outcome for the perplexity of a result against that of the source.

    Args:
        figures: figures of the result.
        results: results of the evaluation, each of which is compared with the source.
    """
    if not any(figures.sequence_kl) and not figures.kl and not figures.perplexity_change:
        return "equal"
    return judge(figures.perplexity_change, figures.perplexity_error, len(figures.sequence_kl), results)


def paired(a: Sequence[float], b: Sequence[float], comparisons: int = 1) -> Difference:
    """Compare two results by a figure of each sequence; the difference is that of ``a`` minus ``b``."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    count = len(differences)
    if not any(differences):
        return Difference(0.0, 0.0, "equal")
    mean = math.fsum(differences) / count
    error = 0.0
    if count > 1:
        squares = math.fsum((each - mean) * (each - mean) for each in differences)
        error = math.sqrt(squares / (count - 1) / count)
    return Difference(mean, error, judge(mean, error, count, comparisons))


def comparisons_of(results: Sequence[CheckpointFigures]) -> list[Comparison]:
    """Compare all results with each other or, if there are many, each with the best; the best results come first."""
    order = sorted(range(len(results)), key=lambda number: (math.fsum(results[number].sequence_kl), number))
    pairs = list(combinations(order, 2))
    if len(pairs) > MOST_PAIRS:
        pairs = [(order[0], other) for other in order[1:]]
    found = []
    for better, worse in pairs:
        difference = paired(results[worse].sequence_kl, results[better].sequence_kl, len(pairs))
        found.append(Comparison(worse, better, difference))
    return found


def verdicts(evaluation: Evaluation, labels: Sequence[str]) -> list[str]:
    """Return what the figures show, in words: of each result, then of each pair of results.

    Args:
        evaluation: the figures.
        labels: name of each result in the words.
    """
    count, results = evaluation.sample.sequences, evaluation.results
    if count < FEWEST:
        sequences = f"{count} sequence{'s' * (count != 1)}"
        return [f"too few sequences to judge: {sequences}; evaluate at least {FEWEST}"]
    lines = [
        f"{label}: {VERDICTS[judge_perplexity(each, len(results))]}"
        for label, each in zip(labels, results, strict=True)
    ]
    for pair in comparisons_of(results):
        worse, better, found = labels[pair.worse], labels[pair.better], pair.difference
        size = f"by {with_error(found.mean, found.error)} in the same sequences"
        if found.outcome == "equal":
            lines.append(f"{better} and {worse}: the same KL in every sequence")
        elif found.outcome == "higher":
            lines.append(f"{worse} is clearly worse than {better}: KL higher {size}")
        else:
            lines.append(f"{worse} is not distinguishable from {better}: KL differs {size}")
    return lines
