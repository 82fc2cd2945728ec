"""Accuracy of stored scales: ``python -m benchmarks.measure.calibration SOURCE [--work DIR] [--sequences N]``.

SOURCE is calibrated on sequences of the default text, quantized with the scales, and all results are evaluated in one
reading of it, on other sequences of the same text. Needs the extra [evaluate].
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Recorder, machine
from nemotron_fp8 import Recipe, calibrate_repo, evaluate_repo, quantize_repo
from nemotron_fp8.inference import sample
from nemotron_fp8.inference.transformers_api import Transformers
from nemotron_fp8.sources.open import open_source

TENSOR: dict[str, Any] = {"granularity": "tensor"}
STATIC = {**TENSOR, "activations": "static"}
CACHE = {"kv_cache": "fp8"}


@dataclass(frozen=True)
class Case:
    """A result.

    Attributes:
        recipe: settings of its recipe.
        calibrated: True if it has scales of the calibration.
        percentile: percentile of the calibration.
        factor: factor of the calibration.
    """

    recipe: dict[str, Any]
    calibrated: bool = False
    percentile: float | None = None
    factor: float = 1.0


CASES = {
    "dynamic": Case(TENSOR),
    "dynamic, a scale for each row of weights": Case({}),
    "static": Case(STATIC, True),
    "static, percentile 99.99": Case(STATIC, True, 99.99),
    "static, percentile 99.9": Case(STATIC, True, 99.9),
    "static, factor 0.5": Case(STATIC, True, factor=0.5),
    "static, factor 1.1": Case(STATIC, True, factor=1.1),
    "dynamic, FP8 cache with scales of 1.0": Case({**TENSOR, **CACHE}),
    "dynamic, FP8 cache, calibrated": Case({**TENSOR, **CACHE}, True),
    "static, FP8 cache, calibrated": Case({**STATIC, **CACHE}, True),
}
"""Results by the name that the table has for them; weights have one scale for each tensor, if it names no other."""
FIGURES = (
    *("perplexity", "perplexity_change", "perplexity_error", "kl", "kl_error", "top1", "top1_error"),
    *("static_values", "clipped_values"),
)


def samples(source: Path, work: Path, evaluated: int, calibrated: int, length: int) -> dict[str, Path]:
    """Write the tokens of the evaluation and, of the same text, others for the calibration."""
    (work / "tokenizer").mkdir(parents=True, exist_ok=True)
    opened, api = open_source(source), Transformers()
    chosen = sample.draw_text(opened, api, work / "tokenizer", None, evaluated, length)
    everything = sample.draw_text(opened, api, work / "tokenizer", None, 1 << 30, length).ids
    taken = set(chosen.sample.indices)
    rest = [number for number in range(len(everything)) if number not in taken][:calibrated]
    files = {}
    for name, ids in (("evaluated", chosen.ids), ("calibrated", everything[rest])):
        files[name] = work / f"{name}.json"
        files[name].write_text(json.dumps(ids.tolist()), encoding="utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--name", default="SmolLM2-135M", help="name of the model in the table")
    parser.add_argument("--work", type=Path, help="folder for results, kept; else a temporary one")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=64, help="sequences of the calibration")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULTS / "calibration.jsonl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        tokens = samples(given.source, work, given.sequences, given.calibration, given.length)
        amaxes = {
            percentile: calibrate_repo(
                given.source, tokens=tokens["calibrated"], percentile=percentile, state_dir=work / "state"
            )
            for percentile in dict.fromkeys(case.percentile for case in CASES.values())
        }
        folders = {name: work / name.replace(", ", "-").replace(" ", "-") for name in CASES}
        for name, case in CASES.items():
            found = amaxes[case.percentile].times(case.factor) if case.calibrated else None
            quantize_repo(given.source, folders[name], Recipe(**case.recipe), amaxes=found, device="cpu")
        evaluation = evaluate_repo(
            given.source, list(folders.values()), tokens=tokens["evaluated"], state_dir=work / "state"
        )
        record = Recorder(given.output, {**machine(evaluation.device), **evaluation.libraries})
        common = {
            "model": given.name,
            "text": sample.DEFAULT_TEXT,
            "sequences": evaluation.sample.sequences,
            "length": evaluation.sample.length,
            "calibration": given.calibration,
        }
        for name, figures in zip(("source", *folders), (evaluation.source, *evaluation.results), strict=True):
            worst = [each.name for each in figures.clipped[:3]]
            record.write(
                recipe=name,
                served=figures.activations,
                sequence_kl=figures.sequence_kl,
                worst_clipped=worst,
                **{key: getattr(figures, key) for key in FIGURES},
                **common,
            )


if __name__ == "__main__":
    main()
