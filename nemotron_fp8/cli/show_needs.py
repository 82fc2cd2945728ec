"""Output of the needs of an evaluation: memory, reading, arithmetic, and predicted times."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._utils import format_bytes, usable_cores
from nemotron_fp8.cli.output import print_table, say
from nemotron_fp8.cli.progress_line import clock_time

if TYPE_CHECKING:
    from nemotron_fp8.inference.needs import EvaluationNeeds, Prediction, Rates
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.sources.base import Source


LONG_SECONDS = 100 * 3600
"""Time from which hours are shown alone."""


class PredictedNeeds(NamedTuple):
    """Needs of an evaluation, and its predicted time on this machine, if it was measured, and on reference devices."""

    needs: EvaluationNeeds
    predictions: tuple[Prediction, ...]


def predicted_needs(
    source: Source, recipe: Recipe, sequences: int | None, length: int | None, threads: int | None, measure: bool
) -> PredictedNeeds:
    """Return the needs of an evaluation of a source and one planned result.

    Args:
        source: the source.
        recipe: recipe of the result.
        sequences: sequences of the sample; None for the default.
        length: tokens of a sequence; None for the default.
        threads: threads of the arithmetic; None for one on each core.
        measure: True to measure this machine.

    Raises:
        UnsupportedArchitectureError: no decoder layer or no output layer is found.
        SourceError: the source cannot be read.
    """
    from nemotron_fp8.inference import needs as of_evaluation

    found = of_evaluation.evaluation_needs(
        source.inventory,
        1,
        sequences or of_evaluation.DEFAULT_SEQUENCES,
        length or of_evaluation.DEFAULT_LENGTH,
        recipe=recipe,
        ahead=not source.is_local,
    )
    rates: tuple[Rates, ...] = of_evaluation.ASSUMED
    if measure:
        from nemotron_fp8.inference.machine import measure_machine

        rates = (measure_machine(source, found.itemsize, threads or usable_cores()), *rates)
    return PredictedNeeds(found, tuple(of_evaluation.predict(found, each) for each in rates))


def needs_json(predicted: PredictedNeeds) -> dict[str, Any]:
    """Return needs and predictions for ``--json``."""
    needs = predicted.needs
    totals = {key: getattr(needs, key) for key in ("memory_bytes", "read_bytes", "flops")}
    predictions = [
        {
            "device": prediction.rates.device,
            "measured": prediction.rates.measured,
            "flops_per_second": prediction.rates.flops,
            "read_bytes_per_second": prediction.rates.read,
            "compute_seconds": prediction.compute_seconds,
            "read_seconds": prediction.read_seconds,
            "seconds": prediction.seconds,
        }
        for prediction in predicted.predictions
    ]
    return {**asdict(needs), **totals, "predictions": predictions}


def show_needs(predicted: PredictedNeeds) -> None:
    """Print needs and predictions."""
    needs = predicted.needs
    results = f"{needs.results} result{'s' * (needs.results != 1)}"
    sample = f"{needs.sequences:,} sequence{'s' * (needs.sequences != 1)} of {needs.length:,} tokens"
    say(f"evaluate SRC and {results}, {sample}, {needs.layers:,} layers:")
    say(f"memory   {format_bytes(needs.memory_bytes)} of weights and buffers at peak")
    print_table([(format_bytes(part.size), part.name) for part in needs.parts], right=(0,), indent=9)
    each = " + ".join(map(format_bytes, (needs.source_read, *needs.result_reads)))
    say(f"reads    {format_bytes(needs.read_bytes)}: {each}")
    say(f"compute  {_operations(needs.flops)}: {_operations(needs.stream_flops)} for each checkpoint")
    say("time     predicted; speeds that are not measured are assumed")
    rows = [("", "TFLOP/s", "GB/s", "reading", "computing", "total")]
    for prediction in predicted.predictions:
        rates = prediction.rates
        rows.append(
            (
                rates.device + ", measured" * rates.measured,
                f"{rates.flops / 1e12:.3g}",
                "unknown" if rates.read is None else f"{rates.read / 1e9:.3g}",
                _time(prediction.read_seconds),
                _time(prediction.compute_seconds),
                _time(prediction.seconds),
            )
        )
    print_table(rows, right=(1, 2, 3, 4, 5), indent=2)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return clock_time(seconds) if seconds < LONG_SECONDS else f"{seconds / 3600:,.0f} h"


def _operations(count: float) -> str:
    """Format a number of floating-point operations with three digits and a decimal unit."""
    for unit in ("", "K", "M", "G", "T"):
        if count < 999.5:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP" if count < 999.5 else f"{count:,.0f} PFLOP"
