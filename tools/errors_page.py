"""Write docs/errors.md from benchmarks/results: ``python -m tools.errors_page [--check]``.

With ``--check`` nothing is written, and a page that differs from the results is an error. `benchmarks.measure.recipes`
and `tools.error_figures` measure.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import drawing
from benchmarks.common import read

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "errors.jsonl"
RECIPES = ROOT / "benchmarks" / "results" / "recipes.jsonl"
PAGE = ROOT / "docs" / "errors.md"
TEXT = """# Error of each layout

## What a layout costs

{evaluation}

## Errors of weights and logits

Weights are dequantized to bf16 and run in transformers on a CPU, with activations in bf16.
`python -m tools.error_figures` measures, in the environment of `make test-engines`.

- SQNR is computed for each tensor, between the bf16 result and the source. E4M3 is a floating-point format, so that it
  hardly depends on the layout, nor on the model.
- The relative L2 error of the logits is of one text of {words} words.
- *requantized by vLLM*: as vLLM holds blocks in memory where DeepGEMM runs. It rounds the scales up to powers of two
  and casts the weights again; scales that are powers of two already leave nothing to change.

Run with torch {torch}, transformers {transformers}.

{table}
"""
EVALUATION = """{model}, evaluated on {sequences} sequences of {length} tokens of the {text} (SHA-256 `{digest}`), all
layouts in one reading of the source: `python -m benchmarks.measure.recipes`. ± is one standard error over sequences.
*As served* quantizes activations as engines do it for each layout, and merges weights as vLLM does; *weights only*
leaves activations in 16 bits. The model's weights were 4-bit once: the table shows the order of layouts, not the loss
of a model that was trained in 16 bits. Blocks of 128x128 do not divide its 576 columns.

Run with torch {torch}, transformers {transformers}, commit {commit}.

{table}"""


def render(lines: list[dict[str, Any]], recipes: list[dict[str, Any]]) -> str:
    """Return the page."""
    versions = {key: lines[0][key] for key in ("words", "torch", "transformers")}
    return TEXT.format(table=_table(lines), evaluation=_evaluation(recipes), **versions)


def _evaluation(lines: list[dict[str, Any]]) -> str:
    """Return the figures of recipes, those with quantized activations beside those without."""
    first = lines[0]
    keys = ("model", "sequences", "length", "text", "torch", "transformers", "commit")
    return EVALUATION.format(
        digest=first["text_sha256"][:12], table=_recipes(lines), **{key: first[key] for key in keys}
    )


def _recipes(lines: list[dict[str, Any]]) -> str:
    rows = [["layout", "KL as served (nats)", "perplexity", "same first token", "KL, weights only", "perplexity"]]
    of = {(line["recipe"], line["activations"]): line for line in lines}
    for name in dict.fromkeys(line["recipe"] for line in lines):
        served, plain = of[name, "as-served"], of[name, "none"]
        if name == "source":
            rows.append([name, "", f"{served['perplexity']:.3f}", "", "", f"{plain['perplexity']:.3f}"])
            continue
        rows.append([name, _kl(served), _change(served), f"{served['top1']:.1%}", _kl(plain), _change(plain)])
    return drawing.table(rows)


def _kl(line: dict[str, Any]) -> str:
    return f"{line['kl']:.4f} ± {line['kl_error']:.4f}"


def _change(line: dict[str, Any]) -> str:
    return f"{line['perplexity_change']:+.2%} ± {line['perplexity_error']:.2%}"


def _table(lines: list[dict[str, Any]]) -> str:
    head = [
        "model",
        "layout",
        "FP8 tensors",
        "SQNR min (dB)",
        "SQNR median (dB)",
        "relative L2 of logits",
    ]
    rows = [head]
    for line in lines:
        if "tensors" not in line:  # the source
            continue
        figures = [f"{line[k]:.{d}f}" for k, d in (("sqnr_min", 3), ("sqnr_median", 3), ("relative_l2", 4))]
        rows.append([line["model"], line["layout"], str(line["tensors"]), *figures])
    return drawing.table(rows, left=2)


def main() -> None:
    """Write the page, or check it."""
    wanted = render(read(RESULTS), read(RECIPES))
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        raise SystemExit(f"{PAGE.name} differs from the results: run python -m tools.errors_page")


if __name__ == "__main__":
    main()
