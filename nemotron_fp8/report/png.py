"""The plots of a report as PNG files, drawn by matplotlib (the extra ``report``)."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8._filesystem import write_whole
from nemotron_fp8._utils import visible
from nemotron_fp8.errors import MissingExtraError, WriteError
from nemotron_fp8.report.series import COLORS, RAMP, color, color_range, power_ticks, row_step, size_series
from nemotron_fp8.report.summary import grid_of

if TYPE_CHECKING:
    import os

    from nemotron_fp8.report.summary import ResultSummary


DPI = 150
ROW_INCHES, COLUMN_INCHES = 0.18, 0.75
TICKS = 12
MIB = 1 << 20


def write_pngs(result: ResultSummary, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``sizes.png``, ``scales.png`` and, if errors are known, ``sqnr.png`` into a folder.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        WriteError: a file cannot be written.
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
            drawn = BytesIO()
            figure.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
            write_whole(root / name, drawn.getvalue())
            written.append(root / name)
    except OSError as error:
        raise WriteError(str(root), error.strerror or str(error), error.errno) from error
    return written


def _sizes(figure_class: Any, result: ResultSummary) -> Any:
    figure = figure_class(figsize=(6, 1.8))
    axes = figure.subplots()
    for bar, kinds in size_series(result.sizes).items():
        left = 0.0
        for kind, count in kinds.items():
            axes.barh(bar, count / MIB, left=left, color=COLORS[kind], label=kind if bar == "result" else None)
            left += count / MIB
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.legend(loc="lower right", fontsize="small")
    axes.set_title(visible(result.name), parse_math=False)
    return figure


def _scales(figure_class: Any, result: ResultSummary) -> Any:
    figure = figure_class(figsize=(6, 3))
    axes = figure.subplots()
    bins = result.scales.bins
    axes.bar(list(bins), list(bins.values()), width=0.9, align="edge", color=COLORS["FP8"])
    ticks = power_ticks(min(bins, default=0), max(bins, default=0), TICKS)
    axes.set_xticks(list(ticks), [f"$2^{{{exponent}}}$" for exponent in ticks.values()])
    axes.set_xlabel("scale")
    axes.set_ylabel("scales")
    axes.set_title(visible(result.name), parse_math=False)
    return figure


def _sqnr(figure_class: Any, result: ResultSummary) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba

    assert result.figures is not None  # the caller's condition
    grid = grid_of(result.figures)
    low, high = color_range([grid])
    rows, columns = range(len(grid.rows)), range(len(grid.columns))
    cells = {place: to_rgba(color(value, low, high)) for place, value in grid.cells.items()}
    empty = (0.0, 0.0, 0.0, 0.0)
    figure = figure_class(figsize=(1.5 + COLUMN_INCHES * len(columns), 1.5 + ROW_INCHES * len(rows)))
    axes = figure.subplots()
    image = [[cells.get((row, column), empty) for column in columns] for row in rows]
    axes.imshow(image, aspect="auto", interpolation="nearest")
    axes.set_xticks(columns, list(map(visible, grid.columns)), rotation=45, ha="right", parse_math=False)
    step = row_step(len(rows))
    axes.set_yticks(rows[::step], list(map(visible, grid.rows[::step])), parse_math=False)
    ramp = ScalarMappable(Normalize(low, high), LinearSegmentedColormap.from_list("sqnr", RAMP))
    figure.colorbar(ramp, ax=axes, label="SQNR (dB)")
    axes.set_title(visible(result.name), parse_math=False)
    return figure
