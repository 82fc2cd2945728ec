"""Write the H100 section of docs/kernels.md from benchmarks/results: ``python -m benchmarks.tables.gpu [--check]``.

The sources are ``kernels-h100.jsonl`` and ``convert-h100.jsonl``. With ``--check`` nothing is written, and a page
that differs from the results is an error.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import RESULTS, ROOT, read
from tools.pages import filled, put

DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- figures: benchmarks/tables/gpu.py -->", "<!-- end of the GPU's figures -->"
KERNELS, CONVERT = RESULTS / "kernels-h100.jsonl", RESULTS / "convert-h100.jsonl"

TARGET_ONE, TARGET_LIST, TARGET_COMPILE = 0.97, 0.90, 1.2
"""Targets: share of the roof for one tensor and for a list, speed relative to torch.compile."""

OURS, LIST, IN_TURN, CANDIDATE = "ours", "quantize_many", "quantize in turn", "candidate "
CANDIDATES = {
    "rows_pieces": ("channel", "more than 4,096 columns in pieces, all loaded before the first use"),
    "rows16": ("channel", "maxima in 16-bit integers"),
    "blocks16": ("block", "one mask instead of a branch, maxima in 16-bit integers"),
    "amax16 + cast_early": ("tensor", "the cast loads before it waits for the amax"),
    "grouped2": ("list", "persistent programs, one amax slot per chunk instead of counters"),
    "held": ("list", "a tensor stays in registers between amax and cast"),
}
"""Baseline of each candidate kernel, and its difference from the baseline."""

PROBES = (", L2 probe", ", hot tail", ", no dependent launch", ", again")
"""Suffixes of measurements that analyze a candidate instead of comparing it."""


def table(rows: list[list[str]], left: int = 1) -> str:
    """Return a Markdown table; all columns but the first ``left`` are numbers."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * left + "---:|" * (len(rows[0]) - left))
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def short_of(share: float, target: float) -> str:
    """Return the gap between a share of the roof and its target in percentage points; empty if there is none."""
    return f"{100 * (target - share):.1f}" if share < target else ""


def ordered(records: list[dict[str, Any]], operation: str) -> list[dict[str, Any]]:
    """Return the records of one operation by size, with the granularities of each shape together."""
    found = [record for record in records if record.get("operation") == operation]
    return sorted(found, key=lambda record: (record["elements"], record["shape"]))


def peer(records: list[dict[str, Any]], record: dict[str, Any], operation: str) -> dict[str, Any] | None:
    """Return the record of another operation on the same tensor; None if it was not measured."""
    same = ("shape", "granularity")
    found = (r for r in records if r.get("operation") == operation and all(r[key] == record[key] for key in same))
    return next(found, None)


