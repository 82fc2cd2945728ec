"""Write the tables of docs/engines.md from benchmarks/results/engines.jsonl.

    python -m tools.engines_table [--check] [--record RESULTS.jsonl]

Only the text between the markers ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced. With ``--check`` nothing is
written, and a page that differs from the results is an error. ``--record`` first copies the measurements of a run of
``make test-engines``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

Line = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "engines.jsonl"
PAGE = ROOT / "docs" / "engines.md"


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.2g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _transformers(lines: list[Line]) -> str:
    rows = [
        [
            line["model"],
            line["layout"],
            line["logits"],
            _number(line["relative_l2"]) if "relative_l2" in line else "",  # an unquantized model has none
            line.get("answer", ""),
        ]
        for line in lines
        if line["engine"] == "transformers" and "logits" in line
    ]
    return _table(["model", "layout", "logits", "relative L2 to bf16", "answer"], rows)


def _vllm(lines: list[Line]) -> str:
    rows = []
    for line in lines:
        if line["engine"] != "vllm" or any(other in line for other in ("damage", "kind", "evaluation")):
            continue
        if "refused" in line:
            figures = ["rejected", line["refused"], "", ""]
        else:
            figures = [_number(line["mean"]), _number(line["kl"]), line.get("kernel", ""), line.get("answer", "")]
        rows.append([line["model"], line["layout"], *figures])
    return _table(["model", "layout", "mean difference (nats)", "KL (nats)", "kernel", "answer"], rows)


def _kinds(lines: list[Line]) -> str:
    rows = [
        [line["kind"], line["model"], line["layout"], _number(line["mean"]), _number(line["kl"]), line["kernel"]]
        for line in lines
        if "kind" in line
    ]
    return _table(["kind", "model", "layout", "mean difference (nats)", "KL (nats)", "kernel"], rows)


def _damage(lines: list[Line]) -> str:
    rows = []
    for line in lines:
        if "damage" not in line:
            continue
        if "refused" in line:
            seen = f"fails, at load or at the first forward ({line['refused']})"
        elif line["engine"] == "vllm":
            seen = f"loads; mean {_number(line['mean'])}, KL {_number(line['kl'])}"
        else:
            named = "names the key" if line["named"] else "loads silently"
            seen = f"{named}; relative L2 {_number(line['relative_l2'])}"
        rows.append([line["engine"], line["layout"], line["damage"], seen])
    return _table(["engine", "layout", "scale", "behavior of the engine"], rows)


def _evaluation(lines: list[Line]) -> str:
    rows = []
    for line in lines:
        if "evaluation" in line:
            divergences = [f"{line[key]:.5f}" if key in line else "" for key in ("divergence", "divergence_evaluation")]
            perplexities = [f"{line[key]:.3f}" for key in ("perplexity", "evaluation")]
            gap = f"{line['gap']:+.2%} ±{line['gap_error']:.2%}"
            named = [line["model"], line["layout"], line["kernel"], f"{line['predictions']:,}"]
            rows.append([*named, *perplexities, gap, *divergences])
    sides = "vLLM", "evaluation"
    perplexity, divergence = ([f"{what}, {side}" for side in sides] for what in ("perplexity", "KL"))
    return _table(["model", "layout", "kernel", "predictions", *perplexity, "difference", *divergence], rows)


def _environment(lines: list[Line]) -> str:
    engines = sorted({f"{line['engine']} {line['version']}" for line in lines})
    around = sorted({f"torch {line['torch']}, Python {line['python']}, {line['processor']}" for line in lines})
    return f"Run with {', '.join(engines)}; {'; '.join(around)}."


TABLES = {
    "environment": _environment,
    "transformers": _transformers,
    "vllm": _vllm,
    "evaluation": _evaluation,
    "kinds": _kinds,
    "damage": _damage,
}


def render(page: str, lines: list[Line]) -> str:
    """Return the page with every marked table filled."""

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{TABLES[found[2]](lines)}\n\n{found[3]}"

    return re.sub(r"(<!-- table (\w+) -->).*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", type=Path, metavar="RESULTS.jsonl")
    options = parser.parse_args()
    if options.record:
        RESULTS.write_text(options.record.read_text(encoding="utf-8"), encoding="utf-8")
    lines = [json.loads(text) for text in RESULTS.read_text(encoding="utf-8").splitlines()]
    found = PAGE.read_text(encoding="utf-8")
    wanted = render(found, lines)
    if not options.check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif wanted != found:
        raise SystemExit(f"{PAGE.name} differs from {RESULTS.name}: run without --check")


if __name__ == "__main__":
    main()
