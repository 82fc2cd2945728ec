"""The pages as a browser shows them, on a phone and on a desk: the plots are there, nothing overflows."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import Recipe, compare_repos, inspect_repo, plan_repo, quantize_repo, report_repo, verify_repo
from nemotron_fp8.cli.demo import write_checkpoint as write_demo
from nemotron_fp8.report import read_summary, render_page
from nemotron_fp8.report.evaluation_page import EVALUATION_STYLE, evaluation_sections, render_evaluation
from tests.browser.chromium import MISSING, PATH, SCHEMES, Picture, measure, screenshot, value_of
from tests.support.checkpoints import ONE, weight, write_checkpoint
from tests.support.evaluations import evaluation_of, figures_of
from tests.support.recipes import PUBLISHED

if TYPE_CHECKING:
    from nemotron_fp8.report import ResultSummary

pytestmark = [pytest.mark.browser, pytest.mark.skipif(PATH is None, reason=MISSING)]
WIDTHS = [390, 1280]
SMOLLM2 = Path(".cache/engines/smollm2-135m-v1")
"""A real model, built by `make test-browser` and `make test-engines`."""
PICTURES = Path(".cache/browser")
"""Where the pictures stay, to be looked at."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ResultSummary]]:
    """Pages by name, each of one result or two."""
    root = tmp_path_factory.mktemp("results")
    write_demo(root / "nemotron-tiny")
    quantize_repo(root / "nemotron-tiny", root / "tensor", PUBLISHED.model_copy(update={"stats": True}))
    quantize_repo(
        root / "nemotron-tiny",
        root / "channel",
        Recipe(format="compressed-tensors", granularity="channel", stats=True),
    )
    # What a stranger may do to a page: one long word, many projections, experts, NaN.
    names = [f"model.layers.{i}.{'x' * 180}_proj.weight" for i in range(2)]
    names += [
        f"model.layers.{i}.mlp.experts.{e}.a{p}_proj.weight" for i in range(2) for e in range(2) for p in range(30)
    ]
    shard = {name: weight(16, 16, seed=i) for i, name in enumerate(names)}
    shard["model.layers.1.mlp.nan_proj.weight"] = weight(4, 4) * float("nan")
    write_checkpoint(root / "odd-source", {ONE: shard})
    odd = root / ("odd" * 60)
    quantize_repo(root / "odd-source", odd, Recipe(stats=True, nonfinite="keep"))
    pages = {
        "one": [read_summary(root / "tensor")],
        "two": [read_summary(root / "tensor"), read_summary(root / "channel")],
        "odd": [read_summary(odd)],
    }
    if SMOLLM2.is_dir():
        quantize_repo(SMOLLM2, root / "SmolLM2-FP8", Recipe(stats=True))
        pages["SmolLM2"] = [read_summary(root / "SmolLM2-FP8")]
    return pages


