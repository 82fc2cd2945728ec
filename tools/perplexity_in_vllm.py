"""Compare perplexities of an evaluation with those of vLLM on many tokens, and write the table of docs/evaluate.md.

    VLLM_PYTHON=.venv-vllm/bin/python .venv-engines/bin/python -m tools.perplexity_in_vllm [--sequences 64]
    python -m tools.perplexity_in_vllm --check

The first command measures, in the environments of `make test-engines`: half an hour on two cores. With ``--check``
nothing is measured or written, and a page that differs from the results is an error. Only layouts for which vLLM's CPU
kernels cast activations as its GPU kernels do are compared: with one scale for each token.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import drawing
from benchmarks.common import RESULTS, Recorder, machine, read
from tools.pages import filled, put

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "evaluate.md"
RECORD = RESULTS / "perplexity-vllm.jsonl"
CACHE = ROOT / ".cache" / "engines"
BEGIN, END = "<!-- figures: tools/perplexity_in_vllm.py -->", "<!-- end of the perplexities -->"
LENGTH, AT_ONCE = 512, 16
RECIPES: dict[str, dict[str, Any]] = {
    "compressed-tensors, channel": {},
    "compressed-tensors, channel, best scales": {"scales": "best"},
    "compressed-tensors, tensor": {"granularity": "tensor"},
}
"""Recipes by the name that the table has for them."""


def measure(sequences: int, work: Path) -> None:
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
    ids = sample.draw_text(open_source(source), Transformers(), work / "tokenizer", None, sequences, LENGTH).ids
    tokens = write_tokens(work / "tokens.json", ids)
    folders = {name: work / name.replace(", ", "-").replace(" ", "-") for name in RECIPES}
    for name, folder in folders.items():
        quantize_repo(source, folder, Recipe(**RECIPES[name]), device="cpu")
    own = predicted(source, list(folders.values()), tokens, "as-served")
    with in_vllm.host(VLLM_PYTHON, work / "log.txt") as host:
        record = None
        for (name, folder), figures in zip({"source": source, **folders}.items(), own, strict=True):
            parts = []
            for begin in range(0, sequences, AT_ONCE):
                prompts = ids[begin : begin + AT_ONCE].tolist()
                answer = host.run(folder, prompts, vocabulary=0, output=work / "logprobs.safetensors")
                parts.append(-torch.stack(answer.logprobs)[..., 0].double())
            versions = {"transformers": transformers.__version__, "vllm": host.version}
            record = record or Recorder(RECORD, {**machine("cpu"), **versions, "model": "SmolLM2-135M"})
            kernel = "" if name == "source" else kernels(answer)
            record.write(recipe=name, kernel=kernel, **compared(torch.cat(parts), figures.nll))


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


def figures() -> str:
    """Return the generated part of the page."""
    lines = read(RECORD)
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
    parser.add_argument("--sequences", type=int, default=64)
    options = parser.parse_args()
    if not options.check:
        with tempfile.TemporaryDirectory() as work:
            measure(options.sequences, Path(work))
    put({PAGE: filled(PAGE, BEGIN, END, figures())}, check=options.check)


if __name__ == "__main__":
    main()
