"""Every family that transformers knows, quantized and judged in transformers and in vLLM's loader.

A result is right, or the plan told that the engine does not read it, or the engine cannot be judged, because it does
not load the source either; then the reason is recorded. Anything else is a fault: an engine that silently computes
something else, and one that raises on a result which the plan calls readable.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from nemotron_fp8.errors import NothingSelectedError, RecipeError
from tests.families import in_transformers, in_vllm
from tests.families.conftest import RESULTS
from tests.families.forks import forked
from tests.families.zoo import specimens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.families

SECONDS = 120
ENGINES = {"transformers": "transformers", "vllm": "vLLM"}
LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "transformers": (
        ("compressed-tensors", "channel"),
        ("fp8", "block"),
        ("compressed-tensors", "tensor"),
        ("compressed-tensors", "block"),
    ),
    "vllm": (
        ("compressed-tensors", "channel"),
        ("fp8", "tensor"),
        ("fp8", "block"),
        ("compressed-tensors", "tensor"),
        ("compressed-tensors", "block"),
    ),
}
SHARE = (
    # Dense, experts of each naming, stacks, hybrid, MLA, prefixes that an engine changes, a tied head, Conv1D.
    *("llama", "nemotron_h", "mixtral", "phimoe", "granitemoe", "qwen3_vl_moe-published"),
    *("llama4", "jamba", "deepseek_v3", "qwen2_5_vl", "llava-published", "whisper", "gpt2", "falcon"),
)
LEAST = {"transformers": 60, "vllm": 45}
"""Families that must be right in the default layout, of the whole zoo."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a case of every engine, layout and family that the options name."""
    if "case" not in metafunc.fixturenames:
        return
    share, engine = metafunc.config.getoption("--zoo"), metafunc.config.getoption("--engine")
    names = SHARE if share == "ci" else tuple(specimen.name for specimen in specimens())
    engines = LAYOUTS if engine == "all" else {engine: LAYOUTS[engine]}
    rare = ("compressed-tensors", "tensor"), ("compressed-tensors", "block")
    cases = [
        (each, *layout, name)
        for each, layouts in engines.items()
        for layout in layouts
        for name in names
        if share != "ci" or layout not in rare
    ]
    metafunc.parametrize("case", cases, ids=["-".join(case) for case in cases])


def judge(engine: str, source: Path, result: Path) -> dict[str, Any]:
    """Ask an engine about a result; each answer comes from a process of its own."""
    if engine == "vllm":  # its host forks by itself
        return in_vllm.check(source, result)
    answer = forked(partial(in_transformers.check, source, result), SECONDS)
    return {"verdict": "crashed", "detail": answer["raised"]} if "raised" in answer else answer


def test_a_family_is_right_or_the_plan_says_so(
    case: tuple[str, str, str, str],
    zoo: Callable[[str], dict[str, Any]],
    record: Callable[..., None],
    tmp_path: Path,
) -> None:
    engine, form, granularity, name = case
    specimen = zoo(name)
    line: dict[str, Any] = {"engine": engine, "format": form, "granularity": granularity, "family": name}
    line |= {"model_type": specimen["model_type"], "class": specimen["class_name"]}
    if not specimen["ok"]:
        record(**line, verdict="not built", detail=specimen["reason"])
        pytest.skip(f"not built: {specimen['reason'][:200]}")
    result = tmp_path / name
    try:
        report = quantize_repo(specimen["folder"], result, Recipe(format=form, granularity=granularity), "cpu")
    except (NothingSelectedError, RecipeError) as refusal:
        record(**line, verdict="refused by the plan", detail=str(refusal).replace(str(specimen["folder"]), name))
        return
    assert verify_repo(specimen["folder"], result).ok
    assert report.share is not None
    told = {each.engine: each for each in report.engines}[ENGINES[engine]]
    answer = judge(engine, specimen["folder"], result)
    shutil.rmtree(result)
    detail = answer["detail"] if isinstance(answer["detail"], str) else "; ".join(map(str, answer["detail"]))
    left = [[left.reason, left.bytes, list(left.names)] for left in report.share.left]
    line |= {"share": report.share.share, "left": left, "version": answer.get("version", "")}
    verdict = "told" if not told.reads and answer["verdict"] != "source" else answer["verdict"]
    detail = detail.replace(str(specimen["folder"]), name).replace(str(tmp_path), "")
    record(**line, verdict=verdict, detail=told.note if verdict == "told" else detail)
    if verdict == "source":
        pytest.skip(f"{engine} does not load the source: {detail[:200]}")
    if verdict == "told":
        assert answer["verdict"] != "right", f"{told.engine} reads the result, but the plan says: {told.note}"
    else:
        assert verdict == "right", detail


def test_enough_families_are_right(request: pytest.FixtureRequest) -> None:
    """Counted in the default layout, over the whole zoo, from the lines of this run."""
    if request.config.getoption("--zoo") != "all":
        pytest.skip("a share of the zoo has fewer families")
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    right = Counter(line["engine"] for line in lines if line["verdict"] == "right" and line["granularity"] == "channel")
    asked = {line["engine"] for line in lines}
    assert asked
    assert all(right[engine] >= LEAST[engine] for engine in asked), right
