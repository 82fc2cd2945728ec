"""Public objects: short in a prompt, a table in a notebook, and the same after pickling."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
import re
from typing import TYPE_CHECKING, Any

import pytest

import nemotron_fp8
from nemotron_fp8 import (
    HubOptions,
    NemotronFp8Error,
    Progress,
    Recipe,
    compare_repos,
    inspect_repo,
    plan_repo,
    quantize_repo,
    report_repo,
    status_of,
    verify_repo,
)
from nemotron_fp8._display import LONGEST_CELL, MOST_ROWS, cut
from nemotron_fp8.calibration.calibrate import Calibration
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.planning.receipt import NonFinite
from nemotron_fp8.progress import ShardProgress, Transfer
from nemotron_fp8.verification.problems import Problem
from tests.support.amaxes import amaxes_of
from tests.support.checkpoints import ONE, model, weight, write_checkpoint
from tests.support.evaluations import evaluation_of, figures_of
from tests.support.html_page import Page

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "<script>alert('1')</script>\x1b[2J\u202e"
"""Start of a name that a stranger may choose."""
GROWING = {
    "Plan": ("tensors", "notices"),
    "Report": ("nonfinite", "notices", "left_out"),
    "Verification": ("problems", "tensors"),
    "Evaluation": ("results",),
    "Inspection": ("files", "tensors"),
    "Status": ("active", "notices"),
}
"""Attributes whose length depends on the checkpoint, by class."""
FOLDED = {"Report", "Evaluation", "Inspection", "Status"}
"""Classes with lists of tensors, files or results; plans show counts by reason."""


def say(reason: str, seconds: float) -> None:
    """Do nothing with a retry."""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One object of each public class, from a checkpoint with hostile names, by the name of its class."""
    root = tmp_path_factory.mktemp("objects")
    shards = model()
    first = next(iter(shards.values()))
    first[f"model.layers.0.{HOSTILE}{'x' * 400}_proj.weight"] = weight(16, 16)
    bad = weight(16, 16)
    bad[0, 0] = math.inf
    first["model.layers.0.mlp.spoiled.up_proj.weight"] = bad
    source = write_checkpoint(root / HOSTILE.replace("/", "|"), shards)
    recipe = Recipe(stats=True, nonfinite="keep")
    found = root / "out"
    report = quantize_repo(source, found, recipe)
    quantize_repo(source, root / "other", Recipe(granularity="tensor", nonfinite="keep"))
    results = report_repo(found, source)
    amaxes = amaxes_of(source)
    evaluation = evaluation_of(figures_of(f"{HOSTILE}/out", 0.02), figures_of("b", 0.03))
    one_of_each = [
        plan_repo(source, recipe),
        report,
        verify_repo(source, found),
        inspect_repo(source),
        results,
        results.summary,
        compare_repos(found, root / "other", source),
        dataclasses.replace(status_of(found), error=HOSTILE * 99, active=(HOSTILE,) * 99),
        evaluation,
        evaluation.source,
        evaluation.sample,
        amaxes,
        Calibration(amaxes, 8, 1, ("a notice",), "cpu", 1.5, 1 << 20),
        recipe,
        HubOptions(revision="main", on_wait=say),
        Progress(1, 2, "s", (ShardProgress("s", 1, 2),), transfers=(Transfer("upload", "f", None, 3),)),
        RecipeError("a problem", ("recipe",)),
    ]
    return {type(each).__name__: each for each in one_of_each}


NAMES = [
    *(
        kind.__name__
        for name in nemotron_fp8.__all__
        if inspect.isclass(kind := getattr(nemotron_fp8, name)) and kind is not NemotronFp8Error
    ),
    *("Calibration", "CheckpointFigures", "RecipeError", "Sample"),
]
every_class = pytest.mark.parametrize("name", sorted(set(NAMES)))
SHOWN = sorted(
    set(NAMES) - {"CheckpointFigures", "HubOptions", "Progress", "Recipe", "RecipeError", "ResultSummary", "Sample"}
)
"""Classes that notebooks show as a table."""
TAGS = {"b", "code", "details", "div", "summary", "table", "tbody", "td", "th", "thead", "tr"}


@every_class
def test_every_public_object_is_the_same_after_pickling(objects: dict[str, Any], name: str) -> None:
    value = objects[name]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(value, protocol))
        assert type(copy) is type(value)
        assert repr(copy) == repr(value)
        if isinstance(value, NemotronFp8Error):
            assert (copy.args, vars(copy)) == (value.args, vars(value))
        else:
            assert copy == value
            assert copy != "another object"


@every_class
def test_a_repr_is_one_short_printable_line(objects: dict[str, Any], name: str) -> None:
    text = repr(objects[name])
    assert text.isprintable()
    assert len(text) < 700, text


