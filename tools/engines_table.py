"""Write the tables of docs/engines.md from the lines that the engine tests recorded.

    python tools/engines_table.py RESULTS.jsonl docs/engines.md

Only what stands between the markers ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.2g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _transformers(lines: list[Line]) -> str:
    rows = [
        [line["model"], line["layout"], line["logits"], _number(line["relative_l2"]), line.get("answer", "")]
        for line in lines
        if line["engine"] == "transformers" and "logits" in line
    ]
    return _table(["model", "layout", "against by hand", "relative L2 from bf16", "answer"], rows)


def _vllm(lines: list[Line]) -> str:
    rows = []
    for line in lines:
        if line["engine"] != "vllm" or "damage" in line:
            continue
        if "refused" in line:
            figures = ["refused", line["refused"], "", ""]
        else:
            figures = [_number(line["mean"]), _number(line["kl"]), line.get("kernel", ""), line.get("answer", "")]
        rows.append([line["model"], line["layout"], *figures])
    return _table(["model", "layout", "mean difference (nats)", "KL (nats)", "kernel", "answer"], rows)


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
            named = "names the key" if line["named"] else "loads without a word"
            seen = f"{named}; relative L2 {_number(line['relative_l2'])}"
        rows.append([line["engine"], line["layout"], line["damage"], seen])
    return _table(["engine", "layout", "scale", "what the engine does"], rows)


def _environment(lines: list[Line]) -> str:
    engines = sorted({f"{line['engine']} {line['version']}" for line in lines})
    around = sorted({f"torch {line['torch']}, Python {line['python']}, {line['processor']}" for line in lines})
    return f"Run with {', '.join(engines)}; {'; '.join(around)}."


TABLES = {"environment": _environment, "transformers": _transformers, "vllm": _vllm, "damage": _damage}


def main(results: str, page: str) -> None:
    """Fill every marked table of ``page`` from the JSON lines of ``results``."""
    lines = [json.loads(text) for text in Path(results).read_text().splitlines()]

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{TABLES[found[2]](lines)}\n\n{found[3]}"

    path = Path(page)
    path.write_text(re.sub(r"(<!-- table (\w+) -->).*?(<!-- end -->)", fill, path.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main(*sys.argv[1:])
