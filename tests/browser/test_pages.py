"""The pages as a browser shows them, on a phone and on a desk: the plots are there, nothing overflows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.demo import write_checkpoint as write_demo
from nemotron_fp8.report import read_result, render_page
from tests.browser.chromium import MISSING, PATH, Picture, measure, screenshot
from tests.checkpoints import ONE, weight, write_checkpoint

if TYPE_CHECKING:
    from nemotron_fp8.report import Result

pytestmark = [pytest.mark.browser, pytest.mark.skipif(PATH is None, reason=MISSING)]
WIDTHS = [390, 1280]
SMOLLM2 = Path(".cache/engines/smollm2-135m-v1")
"""What `make test-engines` has built; a real model's page is looked at where it is there."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Pages by name, each of one result or two."""
    root = tmp_path_factory.mktemp("results")
    write_demo(root / "nemotron-tiny")
    quantize_repo(root / "nemotron-tiny", root / "tensor", Recipe(stats=True))
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
        "one": [read_result(root / "tensor")],
        "two": [read_result(root / "tensor"), read_result(root / "channel")],
        "odd": [read_result(odd)],
    }
    if SMOLLM2.is_dir():
        quantize_repo(SMOLLM2, root / "SmolLM2-FP8", Recipe(stats=True))
        pages["SmolLM2"] = [read_result(root / "SmolLM2-FP8")]
    return pages


@pytest.fixture(params=["one", "two", "odd", "SmolLM2"])
def page(request: pytest.FixtureRequest, results: dict[str, list[Result]], tmp_path: Path) -> Path:
    if request.param not in results:
        pytest.skip("SmolLM2 is built by `make test-engines`")
    path = tmp_path / "page.html"
    path.write_text(render_page(results[request.param]), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_plots_are_there(page: Path, width: int, tmp_path: Path) -> None:
    """No element reaches beyond the window; every plot has its size, and every cell its colour on the screen."""
    found = measure(page, width, tmp_path)
    assert found["width"] == width
    assert found["scroll"] <= found["client"]
    assert found["over"] == []
    assert len(found["svgs"]) >= 3
    assert all(svg["width"] > 250 and svg["height"] > 40 for svg in found["svgs"])
    assert found["cells"]
    assert found["bars"]
    assert all(rect["width"] > 1 and rect["height"] > 1 for rect in found["cells"] + found["bars"])
    picture = tmp_path / "page.png"
    screenshot(page, width, int(found["height"]), picture, tmp_path)
    shown = Picture(picture)
    assert shown.height == found["height"]
    for rect in (*found["cells"], found["bars"][0], found["fp8"][0]):
        wanted = tuple(map(int, re.findall(r"\d+", rect["fill"])[:3]))
        x, y = rect["x"] + rect["width"] / 2, rect["y"] + rect["height"] / 2
        assert all(abs(a - b) <= 2 for a, b in zip(shown.pixel(x, y), wanted, strict=True)), (rect, shown.pixel(x, y))
