"""The families suite: options, the zoo, and the file of results."""

from __future__ import annotations

import importlib.util
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if importlib.util.find_spec("transformers") is None:
    # `make test` runs without the engines; `make test-families` finds no test at all and fails if they are lost.
    collect_ignore_glob = ["test_families.py"]

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "families"
RESULTS = CACHE / "results.jsonl"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the size of the run."""
    parser.addoption("--zoo", default="all", choices=("all", "ci"), help="every family, or one of each kind")
    parser.addoption("--engine", default="all", choices=("all", "transformers", "vllm"), help="engine to ask")


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], dict[str, Any]]:
    """``zoo(name)``: the record of a specimen, built if it is missing; its folder is under ``folder``."""
    from tests.families import zoo as builder

    known = {specimen.name: specimen for specimen in builder.specimens()}

    def specimen(name: str) -> dict[str, Any]:
        record = CACHE / "zoo" / f"{name}.specimen.json"
        if not record.exists():
            builder.build_all(CACHE / "zoo", [known[name]], again=False)
        found: dict[str, Any] = json.loads(record.read_text())
        return found | {"folder": CACHE / "zoo" / name}

    return specimen


@pytest.fixture(scope="session")
def _results() -> Path:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("")
    return RESULTS


@pytest.fixture
def record(_results: Path) -> Callable[..., None]:
    """``record(**line)``: one line about a family, a layout and an engine."""
    import torch
    import transformers

    versions = {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }

    def append(**line: Any) -> None:
        with _results.open("a") as file:
            file.write(json.dumps({**line, **versions}) + "\n")

    return append
