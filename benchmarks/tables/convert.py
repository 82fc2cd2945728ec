"""Write the figures of docs/benchmarks.md and of the README: ``python -m benchmarks.tables.convert [--check]``.

The source is benchmarks/results. With ``--check`` nothing is written, and a page or a plot that differs from the
results is an error.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from benchmarks.checkpoints import nemotron
from benchmarks.common import RESULTS, ROOT, read
from benchmarks.drawing import BLUE, GRAY, ORANGE, SOFT, bar, line, svg, table, text
from tools.pages import filled, put

DOCUMENT = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: benchmarks/tables/convert.py -->", "<!-- end of figures -->"
MIB = 1 << 20
OURS = ("ours", "ours, digests")
SHAPES_GIGABYTES, SHAPES_SHARDS = 1.4, 1
"""Default source of `benchmarks.measure.convert`; `elements` checks that the records are of this source."""
FLOOR_SHAPE = "expert 8 M (2048x4096)"
"""Shape in kernels-cpu.jsonl whose rates give the floors: it does not fit the caches."""


# ---- against cp ----


def contestants(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "contestant" in record]


def versus_table(warm: list[dict[str, Any]], cold: list[dict[str, Any]]) -> str:
    """Return medians with the fastest and the slowest round; each ratio is of two consecutive runs."""
    header = ["", "warm: seconds", "times cp", "cold: seconds", "times cp", "peak resident"]
    rows = [header]
    colds = {record["contestant"]: record for record in contestants(cold)}
    for record in contestants(warm):
        row = [record["contestant"]]
        for found in (record, colds.get(record["contestant"])):
            row += _spread(found) if found else ["not run", ""]
        peak = record["peak_resident_bytes"]
        rows.append([*row, "" if peak is None else f"{peak / MIB:,.0f} MiB"])
    return table(rows)


def _spread(record: dict[str, Any]) -> list[str]:
    seconds = "{seconds:.2f} ({seconds_low:.2f}-{seconds_high:.2f})".format(**record)
    if record["ratio_low"] == record["ratio_high"]:
        return [seconds, "1"]
    return [seconds, "**{ratio_to_cp:.2f}** ({ratio_low:.2f}-{ratio_high:.2f})".format(**record)]


def versus_plot(warm: list[dict[str, Any]], cold: list[dict[str, Any]]) -> str:
    """Draw bars of seconds, warm and cold, with a whisker from the fastest round to the slowest."""
    groups = [("page cache warm", contestants(warm)), ("page cache cold", contestants(cold))]
    top = max(record["seconds_high"] for _, records in groups for record in records)
    left, wide, y, parts = 140, 480, 24, []
    for title, records in groups:
        parts.append(text(left, y, title, extra=' font-weight="bold"'))
        y += 10
        for record in records:
            scale = wide / top
            color = BLUE if record["contestant"] in OURS else GRAY
            low, median, high = (record[key] * scale for key in ("seconds_low", "seconds", "seconds_high"))
            parts += [
                text(left - 8, y + 15, record["contestant"], "end"),
                bar(left, y, median, 20, color),
                line(left + low, y + 10, left + high, y + 10),
                line(left + low, y + 6, left + low, y + 14),
                line(left + high, y + 6, left + high, y + 14),
                text(left + high + 6, y + 15, f"{record['seconds']:.2f} s, {record['ratio_to_cp']:.2f} x cp"),
            ]
            y += 26
        y += 24
    return svg(left + wide + 130, y - 14, "Seconds of a conversion and of a copy", parts)


# ---- layouts ----


def layouts_table(records: list[dict[str, Any]]) -> str:
    """Return the conversions of every layout beside ``cp`` and beside those by torch."""
    found = {(r["contestant"], r["granularity"], r["what"]): r for r in records}
    rows = [["granularity", "", "seconds", "times cp", "processor (s)", "of torch's", "of those without"]]
    for granularity in ("tensor", "channel", "block"):
        for contestant in ("compiled", "torch", "compiled, digests", "compiled, statistics"):
            wall, processor = (found[contestant, granularity, key] for key in ("seconds", "processor_seconds"))
            extra = contestant.startswith("compiled, ")
            rows.append(
                [
                    granularity,
                    contestant,
                    f"{wall['value']:.2f}",
                    _ratio(wall, "cp"),
                    f"{processor['value']:.2f}",
                    "" if extra or contestant == "torch" else _ratio(processor, "torch"),
                    _ratio(processor, "compiled") if extra else "",
                ]
            )
    return table(rows)


def _ratio(record: dict[str, Any], to: str) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*(record[f"to_{to}{end}"] for end in ("", "_low", "_high")))


# ---- phases ----


def elements(records: list[dict[str, Any]]) -> int:
    """Return the number of elements of the benchmark's source; all of them become FP8."""
    tensors = [shape for shard in nemotron(SHAPES_GIGABYTES, SHAPES_SHARDS) for _, shape in shard]
    count = sum(math.prod(shape) for shape in tensors)
    nbytes = records[0]["gigabytes"] * 1e9
    if not 0 <= nbytes - 2 * count < 1e6:
        raise SystemExit("the records are not of the default source of benchmarks.measure.convert")
    return count


