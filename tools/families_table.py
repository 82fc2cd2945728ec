"""Write the table of docs/families.md from benchmarks/results/families.jsonl.

    python -m tools.families_table [--check] [--record RESULTS.jsonl]

Only the text between the markers ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced. With ``--check`` nothing is
written, and a page that differs from the results is an error. ``--record`` first copies the verdicts of a run of
``make test-families``; families that the run did not ask about keep their lines.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

Line = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "families.jsonl"
PAGE = ROOT / "docs" / "families.md"
COLUMNS = {
    ("transformers", "compressed-tensors", "channel"): "transformers, default",
    ("transformers", "compressed-tensors", "tensor"): "transformers, tensor",
    ("transformers", "compressed-tensors", "block"): "transformers, block",
    ("transformers", "fp8", "block"): "transformers, `fp8` block",
    ("vllm", "compressed-tensors", "channel"): "vLLM, default",
    ("vllm", "compressed-tensors", "tensor"): "vLLM, tensor",
    ("vllm", "compressed-tensors", "block"): "vLLM, block",
    ("vllm", "fp8", "tensor"): "vLLM, `fp8` tensor",
    ("vllm", "fp8", "block"): "vLLM, `fp8` block",
}
"""Layouts of compressed-tensors by their granularity alone; the default is that with one scale for each channel."""
WORDS = {"right": "right", "told": "no (told)", "source": "not judged", "refused by the plan": "refused"}
LONGEST = 160
LONGEST_DETAIL = 400
"""Most characters of a reason in the file of results; some errors list every parameter of a model."""
KINDS = 5


def _key(line: Line) -> tuple[str, str, str]:
    return line["engine"], line["format"], line["granularity"]


def _text(value: str) -> str:
    """Return a text as a cell of a table holds it."""
    line = " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _families(lines: list[Line]) -> dict[str, dict[tuple[str, str, str], Line]]:
    found: dict[str, dict[tuple[str, str, str], Line]] = {}
    for line in lines:
        found.setdefault(line["family"], {})[_key(line)] = line
    return found


def _counts(lines: list[Line]) -> str:
    rows = []
    for key, title in COLUMNS.items():
        count = Counter(line["verdict"] for line in lines if _key(line) == key)
        wrong = sum(count.values()) - sum(count[verdict] for verdict in (*WORDS, "not built"))
        cells = (
            count["right"],
            count["told"],
            count["refused by the plan"],
            count["source"],
            count["not built"],
            wrong,
        )
        rows.append(f"| {title} | {' | '.join(map(str, cells))} |")
    head = (
        "| engine and layout | right | not read, and the plan says so | refused by the plan | the engine does not load"
    )
    return "\n".join([f"{head} the source | not built | wrong |", "|---|---:|---:|---:|---:|---:|---:|", *rows])


def _matrix(lines: list[Line]) -> str:
    rows = []
    for family, asked in sorted(_families(lines).items()):
        some = next((line for line in asked.values() if "share" in line), None)
        if some is None:
            continue
        kept = [name for _, _, names in some["left"] for name in names]
        more = f" and {len(kept) - KINDS} more" if len(kept) > KINDS else ""
        stays = ", ".join(f"`{name}`" for name in kept[:KINDS]) + more
        share = "" if some["share"] is None else f"{some['share']:.1%}"
        verdicts = [WORDS.get(asked[key]["verdict"], asked[key]["verdict"]) if key in asked else "" for key in COLUMNS]
        rows.append(f"| {family} | {share} | {stays} | {' | '.join(verdicts)} |")
    head = f"| family | linear bytes in FP8 | stays | {' | '.join(COLUMNS.values())} |"
    return "\n".join([head, "|---|---:|---|" + "---|" * len(COLUMNS), *rows])


def _reasons(lines: list[Line]) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line["verdict"] != "right":
            what = line["engine"] if line["verdict"] in ("source", "told") else ""
            rows.setdefault((line["family"], what), []).append(f"{line['verdict']}: {line['detail']}")
    return "\n".join(
        ["| family | engine | why |", "|---|---|---|"]
        + [f"| {family} | {engine} | {_text(why[0])} |" for (family, engine), why in sorted(rows.items())]
    )


def _environment(lines: list[Line]) -> str:
    versions = {f"{name} {line[name]}" for line in lines for name in ("transformers", "torch") if line.get(name)}
    versions |= {f"vLLM {line['version']}" for line in lines if line["engine"] == "vllm" and line.get("version")}
    return f"Run with {', '.join(sorted(versions))}, on a CPU."


def render(page: str, lines: list[Line]) -> str:
    """Return the page with its tables written anew."""
    tables = {
        "environment": _environment(lines),
        "counts": _counts(lines),
        "matrix": _matrix(lines),
        "reasons": _reasons(lines),
    }
    for name, text in tables.items():
        mark = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = mark.sub(lambda found, text=text: f"{found.group(1)}\n{text}\n\n{found.group(2)}", page)
    return page


def read(path: Path) -> list[Line]:
    """Return the lines of a file; the last line about a family, engine and layout counts."""
    lines = {(*_key(line), line["family"]): line for line in map(json.loads, path.read_text().splitlines())}
    return [lines[key] | {"detail": lines[key]["detail"][:LONGEST_DETAIL]} for key in sorted(lines)]


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    if given.record is not None:
        old = RESULTS.read_text() if RESULTS.exists() else ""
        RESULTS.write_text(old + given.record.read_text())
        RESULTS.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in read(RESULTS)))
    page = PAGE.read_text()
    written = render(page, read(RESULTS))
    if given.check and page != written:
        raise SystemExit(f"error: {PAGE.name} differs from {RESULTS.name}; run python -m tools.families_table")
    if not given.check:
        PAGE.write_text(written)


if __name__ == "__main__":
    main()
