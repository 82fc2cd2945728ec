"""The distance between two sets of log-probabilities, and its bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Distance:
    """Averages over every position, in nats.

    Attributes:
        mean: absolute difference of a log-probability, over the whole vocabulary.
        divergence: Kullback-Leibler divergence of the engine from the reference.
    """

    mean: float
    divergence: float

    def within(self, bound: Distance) -> bool:
        """Return True if both figures are inside ``bound``. NaN is inside no bound."""
        return self.mean <= bound.mean and self.divergence <= bound.divergence


def distance(engine: torch.Tensor, reference: torch.Tensor) -> Distance:
    """Compare log-probabilities [positions, vocabulary] of an engine with a reference's."""
    gap = reference - engine
    return Distance(gap.abs().mean().item(), (reference.exp() * gap).sum(-1).mean().item())