@pytest.fixture(params=["one", "two", "odd", "SmolLM2"])
def page(request: pytest.FixtureRequest, results: dict[str, list[ResultSummary]], tmp_path: Path) -> Path:
    if request.param not in results:
        pytest.skip("SmolLM2 is built by `make test-browser`")
    path = tmp_path / "page.html"
    path.write_text(render_page(results[request.param]), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_plots_are_there(
    page: Path, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """No element reaches beyond the window; every plot has its size, and every cell its color on the screen."""
    found = measure(page, width, tmp_path)
    _check_layout(found, width)
    assert found["cells"]
    assert found["bars"]
    assert all(rect["width"] > 1 and rect["height"] > 1 for rect in found["cells"])
    picture = PICTURES / f"{request.node.callspec.params['page']}-{width}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    screenshot(page, width, int(found["height"]), picture, tmp_path)
    shown = Picture(picture)
    assert shown.height == found["height"]
    tallest = max(found["bars"], key=lambda rect: rect["height"])
    for rect in (*found["cells"], tallest, found["fp8"][0]):
        wanted = tuple(map(int, re.findall(r"\d+", rect["fill"])[:3]))
        x, y = rect["x"] + rect["width"] / 2, rect["y"] + rect["height"] / 2
        assert all(abs(a - b) <= 2 for a, b in zip(shown.pixel(x, y), wanted, strict=True)), (rect, shown.pixel(x, y))


ODD = "<b>odd</b>" * 20
EVALUATIONS = {
    "evaluation": render_evaluation(evaluation_of()),
    "evaluations": render_evaluation(
        evaluation_of(
            figures_of("out/tensor", 0.0174),
            figures_of("out/channel", 0.0176),
            figures_of("hf://me/SmolLM2-135M-FP8-W8A8-static-with-a-long-name@main", 0.0346, notices=("a note",)),
        )
    ),
    "odd-evaluation": render_evaluation(
        evaluation_of(
            *(figures_of(f"{ODD}{i}", 10.0 ** (i - 7), 2, 600, notices=("x" * 300,)) for i in range(8)),
            sequences=2,
            layers=600,
            device="d" * 300,
        )
    ),
    "one-layer": render_evaluation(evaluation_of(figures_of("", 9.0, 1, 1), sequences=1, layers=1)),
}
"""Pages about evaluations, by name."""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [*EVALUATIONS, "report"])
def test_pages_about_evaluations(
    name: str, width: int, tmp_path: Path, results: dict[str, list[ResultSummary]]
) -> None:
    """Lines and dots have their colors on the screen, in light and in dark, and nothing overflows."""
    page = tmp_path / "page.html"
    sections = evaluation_sections(evaluation_of())
    text = EVALUATIONS.get(name) or render_page(results["one"], sections, EVALUATION_STYLE)
    page.write_text(text, encoding="utf-8")
    found = measure(page, width, tmp_path)
    _check_layout(found, width)
    assert found["dots"]
    for scheme in SCHEMES:
        picture = PICTURES / f"{name}-{width}-{scheme}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        screenshot(page, width, int(found["height"]), picture, tmp_path, scheme)
        shown, paper = Picture(picture), PAPER[scheme]
        assert _near(shown.pixel(2, 2), paper)
        dot = found["dots"][0]
        drawn = shown.pixel(dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2)
        assert _contrast(drawn, paper) > 3, "a line is hard to see"  # WCAG 2.2, 1.4.11


PAPER = {"light": (255, 255, 255), "dark": (22, 23, 26)}
"""Color of the page, by scheme."""


OPENED = "<script>for (const each of document.querySelectorAll('details')) each.open = true;</script>"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "two", "odd"])
def test_the_table_of_every_tensor_fits(
    name: str, width: int, tmp_path: Path, results: dict[str, list[ResultSummary]]
) -> None:
    """Unfolded too, no element reaches beyond the window."""
    page = tmp_path / "page.html"
    page.write_text(render_page(results[name]) + OPENED, encoding="utf-8")
    found = measure(page, width, tmp_path)
    _check_layout(found, width)
    for scheme in SCHEMES:
        picture = PICTURES / f"{name}-opened-{width}-{scheme}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        screenshot(page, width, int(found["height"]), picture, tmp_path, scheme)


CLICKS = """(() => {
  const table = document.querySelector("table.all"), found = [];
  for (const column of [0, 3, 3, 4]) {
    table.tHead.rows[0].cells[column].querySelector("button").click();
    found.push([...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent)));
  }
  return [found, [...table.tHead.rows[0].cells].map(cell => cell.getAttribute("aria-sort"))];
})()"""
"""Sort by name, by bytes, by bytes again, and by SQNR."""


def test_a_click_sorts_every_tensor(tmp_path: Path, results: dict[str, list[ResultSummary]]) -> None:
    """Numbers as numbers, in both directions; tensors without an error come last."""
    (result,) = results["one"]
    page = tmp_path / "page.html"
    page.write_text(render_page([result]), encoding="utf-8")
    (by_name, up, down, by_error), titles = value_of(page, CLICKS, tmp_path)
    assert result.contents is not None
    assert result.figures is not None
    names = {t.name for t in result.contents.tensors}
    for rows in (by_name, up, down, by_error):
        assert {row[0] for row in rows} == names
    layers = [int(found.group(1)) for row in by_name if (found := re.search(r"layers\.(\d+)", row[0]))]
    assert layers == sorted(layers)
    assert [row[0].partition(".")[0] for row in by_name] == ["lm_head", *["model"] * (len(names) - 1)]
    sizes = [int(row[3].replace(",", "")) for row in up]
    assert sizes == sorted(sizes)
    assert [int(row[3].replace(",", "")) for row in down] == sizes[::-1]
    errors = [row[4] for row in by_error]
    count = len(result.figures.tensors)
    assert [float(each) for each in errors[:count]] == sorted(round(t.sqnr_db, 2) for t in result.figures.tensors)
    assert set(errors[count:]) == {""}
    assert titles == [None, None, None, None, "ascending", None, None, None]


