"""Report on a result: sizes, scales and errors as text, JSON, an HTML page and PNG files."""

from __future__ import annotations

from nemotron_fp8.report.html import render_page
from nemotron_fp8.report.summary import ResultSummary, read_summary

__all__ = ["ResultSummary", "read_summary", "render_page"]
