"""Output of ``report`` and ``compare``: text, page and PNG files."""

from __future__ import annotations

import errno
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.cli.output import SHOWN_PROBLEMS, note, print_json, print_table, put, say, write_page
from nemotron_fp8.cli.progress_line import ProgressLine
from nemotron_fp8.cli.show_evaluation import show_figures
from nemotron_fp8.errors import MissingExtraError, WriteError
from nemotron_fp8.evaluation.naming import figures_of_folder, read_evaluation
from nemotron_fp8.report.html import DOCTYPE, decibels, render_page
from nemotron_fp8.report.summary import read_summary
from nemotron_fp8.report.text import SHOWN, differences, result_json, rows_of, worst_rows
from nemotron_fp8.untrusted.regular_files import read_start

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.evaluation.result import Evaluation
    from nemotron_fp8.report.summary import ResultSummary


def read_results(
    folders: Sequence[str], source: str | None, max_memory: str, threads: int | None, quiet: bool, verbose: bool = False
) -> list[ResultSummary]:
    """Summarize one result or several, with a progress line."""
    with ProgressLine(sys.stderr, quiet=quiet, verbose=verbose) as line:
        return [read_summary(folder, source, max_memory, threads, line.update) for folder in folders]


def evaluation_of(file: str, destination: str, chosen: str | None) -> Evaluation:
    """Return the evaluation of one result, from a file that may be about several.

    Raises:
        SourceReadError, EvaluationFileError: the file cannot be read, or is not one that ``evaluate --json`` wrote.
        OtherResultError, AmbiguousResultError: the file has no figures of this result, or of several such results.
    """
    evaluation = read_evaluation(file)
    found = figures_of_folder(evaluation, file, destination, chosen)
    return replace(evaluation, results=(found,))


def show_results(
    results: Sequence[ResultSummary],
    html: str | None,
    png: str | None,
    as_json: bool,
    evaluation: Evaluation | None = None,
    quiet: bool = False,
) -> None:
    """Print the figures of one result, or of two side by side, and write the requested files.

    Args:
        results: one result or two.
        html: page to write.
        png: folder of the PNG files to write.
        as_json: print one JSON object.
        evaluation: evaluation of the only result; None without one.
        quiet: print no text and no notes.

    Raises:
        MissingExtraError: PNG files are requested, but matplotlib is not installed.
        WriteError: a file cannot be written.
    """
    written: list[str | Path] = []
    if png is not None:
        from nemotron_fp8.report.png import write_pngs

        written += write_pngs(results[0], png)
    if html is not None:
        from nemotron_fp8.report.evaluation_page import EVALUATION_STYLE, evaluation_sections

        sections = evaluation_sections(evaluation) if evaluation else ()
        written.append(write_page(html, render_page(results, sections, EVALUATION_STYLE if evaluation else "")))
    for path in written * (not quiet):
        note(f"note: {path} written")
    if as_json:
        one = len(results) == 1
        value = result_json(results[0]) if one else {"results": [result_json(result) for result in results]}
        print_json(value if evaluation is None else {**value, "evaluation": evaluation.to_json()})
        return
    if quiet:
        return
    print_table([("", *(result.name for result in results)), *rows_of(results)])
    if len(results) == 1:
        _show_one(results[0])
    else:
        _show_differences(results[0], results[1])
    if evaluation is not None:
        put()
        show_figures(evaluation)


def check_outputs(html: str | None, png: str | None) -> None:
    """Check that the requested files can be written, before measurements of several minutes.

    Raises:
        MissingExtraError: PNG files are requested, but matplotlib is not installed.
        WriteError: a file or folder of that name cannot be created, or is a file of another kind.
    """
    if png is not None:
        if find_spec("matplotlib") is None:
            raise MissingExtraError("report", "matplotlib")
        if Path(png).exists() and not Path(png).is_dir():
            raise WriteError(png, "is a file; name a folder", errno.ENOTDIR)
    if html is not None:
        if Path(html).is_dir():
            raise WriteError(html, "is a folder; name a file", errno.EISDIR)
        if not Path(html).parent.is_dir():
            raise WriteError(html, "no such folder; create it first", errno.ENOENT)
        if Path(html).is_file() and not _is_page(Path(html)):
            raise WriteError(html, "exists and is not a page; name another file", errno.EEXIST)


def _is_page(path: Path) -> bool:
    """Return True for a page, and for an empty file: they may be replaced."""
    start = read_start(path, len(DOCTYPE)).decode("utf-8", "replace")
    return not start or start.lower() == DOCTYPE


def _show_one(result: ResultSummary) -> None:
    rows = worst_rows(result)
    if rows:
        put()
        titles = ("SQNR", "max error", "clamped", "to 0", "worst tensors")
        print_table([titles, *rows], right=(0, 1, 2, 3))
    for problem in result.problems[:SHOWN_PROBLEMS]:
        say(f"problem: {problem.tensor}: {problem.problem}")
    if result.checked and not result.problems:
        put()
        say("compared with its source: every weight matches")
    if result.figures is None:
        note("note: errors were not measured; quantize with --stats, or name the source with --source")


def _show_differences(a: ResultSummary, b: ResultSummary) -> None:
    different = differences(a, b)
    if not different:
        return
    put()
    say(f"{len(different):,} tensors differ in SQNR, the most in:")
    rows = [(decibels(x.sqnr_db), decibels(y.sqnr_db), x.name) for x, y in different[:SHOWN]]
    print_table([(a.name, b.name, "tensor"), *rows], right=(0, 1))
