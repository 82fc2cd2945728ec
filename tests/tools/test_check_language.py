"""The language check notices what it forbids, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tools.check_language import check, problems_in

if TYPE_CHECKING:
    from pathlib import Path

BRITISH = [
    "quantised",
    "dequantisation",
    "Normaliser",
    "serialising",
    "recognise",
    "organisation",
    "summarises",
    "optimised",
    "initialise_state",
    "DequantisingKernel",
    "tensors_quantised",
    "behaviour",
    "colours",
    "honoured",
    "favourite",
    "neighbours",
    "centre",
    "metres",
    "licence",
    "defence",
    "catalogue",
    "artefacts",
    "journalled",
    "unlabelled",
    "modelling",
    "cancelled",
    "analyse",
    "grey",
    "whilst",
    "spoilt",
]
AMERICAN = [
    "quantized, normalizer, behavior, color, center, parameter, kilometer, license, catalog, artifact, labeled",
    "analysis, analyses, hypotheses, emphasis, realistic, optimistic, minimal, promise, otherwise, raise, precise",
    "controlled, excelled, propelled, compelled, installed, programmer, programmed, four, hours, your, source, course",
    "future.cancelled(), asyncio.CancelledError",
]


@pytest.mark.parametrize("word", BRITISH)
def test_a_british_spelling_is_found(word: str) -> None:
    assert [line for line, _ in problems_in(f"x = 1\n# of the {word} kind\n", docstrings=False)] == [2]


@pytest.mark.parametrize("text", AMERICAN)
def test_american_and_other_words_pass(text: str) -> None:
    assert list(problems_in(text, docstrings=False)) == []


@pytest.mark.parametrize("word", ["What", "Whether", "How"])
@pytest.mark.parametrize(
    "code",
    [
        '"""{} it is."""\n',
        'class A:\n    """{} it is."""\n',
        'class A:\n    x = 1\n    """{} it is."""\n',
        'async def f() -> None:\n    """\n    {} it is.\n    """\n',
    ],
)
def test_a_docstring_that_begins_with_a_question_word_is_found(word: str, code: str) -> None:
    text = code.format(word)
    assert [problem for _, problem in problems_in(text, docstrings=True)] == [f"docstring begins with {word}"]
    assert list(problems_in(text, docstrings=False)) == []


def test_other_docstrings_pass() -> None:
    text = '"""Whatever, However and Howitzers."""\nx = "What"\ny = f(\n    "How"\n)\n'
    assert list(problems_in(text, docstrings=True)) == []


def test_every_kind_of_file_is_read_but_no_environment(tmp_path: Path) -> None:
    """Docstrings count in the folders of Python code alone; the spelling counts everywhere."""
    for name in (
        "nemotron_fp8/a.py",
        "tests/b.py",
        "other/b.py",
        ".venv/c.py",
        ".ci/run",
        "d.md",
        "e.toml",
        "f.sh",
        "g.yml",
        "h.bin",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""What colour?"""\n', encoding="utf-8")
    spelling = {f"{name}:1: British spelling: colour" for name in (".ci/run", "d.md", "e.toml", "f.sh", "g.yml")}
    python = {f"{name}:1: British spelling: colour" for name in ("nemotron_fp8/a.py", "tests/b.py", "other/b.py")}
    docstrings = {f"{name}:1: docstring begins with What" for name in ("nemotron_fp8/a.py", "tests/b.py")}
    assert set(check(tmp_path)) == {*spelling, *python, *docstrings}
