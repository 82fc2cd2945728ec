"""The page and the text about an evaluation: self-contained, escaped, in 80 columns, and part of a report."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import quantize_repo
from nemotron_fp8.cli.output import write_page
from nemotron_fp8.cli.show_evaluation import COLUMNS, show_evaluation
from nemotron_fp8.errors import AmbiguousResultError, EvaluationFileError, OtherResultError, SourceReadError, WriteError
from nemotron_fp8.evaluation.result import Evaluation, parse_evaluation
from nemotron_fp8.report.evaluation_page import render_evaluation
from nemotron_fp8.report.series import LEAST_HIGH, MOST_POINTS, round_ticks, thinned, whole_ticks
from nemotron_fp8.report.svg import WIDTH, Line, line_plot
from tests.report.test_report import Page, checkpoint_of, run
from tests.support.evaluations import CLIPPED, evaluation_of, evaluations, figures_of, write_figures

THREE = evaluation_of(
    figures_of("out/tensor", 0.0174),
    figures_of("out/channel", 0.0176),
    figures_of("hf://me/SmolLM2-135M-FP8-W8A8-static-with-a-long-name@main", 0.0346, notices=("no scale of k_proj",)),
)


# ---- ticks ----


@given(st.floats(-1, 1e30), st.integers(1, 12))
def test_ticks_cover_the_values_at_round_steps(high: float, room: int) -> None:
    ticks = round_ticks(high, room)
    assert 2 <= len(ticks) <= room + 1
    assert ticks[0] == 0
    assert ticks[-1] >= (high if high > LEAST_HIGH else 1.0) * (1 - 1e-9)
    assert float(f"{ticks[1]:.1e}"[:3]) in (1.0, 2.0, 5.0)


@given(st.integers(0, 1000), st.integers(0, 1 << 61), st.integers(1, 20))
def test_whole_ticks_are_within_their_room(first: int, more: int, room: int) -> None:
    ticks = whole_ticks(first, first + more, room)
    assert len(ticks) <= room + 1
    assert all(first <= tick <= first + more for tick in ticks)
    assert ticks == sorted(set(ticks))


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), max_size=3 * MOST_POINTS))
@settings(max_examples=20)
def test_a_long_line_keeps_its_peaks(points: list[tuple[float, float]]) -> None:
    found = thinned(points)
    assert len(found) <= MOST_POINTS
    assert not points or max(y for _, y in found) == max(y for _, y in points)
    assert len(points) > MOST_POINTS or found == points


@given(st.lists(st.lists(st.floats(-1e30, 1e30), max_size=9), min_size=1, max_size=9))
def test_every_point_is_inside_of_the_plot(values: list[list[float]]) -> None:
    lines = [Line(str(number), list(enumerate(each))) for number, each in enumerate(values)]
    drawn = line_plot(lines, (0, 8), "layer", "error", "Errors")
    height = float(re.findall(r'viewBox="0 0 360 (\d+)"', drawn)[0])
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', drawn):
        assert 0 <= float(x) <= WIDTH
        assert 0 <= float(y) <= height
    assert drawn.count("<polyline") == len(lines)


# ---- the page ----


def test_a_page_stands_alone() -> None:
    """The page loads nothing, fits a phone, and has all sections, the KL divergence first."""
    text = render_evaluation(THREE)
    page = Page(text)
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script|<link|<iframe", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in page.tags
    for words in (
        "Evaluation of tensor, channel, SmolLM2-135M-FP8-W8A8-static-with-a-long-name",
        "Relative error by layer",
        "Layers that add most to the error",
        "KL divergence by position",
        "KL divergence by sequence",
        "Sequences with the largest divergence",
        "no scale of k_proj",
        "16 of 220 sequences of 512 tokens, 8,176 predictions",
        "± is one standard error over 16 sequences",
        "tensor is not distinguishable from channel",
        "clearly worse than channel",
        "torch 2.13.0, transformers 5.24.0",
        THREE.sample.sha256,
    ):
        assert words in page.text
    assert sum(tag == "polyline" for tag, _ in page.tags) == 3 * len(THREE.results)
    tiles = page.text.index("KL divergence from the source")
    assert tiles < page.text.index("change of the perplexity") < page.text.index("positions with the same top token")
    worst = max(range(16), key=lambda at: sum(each.sequence_kl[at] for each in THREE.results))
    assert page.text.index(THREE.sample.excerpts[worst]) == min(
        page.text.index(each) for each in THREE.sample.excerpts if each in page.text
    )


@given(evaluations())
@settings(max_examples=25)
def test_any_evaluation_is_shown_and_never_interpreted(evaluation: Evaluation) -> None:
    """Tags are nested, texts of the file are texts, and no number is outside of its plot."""
    text = render_evaluation(evaluation)
    page = Page(text)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert not re.search(r"nan|inf\b", "".join(re.findall(r"<(?:polyline|circle|text|line)[^>]*>", text)))
    assert all(c.isprintable() or c == "\n" for c in page.text)


def test_a_sample_without_excerpts_and_one_sequence() -> None:
    one = evaluation_of(figures_of("a", 0.01, 1), sequences=1)
    page = Page(render_evaluation(replace(one, sample=replace(one.sample, excerpts=()))))
    assert "one sequence has no standard error" in page.text
    assert "too few sequences to judge: 1 sequence" in page.text
    assert "±" not in page.text


# ---- the text ----


def shown(capsys: pytest.CaptureFixture[str], evaluation: Evaluation, **options: Any) -> tuple[str, str]:
    show_evaluation(evaluation, **{"as_json": False, **options})
    found = capsys.readouterr()
    return found.out, found.err


@pytest.mark.parametrize(
    "names", [["a/b"], ["a/FP8", "b/FP8"], ["x" * 300, "y" * 300], ["a\x1b[2J/\u202eb", "c\nd"]], ids=str
)
def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str], names: list[str]) -> None:
    """Every row has the width of a terminal at most, and a label of its own, however long the names are."""
    results = [figures_of(name, 0.02 * (at + 1)) for at, name in enumerate(names)]
    out, _ = shown(capsys, evaluation_of(*results))
    table = out.split("\n\n")[1].splitlines()
    assert len(table) == 2 + len(names)
    assert all(len(line) <= COLUMNS and line.isprintable() for line in table)
    assert len({line[:20] for line in table}) == len(table)
    assert all(line.isprintable() for line in out.splitlines())


def test_the_text_has_figures_errors_and_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown(capsys, THREE)
    assert re.search(r"^channel +14\.\d+ +\+2\.\d+% \+-0\.\d+ +0\.0\d+ \+-0\.0\d+ +9\d\.\d+% \+-0\.\d+$", out, re.M)
    assert "clearly worse than" in out
    assert "relative error grows most in layers 24 (" in out
    assert "12:34 on cpu, 666.0 MiB of memory at peak" in out
    assert out.isascii()  # for terminals of any encoding
    assert err == "note: SmolLM2-135M-FP8-W8A8-static-with-a-long-name: no scale of k_proj\n"
    assert shown(capsys, THREE, quiet=True)[1] == ""


def test_clipped_values_are_shown_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = evaluation_of(figures_of("a", 0.02), figures_of("b", 0.03, **CLIPPED))
    out, _ = shown(capsys, evaluation)
    before, after = out.split("\nb: b\n")
    assert "beyond the range" not in before
    assert "  1,234 of 1,000,000 activations, keys and values beyond the range of a stored scale\n" in after
    most = "model.layers.3.mlp.down_proj (1,000 of 40,000), model.layers.0.self_attn (keys) (234 of 20,000)"
    assert f"  most of them in {most}\n" in after
    page = Page(render_evaluation(evaluation)).text
    for words in ("Clipped values", "1,234 of 1,000,000", "model.layers.3.mlp.down_proj", "40,000"):
        assert words in page
    assert "Clipped values" not in Page(render_evaluation(THREE)).text


@given(evaluations())
@settings(max_examples=25)
def test_any_evaluation_is_printed(evaluation: Evaluation) -> None:
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("nemotron_fp8.cli.output.put", lambda line="": lines.append(line))
        patch.setattr("nemotron_fp8.cli.show_evaluation.put", lambda line="": lines.append(line))
        patch.setattr("nemotron_fp8.cli.output.write_error", lambda text: None)
        show_evaluation(evaluation, as_json=False)
    assert lines
    assert all(line.isprintable() for line in lines)


def test_json_is_the_file_and_the_page_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "e.html"
    for quiet in (False, True):
        out, err = shown(capsys, THREE, as_json=True, html=str(path), quiet=quiet)
        assert parse_evaluation(out.encode(), "out") == THREE
        assert path.read_text(encoding="utf-8") == render_evaluation(THREE)
        assert err.endswith("" if quiet else f"note: {path} written\n")
        assert not (quiet and err)
    with pytest.raises(WriteError, match="no"):
        show_evaluation(THREE, as_json=False, html=str(tmp_path / "no" / "e.html"))


def test_figures_are_printed_before_a_page_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(WriteError):
        show_evaluation(THREE, as_json=True, html=str(tmp_path / "no" / "e.html"))
    assert parse_evaluation(capsys.readouterr().out.encode(), "out") == THREE


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, link = tmp_path / "e.html", tmp_path / "link.html"
    write_page(str(page), "old")
    link.symlink_to(page)
    write_page(str(link), "new")
    assert link.is_symlink()
    assert page.read_text() == "new"

    def cut(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(WriteError, match="No space left"):
        write_page(str(page), "newer")
    assert page.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == [page, link]


# ---- in a report ----


@pytest.fixture(scope="module")
def tensor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    quantize_repo(checkpoint_of(root / "s", 128, 128), root / "tensor")
    return root / "tensor"


def test_a_report_has_the_figures_of_its_result(tensor: Path, tmp_path: Path) -> None:
    """As text, as JSON and on the page, those of this result alone."""
    file = write_figures(THREE, tmp_path / "f.json")
    done = run("report", tensor, "--evaluation", file, "--html", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    assert "FP8 tensors" in done.stdout
    assert "tensor: the perplexity is clearly higher than that of the source" in done.stdout
    assert "channel" not in done.stdout.partition("perplexity")[2].replace("each output row", "")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    for words in ("Report on tensor", "Predictions against the source", "Relative error by layer", "Sizes"):
        assert words in page.text
    assert "out/channel" not in page.text
    value = json.loads(run("report", tensor, "--evaluation", file, "--json").stdout)
    assert value["tensors_quantized"] == 6
    found = parse_evaluation(json.dumps(value["evaluation"]).encode(), "f")
    assert found == replace(THREE, results=THREE.results[:1])
    assert "evaluation" not in json.loads(run("report", tensor, "--json").stdout)
    other = run("report", tensor, "--evaluation", file, "--result", "channel", "--json")
    assert json.loads(other.stdout)["evaluation"]["results"][0]["name"] == "out/channel"


def test_a_file_about_other_results_is_an_error_before_any_work(tensor: Path, tmp_path: Path) -> None:
    def error_of(*words: object) -> BaseException | None:
        return run("report", *words, "--html", tmp_path / "r.html").exception

    others = write_figures(evaluation_of(figures_of("x/a", 0.1), figures_of("y/a", 0.2)), tmp_path / "f.json")
    found = error_of(tensor, "--evaluation", others)
    assert isinstance(found, OtherResultError)
    assert found.names == ("x/a", "y/a")
    assert isinstance(error_of(tensor, "--evaluation", others, "--result", "a"), AmbiguousResultError)
    assert isinstance(error_of(tensor, "--evaluation", tmp_path / "missing"), SourceReadError)
    (tmp_path / "bad.json").write_text("{}")
    assert isinstance(error_of(tensor, "--evaluation", tmp_path / "bad.json"), EvaluationFileError)
    assert run("report", tensor, "--result", "a").exit_code == 2
    assert not (tmp_path / "r.html").exists()
