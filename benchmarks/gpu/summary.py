"""Summary of the lines of a run, as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.gpu.lines import drifts, kind, problems, with_shares

if TYPE_CHECKING:
    from benchmarks.gpu.lines import Line

FIRST = ("device", "driver", "torch", "triton", "torchao", "commit", "sm_clock_limit_mhz", "memory_clock_mhz")
MOST_PROBLEMS, MOST_FASTER = 20, 15
FASTER = 0.01

OURS, BESIDE = "ours", "beside the others: ours"
SHOWN = (OURS, "ragged", "at odd addresses", "ours, float32", "quantize_many", "quantize in turn")
"""Operations with a row; the others are only in the results."""


def text(lines: list[Line], stages: list[str], until_launch: bool = False) -> str:
    """Return circumstances, checks, shares of the roof, host times, and what went wrong.

    Args:
        stages: stages that should have run.
        until_launch: whether every stage had to stop at its first launch.
    """
    lines = with_shares(lines)
    # A terminal shows the end: what matters most comes last.
    parts = [*_hosts(lines), *_faster(lines), *_shares(lines), *_drift(lines), *_checks(lines), _circumstances(lines)]
    wrong = problems(lines, stages, until_launch)
    parts.append(f"problems: {len(wrong)}" if wrong else "no problems")
    parts += [f"  {problem[:300]}" for problem in wrong[:MOST_PROBLEMS]]
    return "\n".join(part for part in parts if part) + "\n"


def _circumstances(lines: list[Line]) -> str:
    line = lines[-1] if lines else {}
    return ", ".join(f"{key} {line[key]}" for key in FIRST if line.get(key) is not None)


def _checks(lines: list[Line]) -> list[str]:
    counted: dict[str, list[int]] = {}
    for line in lines:
        if kind(line) == "compared":
            totals = counted.setdefault(line["check"], [0, 0])
            totals[0] += line["compared"]
            totals[1] += line["different"]
    found = [f"{check}: {total[0]} compared, {total[1]} different" for check, total in counted.items()]
    found += [
        f"{line['check']}: {line['passed']} passed, {line['failed']} failed, {line['skipped']} skipped"
        for line in lines
        if kind(line) == "tests"
    ]
    missing = sorted({line["package"] for line in lines if line.get("case") == "missing"})
    compiled = {line["variant"]: line["kernel"] for line in lines if line.get("case") == "compiled"}
    if missing:
        found.append(f"missing packages: {', '.join(missing)}")
    if compiled:
        found.append(f"compiled for sm_90: {len(compiled)} variants of {len(set(compiled.values()))} kernels")
    return found


def _shares(lines: list[Line]) -> list[str]:
    """Return a row per weight or list: share of the roof, and speed relative to the others."""
    rows = []
    for line in lines:
        if kind(line) != "figure" or line["operation"] not in SHOWN:
            continue
        beside = "" if line["operation"] != OURS else _ratios(lines, line)
        rate = f"{line['seconds'] * 1e6:8.1f} us {line['bytes_per_second'] / 1e9:5.0f} GB/s"
        share = "      " if "share_of_roof" not in line else f"{100 * line['share_of_roof']:5.1f}%"
        rows.append(f"{line['shape'][:28]:28} {line['granularity']:7} {rate} {share} {line['operation']}{beside}")
    return rows


def _ratios(lines: list[Line], line: Line) -> str:
    """Return the speed relative to torch.compile and torchao, all measured beside each other."""
    same = [r for r in lines if kind(r) == "figure" and all(r[key] == line[key] for key in ("shape", "granularity"))]
    seconds = {r["operation"]: r["seconds"] for r in same if r.get("stage") == "peers"}
    ours = seconds.get(BESIDE)
    found = [
        f"x {seconds[name] / ours:.2f} {name}" for name in ("torch.compile", "torchao") if ours and name in seconds
    ]
    return "".join(f", {ratio}" for ratio in found)


def _faster(lines: list[Line]) -> list[str]:
    """Return the alternatives that are clearly faster than the package's configuration in the same stage."""
    swept = [line for line in lines if kind(line) == "figure" and line.get("stage") == "sweep"]
    chosen = {(r["shape"], r["granularity"]): r["seconds"] for r in swept if r["operation"].startswith("swept: ")}
    gains = []
    for line in swept:
        own = chosen.get((line["shape"], line["granularity"]))
        if own and line["operation"].startswith(("ours, ", "quantize_many, ")):
            gains.append((own / line["seconds"] - 1, line))
    best = sorted((gain for gain in gains if gain[0] >= FASTER), key=lambda gain: -gain[0])[:MOST_FASTER]
    return [f"faster by {100 * gain:.1f}%: {line['shape']}, {line['operation']}" for gain, line in best]


def _hosts(lines: list[Line]) -> list[str]:
    return [
        f"{line['shape'][:28]:28} {1e3 * line['host_seconds']:8.3f} ms on the host: {line['host']}"
        for line in lines
        if kind(line) == "host"
    ]


def _drift(lines: list[Line]) -> list[str]:
    found: dict[tuple[Any, ...], float] = drifts(lines)
    if not found:
        return []
    low, high = min(found.values()), max(found.values())
    return [f"roofs after the kernels relative to before: {100 * low:+.1f}% to {100 * high:+.1f}%"]
