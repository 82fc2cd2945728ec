"""Lines of a GPU run: what is accepted, shares of the roof, problems, and the page that they become."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.gpu import publish, summary
from benchmarks.gpu.lines import drifts, kind, parse, problems, read, with_shares
from benchmarks.tables import gpu
from tests.benchmarks.gpu_lines import figure, roofs, whole_run

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "results.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[1]", "{}", '{"case": 5}', '{"operation": "a"}', '{"error": null}', "[" * 100_000, "1" * 5000],
)
def test_what_is_no_line_is_not_accepted(text: str) -> None:
    assert parse(text) is None


def test_kinds() -> None:
    assert kind(figure("kernels", "ours", "a", 100, "channel", 3, 1e12)) == "figure"
    assert kind(figure("kernels", "ours", "a", 100, "channel", 3, 1e12) | {"seconds": True}) is None
    assert kind({"error": "x", "step": "y"}) == "error"
    assert kind({"case": "exit", "code": 0}) == "event"
    assert all(kind(line) for line in whole_run())


def test_a_share_is_of_the_best_roof_before_and_after() -> None:
    lines = roofs("kernels", "a", 1000, 2e12)
    lines.append(figure("kernels", "ours", "a", 1000, "channel", 3, 1.5e12))
    lines += [*roofs("kernels", "a", 1000, 3e12), *roofs("peers", "a", 1000, 9e12), *roofs("kernels", "b", 1, 9e12)]
    found = [line["share_of_roof"] for line in with_shares(lines) if "share_of_roof" in line]
    assert found == [pytest.approx(0.5)]
    assert drifts(lines) == {(None, "kernels", "a", "bfloat16"): pytest.approx(0.5)}


def test_a_complete_run_has_no_problems() -> None:
    lines = whole_run()
    assert problems(lines, sorted({line["stage"] for line in lines})) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"stage": "kernels", "error": "broken"}, "broken"),
        ({"stage": "bytes", "check": "bytes", "compared": 1, "different": 1}, "1 wrong"),
        ({"stage": "tests-gpu", "check": "t", "passed": 1, "failed": 2, "skipped": 0, "exit_code": 1}, "2 wrong"),
        ({"stage": "lists", "case": "exit", "code": -9}, "exit status -9"),
    ],
)
def test_problems_are_found(line: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """They are in the summary, and the run is not published."""
    lines = [*whole_run(), line]
    stages = sorted({line["stage"] for line in lines})
    assert problem in problems(lines, stages)[0]
    assert problem in summary.text(lines, stages)
    assert publish.main([str(write(tmp_path / "out", lines)), "--into", str(tmp_path)]) == 1
    assert not (tmp_path / "kernels-h100.jsonl").exists()
    partial = publish.main([str(tmp_path / "out"), "--into", str(tmp_path), "--partial"])
    assert partial == (1 if "wrong" in problem else 0)


def test_a_stage_without_a_report_is_found() -> None:
    lines = whole_run()
    assert problems(lines, ["kernels", "another"]) == ["another: no report", "another: no figure, no check"]
    assert "lists: did not get to a launch" in problems(lines, ["lists"], until_launch=True)


def test_the_page_is_made_from_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published results of a run are all that the section on the H100 needs; a line that was cut off is ignored."""
    out = write(tmp_path / "out", whole_run(), tail='{"operation": "ours", "sec')
    assert publish.main([str(out), "--into", str(tmp_path)]) == 0
    monkeypatch.setattr(gpu, "KERNELS", tmp_path / "kernels-h100.jsonl")
    monkeypatch.setattr(gpu, "CONVERT", tmp_path / "convert-h100.jsonl")
    text = gpu.figures()
    for part in (
        "torch 2.11.0, triton 3.6.0, torchao 0.18.0, commit 0123456789ab",
        "| 340B up (73728x18432) | channel | 1415.6 | 2880 | 96.0% |  | 1.0 | 1.20 |  |",
        "| 1000 columns (65536x1000) | ragged width | channel |",
        "| Minitron-8B up (16384x4096) | odd addresses | channel |",
        "| 64 x 5 M | 2400 | 80.0% |  | 10.0 | 1200 | 40.0% |",
        "- `block`, 16 warps: ",
        "340B o_proj (18432x18432) +12.5%",
        "300 results were compared",
        "200 of `tests/kernels` and 200 of `tests/gpu` passed, none failed",
        "340B o_proj (18432x18432) 2900 GB/s, a quarter of 340B down (4608x73728) 2900 GB/s",
        "A whole conversion of 8.0 GB in 4 shards",
        "up to 3 ms for a list of new sizes, and up to 1 ms",
    ):
        assert part in text
    assert "before" not in text.replace("was measured before and after", "").replace("sizes as before", "")


def test_results_of_several_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last run is on the page, with the range of all."""
    slower = [
        line
        | {"run": 5}
        | ({"bytes_per_second": 0.9 * line["bytes_per_second"]} if line.get("operation") == "ours" else {})
        for line in whole_run()
    ]
    for number, lines in enumerate((whole_run(), slower)):
        out = write(tmp_path / f"out{number}", lines)
        assert publish.main([str(out), "--into", str(tmp_path), *(["--append"] if number else [])]) == 0
    monkeypatch.setattr(gpu, "KERNELS", tmp_path / "kernels-h100.jsonl")
    monkeypatch.setattr(gpu, "CONVERT", tmp_path / "convert-h100.jsonl")
    assert "| 86.4% | 86.4-96.0 |" in gpu.figures()


def test_the_summary_fits_a_terminal() -> None:
    """It has the shares of all weights and lists in at most 12,000 characters, and what was checked at the end."""
    text = summary.text(whole_run(), ["kernels"])
    assert len(text) <= 12_000
    assert len([row for row in text.splitlines() if "GB/s" in row]) == 3 * 11 + 3 + 2 + 2 * 8
    assert "x 1.20 torch.compile, x 2.00 torchao" in text
    assert text.endswith("commit 0123456789ab, sm_clock_limit_mhz 1980, memory_clock_mhz 2619\nno problems\n")


def test_lines_of_a_missing_file_are_none(tmp_path: Path) -> None:
    assert read(tmp_path / "results.jsonl") == []
