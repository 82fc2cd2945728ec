"""Times of imports: nothing heavy is imported before it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import nemotron_fp8

if TYPE_CHECKING:
    from pathlib import Path

HEAVY = ("torch", "triton", "pydantic", "safetensors", "huggingface_hub", "numpy", "transformers")


def imported_by(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a new interpreter has loaded after running some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


HELP = """
import sys
from nemotron_fp8.cli.main import main
sys.argv = ["nemotron-fp8", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("import nemotron_fp8", ()),
        ("import nemotron_fp8; dir(nemotron_fp8); nemotron_fp8.__version__; nemotron_fp8.NemotronFp8Error", ()),
        (HELP, ("--help",)),
        (HELP, ("verify", "-h")),
        (HELP, ("--version",)),
    ],
)
def test_import_and_help_load_nothing_heavy(code: str, arguments: tuple[str, ...]) -> None:
    assert not imported_by(code, *arguments) & set(HEAVY)


def test_help_of_the_recipe_options_loads_the_recipe_alone() -> None:
    """The options are the fields of `Recipe`, a pydantic model."""
    assert imported_by(HELP, "quantize", "--help") & set(HEAVY) <= {"pydantic"}


def test_plans_and_headers_need_no_torch(checkpoint: Path) -> None:
    """The plan is pure data: it is made, and a folder inspected, before torch is loaded."""
    code = """
import sys, pathlib
from nemotron_fp8.documents.render import planned_sizes
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.planning.recipe import Recipe
from nemotron_fp8.sources.folder import inspect_path, read_folder
planned_sizes(make_plan(read_folder(pathlib.Path(sys.argv[1])), Recipe(), 1 << 28, 2))
inspect_path(sys.argv[1])
"""
    assert not imported_by(code, str(checkpoint)) & {"torch", "triton", "numpy"}


CLASH = """
import os, sys
standard_output = os.dup(1)  # an error is the last word of the command, which closes it
from nemotron_fp8.cli.main import main
sys.argv = ["nemotron-fp8", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert stop.code == 1
os.dup2(standard_output, 1)
"""


@pytest.mark.parametrize("words", [[], ["--format", "fp8", "--granularity", "channel"], ["--max-memory", "much"]])
def test_a_mistake_is_reported_before_torch_is_loaded(checkpoint: Path, tmp_path: Path, words: list[str]) -> None:
    """A destination with other files, a recipe that no engine loads, a malformed number."""
    target = tmp_path / "full"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert "torch" not in imported_by(CLASH, "quantize", str(checkpoint), str(target), *words)
    if not words:
        assert "torch" not in imported_by(CLASH, "dequantize", str(checkpoint), str(target))
        assert "torch" not in imported_by(CLASH, "convert", str(checkpoint), str(target))


def test_the_cpu_path_loads_no_triton(checkpoint: Path, destination: Path) -> None:
    code = """
import sys
from nemotron_fp8 import quantize_repo, verify_repo
quantize_repo(*sys.argv[1:], device="cpu")
assert verify_repo(*sys.argv[1:]).ok
"""
    found = imported_by(code, str(checkpoint), str(destination))
    assert "torch" in found
    assert "triton" not in found


def test_python_says_nothing_without_numpy(checkpoint: Path, destination: Path) -> None:
    """The library needs no NumPy; torch, imported by it, would warn about its absence."""
    code = """
import sys
sys.modules["numpy"] = None  # as if it were not installed
import nemotron_fp8
nemotron_fp8.quantize_repo(*sys.argv[1:], device="cpu")
assert nemotron_fp8.verify_repo(*sys.argv[1:]).ok
assert "torch" in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(destination)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_public_names() -> None:
    """The promised names are listed, and every listed name is available."""
    promised = {"quantize_repo", "plan_repo", "verify_repo", "Recipe", "NemotronFp8Error"}
    assert promised <= set(nemotron_fp8.__all__)
    for name in nemotron_fp8.__all__:
        assert getattr(nemotron_fp8, name) is not None
        assert name in dir(nemotron_fp8)
    with pytest.raises(AttributeError, match="no_such_name"):
        nemotron_fp8.no_such_name  # noqa: B018  # the access is the test