THEMES = {"light": ("#ffffff", "#1b1b1f"), "dark": ("#16171a", "#e8e8ea")}
"""Background and color of text of a notebook, by scheme."""
NOTEBOOK = """<!doctype html><meta name="viewport" content="width=device-width,initial-scale=1"><style>
body{{margin:1rem;background:{light[0]};color:{light[1]};font:13px/1.4 system-ui,sans-serif}}
@media (prefers-color-scheme:dark){{body{{background:{dark[0]};color:{dark[1]}}}}}
td,th{{text-align:right}}tbody tr:nth-child(even){{background:rgba(128,128,128,.08)}}
</style>"""
"""A notebook's page, whose own style of tables must not matter."""


@pytest.mark.parametrize("width", WIDTHS)
def test_a_notebook_with_every_object(width: int, tmp_path: Path) -> None:
    """Tables fit, and lines and text are visible in both themes."""
    source = tmp_path / "nemotron-tiny"
    write_demo(source)
    reports = [
        quantize_repo(source, tmp_path / name, Recipe(granularity=name, stats=True)) for name in ("channel", "tensor")
    ]
    objects = [
        inspect_repo(source),
        plan_repo(source),
        reports[0],
        verify_repo(source, tmp_path / "channel"),
        verify_repo(source, source),
        report_repo(tmp_path / "channel"),
        compare_repos(tmp_path / "channel", tmp_path / "tensor"),
        evaluation_of(figures_of("out/channel", 0.0174), figures_of("out/tensor", 0.0301)),
    ]
    page = tmp_path / "notebook.html"
    cells = "".join(each._repr_html_() for each in objects)  # type: ignore[attr-defined]  # notebooks call it
    page.write_text(NOTEBOOK.format(**THEMES) + cells + OPENED, encoding="utf-8")
    found = measure(page, width, tmp_path)
    assert found["scroll"] <= found["client"]
    assert found["over"] == []
    for scheme in SCHEMES:
        picture = PICTURES / f"notebook-{width}-{scheme}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        screenshot(page, width, int(found["height"]), picture, tmp_path, scheme)
        assert _near(Picture(picture).pixel(2, 2), PAPER[scheme])


def _near(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return all(abs(a - b) <= 2 for a, b in zip(one, other, strict=True))


def _contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """Return the contrast of two colors. Source: WCAG 2.2, contrast ratio."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: tuple[int, int, int]) -> float:
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def _check_layout(found: dict[str, Any], width: int) -> None:
    """Check that no element reaches beyond the window, and that the labels of plots are apart and inside."""
    assert found["width"] == width
    assert found["scroll"] <= found["client"]
    assert found["over"] == []
    assert len(found["svgs"]) >= 3
    assert all(svg["width"] > 250 and svg["height"] > 40 for svg in found["svgs"])
    for svg, texts in zip(found["svgs"], found["texts"], strict=True):
        assert texts
        assert [text for text in texts if not _inside(text, svg)] == []
        assert [(a["text"], b["text"]) for a, b in combinations(texts, 2) if _overlap(a, b)] == []


def _inside(text: dict[str, Any], svg: dict[str, Any]) -> bool:
    across = svg["x"] - 1 <= text["x"] and text["x"] + text["width"] <= svg["x"] + svg["width"] + 1
    return bool(across and svg["y"] - 3 <= text["y"] and text["y"] + text["height"] <= svg["y"] + svg["height"] + 3)


def _overlap(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return True if two labels overlap. Lines of text may touch by their empty margins."""
    across = min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"])
    down = min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"])
    return bool(across > 0.2 * min(a["width"], b["width"]) and down > 0.35 * min(a["height"], b["height"]))
