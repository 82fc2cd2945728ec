"""Write the H100 section of docs/kernels.md from benchmarks/results: ``python -m benchmarks.tables.gpu [--check]``.

The sources are ``kernels-h100.jsonl`` and ``convert-h100.jsonl``. ``--check`` writes nothing and fails if the page
differs from the results.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import RESULTS, ROOT, read
from benchmarks.drawing import table
from tools.pages import fill_page

DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- figures: benchmarks/tables/gpu.py -->", "<!-- end of the GPU's figures -->"
KERNELS, CONVERT = RESULTS / "kernels-h100.jsonl", RESULTS / "convert-h100.jsonl"

TARGET_ONE, TARGET_LIST, TARGET_COMPILE = 0.97, 0.90, 1.2
"""Targets: share of the roof for one tensor and for a list, speed relative to torch.compile."""

OURS, LIST, IN_TURN, BEFORE = "ours", "quantize_many", "quantize in turn", "before"
BESIDE, SWEPT = "beside the others: ours", "swept: "
"""Times of our kernels beside those of others, and of the package's configurations beside the alternatives."""

LISTS_BEFORE = "before, quantize_many"
ALTERNATIVES = {
    "L2 asked for all": "`evict_last` for all sizes",
    "L2 asked for nothing": "`evict_last` for no size",
    "always from the end": "every group cast from its end",
    "never from the end": "no group cast from its end",
}
"""Descriptions of alternatives whose names in the results are not self-explanatory."""
OTHERS = {"ragged": "ragged width", "at odd addresses": "odd addresses"}
"""Operations outside the targets, with their descriptions."""

Records = list[dict[str, Any]]


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.1f}%"


def short_of(share: float, target: float) -> str:
    """Return the gap between a share of the roof and its target in percentage points; empty if there is none."""
    return f"{100 * (target - share):.1f}" if share < target else ""


def last_run(records: Records) -> int:
    """Return the run of the figures on the page, the last one; the earlier runs only widen the range of a share."""
    return max(int(record["run"]) for record in records)


def ordered(records: Records, operation: str) -> Records:
    """Return the records of one operation in the last run by size, with the granularities of each shape together."""
    run = last_run(records)
    found = [record for record in records if record.get("operation") == operation and record["run"] == run]
    return sorted(found, key=lambda record: (record["elements"], record["shape"]))


def peer(records: Records, record: dict[str, Any], operation: str) -> dict[str, Any] | None:
    """Return the record of another operation on the same tensor in the same run; None if it was not measured."""
    same = ("shape", "granularity", "run")
    found = (r for r in records if r.get("operation") == operation and all(r[key] == record[key] for key in same))
    return next(found, None)


def span(records: Records, record: dict[str, Any]) -> str:
    """Return the lowest and the highest share of the roof of the same launch in all runs."""
    same = ("shape", "granularity", "operation")
    shares = [
        r["share_of_roof"] for r in records if "share_of_roof" in r and all(r[key] == record[key] for key in same)
    ]
    return f"{100 * min(shares):.1f}-{100 * max(shares):.1f}" if len(shares) > 1 else ""


