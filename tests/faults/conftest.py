"""Options of the fault rows, the runner that their tests share, and the lines at the end."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults import tools, world
from tests.faults.row import Share
from tests.faults.runner import Runner, warm_up

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNNER = pytest.StashKey[Runner]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the fault rows."""
    group = parser.getgroup("faults", "fault rows")
    group.addoption("--share", choices=("ci", "full"), default="full", help="ci: a share that takes under six minutes")
    group.addoption("--part", default="1/1", help="1/3: the first of three parts of the cases of every row")
    group.addoption("--jobs", type=int, default=2, help="cases at a time")
    group.addoption("--record", type=Path, help="put the results into this file of JSON lines")


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Run rows with the options of the command line; record the results and remove the worlds at the end."""
    config = request.config
    terminal = config.pluginmanager.getplugin("terminalreporter")

    def report(line: str) -> None:
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(line)

    share = Share(full=config.getoption("share") == "full", missing=tools.missing())
    made = Runner(share, config.getoption("part"), config.getoption("jobs"), report)
    config.stash[RUNNER] = made
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a terminated run removes its worlds
    warm_up()
    try:
        world.reference()
        world.reference("large")
        yield made
    finally:
        world.clean_up()
        if config.getoption("record"):
            made.record(config.getoption("record"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print a line for each row that could not run here; a long log ends with what it leaves open."""
    made = config.stash.get(RUNNER, None)
    for line in made.skipped if made else ():
        terminalreporter.write_line(line)