def times(record: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    """Return the speed of a measurement relative to another."""
    return None if other is None else float(other["seconds"] / record["seconds"])


def kernels_table(records: list[dict[str, Any]]) -> str:
    head = ["weight", "granularity", "µs", "GB/s", "share of the roof", "points short", "x torch.compile", "x torchao"]
    rows = [head]
    for record in ordered(records, OURS):
        ratios = [times(record, peer(records, record, name)) for name in ("torch.compile", "torchao")]
        rows.append(
            [
                record["shape"],
                record["granularity"],
                f"{record['seconds'] * 1e6:.1f}",
                f"{record['bytes_per_second'] / 1e9:.0f}",
                percent(record["share_of_roof"]),
                short_of(record["share_of_roof"], TARGET_ONE),
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    return table(rows, left=2)


def lists_table(records: list[dict[str, Any]]) -> str:
    rows = [["list", "`quantize_many` GB/s", "share of the roof", "points short", "one after another GB/s", "share"]]
    for record in ordered(records, LIST):
        other = peer(records, record, IN_TURN)
        assert other is not None
        rows.append(
            [
                record["shape"],
                f"{record['bytes_per_second'] / 1e9:.0f}",
                percent(record["share_of_roof"]),
                short_of(record["share_of_roof"], TARGET_LIST),
                f"{other['bytes_per_second'] / 1e9:.0f}",
                percent(other["share_of_roof"]),
            ]
        )
    return table(rows)


def roofs(records: list[dict[str, Any]]) -> str:
    """Describe the fastest and the slowest roof, and a device copy of a tensor of medium size."""
    moved = [record for record in records if record.get("operation", "").startswith("2:1 roof")]
    best: dict[str, dict[str, Any]] = {}
    for record in moved:
        other = best.get(record["shape"])
        if other is None or record["bytes_per_second"] > other["bytes_per_second"]:
            best[record["shape"]] = record
    top = max(best.values(), key=lambda record: record["bytes_per_second"])
    least = min(best.values(), key=lambda record: record["bytes_per_second"])
    copy = max(ordered(records, "device copy"), key=lambda record: record["elements"] < 1 << 29 and record["elements"])
    return (
        f"The fastest roof moved {top['bytes_per_second'] / 1e9:.0f} GB/s ({top['shape']}), the slowest"
        f" {least['bytes_per_second'] / 1e9:.0f} ({least['shape']}, where launches matter). torch's device copy of"
        f" {copy['shape']} moved {copy['bytes_per_second'] / 1e9:.0f}."
    )


def findings(records: list[dict[str, Any]]) -> list[str]:
    """List the measurements that miss their targets, and the gaps."""
    parts = []
    for granularity in ("channel", "block", "tensor"):
        ours = [record for record in ordered(records, OURS) if record["granularity"] == granularity]
        missed = [record for record in ours if record["share_of_roof"] < TARGET_ONE]
        if not missed:
            parts.append(f"- `{granularity}` reaches {TARGET_ONE:.0%} of the roof on all {len(ours)} weights.")
            continue
        worst = min(missed, key=lambda record: record["share_of_roof"])
        parts.append(
            f"- `{granularity}` falls short of {TARGET_ONE:.0%} of the roof on {len(missed)} of {len(ours)} weights, by"
            f" {short_of(worst['share_of_roof'], TARGET_ONE)} points at worst ({worst['shape']})."
        )
    lists = ordered(records, LIST)
    short = [record for record in lists if record["share_of_roof"] < TARGET_LIST]
    gaps = [100 * (TARGET_LIST - record["share_of_roof"]) for record in short]
    slower = [
        record["shape"]
        for record in lists
        if (ratio := times(record, peer(records, record, IN_TURN))) is not None and ratio < 1
    ]
    if gaps:
        parts.append(
            f"- `quantize_many` falls short of {TARGET_LIST:.0%} on {len(short)} of {len(lists)} lists, by"
            f" {min(gaps):.0f} to {max(gaps):.0f} points"
            + (f", and is slower than one tensor after another on {' and '.join(slower)}." if slower else ".")
        )
    ratios = [
        (record, ratio)
        for record in ordered(records, OURS)
        if (ratio := times(record, peer(records, record, "torch.compile"))) is not None
    ]
    under = [(record, ratio) for record, ratio in ratios if ratio < TARGET_COMPILE]
    losing = ", ".join(f"{r['shape']} by {r['granularity']} at {ratio:.2f}" for r, ratio in under if ratio < 1)
    parts.append(
        f"- {TARGET_COMPILE} times torch.compile is missed in {len(under)} of {len(ratios)} cases"
        + (f"; torch.compile is faster in {losing}." if losing else ".")
    )
    behind = [
        f"{record['shape']} at {ratio:.2f}"
        for record in ordered(records, OURS)
        if (ratio := times(record, peer(records, record, "torchao"))) is not None and ratio < 1
    ]
    if behind:
        parts.append(f"- torchao's kernel is faster on {', '.join(behind)}.")
    return parts


def candidates(records: list[dict[str, Any]]) -> str:
    """Return a line for each candidate: its best share of the roof on each tensor, and that of the package."""
    lines = []
    for name, (kind, what) in CANDIDATES.items():
        found = [r for r in records if r.get("operation", "").startswith(CANDIDATE + name) and "share_of_roof" in r]
        found = [r for r in found if not any(mark in r["operation"] for mark in PROBES)]
        best: dict[str, dict[str, Any]] = {}
        for record in sorted(found, key=lambda record: (record["elements"], record["shape"], record["share_of_roof"])):
            best[record["shape"]] = record
        told = []
        for shape, record in best.items():
            now = peer(records, record, LIST if kind == "list" else OURS)
            assert now is not None
            told.append(f"{shape} {percent(record['share_of_roof'])} (now {percent(now['share_of_roof'])})")
        lines.append(f"- `{name}`, {kind}, {what}: {', '.join(told)}.")
    return "\n".join(lines)


def checks(records: list[dict[str, Any]]) -> str:
    """Describe the comparisons with the reference, and the tests."""
    compared = [record for record in records if "compared" in record]
    beside = sum(record["compared"] for record in compared if "beside" in record["check"])
    tests = [record for record in records if "passed" in record]
    told = ", ".join(f"{record['passed']} of `{record['check'].partition(',')[0]}`" for record in tests)
    return (
        f"{sum(record['compared'] for record in compared) - beside} results, including those of candidates, were"
        f" compared with the reference as bytes, and, beside the timings, parts of {beside} more;"
        f" {sum(record['different'] for record in compared) or 'none'} differed. Of the tests, {told} passed and"
        f" {sum(record['failed'] for record in tests) or 'none'} failed; {sum(record['skipped'] for record in tests)}"
        " were skipped."
    )


def drift(records: list[dict[str, Any]]) -> float:
    """Return the largest speedup of a roof kernel after a weight's other kernels, relative to before them."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if record.get("operation", "").startswith("2:1 roof") and " x " not in record["shape"]:
            found.setdefault((record["shape"], record["operation"]), []).append(record["seconds"])
    return max(seconds[0] / seconds[1] - 1 for seconds in found.values() if len(seconds) > 1)


def conversion(records: list[dict[str, Any]]) -> str:
    """Describe a whole conversion, the rates that bound it, and the time of its casts at the slowest measured rate."""
    told = read(CONVERT)
    found = next(record for record in told if record["case"] == "conversion")
    rates = {r["case"]: r["gigabytes_per_second"] for r in told if r["case"] != "conversion" and "note" not in r}
    bus = min(rates["pinned H2D"], rates["pinned D2H"])
    slowest = min(r["elements_per_second"] for r in records if r.get("operation") in (OURS, LIST))
    return (
        f"A whole conversion of {found['bytes_in'] / 1e9:.1f} GB in {found['shards']} shards, from tmpfs to tmpfs,"
        f" without digests, took {found['seconds']:.2f} s ({found['low']:.2f}-{found['high']:.2f},"
        f" {found['samples']} samples), or {found['gigabytes_per_second']:.2f} GB/s: {found['of_slowest']:.0%} of the"
        f" {rates[found['slowest']]:.1f} GB/s of copies within the memory of the same host; the bus moves"
        f" {bus:.0f} GB/s each way. At the slowest rate above, the casts take"
        f" {found['bytes_in'] / 2 / slowest * 1e3:.0f} ms of this time; the rest was not broken down."
    )


def figures() -> str:
    """Return the generated part of the page."""
    records = read(KERNELS)
    first = records[0]
    measured = [record for record in records if "seconds" in record]
    samples = sorted({record["samples"] for record in measured})
    versions = ", ".join(f"{key} {first[key]}" for key in ("driver", "torch", "triton", "torchao"))
    parts = [
        "### H100",
        f"{first['device']}, {versions}, commit {first['commit']}; SMs up to {first['sm_clock_limit_mhz']} MHz,"
        f" memory at {first['memory_clock_mhz']} MHz, clocks {first['clocks']}.",
        "Measured once, on one machine, in one run. bf16; medians of"
        f" {' or '.join(map(str, samples))} replays of a CUDA graph; inputs and outputs rotate over 300 MB at least."
        " GB/s counts the bytes that must cross the memory bus: 3 per element, 5 for `tensor`; L2 serves some of these,"
        " so that more than 100% is possible. The roof is the fastest kernel that only reads 2 bytes and writes 1 for"
        " each element of the same weight, measured before and after the others. It was up to"
        f" {drift(records):.1%} faster after them, so the shares of kernels that were measured early may be too low by"
        " as much. torch.compile compiles for each shape, with static sizes. *Points short* are percentage points below"
        f" the target, {TARGET_ONE:.0%} of the roof for a tensor and {TARGET_LIST:.0%} for a list.",
        roofs(records),
        checks(records),
        kernels_table(records),
        "Lists in one launch (`quantize_many`, prepared) and by `quantize` one after another, in a CUDA graph without"
        " the work of the host, at 3 bytes per element. The roof is that of one array of the same size:",
        lists_table(records),
        "Missed targets:",
        "\n".join(findings(records)),
        conversion(records),
        "Candidate kernels, not yet in the package; the best variant of each:",
        candidates(records),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    put({DOCUMENT: filled(DOCUMENT, BEGIN, END, figures())}, check=options.check)


if __name__ == "__main__":
    main()
