"""Comparison of predicted distributions, from parts of the vocabulary: KL divergence, likelihoods, first words.

The logits of a whole vocabulary are never held. Each part of it updates a running maximum and sums that are scaled to
it, as in online softmax. All sums are float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nemotron_fp8.evaluation.result import BUCKETS


class TokenFigures(NamedTuple):
    """Figures of every prediction, float64 ``[sequences, length - 1]``.

    Attributes:
        nll: negative log-likelihoods of the next tokens, in nats.
        kl: KL divergences from the source, in nats.
        same: 1 where source and checkpoint predict the same token, else 0.
    """

    nll: torch.Tensor
    kl: torch.Tensor
    same: torch.Tensor


class Distribution:
    """Running softmax of the logits of one checkpoint at every position of all sequences.

    Args:
        ids: tokens, int64 ``[sequences, length]``.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self._next = ids[:, 1:]
        shape = self._next.shape
        self.largest = torch.full(shape, -math.inf, dtype=torch.float64)
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.first = torch.full(shape, -1)
        self._label = torch.full(shape, math.nan, dtype=torch.float64)

    def add(self, sequence: int, word: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the logits of some words.

        Args:
            sequence: number of the sequence.
            word: first of the words.
            logits: float32 ``[length - 1, words]``, on any device.

        Returns:
            The weights of these words, ``exp(logit - maximum)``, float32 as ``logits``; and the factor by which earlier
            weights shrink, float64 ``[length - 1]``.
        """
        top, place = logits.max(-1)
        before, after = self.largest[sequence], top.cpu().double()
        newest = torch.maximum(before, after)
        weights = (logits - newest.to(logits.device, torch.float32)[:, None]).exp_()
        shrink = (before - newest).exp()
        self.total[sequence] = self.total[sequence] * shrink + weights.sum(-1, dtype=torch.float64).cpu()
        self.first[sequence] = torch.where(after > before, place.cpu() + word, self.first[sequence])
        self.largest[sequence] = newest
        places = self._next[sequence] - word
        here = (places >= 0) & (places < logits.shape[-1])
        found = logits.gather(1, places.clamp(0, logits.shape[-1] - 1).to(logits.device)[:, None])[:, 0].cpu().double()
        self._label[sequence] = torch.where(here, found, self._label[sequence])
        return weights, shrink

    @property
    def log_total(self) -> torch.Tensor:
        """Logarithms of the sums of exp(logit)."""
        return self.largest + self.total.log()

    @property
    def nll(self) -> torch.Tensor:
        """Negative log-likelihoods of the next tokens, in nats."""
        return self.log_total - self._label


class Comparison:
    """Running comparison of a source with results.

    Args:
        ids: tokens, int64 ``[sequences, length]``.
        results: number of results.
    """

    def __init__(self, ids: torch.Tensor, results: int) -> None:
        self._source = Distribution(ids)
        self._results = [Distribution(ids) for _ in range(results)]
        self._difference = [torch.zeros_like(self._source.total) for _ in range(results)]

    def add(self, sequence: int, word: int, logits: list[torch.Tensor]) -> None:
        """Add the logits of some words: those of the source, then those of each result, as in `Distribution.add`."""
        weights, shrink = self._source.add(sequence, word, logits[0])
        for result, sums, own in zip(self._results, self._difference, logits[1:], strict=True):
            result.add(sequence, word, own)
            product = (logits[0] - own).mul_(weights).sum(-1, dtype=torch.float64).cpu()
            sums[sequence] = sums[sequence] * shrink + product

    def source(self) -> TokenFigures:
        """Return the figures of the source; it does not differ from itself."""
        nll = self._source.nll
        return TokenFigures(nll, torch.zeros_like(nll), torch.ones_like(nll))

    def results(self) -> list[TokenFigures]:
        """Return the figures of each result."""
        return [
            TokenFigures(
                result.nll,
                # The mean of log p - log q under p: differences of logits, and of the logarithms of the sums.
                sums / self._source.total - self._source.log_total + result.log_total,
                (self._source.first == result.first).double(),
            )
            for result, sums in zip(self._results, self._difference, strict=True)
        ]


class Mean(NamedTuple):
    """A mean over sequences, and its standard error: the spread of sequences, not of tokens, which are not independent.

    Attributes:
        value: the mean.
        error: standard error; 0 for a single sequence, of which no spread is known.
    """

    value: float
    error: float


def mean_of(values: torch.Tensor) -> Mean:
    """Return the mean of figures ``[sequences, positions]``."""
    each = values.mean(1)
    error = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else 0.0
    return Mean(float(each.mean()), error)


def change_of(source: TokenFigures, result: TokenFigures) -> Mean:
    """Return the relative change of the perplexity, paired by sequence, with its standard error."""
    mean = mean_of(result.nll - source.nll)
    ratio = math.exp(mean.value)
    return Mean(ratio - 1, ratio * mean.error)


def by_position(kl: torch.Tensor) -> tuple[float, ...]:
    """Return the mean divergence of each group of neighboring positions, at most `BUCKETS` groups."""
    at = kl.mean(0)
    return tuple(float(part.mean()) for part in torch.tensor_split(at, min(BUCKETS, len(at))))
