"""Figures of predictions: equal to those of whole distributions in float64, whatever the parts of the vocabulary."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.evaluation.comparison import Comparison, TokenFigures, by_position, change_of, mean_of


def compare(ids: torch.Tensor, logits: list[torch.Tensor], step: int) -> tuple[TokenFigures, list[TokenFigures]]:
    comparison = Comparison(ids, len(logits) - 1)
    words = logits[0].shape[-1]
    for first in range(0, words, step):
        for sequence in range(len(ids)):
            comparison.add(sequence, first, [each[sequence, :-1, first : first + step].clone() for each in logits])
    return comparison.source(), comparison.results()


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    sequences, length, words = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    ids = torch.randint(0, words, (sequences, length), generator=generator)
    spread = draw(st.sampled_from([0.0, 0.1, 3.0, 30.0, 300.0]))
    source = torch.randn((sequences, length, words), generator=generator) * spread
    results = [
        source + torch.randn(source.shape, generator=generator) * draw(st.sampled_from([0.0, 0.01, 1.0, 50.0]))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return ids, [source, *results], draw(st.integers(1, words))


@given(cases())
def test_figures_equal_those_of_whole_distributions(case: tuple[torch.Tensor, list[torch.Tensor], int]) -> None:
    ids, logits, step = case
    source, results = compare(ids, logits, step)
    log_p = logits[0][:, :-1].double().log_softmax(-1)
    right = ids[:, 1:, None]
    torch.testing.assert_close(source.nll, -log_p.gather(-1, right)[..., 0], atol=1e-4, rtol=1e-5)
    for own, figures in zip(logits[1:], results, strict=True):
        log_q = own[:, :-1].double().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(figures.kl, kl, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(figures.nll, -log_q.gather(-1, right)[..., 0], atol=1e-4, rtol=1e-5)
        same = (logits[0][:, :-1].argmax(-1) == own[:, :-1].argmax(-1)).double()
        assert torch.equal(figures.same, same)


@given(cases())
def test_a_source_does_not_differ_from_itself(case: tuple[torch.Tensor, list[torch.Tensor], int]) -> None:
    ids, logits, step = case
    _, (own,) = compare(ids, [logits[0], logits[0].clone()], step)
    assert torch.equal(own.kl, torch.zeros_like(own.kl))  # exactly
    assert torch.equal(own.same, torch.ones_like(own.same))


def test_words_that_cannot_occur() -> None:
    ids = torch.tensor([[0, 1, 1]])
    logits = torch.tensor([[[0.0, 1.0, -math.inf], [2.0, 0.0, -math.inf], [0.0, 0.0, 0.0]]])
    source, _ = compare(ids, [logits, logits.clone()], 1)
    assert torch.isfinite(source.nll).all()


def test_errors_are_those_of_sequences() -> None:
    values = torch.tensor([[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]], dtype=torch.float64)
    assert mean_of(values) == (3.0, 2.0 / math.sqrt(3))
    assert mean_of(values[:1]) == (1.0, 0.0)


def test_the_change_of_the_perplexity_is_paired_by_sequence() -> None:
    nll = torch.tensor([[1.0, 2.0], [5.0, 6.0]], dtype=torch.float64)
    zeros = torch.zeros_like(nll)
    change = change_of(TokenFigures(nll, zeros, zeros), TokenFigures(nll + math.log(1.1), zeros, zeros))
    assert math.isclose(change.value, 0.1)
    assert change.error < 1e-12  # although the sequences differ from each other


@given(st.integers(1, 3), st.integers(1, 200))
def test_groups_of_positions_have_the_mean_of_all(sequences: int, positions: int) -> None:
    kl = torch.rand((sequences, positions), dtype=torch.float64)
    groups = by_position(kl)
    sizes = [len(part) for part in torch.tensor_split(torch.arange(positions), len(groups))]
    mean = sum(size * value for size, value in zip(sizes, groups, strict=True)) / positions
    assert math.isclose(mean, float(kl.mean()))
