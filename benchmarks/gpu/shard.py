"""Plugin of pytest: runs one share of the tests, and writes a line after each, without any other plugin.

A share is every n-th test of the collection. A process per share needs no pytest-xdist, and if a test ends its process
the other shares go on.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.lines import LINES

if TYPE_CHECKING:
    import pytest

SHARE, TITLE, COLLECT = "NEMOTRON_FP8_GPU_RUN_SHARE", "NEMOTRON_FP8_GPU_RUN_TITLE", "NEMOTRON_FP8_GPU_RUN_COLLECT"
"""Environment variables: the share as ``number/count``, the name of the suite, whether tests are only collected."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the share."""
    number, _, count = os.environ.get(SHARE, "0/1").partition("/")
    if os.environ.get(COLLECT):
        _write(case="stopped", step=os.environ[TITLE], stopped="no CUDA device", collected=len(items), compiled=[])
    kept = items[int(number) :: int(count)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the outcome of a test; a failed set-up or tear-down counts as a failed test."""
    if report.when != "call" and report.outcome == "passed":
        return
    fields: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "test_seconds": report.duration}
    if report.failed:
        fields["problem"] = str(report.longrepr)[-2000:]
    _write(check=os.environ.get(TITLE, "tests"), **fields)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write a file that cannot be collected, as an error."""
    if report.failed:
        _write(error=f"{report.nodeid} cannot be collected: {str(report.longrepr)[-2000:]}", step="collection")


def _write(**fields: Any) -> None:
    descriptor = os.environ.get(LINES)
    if descriptor is not None:
        os.write(int(descriptor), (json.dumps(fields) + "\n").encode())
