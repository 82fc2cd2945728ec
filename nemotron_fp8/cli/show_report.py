"""Output of ``report`` and ``compare``: text, page and PNG files."""

from __future__ import annotations

import errno
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.cli.output import SHOWN_PROBLEMS, note, print_json, print_table, put, say
from nemotron_fp8.cli.progress_line import ProgressLine
from nemotron_fp8.errors import MissingExtraError, WriteError
from nemotron_fp8.report.html import decibels, render_page
from nemotron_fp8.report.summary import read_summary
from nemotron_fp8.report.text import SHOWN, differences, result_json, rows_of, worst_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.report.summary import ResultSummary


def read_results(
    folders: Sequence[str], source: str | None, max_memory: str, threads: int | None, quiet: bool
) -> list[ResultSummary]:
    """Summarize one result or several, with a progress line."""
    with ProgressLine(sys.stderr, quiet=quiet) as line:
        return [read_summary(folder, source, max_memory, threads, line.update) for folder in folders]


def show_results(results: Sequence[ResultSummary], html: str | None, png: str | None, as_json: bool) -> None:
    """Print the figures of one result, or of two side by side, and write the requested files.

    Raises:
        MissingExtraError: PNG files are requested, but matplotlib is not installed.
        WriteError: a file cannot be written.
    """
    written = []
    if png is not None:
        from nemotron_fp8.report.png import write_pngs

        written = write_pngs(results[0], png)
    if html is not None:
        written.append(_write(Path(html), render_page(results)))
    for path in written:
        note(f"note: {path} written")
    if as_json:
        one = len(results) == 1
        print_json(result_json(results[0]) if one else {"results": [result_json(result) for result in results]})
        return
    print_table([("", *(result.name for result in results)), *rows_of(results)])
    if len(results) == 1:
        _show_one(results[0])
    else:
        _show_differences(results[0], results[1])


def check_outputs(html: str | None, png: str | None) -> None:
    """Check that the requested files can be written, before measurements of several minutes.

    Raises:
        MissingExtraError: PNG files are requested, but matplotlib is not installed.
        WriteError: a file or folder of that name cannot be created.
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


def _write(path: Path, text: str) -> Path:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise WriteError(str(path), error.strerror or str(error), error.errno) from error
    return path


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
