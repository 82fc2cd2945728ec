"""The plots of a report as PNG files, by matplotlib (the extra ``report``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8.errors import MissingExtraError, WriteError
from nemotron_fp8.report.summary import HALF_OCTAVES, grid_of
from nemotron_fp8.report.svg import span

if TYPE_CHECKING:
    import os

    from nemotron_fp8.report.summary import ResultSummary


DPI = 150
ROW_INCHES, COLUMN_INCHES = 0.18, 0.75


def write_pngs(result: ResultSummary, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``sizes.png``, ``scales.png`` and, where errors are known, ``sqnr.png`` into a folder.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        WriteError: the system refuses to write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("report", "matplotlib") from error
    root = Path(folder)
    figures = {"sizes.png": _sizes(Figure, result), "scales.png": _scales(Figure, result)}
    if result.figures and result.figures.tensors:
        figures["sqnr.png"] = _sqnr(Figure, result)
    written = []
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(root / name, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
            written.append(root / name)
    except OSError as error:
        raise WriteError(str(root), error.strerror or str(error), error.errno) from error
    return written


def _sizes(figure_class: Any, result: ResultSummary) -> Any:
    figure = figure_class(figsize=(6, 1.8))
    axes = figure.subplots()
    sizes, shard_task = result.sizes, 1 << 20
    if sizes.source is not None:
        axes.barh("source", sizes.source / shard_task, color="#7a8794")
    left = 0.0
    parts = (
        ("FP8", sizes.codes, "#3b6fb6"),
        ("scales", sizes.scales, "#e08a1e"),
        ("kept", sizes.unquantized, "#7a8794"),
    )
    for label, count, shade in parts:
        axes.barh("result", count / shard_task, left=left, color=shade, label=label)
        left += count / shard_task
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.legend(loc="lower right", fontsize="small")
    axes.set_title(result.name)
    return figure


def _scales(figure_class: Any, result: ResultSummary) -> Any:
    figure = figure_class(figsize=(6, 3))
    axes = figure.subplots()
    places = list(result.scales.bins)
    axes.bar(
        [place / HALF_OCTAVES for place in places],
        list(result.scales.bins.values()),
        width=0.9 / HALF_OCTAVES,
        align="edge",
        color="#3b6fb6",
    )
    axes.set_xlabel("log2 of the scale")
    axes.set_ylabel("scales")
    axes.set_title(result.name)
    return figure


def _sqnr(figure_class: Any, result: ResultSummary) -> Any:
    assert result.figures is not None  # the caller's condition
    grid = grid_of(result.figures)
    low, high = span([grid])
    values = [[grid.cells.get((r, c), math.nan) for c in range(len(grid.columns))] for r in range(len(grid.rows))]
    finite = [[v if math.isfinite(v) else math.nan for v in row] for row in values]
    size = (1.5 + COLUMN_INCHES * len(grid.columns), 1.5 + ROW_INCHES * len(grid.rows))
    figure = figure_class(figsize=size)
    axes = figure.subplots()
    image = axes.imshow(finite, aspect="auto", vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(grid.columns)), grid.columns, rotation=45, ha="right")
    every = max(1, len(grid.rows) // 48)
    axes.set_yticks(range(0, len(grid.rows), every), grid.rows[::every])
    figure.colorbar(image, label="SQNR (dB)")
    axes.set_title(result.name)
    return figure
