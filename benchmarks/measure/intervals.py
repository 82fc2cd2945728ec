"""Honesty of the intervals of an evaluation: ``python -m benchmarks.measure.intervals --source MODEL [--work DIR]``.

A trained model is quantized in two layouts and evaluated on many sequences of the default text. These are divided into
disjoint samples, as large as the default sample, and each sample's interval either holds the value of all sequences, or
not. A division gives as many intervals as samples, whose count varies by chance; many random divisions give the rate.

Intervals of a mean are those of Student's t. A sample is drawn without replacement from a known number of sequences,
which makes its mean less uncertain than the same sample of an endless text; the expected rate takes that into account.

Needs transformers, as in the environment of ``make test-engines``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.common import RESULTS, Recorder, machine
from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.evaluation.comparison import mean_of
from nemotron_fp8.evaluation.evaluate import evaluate_repo
from nemotron_fp8.evaluation.result import parse_evaluation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.evaluation.result import Evaluation

LAYOUTS = {
    "channel": {"format": "compressed-tensors", "granularity": "channel"},
    "tensor": {"format": "fp8", "granularity": "tensor"},
}
"""Recipes by the names of the table."""
WIDTHS = (1, 2)
"""Half widths of the intervals, in standard errors."""
DIVISIONS = 1000
SEED = 0


def t_probability(bound: float, freedom: int, steps: int = 20_000) -> float:
    """Return the probability that Student's t lies within ``bound`` of 0, by Simpson's rule."""
    factor = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    step = bound / steps
    total = sum(
        (1 if number in (0, steps) else 4 if number % 2 else 2)
        * (1 + (number * step) ** 2 / freedom) ** (-(freedom + 1) / 2)
        for number in range(steps + 1)
    )
    return 2 * factor * total * step / 3


def held(values: torch.Tensor, size: int, order: Sequence[int]) -> list[int]:
    """Return how many disjoint samples hold the mean of all values within each of `WIDTHS`.

    Args:
        values: a value for each sequence.
        size: sequences of a sample.
        order: numbers of the sequences, in the order in which they are divided.
    """
    whole = float(values.mean())
    samples = [mean_of(values[list(order[at : at + size])][:, None]) for at in range(0, len(order) - size + 1, size)]
    return [sum(abs(found.value - whole) <= width * found.error for found in samples) for width in WIDTHS]


def rates(values: torch.Tensor, size: int, divisions: int) -> list[float]:
    """Return the rates at which intervals hold the mean of all values, over random divisions."""
    draw = torch.Generator().manual_seed(SEED)
    count = len(values) // size
    orders = torch.stack([torch.randperm(len(values), generator=draw)[: count * size] for _ in range(divisions)])
    samples = values[orders].view(divisions * count, size)
    off = (samples.mean(1) - values.mean()).abs()
    error = samples.std(1) / math.sqrt(size)
    return [float((off <= width * error).double().mean()) for width in WIDTHS]


def figures(evaluation: Evaluation) -> dict[str, dict[str, torch.Tensor]]:
    """Return, for each layout, the values of each sequence whose mean and error are stated."""
    source = torch.tensor(evaluation.source.sequence_nll, dtype=torch.float64)
    return {
        name: {
            "KL divergence": torch.tensor(found.sequence_kl, dtype=torch.float64),
            # The change of the perplexity is exp of this mean, minus 1, and its error is scaled alike.
            "perplexity": torch.tensor(found.sequence_nll, dtype=torch.float64) - source,
        }
        for name, found in zip(LAYOUTS, evaluation.results, strict=True)
    }


def evaluate(source: Path, work: Path, sequences: int, length: int) -> Evaluation:
    """Quantize a model to every layout, and evaluate the results."""
    for name, recipe in LAYOUTS.items():
        quantize_repo(source, work / name, Recipe(**recipe), digests=False)  # type: ignore[arg-type]  # choices
    results = [work / name for name in LAYOUTS]
    return evaluate_repo(source, results, sequences=sequences, length=length, state_dir=work / "state")


def evaluated(source: Path, work: Path | None, kept: Path | None, sequences: int, length: int) -> Evaluation:
    """Return the figures in a file; without the file, evaluate and write it."""
    if kept is not None and kept.exists():
        return parse_evaluation(kept.read_bytes(), str(kept))
    with tempfile.TemporaryDirectory(dir=work) as made:
        evaluation = evaluate(source, Path(made), sequences, length)
    if kept is not None:
        kept.write_text(json.dumps(evaluation.to_json()), encoding="utf-8")
    return evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a trained model with its tokenizer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--tokens", type=int, default=320 * 128, help="tokens of all sequences of a length")
    parser.add_argument("--size", type=int, default=16, help="sequences of a sample")
    parser.add_argument("--work", type=Path, help="folder for the results; a temporary one by default")
    parser.add_argument("--kept", type=Path, help="folder for the figures, LENGTH.json; those that exist are read")
    parser.add_argument("--out", type=Path, default=RESULTS / "intervals.jsonl")
    options = parser.parse_args()
    record = Recorder(options.out, {**machine("cpu"), "size": options.size, "divisions": DIVISIONS})
    for length in options.lengths:
        kept = options.kept and options.kept / f"{length}.json"
        evaluation = evaluated(options.source, options.work, kept, options.tokens // length, length)
        write(record, evaluation, options.size)


def write(record: Recorder, evaluation: Evaluation, size: int) -> None:
    """Write the counts and rates of one evaluation."""
    count = evaluation.sample.sequences
    # The mean of a part of the sequences varies less than that of as many sequences of an endless text.
    shrunk = math.sqrt(1 - size / count)
    order = random.Random(SEED).sample(range(count), count)
    for layout, found in zip(LAYOUTS, evaluation.results, strict=True):
        for what, values in figures(evaluation)[layout].items():
            is_kl = what == "KL divergence"
            spread = values - values.mean()
            counts, shares = held(values, size, order), rates(values, size, DIVISIONS)
            for width, number, share in zip(WIDTHS, counts, shares, strict=True):
                record.write(
                    layout=layout,
                    what=what,
                    value=found.kl if is_kl else found.perplexity_change,
                    error=found.kl_error if is_kl else found.perplexity_error,
                    width=width,
                    sequences=count,
                    available=evaluation.sample.available,
                    length=evaluation.sample.length,
                    samples=count // size,
                    held=number,
                    rate=share,
                    expected=t_probability(width / shrunk, size - 1),
                    skewness=float((spread**3).mean() / (spread**2).mean() ** 1.5),
                    transformers=evaluation.libraries["transformers"],
                    seconds=evaluation.seconds,
                )


if __name__ == "__main__":
    main()