@pytest.mark.parametrize("name", GROWING)
def test_a_repr_does_not_grow_with_the_checkpoint(objects: dict[str, Any], name: str) -> None:
    """A thousand times the tensors add digits alone; a notebook shows the first rows and the number of the others."""
    value = objects[name]
    lists = {each: getattr(value, each) for each in GROWING[name]}
    assert any(lists.values())
    small, large = (
        dataclasses.replace(value, **{each: tuple(list(found) * count) for each, found in lists.items()})
        for count in (3, 3000)
    )
    assert abs(len(repr(large)) - len(repr(small))) < 60
    page = large._repr_html_()
    assert len(page) < 4 * 6 * MOST_ROWS * (LONGEST_CELL + 500)
    assert bool(re.search(r"and [\d,]+ more", page)) == (name in FOLDED)


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_shows_a_table_in_the_colors_of_its_theme(objects: dict[str, Any], name: str) -> None:
    """Nothing is loaded or run, names are text, and no color is set except that of translucent lines."""
    text = objects[name]._repr_html_()
    page = Page(text)
    assert not re.search(r"https?:|src=|href=|url\(|@import|<(script|style|link|iframe|img|svg)|on\w+=", text)
    assert {tag for tag, _ in page.tags} <= TAGS
    styles = ";".join(attributes.get("style") or "" for _, attributes in page.tags)
    assert not re.search(r"(?<![-\w])(color|background)\s*:|#[0-9a-f]{3}|rgb\(", styles)
    assert page.text.replace("\n", "").isprintable()
    assert len(text) < 60_000


def test_what_a_notebook_shows(objects: dict[str, Any]) -> None:
    """The decision, its reasons, what was found, and what to do with it."""
    shown = {name: Page(objects[name]._repr_html_()).text for name in SHOWN}
    plan = objects["Plan"]
    assert f"{sum(t.quantize for t in plan.tensors)} tensors (compressed-tensors, channel" in shown["Plan"]
    assert all(cut(reason, LONGEST_CELL) in shown["Plan"] for reason in {t.reason for t in plan.tensors})
    assert "read by vLLM, SGLang, transformers" in shown["Plan"]
    assert "spoiled.up_proj.weight" in shown["Report"]
    assert "OK" in shown["Verification"]
    assert "compared code by code" in shown["Verification"]
    assert "BF16" in shown["Inspection"]
    assert "SQNR, median" in shown["ResultReport"]
    assert "is as expected of FP8" in shown["ResultReport"]
    assert "engines load the output layer unquantized" in shown["ResultReport"]
    assert "vllm serve PATH" in shown["ResultReport"]
    assert "SQNR, median" in shown["ResultComparison"]
    assert "complete" in shown["Status"]
    assert re.search(r"0\.0\d+ \u00b10\.0\d+", shown["Evaluation"])
    assert "8 experts, of which 1 saw no token" in shown["Calibration"]
    assert "words.txt" in shown["Amaxes"]


def test_reprs(objects: dict[str, Any]) -> None:
    """A prompt shows what the object is about and its figures."""
    assert re.fullmatch(
        r"<Plan of .*: 16 tensors to FP8, 5 unquantized, [\d.]+ KiB -> [\d.]+ KiB>", repr(objects["Plan"])
    )
    assert re.fullmatch(r"<Report of .*/out: \d+ quantized, \d+ copied, .* in [\d.]+ s>", repr(objects["Report"]))
    assert re.fullmatch(
        r"<Verification: OK, \d+ FP8 tensors compared code by code, \d+ others>", repr(objects["Verification"])
    )
    assert re.fullmatch(r"<Inspection of .*: 2 files, .*, 21 tensors, 21 BF16>", repr(objects["Inspection"]))
    assert re.fullmatch(
        r"<ResultReport of out: \d+ FP8 tensors, \d+ others, SQNR 3\d\.\d\d dB in the median>",
        repr(objects["ResultReport"]),
    )
    assert re.fullmatch(r"<Status of .*/out: complete, 2 of 2 done, .* KiB of .* KiB>", repr(objects["Status"]))
    assert "16 of 220 sequences of 512 tokens" in repr(objects["Evaluation"])
    assert "(KL 0.02" in repr(objects["Evaluation"])


def test_problems_come_first(objects: dict[str, Any]) -> None:
    """A result that is wrong looks wrong."""
    problems = (Problem("a.weight", "missing"), Problem(HOSTILE, "strange"))
    wrong = dataclasses.replace(objects["Verification"], problems=problems)
    assert repr(wrong).startswith("<Verification: 2 problems, the first a.weight: missing")
    page = Page(wrong._repr_html_())
    assert ("details", {"open": None, "style": "margin-top:.4em"}) in page.tags
    assert "OK" not in page.text
    unchanged = dataclasses.replace(objects["Report"], unchanged=True)
    assert repr(unchanged).endswith(": already up to date>")
    spoiled = NonFinite("b.weight", 3, (1, 2), "nan")
    assert "nan at [1, 2]" in dataclasses.replace(objects["Report"], nonfinite=(spoiled,))._repr_html_()


def test_a_plan_without_quantizing(tmp_path: Path) -> None:
    """The plan of another task names the task."""
    from nemotron_fp8.planning.convert import plan_convert
    from nemotron_fp8.sources.open import open_source

    source = write_checkpoint(tmp_path / "s", {ONE: {"a.weight": weight(4, 4)}})
    plan = plan_convert(open_source(source).inventory, 1 << 28, 1)
    assert "1 tensor, 32 B -> 32 B" in repr(plan)
    assert "become FP8" not in plan._repr_html_()
