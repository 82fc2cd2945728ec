"""Command line of the report."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from . import __doc__ as description
from .report import report_all
from .spec import INPUTS, specs

COLUMNS = ("registers", "programs_per_sm", "instructions", "issue_share", "loads_before_use", "in_flight_per_sm")


def main(arguments: list[str] | None = None) -> int:
    """Print the report as tables, or with ``--json`` as a list of objects."""
    parser = argparse.ArgumentParser(prog="nemotron_fp8_kernels.inspect", description=description)
    parser.add_argument("--arch", type=int, default=90, help="compute capability (90: Hopper)")
    parser.add_argument(
        "--dtype", choices=tuple(INPUTS), action="append", help="report only this input dtype (repeatable)"
    )
    parser.add_argument(
        "--kernel", action="append", help="report only kernels whose name begins with this (repeatable)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list")
    form.add_argument("--json-lines", action="store_true", help="print a JSON object per kernel and line")
    options = parser.parse_args(arguments)
    wanted = tuple(options.kernel or ("",))
    chosen = [spec for spec in specs(tuple(options.dtype or INPUTS)) if spec.name.startswith(wanted)]
    reports = [asdict(report) for report in report_all(chosen, options.arch)]
    if options.json:
        print(json.dumps(reports, indent=1))
        return 0
    if options.json_lines:
        for report in reports:
            print(json.dumps(report, sort_keys=True))
        return 0
    _print([[*_names(report), *(str(report[column]) for column in COLUMNS)] for report in reports], ["", "", *COLUMNS])
    rows = [
        [
            *_names(report),
            str(found["shape"]),
            f"{found['hbm_bytes']:.2f}",
            f"{found['margin']:.1f}",
            f"{found['seconds'] * 1e6:.1f}",
            f"{found['share']:.1%}",
            str(found["limit"]),
        ]
        for report in reports
        for found in report["predictions"]
    ]
    print("\nPredicted:")
    _print(rows, ["", "", "shape", "HBM bytes", "margin", "µs", "share of the roof", "limit"])
    return 0


def _names(report: dict[str, Any]) -> tuple[str, str]:
    return report["name"], report["dtype"]


def _print(rows: list[list[str]], header: list[str]) -> None:
    """Print columns of equal width."""
    rows = [header, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