def times(record: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    """Return the speed of a measurement relative to another."""
    return None if other is None else float(other["seconds"] / record["seconds"])


def versus(records: Records, record: dict[str, Any], operation: str) -> float | None:
    """Return our speed relative to a competitor's, by the time of our kernel that was measured beside it."""
    return times(peer(records, record, BESIDE) or record, peer(records, record, operation))


def kernels_table(records: Records) -> str:
    """Return the table of single weights; the earlier kernels have a column if they were measured."""
    had_before = bool(ordered(records, BEFORE))
    head = ["weight", "granularity", "µs", "GB/s", "share of the roof", "in all runs", *["before"] * had_before]
    rows = [[*head, "points short", "x torch.compile", "x torchao"]]
    for record in ordered(records, OURS):
        ratios = [versus(records, record, name) for name in ("torch.compile", "torchao")]
        rows.append(
            [
                record["shape"],
                record["granularity"],
                f"{record['seconds'] * 1e6:.1f}",
                f"{record['bytes_per_second'] / 1e9:.0f}",
                percent(record["share_of_roof"]),
                span(records, record),
                *[share(peer(records, record, BEFORE))] * had_before,
                short_of(record["share_of_roof"], TARGET_ONE),
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    return table(rows, left=2)


def lists_table(records: Records) -> str:
    """Return the table of lists of tensors; the earlier kernel has a column if it was measured."""
    had_before = bool(ordered(records, LISTS_BEFORE))
    head = ["list", "`quantize_many` GB/s", "share of the roof", "in all runs", *["before"] * had_before]
    rows = [[*head, "points short", "`quantize` in turn GB/s", "share of the roof"]]
    for record in ordered(records, LIST):
        other = peer(records, record, IN_TURN)
        rows.append(
            [
                record["shape"],
                f"{record['bytes_per_second'] / 1e9:.0f}",
                percent(record["share_of_roof"]),
                span(records, record),
                *[share(peer(records, record, LISTS_BEFORE))] * had_before,
                short_of(record["share_of_roof"], TARGET_LIST),
                "" if other is None else f"{other['bytes_per_second'] / 1e9:.0f}",
                share(other),
            ]
        )
    return table(rows)


def others_table(records: Records) -> str:
    """Return the table of ragged widths and odd addresses; empty if none was measured."""
    found = [(name, record) for operation, name in OTHERS.items() for record in ordered(records, operation)]
    if not found:
        return ""
    rows = [["weight", "layout", "granularity", "µs", "GB/s", "share of the roof"]]
    rows += [
        [
            record["shape"],
            name,
            record["granularity"],
            f"{record['seconds'] * 1e6:.1f}",
            f"{record['bytes_per_second'] / 1e9:.0f}",
            percent(record["share_of_roof"]),
        ]
        for name, record in found
    ]
    return table(rows, left=3)


def share(record: dict[str, Any] | None) -> str:
    """Return the share of the roof of a record in percent; empty without one."""
    return "" if record is None else percent(record["share_of_roof"])


def roofs(records: Records) -> str:
    """Describe the fastest and the slowest roof, and a device copy of a tensor of medium size."""
    run = last_run(records)
    moved = [r for r in records if r.get("operation", "").startswith("2:1 roof") and r["run"] == run]
    moved = [record for record in moved if record["dtype"] == "bfloat16"]
    best: dict[str, dict[str, Any]] = {}
    for record in moved:
        other = best.get(record["shape"])
        if other is None or record["bytes_per_second"] > other["bytes_per_second"]:
            best[record["shape"]] = record
    top = max(best.values(), key=lambda record: record["bytes_per_second"])
    least = min(best.values(), key=lambda record: record["bytes_per_second"])
    copy = max(ordered(records, "device copy"), key=lambda record: record["elements"] < 1 << 29 and record["elements"])
    return (
        f"The highest roof is {top['bytes_per_second'] / 1e9:.0f} GB/s ({top['shape']}). The lowest is"
        f" {least['bytes_per_second'] / 1e9:.0f} GB/s ({least['shape']}), where the launch overhead matters. torch's"
        f" device copy of {copy['shape']} reaches {copy['bytes_per_second'] / 1e9:.0f} GB/s."
    )


def findings(records: Records) -> list[str]:
    """Return a line for each target: whether it is reached, or the number of misses and the gaps."""
    parts = []
    for granularity in ("channel", "block", "tensor"):
        ours = [record for record in ordered(records, OURS) if record["granularity"] == granularity]
        missed = [record for record in ours if record["share_of_roof"] < TARGET_ONE]
        if not missed:
            parts.append(f"- `{granularity}` reaches {TARGET_ONE:.0%} of the roof on all {len(ours)} weights.")
            continue
        worst = min(missed, key=lambda record: record["share_of_roof"])
        parts.append(
            f"- `{granularity}` misses {TARGET_ONE:.0%} of the roof on {len(missed)} of {len(ours)} weights, by at most"
            f" {short_of(worst['share_of_roof'], TARGET_ONE)} points ({worst['shape']})."
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
            f"- `quantize_many` misses {TARGET_LIST:.0%} of the roof on {len(short)} of {len(lists)} lists, by"
            f" {min(gaps):.0f} to {max(gaps):.0f} points"
            + (f", and is slower than `quantize` in turn on {' and '.join(slower)}." if slower else ".")
        )
    ratios = [
        (record, ratio)
        for record in ordered(records, OURS)
        if (ratio := versus(records, record, "torch.compile")) is not None
    ]
    under = [(record, ratio) for record, ratio in ratios if ratio < TARGET_COMPILE]
    losing = ", ".join(f"{r['shape']} by {r['granularity']} ({ratio:.2f})" for r, ratio in under if ratio < 1)
    if ratios:
        parts.append(
            f"- The kernels miss {TARGET_COMPILE} times the speed of torch.compile in {len(under)} of {len(ratios)}"
            + (f" cases; torch.compile is faster on {losing}." if losing else " cases.")
        )
    behind = [
        f"{record['shape']}, where the speed of ours is {ratio:.2f} times that of torchao"
        for record in ordered(records, OURS)
        if (ratio := versus(records, record, "torchao")) is not None and ratio < 1
    ]
    if behind:
        parts.append(f"- torchao's kernel is faster on {'; '.join(behind)}.")
    return parts


def choices(records: Records) -> str:
    """Return a line for each alternative of the same run: its speed relative to the package's configuration."""
    lines = []
    for operation in sorted(
        {
            r["operation"]
            for r in records
            if r.get("operation", "").startswith((OURS + ",", LIST + ",")) and r["dtype"] == "bfloat16"
        }
    ):
        changes = []
        records_of = ordered(records, operation)
        for record in records_of:
            own = LIST if operation.startswith(LIST) else OURS
            chosen = peer(records, record, SWEPT + own) or peer(records, record, own)
            if chosen is not None:
                changes.append(f"{record['shape']} {100 * (times(record, chosen) or 0) - 100:+.1f}%")
        if changes:
            function, _, name = operation.partition(", ")
            label = "`quantize_many`" if function == LIST else f"`{records_of[0]['granularity']}`"
            lines.append(
                f"- {label}, {ALTERNATIVES.get(name, name.replace(' an SM', ' per SM'))}: {', '.join(changes)}."
            )
    return "\n".join(lines)


def checks(records: Records) -> str:
    """Describe the comparisons with the reference, and the tests."""
    compared = [record for record in records if "compared" in record]
    beside = sum(record["compared"] for record in compared if "beside" in record["check"])
    tests = [record for record in records if "passed" in record]
    passed = " and ".join(f"{record['passed']} of `{record['check'].partition(',')[0]}`" for record in tests)
    return (
        f"{sum(record['compared'] for record in compared) - beside} results were compared with the reference as bytes."
        f" During the timings, {beside} more were compared with parts of the reference or with the earlier kernels."
        f" {sum(record['different'] for record in compared) or 'None'} differed. Of the tests, {passed} passed,"
        f" {sum(record['failed'] for record in tests) or 'none'} failed, and"
        f" {sum(record['skipped'] for record in tests)}, which test the host only, were skipped."
    )


def drift(records: Records) -> float:
    """Return the largest speedup of a roof kernel between its measurements before and after the other kernels."""
    found: dict[tuple[Any, ...], list[float]] = {}
    run = last_run(records)
    for record in records:
        if record.get("operation", "").startswith("2:1 roof") and " x " not in record["shape"] and record["run"] == run:
            place = (record.get("stage"), record["shape"], record["dtype"], record["operation"])
            found.setdefault(place, []).append(record["seconds"])
    return max(seconds[0] / seconds[1] - 1 for seconds in found.values() if len(seconds) > 1)


def hosts(records: Records) -> str:
    """Describe the host time of a call of quantize_many, and rows of float32."""
    first, again = (
        max(r["host_seconds"] for r in records if r.get("host", "").endswith(which)) for which in (", first", ", again")
    )
    wide = []
    for record in ordered(records, "ours, float32"):
        other = peer(records, record, "before, float32")
        text = f"{record['shape']} {record['bytes_per_second'] / 1e9:.0f} GB/s"
        wide.append(text + (f" ({other['bytes_per_second'] / 1e9:.0f} before)" if other is not None else ""))
    return (
        f"The host time of a call of `quantize_many` is up to {1e3 * first:.0f} ms for a list of new sizes, and up to"
        f" {1e3 * again:.0f} ms for a list of the same sizes as before. Rows of float32, at 5 bytes per element:"
        f" {', '.join(wide)}."
    )


def conversion(records: Records) -> str:
    """Describe a whole conversion: its rate, the rates that limit it, and the time of each step."""
    results = read(CONVERT)
    found = next(record for record in results if record["case"] == "conversion")
    profile = next(record for record in results if record["case"] == "profile")
    rates = {
        r["case"]: r["gigabytes_per_second"]
        for r in results
        if r["case"] in ("host memcpy", "pinned H2D", "pinned D2H")
    }
    bus = min(rates["pinned H2D"], rates["pinned D2H"])

    def tmpfs(files: int) -> float:
        """Return the highest rate of writing to reserved pages of ``files`` files, over all numbers of threads."""
        return max(
            float(r["gigabytes_per_second"])
            for r in results
            if r["case"] == "tmpfs pwrite" and r["reserved"] and r["files"] == files
        )

    reserving = [
        r["reserve_gigabytes_per_second"] for r in results if "reserve_gigabytes_per_second" in r and r["files"] == 1
    ]
    written = profile["bytes_in"] / 2 / profile["write_threads"] * profile["writers"] / 1e9
    share = {key: profile[key] / profile["seconds"] for key in ("reserve", "pin", "flow", "kernels")}
    return (
        f"A whole conversion of {found['bytes_in'] / 1e9:.1f} GB in {found['shards']} shards, from tmpfs to tmpfs"
        f" without digests, took {found['seconds']:.2f} s ({found['low']:.2f}-{found['high']:.2f},"
        f" {found['samples']} samples), or {found['gigabytes_per_second']:.2f} GB/s. That is"
        f" {found['of_slowest']:.0%} of the {rates[found['slowest']]:.1f} GB/s at which the same host copies within"
        f" its memory; the bus moves {bus:.0f} GB/s in each direction. Another conversion had timers in every step"
        f" ({profile['seconds']:.2f} s; {' and '.join(f'{seconds:.2f}' for seconds in profile['undisturbed'])} s"
        " without timers):\n\n"
        f"- {share['reserve']:.0%} of the time: reserving the pages of the output, one shard after another, while"
        " nothing else runs.\n"
        f"- {share['pin']:.0%}: pinning the buffers, once.\n"
        f"- {share['flow']:.0%}: moving data. The writers are the limit: {profile['writers']} threads together write"
        f" one file at {written:.1f} GB/s, because the system lets only one thread at a time write to a file. With"
        f" reserved pages, the rate is {tmpfs(1):.0f} GB/s for one file, {tmpfs(2):.0f} for two and {tmpfs(4):.0f} for"
        f" four. Pages are reserved at {min(reserving):.0f} to {max(reserving):.0f} GB/s.\n\n"
        f"The kernels take {1e3 * profile['kernels']:.0f} ms, {share['kernels']:.1%} of the time."
    )


def figures() -> str:
    """Return the generated part of the page."""
    records = read(KERNELS)
    run, runs = last_run(records), {record["run"] for record in records}
    first = next(record for record in records if record["run"] == run)
    measured = [record for record in records if "seconds" in record]
    samples = sorted({record["samples"] for record in measured})
    versions = ", ".join(f"{key} {first[key]}" for key in ("driver", "torch", "triton", "torchao"))
    parts = [
        "### H100",
        f"{first['device']}, {versions}, commit {first['commit']}; SMs up to {first['sm_clock_limit_mhz']} MHz,"
        f" memory at {first['memory_clock_mhz']} MHz, clocks {first['clocks']}.",
        f"All weights are bf16. A time is the median of {', '.join(map(str, samples[:-1]))} or {samples[-1]} replays of"
        " a CUDA graph. Inputs and outputs rotate over at least 300 MB.",
        "\n".join(
            [
                "- *GB/s* counts the bytes that must cross the memory bus: 3 per element, 5 for `tensor`. L2 serves"
                " some of the 5, so that more than 100% of the roof is possible.",
                "- The *roof* is the fastest kernel that only reads 2 bytes and writes 1 byte per element of the same"
                " weight. It was measured before and after the other kernels, and was up to"
                f" {drift(records):.1%} faster after them.",
                *[
                    "- *In all runs* is the lowest and the highest share of the same launch in up to three runs. The"
                    " last two runs measured `channel` first on each weight. The first run measured it after other"
                    " kernels, and large weights were up to 3% faster; the reason is unknown."
                ]
                * (len(runs) > 1),
                *["- *Before* are the kernels of commit 7a2794d in the same run."] * bool(ordered(records, BEFORE)),
                "- *Points short* is the distance to the target in percentage points. The target is"
                f" {TARGET_ONE:.0%} for a tensor and {TARGET_LIST:.0%} for a list.",
                "- *x torch.compile* and *x torchao* are speeds relative to theirs. torch.compile compiles anew for"
                " each shape, with static sizes.",
            ]
        ),
        roofs(records),
        checks(records),
        kernels_table(records),
        "Lists of tensors are quantized in one launch (`quantize_many`, prepared), or by `quantize` in turn. Both run"
        " in a CUDA graph, without the work of the host. GB/s counts 3 bytes per element. The roof is that of"
        " one array of the same size.",
        lists_table(records),
        others_table(records),
        hosts(records),
        "Comparison with the targets:",
        "\n".join(findings(records)),
        conversion(records),
        "Alternative configurations in the same run, faster (+) or slower (-) than that of the package. Numbers joined"
        " by x are rows, columns of a piece and pieces of a program for `channel`, and elements of a tile and tiles of"
        " a program for `quantize_many`:",
        choices(records),
    ]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    """Write the section, or check it."""
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__)


if __name__ == "__main__":
    main()
