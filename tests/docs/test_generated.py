"""Generated parts of pages equal the current output of their scripts."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from tests.docs.pages import ROOT

if TYPE_CHECKING:
    from pathlib import Path

FOLDERS = ("benchmarks", "tools", "tests/faults", "tests/cluster")
GENERATORS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "pages.py" and any(word in path.read_text(encoding="utf-8") for word in ('"--check"', "fill_page("))
)
"""Modules that write a part of a page, or compare it: the flag is their own, or that of `tools.pages.fill_page`."""

RECORDED = {
    "benchmarks.simulation.needs",
    "benchmarks.simulation.table",
    "benchmarks.tables.best_scales",
    "benchmarks.tables.calibration",
    "benchmarks.tables.cluster",
    "benchmarks.tables.convert",
    "benchmarks.tables.evaluate",
    "benchmarks.tables.gpu",
    "benchmarks.tables.h200",
    "benchmarks.tables.intervals",
    "benchmarks.tables.kernels",
    "benchmarks.tables.machine_code",
    "benchmarks.tables.memory",
    "benchmarks.tables.requantization",
    "benchmarks.tables.scales",
    "tools.command_reference",
    "tools.engines_table",
    "tools.errors_page",
    "tools.perplexity_in_vllm",
}
"""Generators that must be found."""


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", [name, "--check"])
    result: object = import_module(name).main()
    return result


@pytest.mark.parametrize("name", GENERATORS)
def test_page_is_what_its_generator_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not run(name, monkeypatch)


def test_the_generators_are_found() -> None:
    assert set(GENERATORS) >= RECORDED


@pytest.mark.parametrize("name", ["tools.command_reference", "tools.errors_page", "tools.engines_table"])
def test_a_page_that_was_changed_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = import_module(name)
    changed = tmp_path / module.PAGE.name
    changed.write_text(module.PAGE.read_text(encoding="utf-8").replace("|", "¦", 40), encoding="utf-8")
    monkeypatch.setattr(module, "PAGE", changed)
    with pytest.raises(SystemExit, match="differs from"):
        run(name, monkeypatch)
