"""Options and fixtures of the tests that run the compiled kernels in the PTX emulator.

Triton reads TRITON_INTERPRET when it is first imported, and tests/kernels sets it. Therefore no module here imports
triton at collection, and the fixtures refuse a process with interpreted kernels.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from tests.ptx.compiled import Compiled
from tests.support.ptxemu.schedule import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.ptxemu.driver import Emulator

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "ptx"
PRINTED = ("bytes compared", "schedules", "turns", "faults found")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of the suite."""
    group = parser.getgroup("ptx", "compiled kernels in the emulator")
    group.addoption(
        "--ptx-share", choices=("ci", "full"), default="full", help="ci: a share of at most 90 seconds on two cores"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of examples; without this suite's option another suite runs, and nothing changes."""
    share = config.getoption("ptx_share", None)
    if share:
        examples = 3 if share == "ci" else 60
        settings.register_profile("ptx", settings.get_profile("suite"), max_examples=examples, database=None)
        settings.load_profile("ptx")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a share of the cases in CI: ``@pytest.mark.ptx(ci=3)`` keeps three, with the first and the last."""
    if config.getoption("ptx_share", None) != "ci":
        return
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault(item.nodeid.split("[")[0], []).append(item)
    left_out = set()
    for cases in by_test.values():
        marker = cases[0].get_closest_marker("ptx")
        kept = marker.kwargs.get("ci", len(cases)) if marker else len(cases)
        if kept < len(cases):
            places = {i * (len(cases) - 1) // max(1, kept - 1) for i in range(kept)}
            left_out |= {item.nodeid for place, item in enumerate(cases) if place not in places}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """Make the emulator Triton's device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET is set: run these tests alone, by `make test-ptx`")
    from tests.support.ptxemu.driver import install

    return install(CACHE)


@pytest.fixture(scope="session")
def package(emulator: Emulator) -> Compiled:
    """Return the compiled kernels of the package."""
    return Compiled(emulator)


@pytest.fixture
def compiled(package: Compiled, request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """Return the compiled kernels, with default settings; report counts at the end of the test."""
    package.restart(Settings())
    package.counts.clear()
    yield package
    request.node.user_properties += list(package.counts.items())
    package.restart(Settings())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts of all tests, also of those in other processes."""
    totals: Counter[str] = Counter()
    for report in terminalreporter.stats.get("", []):
        # The properties are complete after the fixtures' ends.
        if getattr(report, "when", "") == "teardown":
            totals.update({name: count for name, count in report.user_properties if name in PRINTED})
    if totals:
        terminalreporter.write_line(", ".join(f"{totals[name]:,} {name}" for name in PRINTED if totals[name]))
