"""Write the CPU tables and plots of docs/kernels.md: ``python -m benchmarks.tables.kernels [--check]``.

The sources are ``benchmarks/results/kernels-*.jsonl``; `benchmarks.tables.gpu` writes the section on the H100.
``--check`` writes nothing and fails if a page differs from the results.
"""

from __future__ import annotations

import argparse
from typing import Any
from xml.sax.saxutils import escape

from benchmarks import drawing
from benchmarks.common import RESULTS, ROOT, read
from tools.pages import filled, put

DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- figures: benchmarks/tables/kernels.py -->", "<!-- end of figures -->"
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")


def table(records: list[dict[str, Any]]) -> str:
    """Return a table of medians, quartiles, elements per second, and shares of the roof where measured."""
    roofed = any("share_of_roof" in record for record in records)
    header = ["shape", "dtype", "granularity", "operation", "median ms (quartiles)", "G elements/s"]
    rows = [[*header, "share of the 2:1 roof"] if roofed else header]
    for record in records:
        low, median, high = (record[key] * 1e3 for key in ("seconds_low", "seconds", "seconds_high"))
        row = [
            record["shape"],
            record["dtype"],
            record["granularity"],
            record["operation"],
            f"{median:.3f} ({low:.3f}-{high:.3f})",
            f"{record['elements_per_second'] / 1e9:.2f}",
        ]
        if roofed:
            share = record.get("share_of_roof")
            row.append("" if share is None else f"{100 * share:.0f}%")
        rows.append(row)
    return drawing.table(rows, left=len(rows[0]))


def plot(records: list[dict[str, Any]], title: str) -> str:
    """Draw horizontal bars of G elements/s for each operation, grouped by shape and granularity."""
    records = [record for record in records if record["dtype"] == "bfloat16"]
    top = max(record["elements_per_second"] for record in records)
    operations = list(dict.fromkeys(record["operation"] for record in records))
    labels = [f"{record['shape']}, {record['granularity']}: {record['operation']}" for record in records]
    left = max(350, 7 * max(map(len, labels)) + 20)
    height = 20 * len(records) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 510}" height="{height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}: bf16, G elements/s</text>',
    ]
    for place, (record, label) in enumerate(zip(records, labels, strict=True)):
        y = 40 + 20 * place
        rate = record["elements_per_second"]
        width = 400 * rate / top
        color = COLORS[operations.index(record["operation"]) % len(COLORS)]
        parts += [
            f'<text x="{left - 10}" y="{y + 12}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{left}" y="{y}" width="{width:.1f}" height="15" fill="{color}"/>',
            f'<text x="{left + 5 + width:.1f}" y="{y + 12}">{rate / 1e9:.2f}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def figures() -> tuple[str, dict[str, str]]:
    """Return the generated part of the page, and the plots by file name."""
    sections, plots = [], {}
    for path in sorted(RESULTS.glob("kernels-*cpu.jsonl")):
        records = read(path)
        first = records[0]
        versions = ", ".join(f"{key} {first[key]}" for key in ("driver", "torch", "triton") if first.get(key))
        name = f"{path.stem}.svg"
        title = first["device"] + ", blocks" * ("blocks" in path.stem)
        plots[name] = plot(records, title)
        sections.append(
            f"### {title}\n\n{versions}, {first['vector']}, commit {first['commit']}, "
            f"{first['samples']} samples.\n\n![G elements/s]({name})\n\n{table(records)}"
        )
    return "\n\n".join(sections), plots


def main() -> None:
    """Write the page and the plots, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    body, plots = figures()
    wanted = {DOCUMENT: filled(DOCUMENT, BEGIN, END, body)}
    wanted |= {DOCUMENT.parent / name: svg for name, svg in plots.items()}
    put(wanted, check=options.check)


if __name__ == "__main__":
    main()
