"""What a result cost: its sizes, scales and errors, as text, JSON, one HTML page and pictures."""

from __future__ import annotations

from nemotron_fp8.report.html import render_page
from nemotron_fp8.report.summary import ResultSummary, read_summary

__all__ = ["ResultSummary", "read_summary", "render_page"]
