"""Cost of recipes in accuracy: ``python -m benchmarks.measure.recipes SOURCE [--work DIR] [--sequences N]``.

SOURCE is quantized by every recipe, and all results are evaluated in one reading of it: once with activations as
engines serve them, and once in 16 bits, which shows the share of the weights. Needs the extra [evaluate].
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, Recorder, machine
from nemotron_fp8 import Recipe, evaluate_repo, quantize_repo
from nemotron_fp8.errors import NothingSelectedError

RECIPES = {
    "fp8, tensor": Recipe(format="fp8", granularity="tensor"),
    "fp8, tensor, shared scales": Recipe(format="fp8", granularity="tensor", share_scales=True),
    "compressed-tensors, channel": Recipe(),
    "compressed-tensors, channel, best scales": Recipe(scales="best"),
    "fp8, block": Recipe(format="fp8"),
    "fp8, block, scales not rounded": Recipe(format="fp8", scale_rounding="none"),
    "compressed-tensors, mx": Recipe(granularity="mx"),
}
"""Recipes by the name that the table has for them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--name", default="SmolLM2-135M", help="name of the model in the table")
    parser.add_argument("--work", type=Path, help="folder for results, kept; else a temporary one")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULTS / "recipes.jsonl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        folders = {}
        for name, recipe in RECIPES.items():
            folder = work / name.replace(", ", "-").replace(" ", "-")
            try:
                quantize_repo(given.source, folder, recipe, device="cpu")
            except NothingSelectedError as error:
                print(f"{name}: {str(error)[:200]}")
                continue
            folders[name] = folder
        record = None
        for activations in ("as-served", "none"):
            evaluation = evaluate_repo(
                given.source,
                list(folders.values()),
                sequences=given.sequences,
                length=given.length,
                activations=activations,
                state_dir=work / "state",
            )
            record = record or Recorder(given.output, {**machine(evaluation.device), **evaluation.libraries})
            sample = evaluation.sample
            common = {
                "model": given.name,
                "activations": activations,
                "text": sample.name,
                "text_sha256": sample.sha256,
                "sequences": sample.sequences,
                "length": sample.length,
            }
            for name, figures in zip(("source", *folders), (evaluation.source, *evaluation.results), strict=True):
                keys = ("perplexity", "perplexity_change", "perplexity_error", "kl", "kl_error", "top1", "top1_error")
                found = {key: getattr(figures, key) for key in keys}
                served = figures.activations
                record.write(recipe=name, served=served, sequence_kl=figures.sequence_kl, **found, **common)


if __name__ == "__main__":
    main()
