"""Figures of an evaluation as text, with the digits that their standard errors support."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nemotron_fp8.evaluation.figures import CheckpointFigures
    from nemotron_fp8.inference.sample_record import Sample


ASCII, SIGN = "+-", "\N{PLUS-MINUS SIGN}"
"""Signs before an error: for terminals of any encoding, and for pages."""
DIGEST = 12
"""Digits of a digest that identify a text at a glance."""
MOST_DECIMALS = 6
"""Most decimals before a number is written with an exponent."""
HUGE = 1e6
"""Least number that is written with an exponent."""
SMALL = 1e-3
"""Least number that is written without one."""
NOISE = 1e-9
"""Share of a value below which its error is that of float64 sums, as of sequences that are all the same."""


class Texts(NamedTuple):
    """Figures of a checkpoint as text.

    Attributes:
        perplexity: perplexity.
        change: change of the perplexity against the source, with its error.
        kl: KL divergence in nats, with its error.
        top1: share of positions with the same top token, with its error.
    """

    perplexity: str
    change: str
    kl: str
    top1: str


def texts_of(figures: CheckpointFigures, plus_minus: str = ASCII) -> Texts:
    """Return the figures as text. One sequence has no standard error, so none is written."""
    known = len(figures.sequence_kl) > 1

    def text(value: float, error: float, unit: str = "", sign: str = "") -> str:
        return with_error(value, error if known else None, plus_minus, unit, sign)

    return Texts(
        plain_number(figures.perplexity, 3),
        text(100 * figures.perplexity_change, 100 * figures.perplexity_error, "%", "+"),
        text(figures.kl, figures.kl_error),
        text(100 * figures.top1, 100 * figures.top1_error, "%"),
    )


def with_error(value: float, error: float | None, plus_minus: str = ASCII, unit: str = "", sign: str = "") -> str:
    """Return a value and its standard error with two digits of the error.

    Args:
        value: the value.
        error: its standard error; None if it is unknown, 0 for an exact value.
        plus_minus: sign before the error.
        unit: unit after the value.
        sign: ``+`` to write the sign of a positive value.
    """
    if not error or error < NOISE * abs(value):
        return f"{_decimal(value, 3, sign)}{unit}"
    if max(abs(value), error) >= HUGE:
        return f"{value:{sign}.2e}{unit} {plus_minus}{error:.1e}"
    decimals = 1 - math.floor(math.log10(error))
    if decimals > MOST_DECIMALS:
        number = _decimal(value, 3, sign) if abs(value) < SMALL else f"{value:{sign}.{MOST_DECIMALS}f}"
        return f"{number}{unit} {plus_minus}{error:.1e}"
    decimals = max(decimals, 0)
    return f"{value:{sign}.{decimals}f}{unit} {plus_minus}{error:.{decimals}f}"


def plain_number(value: float, decimals: int) -> str:
    """Return a number with some decimals, or with an exponent if it is huge."""
    return f"{value:,.{decimals}f}" if abs(value) < HUGE else f"{value:.2e}"


def _decimal(value: float, digits: int, sign: str) -> str:
    if 10 ** (digits - 1) <= abs(value) < HUGE:  # ``g`` would write 1000 as 1e+03
        return f"{value:{sign}.0f}"
    return f"{value:{sign}.{digits}g}" if value else "0"


def clipped_text(figures: CheckpointFigures) -> str:
    """Return how many values were beyond the range of a stored scale; empty if none was."""
    clipped, values = figures.clipped_values, max(figures.static_values, figures.clipped_values)
    if not clipped:
        return ""
    what = "activations, keys and values beyond the range of a stored scale"
    return f"{clipped:,} of {values:,} {what}"


def sample_text(sample: Sample) -> str:
    """Return the size of a sample: sequences, their length, predictions."""
    of = f" of {sample.available:,}" if sample.available != sample.sequences else ""
    return (
        f"{sample.sequences:,}{of} sequence{'s' * (max(sample.available, sample.sequences) != 1)} of {sample.length:,}"
        f" tokens, {sample.predictions:,} predictions"
    )


def error_text(sample: Sample, plus_minus: str = ASCII) -> str:
    """Return the meaning of the errors of a sample."""
    if sample.sequences < 2:
        return "one sequence has no standard error"
    return f"{plus_minus} is one standard error over {sample.sequences:,} sequences"