def phase_rows(records: list[dict[str, Any]]) -> list[tuple[str, float, float, float | None, str]]:
    """Return for each phase, on one thread: name, wall and processor seconds, floor in seconds, name of the floor."""
    found = {record["phase"]: record for record in records if "phase" in record}
    kernels = read(RESULTS / "kernels-cpu.jsonl")
    if kernels[0]["processor"] != records[0]["processor"]:
        raise SystemExit("the floors are of another processor than the conversion")
    copies = [r["bytes_per_second"] for r in kernels if r["shape"] == FLOOR_SHAPE and r["operation"] == "copy"]
    count, bandwidth = elements(records), max(copies)  # copies of every dtype move bytes: the fastest counts
    amax, cast, both = found["amax"], found["cast"], found["cast and write"]
    write = {key: both[key] - cast[key] for key in ("seconds", "processor_seconds")}
    rows = [
        ("amax", amax, 2, "memory: 2 bytes read per element"),
        ("cast", cast, 2, "memory: 2 bytes read per element; the codes stay in the cache"),
        ("write", write, 2, "memory: 1 byte read, 1 written, into the page cache"),
    ]
    phases = [
        (name, r["seconds"], r["processor_seconds"], nbytes * count / bandwidth, what) for name, r, nbytes, what in rows
    ]
    digest, fsync = found["digest"], found["fsync"]
    phases.append(("digest", digest["seconds"], digest["processor_seconds"], None, "hashlib: the phase is its speed"))
    phases.append(("fsync", fsync["seconds"], fsync["processor_seconds"], None, "disk: nothing is computed"))
    return phases


def phases_table(records: list[dict[str, Any]]) -> str:
    count = elements(records)
    rows = [["phase", "wall (s)", "processor (s)", "G elements/s", "floor (s)", "floor is set by"]]
    for name, wall, processor, floor, what in phase_rows(records):
        rows.append(
            [
                name,
                f"{wall:.2f}",
                f"{processor:.2f}",
                f"{count / wall / 1e9:.2f}",
                "" if floor is None else f"{floor:.2f}",
                what,
            ]
        )
    return table(rows)


