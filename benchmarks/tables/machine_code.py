"""Write the predictions of docs/kernels.md: ``python -m benchmarks.tables.machine_code [--check]``.

The sources are ``machine-code.jsonl``, which has the lines of ``python -m nemotron_fp8_kernels.inspect --json-lines``
with each triton, and ``kernels-h100.jsonl``. ``--check`` writes nothing and fails if the page differs from the results.
"""

from __future__ import annotations

import re
from statistics import fmean
from typing import Any

from benchmarks.common import RESULTS, ROOT, read
from benchmarks.drawing import table
from benchmarks.tables.gpu import KERNELS, LIST, OURS, ordered, percent, span
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- figures: benchmarks/tables/machine_code.py -->", "<!-- end of the predictions -->"
CODE = RESULTS / "machine-code.jsonl"
CLASSES = ("load", "store", "cast", "multiply", "widen", "maximum", "exchange", "other")
GRANULARITIES = {
    "rows_kernel": "channel",
    "blocks_kernel": "block",
    "groups_kernel": "MX",
    "cast_kernel": "tensor",
}
VARIANTS = ("codes apart", "power-of-two")

Record = dict[str, Any]


def kernel_of(record: Record) -> str:
    return str(record["name"].partition("[")[0])


def code_table(records: list[Record]) -> str:
    """Return a row for each kernel and variant."""
    head = ["kernel", "registers", "programs per SM", "instructions", *CLASSES, "issue", "loads", "KB in flight"]
    rows = [
        [
            f"`{record['name']}`",
            str(record["registers"]),
            str(record["programs_per_sm"]),
            f"{record['instructions']:.0f}",
            *(f"{record['classes'][name]:.0f}" for name in CLASSES),
            f"{100 * record['issue_share']:.0f}%",
            str(record["loads_before_use"]),
            f"{record['in_flight_per_sm'] / 1024:.0f}",
        ]
        for record in records
    ]
    return table([head, *rows])


def sides(label: str) -> str:
    """Return rows and columns of a measured weight, such as 2688x1856."""
    found = re.search(r"\((\d+x\d+)\)", label)
    return found[1] if found else ""


def one_table(records: list[Record], measured: list[Record]) -> tuple[str, str]:
    """Return the predicted and the measured shares of single weights, and a line about the differences."""
    found = {(sides(r["shape"]), r["granularity"]): r for r in ordered(measured, OURS)}
    head = ["weight", "granularity", "HBM bytes", "crossbar bytes", "margin", "predicted", "limit"]
    rows, gaps = [], []
    for record in records:
        granularity = GRANULARITIES.get(kernel_of(record))
        if granularity is None:
            continue
        label = ", ".join([granularity, *(name for name in VARIANTS if name in record["name"])])
        for prediction in record["predictions"]:
            known = found.get((prediction["shape"], label))
            rows.append(
                [
                    prediction["shape"],
                    label,
                    f"{prediction['hbm_bytes']:.2f}",
                    f"{prediction['crossbar_bytes']:.3g}",
                    f"{prediction['margin']:.1f}",
                    percent(prediction["share"]),
                    prediction["limit"],
                    percent(known["share_of_roof"]) if known else "",
                    span(measured, known) if known else "",
                ]
            )
            if known:
                gaps.append((granularity, 100 * (prediction["share"] - known["share_of_roof"])))
    parts = []
    for granularity in ("channel", "block", "tensor"):
        own = [gap for name, gap in gaps if name == granularity]
        parts.append(
            f"- `{granularity}`: {fmean(own):+.1f} points on average of {len(own)} weights, from {min(own):+.1f} to"
            f" {max(own):+.1f}"
        )
    return table([[*head, "measured", "in all runs"], *rows], left=2), "\n".join(parts)


def list_table(records: list[Record], measured: list[Record]) -> tuple[str, str]:
    """Return the predicted and the measured shares of lists, and a line about the differences."""
    found = {(int(r["shape"].partition(" ")[0]), r["elements"]): r for r in ordered(measured, LIST)}
    head = ["list", "HBM bytes", "crossbar bytes", "margin", "predicted", "limit", "measured"]
    rows, gaps = [], []
    grouped = next(record for record in records if record["name"] == "grouped_kernel")
    for prediction in grouped["predictions"]:
        count = int(prediction["shape"].partition(" ")[0])
        known = found[count, prediction["elements"]]
        rows.append(
            [
                known["shape"],
                f"{prediction['hbm_bytes']:.2f}",
                f"{prediction['crossbar_bytes']:.3g}",
                f"{prediction['margin']:.1f}",
                percent(prediction["share"]),
                prediction["limit"],
                percent(known["share_of_roof"]),
            ]
        )
        gaps.append((known["shape"], prediction["limit"], 100 * (prediction["share"] - known["share_of_roof"])))
    held = [gap for _, limit, gap in gaps if "left L2" not in limit]
    lost = [gap for _, limit, gap in gaps if "left L2" in limit]
    text = (
        f"For lists whose tensors leave L2 before their casts, the simulation is {min(lost):.0f} to {max(lost):.0f}"
        f" points too high. For the others it is {min(held):.0f} to {max(held):.0f} points too high. There it is an"
        " upper bound: it assumes that L2 serves every second reading. Counters of the device, which could explain the"
        " difference, were not read."
    )
    return table([head, *rows]), text


def tritons(records: list[Record], base: str) -> str:
    """Describe how the machine code of other versions of triton differs."""
    own = {(r["name"], r["dtype"]): r for r in records if r["triton"] == base}
    parts = []
    for other in sorted({r["triton"] for r in records} - {base}):
        pairs = [(r, own[r["name"], r["dtype"]]) for r in records if r["triton"] == other]
        registers = sum(1 for one, two in pairs if one["registers"] != two["registers"])
        fewer = [
            f"`{one['name']}` ({one['dtype']})" for one, two in pairs if one["programs_per_sm"] < two["programs_per_sm"]
        ]
        parts.append(
            f"With triton {other}, {registers} of {len(pairs)} compilations have another number of registers, and"
            f" {len(fewer)} have fewer programs per SM{': ' + ', '.join(fewer) if fewer else ''}."
        )
    return " ".join(parts)


def figures() -> str:
    """Return the generated part of the page."""
    records, measured = read(CODE), read(KERNELS)
    base = next(record["triton"] for record in measured)
    chosen = [record for record in records if record["triton"] == base and record["dtype"] == "bfloat16"]
    ones, gaps = one_table(chosen, measured)
    lists, list_gaps = list_table(chosen, measured)
    return "\n\n".join(
        [
            f"bf16, triton {base}, compute capability {records[0]['arch']}. *Instructions* and their classes are those"
            " that a thread executes per 16 elements, on the path of whole tiles; of the grouped kernel, for a cast."
            " *Issue* is the share of issue slots at the roof. *Loads* are those that a thread issues before it uses"
            " the result of one; all threads of an SM together have the *KB in flight*.",
            code_table(chosen),
            tritons(records, base),
            "Predicted and measured shares of the roof. *HBM bytes* and *crossbar bytes* (between L2 and the SMs) are"
            " per element. *Margin* is the speed that the resident programs allow (Little's law), relative to the"
            " roof.",
            ones,
            "Differences between predicted and measured shares:",
            gaps,
            "Lists, by the simulation:",
            lists,
            list_gaps,
        ]
    )


def main() -> None:
    """Write the section, or check it."""
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
