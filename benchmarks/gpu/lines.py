"""JSON lines of a run: one object per figure, check or event, written when it is known.

A line is one of the kinds in `KINDS`. The driver adds the stage, the second and the circumstances (versions, device,
commit). A figure has the bytes per second of its operation; `with_shares` relates it to the best roof of its shape.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

Line = dict[str, Any]

MODE, LINES = "NEMOTRON_FP8_GPU_RUN_MODE", "NEMOTRON_FP8_GPU_RUN_LINES"
"""Environment variables of a stage: the mode, and the descriptor of the pipe that it writes its lines to."""

NUMBER = (int, float)
TEXT = (str,)

NO_DEVICE = 4
"""Exit status of a stage that needs a CUDA device and finds none."""

FIGURE = {
    "operation": TEXT,
    "granularity": TEXT,
    "shape": TEXT,
    "dtype": TEXT,
    "elements": (int,),
    "samples": (int,),
    "seconds": NUMBER,
    "seconds_least": NUMBER,
    "seconds_most": NUMBER,
    "floor_bytes_per_element": NUMBER,
    "elements_per_second": NUMBER,
    "bytes_per_second": NUMBER,
}
"""Time of an operation on one weight or list; the record of benchmarks/results/kernels-h100.jsonl."""

KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "figure": FIGURE,
    "host": {"host": TEXT, "host_seconds": NUMBER, "shape": TEXT},
    "compared": {"check": TEXT, "compared": (int,), "different": (int,)},
    "test": {"check": TEXT, "test": TEXT, "outcome": TEXT},
    "tests": {"check": TEXT, "passed": (int,), "failed": (int,), "skipped": (int,), "exit_code": (int,)},
    "error": {"error": TEXT},
    "event": {"case": TEXT},
}
"""Required fields of each kind and their types. A line is of the first kind whose fields it has."""

ROOF = "2:1 roof"
"""Start of the operations that only read two bytes and write one."""

MOST_BYTES = 1 << 16
"""Longest line that is accepted."""


def kind(line: Line) -> str | None:
    """Return the kind of a line; None if it is of no kind."""
    for name, fields in KINDS.items():
        if all(
            isinstance(line.get(field), types) and not isinstance(line.get(field), bool)
            for field, types in fields.items()
        ):
            return name
    return None


def parse(text: str) -> Line | None:
    """Return a line of a known kind; None for anything else."""
    if len(text) > MOST_BYTES:
        return None
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and kind(line) is not None else None


def read(path: Path) -> list[Line]:
    """Return the lines of a file, without those of no kind: the last one may be cut off."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [line for line in map(parse, text.splitlines()) if line is not None]


def with_shares(lines: list[Line]) -> list[Line]:
    """Return the lines; figures get ``share_of_roof``: their bytes per second over the best roof of their shape.

    Best of all roof kernels before and after the shape, in the same run and stage. Lines that have a share keep it.
    """
    best: dict[tuple[Any, ...], float] = {}
    for line in lines:
        if is_roof(line):
            best[_place(line)] = max(best.get(_place(line), 0.0), line["bytes_per_second"])
    return [
        line | {"share_of_roof": line["bytes_per_second"] / best[_place(line)]}
        if kind(line) == "figure" and not is_roof(line) and "share_of_roof" not in line and _place(line) in best
        else line
        for line in lines
    ]


def is_roof(line: Line) -> bool:
    """Return True for the time of a roof kernel."""
    return str(line.get("operation", "")).startswith(ROOF)


def drifts(lines: list[Line]) -> dict[tuple[Any, ...], float]:
    """Return the relative change of the best roof of each shape from the first to the last round.

    A round is one measurement of each roof kernel; shapes have at least two, before and after the other kernels.
    """
    rounds: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for line in lines:
        if is_roof(line):
            rounds.setdefault(_place(line), {}).setdefault(line["operation"], []).append(line["bytes_per_second"])
    found = {}
    for place, operations in rounds.items():
        again = [rates for rates in operations.values() if len(rates) > 1]
        if again:
            found[place] = max(rates[-1] for rates in again) / max(rates[0] for rates in again) - 1
    return found


def problems(lines: list[Line], stages: list[str], until_launch: bool = False) -> list[str]:
    """Return what is wrong with the lines of a finished run: stages without a report, errors, wrong bytes.

    Args:
        stages: stages that ran.
        until_launch: whether every stage had to stop at its first launch.
    """
    found = [f"{line.get('stage')}: {line['error']}" for line in lines if kind(line) == "error"]
    found += wrong_results(lines)
    for stage in stages:
        own = [line for line in lines if line.get("stage") == stage]
        ends = [line for line in own if line.get("case") == "exit"]
        if not ends:
            found.append(f"{stage}: no report")
        found += [f"{stage}: exit status {line['code']}" for line in ends if line["code"]]
        if all(line.get("case") == "exit" for line in own):
            found.append(f"{stage}: no figure, no check")
        if until_launch and not any(line.get("case") == "stopped" for line in own):
            found.append(f"{stage}: did not get to a launch")
    return found


def wrong_results(lines: list[Line]) -> list[str]:
    """Return the checks that found wrong bytes or failed tests."""
    return [
        f"{line.get('stage')}: {line['check']}: {line.get('different') or line.get('failed')} wrong"
        for line in lines
        if line.get("different") or line.get("failed")
    ]


def _place(line: Line) -> tuple[Any, ...]:
    return line.get("run"), line.get("stage"), line["shape"], line["dtype"]