def phases_plot(records: list[dict[str, Any]]) -> str:
    """Draw a bar for each phase, with a mark for its floor."""
    rows = phase_rows(records)
    left, wide, y, parts = 80, 520, 30, []
    scale = wide / max(wall for _, wall, *_ in rows)
    parts.append(text(left, 18, "seconds on one thread; dark: processor time; orange: memory floor"))
    for name, wall, processor, floor, _ in rows:
        parts += [
            text(left - 8, y + 15, name, "end"),
            bar(left, y, wall * scale, 20, "#b9c7dc"),
            bar(left, y, min(processor, wall) * scale, 20, BLUE),
            text(left + wall * scale + 8, y + 15, f"{wall:.2f} s"),
        ]
        if floor is not None:
            x = left + floor * scale
            parts.append(line(x, y - 3, x, y + 23, ORANGE, ' stroke-width="3"'))
        y += 30
    return svg(left + wide + 70, y + 2, "Seconds of each phase of a conversion", parts)


# ---- growth ----


def growth_table(records: list[dict[str, Any]], what: str) -> str:
    convert = what == "convert"
    rows = [["shards", "tensors", "bytes", "seconds", "processor (s)", "peak resident"]]
    if convert:
        rows[0].append("open files")
    for r in records:
        if r["what"] == what:
            row = [f"{r['shards']:,}", f"{r['tensors']:,}", _bytes(r["bytes"])]
            row += [f"{r[key]:.2f}" for key in ("seconds", "processor_seconds")]
            row.append(f"{r['peak_resident_bytes'] / MIB:.0f} MiB")
            rows.append([*row, str(r["open_files"])] if convert else row)
    return table(rows).replace("|---|", "|---:|", 1)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def growth_plot(records: list[dict[str, Any]]) -> str:
    """Draw three panels on logarithmic axes: planning by tensors, conversion by bytes, its memory by bytes."""
    plans = [r for r in records if r["what"] == "plan"]
    conversions = [r for r in records if r["what"] == "convert"]
    panels = [
        ("plan: seconds by tensors", [(r["tensors"], r["seconds"], r["shards"]) for r in plans]),
        ("conversion: seconds by bytes", [(r["bytes"], r["seconds"], r["shards"]) for r in conversions]),
        (
            "conversion: peak MiB by bytes",
            [(r["bytes"], r["peak_resident_bytes"] / MIB, r["shards"]) for r in conversions],
        ),
    ]
    parts: list[str] = []
    for i, (title, points) in enumerate(panels):
        parts += _panel(20 + i * 310, title, points)
    return svg(940, 300, "Growth of time and memory", parts)


def _panel(x0: float, title: str, points: list[tuple[float, float, int]]) -> list[str]:
    """Draw points on two logarithmic axes; orange marks sources of 1,000 shards or more."""
    left, right, top, bottom = x0 + 40, x0 + 280, 40, 250
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_low, x_high = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
    y_low, y_high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (math.log10(x) - x_low) / (x_high - x_low) * (right - left),
            bottom - (math.log10(y) - y_low) / (y_high - y_low) * (bottom - top),
        )

    parts = [text(left, 22, title, extra=' font-weight="bold"')]
    for k in range(x_low, x_high + 1):
        x, _ = at(10.0**k, 10.0**y_low)
        parts += [line(x, top, x, bottom, "#e3e5e9"), text(x, bottom + 18, _power(k), "middle")]
    for k in range(y_low, y_high + 1):
        _, y = at(10.0**x_low, 10.0**k)
        parts += [line(left, y, right, y, "#e3e5e9"), text(left - 6, y + 4, _power(k), "end")]
    for x, y, shards in sorted(points):
        px, py = at(x, y)
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="{ORANGE if shards >= 1000 else BLUE}"/>')
    parts.append(text(left, bottom + 40, "orange: 1,000 shards or more", extra=f' fill="{SOFT}" font-size="12"'))
    return parts


def _power(k: int) -> str:
    named = {-1: "0.1", 0: "1", 1: "10", 2: "100", 3: "1k", 4: "10k", 5: "100k", 6: "1M", 7: "10M", 8: "100M"}
    return named.get(k, f"{10 ** (k - 9)}G")


# ---- the document ----


