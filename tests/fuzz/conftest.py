"""Options of the fuzz suite, and the specimens that the formats of a process share."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuzz import harness, sweep
from tests.fuzz.seeds import Seeds

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the fuzz suite."""
    group = parser.getgroup("fuzz", "fuzz suite")
    group.addoption("--inputs", type=int, default=2000, help="inputs of all formats together")
    group.addoption("--seed", type=int, default=1, help="first word of the inputs' names; other seeds, other inputs")
    group.addoption("--counts", type=Path, help="put the counts into this file of JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the file of counts anew, in the process that starts the others."""
    counts = config.getoption("counts", None)
    if counts and not hasattr(config, "workerinput"):
        counts.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def base() -> Iterator[Path]:
    """A folder for the folders of all inputs of this process."""
    # So that a terminated run removes its folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    made = sweep.temporary_base()
    yield made
    sweep.remove_base(made)


@pytest.fixture(scope="session")
def seeds(base: Path) -> Seeds:
    """The specimens, made once in this process."""
    harness.preload()
    return Seeds(base)
