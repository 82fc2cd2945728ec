"""Counts of tests for the last lines of a run, from any of its processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Counted = Callable[[str, object], None]
COUNT = "counted: "


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Counted:
    """Function that takes a count of a test for the last lines of the run."""

    def count(what: str, number: object) -> None:
        request.node.user_properties.append((COUNT + what, str(number)))

    return count


def write_counts(terminalreporter: pytest.TerminalReporter, folder: str) -> None:
    """Write the counts of the tests in a folder."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    for report in reports:
        if getattr(report, "when", "") != "call" or not report.nodeid.startswith(f"{folder}/"):
            continue
        for name, value in getattr(report, "user_properties", ()):
            if name.startswith(COUNT):
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {name.removeprefix(COUNT)}: {value}")
