"""Write the H200 section of docs/kernels.md from benchmarks/results: ``python -m benchmarks.tables.h200 [--check]``.

The sources are ``kernels-h200.jsonl`` and ``convert-h200.jsonl``. ``--check`` writes nothing and fails if the page
differs from the results.
"""

from __future__ import annotations

from benchmarks.common import RESULTS, read
from benchmarks.drawing import table
from benchmarks.tables.gpu import (
    DOCUMENT,
    OURS,
    Records,
    checks,
    findings,
    kernels_table,
    lists_table,
    ordered,
    others_table,
    peer,
    percent,
)
from tools.pages import fill_page

BEGIN, END = "<!-- figures: benchmarks/tables/h200.py -->", "<!-- end of the H200's figures -->"
KERNELS, CONVERT = RESULTS / "kernels-h200.jsonl", RESULTS / "convert-h200.jsonl"
ROUNDED = "ours, rounded"


def rounded_table(records: Records) -> str:
    """Return the table of scales that are powers of two, with the time of blocks whose scales are not rounded."""
    rows = [["weight", "scales", "µs", "GB/s", "share of the roof", "µs of `block`, not rounded"]]
    for record in ordered(records, ROUNDED):
        plain = peer(records, record | {"granularity": "block"}, OURS)
        rows.append(
            [
                record["shape"],
                record["granularity"],
                f"{record['seconds'] * 1e6:.1f}",
                f"{record['bytes_per_second'] / 1e9:.0f}",
                percent(record["share_of_roof"]),
                "" if plain is None else f"{plain['seconds'] * 1e6:.1f}",
            ]
        )
    return table(rows, left=2)


def conversion() -> str:
    """Describe a whole conversion, and the rates that limit it."""
    results = {record["case"]: record for record in read(CONVERT)}
    found = results["conversion"]
    return (
        f"A whole conversion of {found['bytes_in'] / 1e9:.1f} GB in {found['shards']} shards, from tmpfs to tmpfs"
        f" without digests, took {found['seconds']:.2f} s ({found['low']:.2f}-{found['high']:.2f},"
        f" {found['gigabytes_per_second']:.2f} GB/s). A copy of the host reaches"
        f" {results['host memcpy']['gigabytes_per_second']:.1f} GB/s, the bus"
        f" {results['pinned H2D']['gigabytes_per_second']:.1f} GB/s."
    )


def figures() -> str:
    """Return the generated part of the page."""
    records = read(KERNELS)
    first = records[0]
    named = ", ".join(dict.fromkeys(record["commit"] for record in records))
    return "\n\n".join(
        [
            "### H200",
            f"{first['device']}, driver {first['driver']}, torch {first['torch']}, triton {first['triton']}, commits"
            f" {named}; SMs up to {first['sm_clock_limit_mhz']} MHz, memory at {first['memory_clock_mhz']} MHz, clocks"
            " not locked. Configurations are those of the H100; that of the groups kernel was chosen here.",
            kernels_table(records),
            "\n".join(findings(records)),
            "Scales that are powers of two, and MX blocks, which write 3.125 bytes per element. The model"
            " predicts 97% of the roof or more for MX; the gap at 340 M elements is not explained.",
            rounded_table(records),
            "Ragged widths and odd addresses:",
            others_table(records),
            lists_table(records),
            conversion(),
            checks(records),
        ]
    )


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
