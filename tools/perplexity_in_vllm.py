"""Compare perplexities of an evaluation with those of vLLM on many tokens, and write the tables of two pages.

    VLLM_PYTHON=.venv-vllm/bin/python .venv-engines/bin/python -m tools.perplexity_in_vllm [--sequences 64]
    VLLM_PYTHON=.venv-vllm/bin/python .venv-engines/bin/python -m tools.perplexity_in_vllm --static [--sequences 64]
    python -m tools.perplexity_in_vllm --check

The first two commands measure, in the environments of `make test-engines`: half an hour on two cores each. With
``--check`` nothing is measured or written, and a page that differs from the results is an error.

The first is of layouts for which vLLM's CPU kernels cast activations as its GPU kernels do: with one scale for each
token. The second is of stored scales, of activations and of an FP8 cache, from a calibration on sequences of the same
text that are not evaluated. The plugin of the tests rounds keys and values to nearest, as GPUs do; vLLM's CPU kernels
truncate them.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import drawing
from benchmarks.common import RESULTS, Recorder, machine, read
from tools.pages import filled, put

if TYPE_CHECKING:
    from nemotron_fp8.planning.amaxes import Amaxes

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "engines"
BEGIN, END = "<!-- figures: tools/perplexity_in_vllm.py -->", "<!-- end of the perplexities -->"
LENGTH, AT_ONCE = 512, 16
STATIC = {"granularity": "tensor", "activations": "static"}
STATIC_LAYOUTS = ("fp8", "compressed-tensors", "modelopt")


class Recipes(NamedTuple):
    """Recipes that are compared on one page.

    Attributes:
        page: the page.
        record: results.
        recipes: settings of each recipe, by the name that the table has for it.
    """

    page: Path
    record: Path
    recipes: dict[str, dict[str, Any]]


DYNAMIC_RECIPES = Recipes(
    ROOT / "docs" / "evaluate.md",
    RESULTS / "perplexity-vllm.jsonl",
    {
        "compressed-tensors, channel": {},
        "compressed-tensors, channel, best scales": {"scales": "best"},
        "compressed-tensors, tensor": {"granularity": "tensor"},
    },
)
STATIC_RECIPES = Recipes(
    ROOT / "docs" / "calibration.md",
    RESULTS / "perplexity-vllm-static.jsonl",
    {
        f"{name}, static{', FP8 cache' * (kv_cache == 'fp8')}": {"format": name, "kv_cache": kv_cache, **STATIC}
        for name in STATIC_LAYOUTS
        for kv_cache in ("none", "fp8")
    },
)


def measure(measured: Recipes, sequences: int, work: Path) -> None:
    """Score the same tokens by the evaluation and by vLLM, and record both."""
    import torch
    import transformers

    from nemotron_fp8 import Recipe, quantize_repo
    from nemotron_fp8.inference import sample
    from nemotron_fp8.inference.transformers_api import Transformers
    from nemotron_fp8.sources.open import open_source
    from tests.inference import in_vllm
    from tests.inference.conftest import VLLM_PYTHON
    from tests.inference.layer_by_layer import predicted, write_tokens
    from tests.inference.models import smollm2
    from tests.inference.test_vllm import kernels

    source = smollm2(CACHE)
    (work / "tokenizer").mkdir()
    drawn = sample.draw_text(open_source(source), Transformers(), work / "tokenizer", None, sequences, LENGTH)
    ids = drawn.ids
    tokens = write_tokens(work / "tokens.json", ids)
    recipes = {name: Recipe(**settings) for name, settings in measured.recipes.items()}
    needs_amaxes = any(recipe.activations == "static" for recipe in recipes.values())
    amaxes = calibrated(source, set(drawn.sample.indices), work) if needs_amaxes else None
    folders = {name: work / name.replace(", ", "-").replace(" ", "-") for name in recipes}
    for name, folder in folders.items():
        quantize_repo(source, folder, recipes[name], amaxes=amaxes, device="cpu")
    own = predicted(source, list(folders.values()), tokens, "as-served")
    with in_vllm.host(VLLM_PYTHON, work / "log.txt") as host:
        record = None
        for (name, folder), figures in zip({"source": source, **folders}.items(), own, strict=True):
            cached = name in recipes and recipes[name].kv_cache == "fp8"
            options = {"kv_cache_dtype": "fp8"} if cached and recipes[name].format == "fp8" else {}
            parts = []
            for begin in range(0, sequences, AT_ONCE):
                prompts = ids[begin : begin + AT_ONCE].tolist()
                answer = host.run(folder, prompts, vocabulary=0, output=work / "logprobs.safetensors", **options)
                parts.append(-torch.stack(answer.logprobs)[..., 0].double())
            versions = {"transformers": transformers.__version__, "vllm": host.version}
            record = record or Recorder(measured.record, {**machine("cpu"), **versions, "model": "SmolLM2-135M"})
            kernel = "" if name == "source" else kernels(answer)
            caches = sorted({cache["dtype"] for cache in answer.caches.values()})
            record.write(recipe=name, kernel=kernel, caches=caches, **compared(torch.cat(parts), figures.nll))


CALIBRATION = 64
"""Sequences of a calibration."""


def calibrated(source: Path, evaluated: set[int], work: Path) -> Amaxes:
    """Calibrate on sequences of the default text that are not evaluated."""
    from nemotron_fp8 import calibrate_repo
    from nemotron_fp8.inference import sample
    from nemotron_fp8.inference.transformers_api import Transformers
    from nemotron_fp8.sources.open import open_source
    from tests.inference.layer_by_layer import write_tokens

    everything = sample.draw_text(open_source(source), Transformers(), work / "tokenizer", None, 1 << 30, LENGTH).ids
    rest = [number for number in range(len(everything)) if number not in evaluated][:CALIBRATION]
    tokens = write_tokens(work / "calibration.json", everything[rest])
    return calibrate_repo(source, tokens=tokens, device="cpu", state_dir=work / "calibration")


def compared(engine: Any, own: Any) -> dict[str, Any]:
    """Return perplexities of vLLM and of the evaluation, and their relative difference with its error.

    Args:
        engine: negative log-likelihoods of vLLM, float64 ``[sequences, length - 1]``.
        own: those of the evaluation.
    """
    apart = (engine - own).mean(1)
    return {
        "perplexity_vllm": math.exp(engine.mean()),
        "perplexity": math.exp(own.mean()),
        "difference": math.expm1(float(apart.mean())),
        "difference_error": float(apart.std()) / math.sqrt(len(apart)),
        "sequences": len(apart),
        "length": engine.shape[1] + 1,
        "token_difference": float((engine - own).abs().mean()),
    }


def figures(record: Path) -> str:
    """Return the generated part of a page."""
    lines = read(record)
    first = lines[0]
    rows = [["layout", "perplexity in vLLM", "in the evaluation", "difference"]]
    rows += [
        [
            line["recipe"],
            f"{line['perplexity_vllm']:.3f}",
            f"{line['perplexity']:.3f}",
            f"{line['difference']:+.2%} ± {line['difference_error']:.2%}",
        ]
        for line in lines
    ]
    return (
        f"{first['model']}, {first['sequences']} sequences of {first['length']} tokens, ± one standard error over"
        f" sequences; {first['processor']}, torch {first['torch']}, transformers {first['transformers']}, vLLM"
        f" {first['vllm']}, commit {first['commit']}.\n\n{drawing.table(rows)}"
    )


def main() -> None:
    """Measure and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--sequences", type=int, default=64)
    options = parser.parse_args()
    if not options.check:
        with tempfile.TemporaryDirectory() as work:
            measure(STATIC_RECIPES if options.static else DYNAMIC_RECIPES, options.sequences, Path(work))
    pages = {
        each.page: filled(each.page, BEGIN, END, figures(each.record)) for each in (DYNAMIC_RECIPES, STATIC_RECIPES)
    }
    put(pages, check=options.check)


if __name__ == "__main__":
    main()
