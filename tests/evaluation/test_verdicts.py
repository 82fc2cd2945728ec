"""Verdicts state what the figures support: signs, symmetry, and nothing from a handful of sequences."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.evaluation.naming import labels_of
from nemotron_fp8.evaluation.verdict import (
    FEWEST,
    LEAST,
    MOST_PAIRS,
    comparisons_of,
    judge,
    judge_perplexity,
    paired,
    quantile,
    threshold,
    verdicts,
)
from nemotron_fp8.evaluation.wording import with_error
from tests.support.evaluations import evaluation_of, evaluations, figures_of

figures = st.lists(st.floats(0, 10, allow_subnormal=False), min_size=FEWEST, max_size=40)
MIRROR = {"higher": "lower", "lower": "higher"}


@pytest.mark.parametrize(
    ("freedom", "level", "known"),
    [
        (3, 0.05, 3.182),
        (4, 0.05, 2.776),
        (7, 0.05, 2.365),
        (15, 0.05, 2.131),
        (30, 0.05, 2.042),
        (100, 0.05, 1.984),
        (3, 0.01, 5.841),
        (15, 0.01, 2.947),
    ],
)
def test_quantiles_are_those_of_published_tables(freedom: int, level: float, known: float) -> None:
    assert quantile(freedom, level) == pytest.approx(known, rel=0.01)


@given(st.integers(FEWEST, 10_000), st.integers(1, 28))
def test_a_clear_difference_is_two_errors_or_more(sequences: int, comparisons: int) -> None:
    """The threshold grows with the comparisons, shrinks with the sequences, and is never below two errors."""
    assert LEAST <= threshold(sequences + 1, comparisons) <= threshold(sequences, comparisons)
    assert threshold(sequences, comparisons) <= threshold(sequences, comparisons + 1)


@pytest.mark.parametrize("count", range(FEWEST))
def test_few_sequences_are_no_evidence(count: int) -> None:
    """However large the difference is."""
    assert threshold(count) == math.inf
    assert judge(100.0, 1e-9, count) == "few"
    if count:
        assert paired([9.0] * count, [1.0] * count).outcome == "few"
        made = evaluation_of(figures_of("a", 0.01, count), figures_of("b", 1.0, count), sequences=count)
        (line,) = verdicts(made, ["a", "b"])
        assert line == f"too few sequences to judge: {count} sequence{'s' * (count != 1)}; evaluate at least {FEWEST}"


@given(figures, st.data())
def test_a_comparison_has_no_sides(a: list[float], data: st.DataObject) -> None:
    """Exchanging the results exchanges higher and lower; the order of the sequences does not matter."""
    b = data.draw(st.lists(st.floats(0, 10, allow_subnormal=False), min_size=len(a), max_size=len(a)))
    there, back = paired(a, b), paired(b, a)
    assert back == (-there.mean, there.error, MIRROR.get(there.outcome, there.outcome))
    order = data.draw(st.permutations(range(len(a))))
    assert paired([a[at] for at in order], [b[at] for at in order]) == there


@given(figures)
def test_a_result_is_not_worse_than_itself(a: list[float]) -> None:
    assert paired(a, a) == (0.0, 0.0, "equal")


@given(figures, st.floats(0.5, 10), st.randoms(use_true_random=False))
def test_pairs_remove_what_is_common(a: list[float], more: float, chance: random.Random) -> None:
    """A constant surplus is clear, however different the sequences are; the same surplus among strangers is not."""
    assert paired([each + more for each in a], a).outcome == "higher"
    noise = [chance.choice([-1, 1]) * 1000 * more for _ in a]
    noise[:2] = [-1000 * more, 1000 * more]
    assert paired([x + n for x, n in zip(a, noise, strict=True)], a).outcome != "equal"


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(FEWEST, 100), st.integers(1, 6))
def test_the_outcome_follows_from_mean_and_error(mean: float, error: float, sequences: int, comparisons: int) -> None:
    outcome = judge(mean, error, sequences, comparisons)
    clear = abs(mean) > threshold(sequences, comparisons) * error
    assert outcome == (("higher" if mean > 0 else "lower") if clear else "unclear")
    if outcome != "unclear":
        assert abs(mean) > 2 * error


def test_noise_is_rarely_called_a_difference() -> None:
    """Of samples of one distribution, at most about 5 % give any clear difference among three results."""
    chance, wrong, tries = random.Random(7), 0, 400
    for _ in range(tries):
        made = [tuple(chance.gauss(1, 0.2) for _ in range(8)) for _ in range(3)]
        results = [replace(figures_of(str(at), 1.0, 8), sequence_kl=values) for at, values in enumerate(made)]
        wrong += any(each.difference.outcome in ("higher", "lower") for each in comparisons_of(results))
    assert wrong / tries < 0.08


def test_words_for_each_outcome() -> None:
    better, worse = figures_of("a/better", 0.01), figures_of("b/worse", 0.03)
    same = replace(better, name="same")
    source = figures_of("source", 0.0, top1=1.0)
    made = evaluation_of(worse, better, same, source)
    lines = verdicts(made, labels_of(made.results, 30))
    assert lines[3] == "4 source: predicts exactly as the source does"
    assert "2 better and 3 same: the same KL in every sequence" in lines
    assert any(line.startswith("1 worse is clearly worse than 2 better: KL higher by ") for line in lines)
    near = replace(better, sequence_kl=tuple(k + (-1) ** at * 1e-3 for at, k in enumerate(better.sequence_kl)))
    assert any(" is not distinguishable from " in line for line in verdicts(evaluation_of(better, near), ["a", "b"]))


def test_the_perplexity_has_a_verdict_of_its_own() -> None:
    base = figures_of("a", 0.01)
    cases = {"unclear": (0.01, 0.006), "higher": (0.01, 0.004), "lower": (-0.01, 0.004)}
    for outcome, (change, error) in cases.items():
        assert judge_perplexity(replace(base, perplexity_change=change, perplexity_error=error)) == outcome
    assert judge_perplexity(figures_of("s", 0.0)) == "equal"
    assert judge_perplexity(figures_of("s", 0.01, 3)) == "few"


def test_many_results_are_compared_with_the_best() -> None:
    """All pairs of many results would be a page of words, and need a stricter threshold."""
    results = [figures_of(str(at), 0.01 * (9 - at)) for at in range(6)]
    pairs = comparisons_of(results)
    assert len(pairs) == len(results) - 1
    assert {each.better for each in pairs} == {5}
    assert len(comparisons_of(results[:4])) == MOST_PAIRS


@given(evaluations())
def test_any_figures_have_verdicts(evaluation: object) -> None:
    """No figure that a file may hold ends in an exception, and every line is one line."""
    labels = labels_of(evaluation.results, 20)  # type: ignore[attr-defined]  # the strategy makes evaluations
    assert all(line.isprintable() for line in verdicts(evaluation, labels))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.0174, 0.00051, "0.01740 +-0.00051"),
        (0.0174, 0.0123, "0.017 +-0.012"),
        (1234.5, 37.0, "1234 +-37"),
        (0.0, 0.0, "0"),
        (0.5, None, "0.5"),
        (3.1e-9, 1e-10, "3.1e-09 +-1.0e-10"),
        (0.0, 1e-9, "0 +-1.0e-09"),
        (18.2431, 2e-15, "18.2"),  # an error of the sums, as of sequences that are all the same
        (-18.2431, 2e-15, "-18.2"),
        (18.2431, 3e-7, "18.243100 +-3.0e-07"),
        (2e9, 1e7, "2.00e+09 +-1.0e+07"),
    ],
)
def test_digits_are_those_that_the_error_supports(value: float, error: float | None, text: str) -> None:
    assert with_error(value, error) == text


@given(st.floats(1e-3, 1e5), st.floats(0, 1.0))
def test_usual_figures_have_no_exponent(value: float, error: float) -> None:
    """Perplexities, percentages and divergences of a result; only their errors may be tiny."""
    assert "e" not in with_error(value, error).partition(" ")[0]


@given(st.floats(-1e30, 1e30), st.none() | st.floats(0, 1e30))
def test_a_figure_is_short(value: float, error: float | None) -> None:
    assert len(with_error(value, error, "+-", "%", "+")) <= 24
