"""Report on a result: sizes, scales and errors as text, JSON, an HTML page and PNG files."""

from __future__ import annotations

from nemotron_fp8.report.html import render_page
from nemotron_fp8.report.reports import ResultComparison, ResultReport, compare_repos, report_repo
from nemotron_fp8.report.summary import ResultSummary, read_summary

__all__ = [
    "ResultComparison",
    "ResultReport",
    "ResultSummary",
    "compare_repos",
    "read_summary",
    "render_page",
    "report_repo",
]
