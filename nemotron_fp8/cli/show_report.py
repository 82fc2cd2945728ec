"""Output of ``report`` and ``compare``: text, page and PNG files."""

from __future__ import annotations

import errno
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.cli.output import SHOWN_PROBLEMS, note, print_json, print_table, put, say, write_page
from nemotron_fp8.cli.show_evaluation import COLUMNS, show_figures
from nemotron_fp8.documents.expected_error import expected_text
from nemotron_fp8.errors import MissingExtraError, WriteError
from nemotron_fp8.report.html import DOCTYPE
from nemotron_fp8.report.reports import ResultComparison
from nemotron_fp8.report.series import decibels
from nemotron_fp8.report.text import SHOWN, rows_of, worst_rows
from nemotron_fp8.untrusted.regular_files import read_start

if TYPE_CHECKING:
    from nemotron_fp8.report.reports import ResultReport
    from nemotron_fp8.report.summary import ResultSummary


TO_MEASURE = "name the source with --source, or quantize with --stats"


def show_results(
    report: ResultReport | ResultComparison, html: str | None, png: str | None, as_json: bool, quiet: bool = False
) -> None:
    """Print the figures of one result, or of two side by side, and write the requested files.

    Args:
        report: report on one result, or a comparison of two.
        html: page to write.
        png: folder of the PNG files to write.
        as_json: print one JSON object.
        quiet: print no text and no notes.

    Raises:
        MissingExtraError: PNG files are requested, but matplotlib is not installed.
        WriteError: a file cannot be written.
    """
    written: list[str | Path] = []
    if png is not None:
        from nemotron_fp8.report.png import write_pngs

        written += write_pngs(report.results[0], png)
    if html is not None:
        written.append(write_page(html, report.to_html()))
    for path in written * (not quiet):
        note(f"note: {path} written")
    if as_json:
        print_json(report.to_json())
        return
    if quiet:
        return
    print_table([("", *(result.name for result in report.results)), *rows_of(report.results)])
    if isinstance(report, ResultComparison):
        _show_differences(report)
        missing = [result.name for result in report.results if result.figures is None]
        if missing:
            note(f"note: errors (SQNR) of {' and '.join(missing)} were not measured; {TO_MEASURE}")
        return
    _show_one(report.summary)
    if report.evaluation is not None:
        put()
        show_figures(report.evaluation)


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
    if result.figures is not None and (text := expected_text(result.figures)):
        put()
        for line in textwrap.wrap(text, COLUMNS - 1):
            say(line)
    for problem in result.problems[:SHOWN_PROBLEMS]:
        say(f"problem: {problem.tensor}: {problem.problem}")
    if result.checked and not result.problems:
        put()
        say("compared with its source: every weight matches")
    if result.figures is None:
        note(f"note: errors were not measured; {TO_MEASURE}")


def _show_differences(comparison: ResultComparison) -> None:
    different = comparison.differences
    if not different:
        return
    put()
    say(f"{len(different):,} tensors differ in SQNR, the most in:")
    rows = [(decibels(x.sqnr_db), decibels(y.sqnr_db), x.name) for x, y in different[:SHOWN]]
    print_table([(*(result.name for result in comparison.results), "tensor"), *rows], right=(0, 1))
