"""Write docs/errors.md from benchmarks/results/errors.jsonl: ``python -m tools.errors_page [--check]``.

With ``--check`` nothing is written, and a page that differs from the results is an error. `tools.error_figures`
measures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "errors.jsonl"
PAGE = ROOT / "docs" / "errors.md"
TEXT = """# Error of each layout

Weights are dequantized to bf16 and run in transformers on a CPU, with activations in bf16.
`python -m tools.error_figures` measures, in the environment of `make test-engines`; `python -m tools.errors_page`
writes this page from `benchmarks/results/errors.jsonl`.

- SQNR is computed for each tensor, between the bf16 result and the source.
- Perplexity is of one text of {words} words: it only distinguishes layouts of one model.
- *requantized by vLLM*: as vLLM holds blocks in memory where DeepGEMM runs. It rounds the scales up to powers of two
  and casts the weights again; scales that are powers of two already leave nothing to change.
- SmolLM2's weights were 4-bit once; the perplexity of the random Nemotron only shows whether it changes.

Run with torch {torch}, transformers {transformers}.

{table}
"""


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    return TEXT.format(table=_table(lines), **{key: lines[0][key] for key in ("words", "torch", "transformers")})


def _table(lines: list[dict[str, Any]]) -> str:
    head = [
        "model",
        "layout",
        "FP8 tensors",
        "SQNR min (dB)",
        "SQNR median (dB)",
        "relative L2 of logits",
        "perplexity",
    ]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for line in lines:
        figures = [
            f"{line[k]:.{d}f}" if k in line else ""
            for k, d in (("sqnr_min", 3), ("sqnr_median", 3), ("relative_l2", 4))
        ]
        rows.append(
            [line["model"], line["layout"], str(line.get("tensors", "")), *figures, f"{line['perplexity']:.3f}"]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Write the page, or check it."""
    wanted = render([json.loads(text) for text in RESULTS.read_text(encoding="utf-8").splitlines()])
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        raise SystemExit(f"{PAGE.name} differs from {RESULTS.name}: run python -m tools.errors_page")


if __name__ == "__main__":
    main()