def figures() -> tuple[str, dict[str, str]]:
    """Return the generated part of the page, and the plots by file name."""
    warm, cold, growth = (read(RESULTS / f"{name}.jsonl") for name in ("convert-cpu", "convert-cpu-cold", "growth-cpu"))
    paths = read(RESULTS / "paths-cpu.jsonl")
    first = warm[0]
    by_name = {r["contestant"]: r["seconds"] for r in contestants(warm)}
    times = ", ".join(
        f"{by_name[name] / by_name['ours']:.1f} times as fast as {words}"
        for name, words in (("original script", "the original script"), ("llm-compressor", "llm-compressor"))
        if name in by_name
    )
    parts = [
        f"{first['processor']}, {first['cores']} cores, {first['vector']}, Python {first['python']}, torch"
        f" {first['torch']}, commit {first['commit']}.",
        "## Against cp",
        f"One shard of {first['gigabytes']:.2f} GB, {first['rounds']} rounds warm and {cold[0]['rounds']} cold (commit"
        f" {cold[0]['commit']}). With a"
        f" warm page cache and without digests, a conversion is {times}.",
        "![Seconds, with the fastest and the slowest round](convert-cpu.svg)",
        versus_table(warm, cold),
        "## Layouts",
        _layouts_text(paths),
        layouts_table(paths),
        "## Phases",
        f"The same shard ({elements(warm) / 1e6:,.0f} M elements, all quantized), one thread, warm page cache.",
        "![Seconds of each phase](phases-cpu.svg)",
        phases_table(warm),
        "## Growth",
        "![Growth of time and memory](growth-cpu.svg)",
        "Planning:",
        growth_table(growth, "plan"),
        "Conversion:",
        growth_table(growth, "convert"),
    ]
    plots = {
        "convert-cpu.svg": versus_plot(warm, cold),
        "phases-cpu.svg": phases_plot(warm),
        "growth-cpu.svg": growth_plot(growth),
    }
    return "\n\n".join(parts), plots


def _layouts_text(paths: list[dict[str, Any]]) -> str:
    first, copied = paths[0], {r["what"]: r["value"] for r in paths if r["granularity"] == "-"}
    return (
        f"{first['processor']}, {first['cores']} cores, commit {first['commit']}; {first['rounds']} rounds of another"
        f" run, page cache warm, on a disk where cp takes {copied['seconds']:.2f} s, {copied['fsync_seconds']:.2f} s of"
        " it fsync; cp varied more between runs than the others."
        " *compiled* are the kernels in C, *torch* is the same conversion without them. Processor seconds are"
        " those of all threads and of the system."
    )


def short_table() -> str:
    """Return the table of the README: the warm rounds."""
    warm = read(RESULTS / "convert-cpu.jsonl")
    first, rows = warm[0], [["", "seconds", "times `cp`", "peak memory"]]
    labels = dict(zip(OURS, ("`quantize --no-digests`", "`quantize`"), strict=True))
    for record in contestants(warm):
        name, peak = record["contestant"], record["peak_resident_bytes"]
        seconds, ratio = f"{record['seconds']:.2f}", f"{record['ratio_to_cp']:.2f}"
        cells = [labels.get(name, name), seconds, ratio, "" if peak is None else f"{peak / MIB:,.0f} MiB"]
        rows.append([f"**{cell}**" if cell and name in OURS else cell for cell in cells])
    where = (
        f"One shard of {first['gigabytes']:.2f} GB, bf16, in the page cache; {first['processor']}, {first['cores']}"
        f" cores, torch {first['torch']}; median of {first['rounds']} rounds."
    )
    return f"{table(rows)}\n\n{where}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    body, plots = figures()
    wanted = {page: filled(page, BEGIN, END, part) for page, part in ((DOCUMENT, body), (README, short_table()))}
    wanted |= {DOCUMENT.parent / name: plot for name, plot in plots.items()}
    put(wanted, check=options.check)


if __name__ == "__main__":
    main()
