"""Report for a terminal and for programs: the figures of one result, or of two side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemotron_fp8._utils import format_bytes
from nemotron_fp8.planning.linear_share import percent
from nemotron_fp8.report.series import decibels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.planning.receipt import TensorStats
    from nemotron_fp8.report.summary import ResultSummary


SHOWN = 5


def rows_of(results: Sequence[ResultSummary]) -> list[tuple[str, ...]]:
    """Return the rows of a table: label, then the value of each result."""
    lines = [_figures(result) for result in results]
    labels = dict.fromkeys(label for line in lines for label in line)
    return [(label, *(line.get(label, "") for line in lines)) for label in labels]


def _figures(result: ResultSummary) -> dict[str, str]:
    sizes, layout = result.sizes, result.layout
    line = {
        "layout": f"{layout.format}, {layout.granularity}" if layout else "unknown",
        "arithmetic": str(result.asked.get("numerics", "unknown")),
        "shared scales": {True: "yes", False: "no"}.get(result.asked.get("share_scales", None), "unknown"),
        "FP8 tensors": f"{result.quantized:,}",
        "other tensors": f"{result.unquantized:,}",
        **_contents(result),
        "bytes before": format_bytes(sizes.source) if sizes.source is not None else "unknown",
        "bytes after": format_bytes(sizes.result),
        "of which scales": format_bytes(sizes.scales),
        "scales": f"{result.scales.count:,}",
        **({"stored scales of activations and KV cache": f"{result.stored:,}"} if result.stored else {}),
        "smallest scale": f"{result.scales.smallest:.4g}",
        "largest scale": f"{result.scales.largest:.4g}",
    }
    if result.figures is None:
        return line | {"SQNR, median": "not measured"}
    typical, worst = result.figures.typical, result.figures.worst(1)
    return line | {
        "SQNR, median": "none" if typical is None else f"{typical:.2f} dB",
        "SQNR, worst": decibels(worst[0].sqnr_db) if worst else "none",
        "values clamped": f"{result.clamped:,}",
        "values that became 0": f"{result.flushed:,}",
        "tensors with NaN or Inf": f"{len(result.figures.nonfinite):,}",
    }


def _contents(result: ResultSummary) -> dict[str, str]:
    """Return the share of the linear weights that is FP8, and the engines that read the result, where known."""
    found: dict[str, str] = {}
    if result.contents is None:
        return found
    share = result.contents.share.share
    if share is not None:
        found["linear weights in FP8"] = percent(share)
    if result.contents.engines:
        readers = result.contents.readers
        every = len(readers) == len(result.contents.engines)
        found["read by"] = "every engine" if every else ", ".join(readers) or "no engine"
    return found


def differences(a: ResultSummary, b: ResultSummary) -> list[tuple[TensorStats, TensorStats]]:
    """Return the tensors that are FP8 in both, by decreasing difference of SQNR; empty if errors are unknown."""
    if a.figures is None or b.figures is None:
        return []
    other = {tensor.name: tensor for tensor in b.figures.tensors}
    both = [(tensor, other[tensor.name]) for tensor in a.figures.tensors if tensor.name in other]
    known = [(x, y) for x, y in both if abs(x.sqnr_db - y.sqnr_db) > 0]
    return sorted(known, key=lambda pair: (-abs(pair[0].sqnr_db - pair[1].sqnr_db), pair[0].name))


def result_json(result: ResultSummary) -> dict[str, Any]:
    """Return the figures of one result as JSON values."""
    sizes, figures = result.sizes, result.figures
    return {
        "name": result.name,
        "source": result.source,
        "model": result.model,
        "version": result.version,
        "made": result.made,
        "recipe": dict(result.asked),
        "tensors_quantized": result.quantized,
        "tensors_kept": result.unquantized,
        "stored_scales": result.stored,
        "bytes_source": sizes.source,
        "bytes_fp8": sizes.codes,
        "bytes_scales": sizes.scales,
        "bytes_kept": sizes.unquantized,
        "scales": {
            "count": result.scales.count,
            "smallest": result.scales.smallest,
            "largest": result.scales.largest,
            "half_octaves": {str(place): count for place, count in result.scales.bins.items()},
        },
        "sqnr_db_median": figures.typical if figures else None,
        "clamped": result.clamped if figures else None,
        "flushed_to_zero": result.flushed if figures else None,
        "tensors": [
            {
                "name": t.name,
                "sqnr_db": t.sqnr_db,
                "max_abs_error": t.max_abs_error,
                "clamped": t.clamped,
                "flushed_to_zero": t.flushed_to_zero,
            }
            for t in (figures.tensors if figures else ())
        ],
        "nonfinite": [
            {"tensor": f.tensor, "count": f.count, "position": list(f.position), "value": f.value}
            for f in (figures.nonfinite if figures else ())
        ],
        **_contents_json(result),
        "problems": [{"tensor": p.tensor, "problem": p.problem} for p in result.problems],
    }


def _contents_json(result: ResultSummary) -> dict[str, Any]:
    """Return the share of the linear weights, what is unquantized, and the engines; empty without contents."""
    contents = result.contents
    if contents is None:
        return {}
    return {
        "linear_share": contents.share.share,
        "unquantized": [{**each._asdict(), "names": list(each.names)} for each in contents.unquantized],
        "engines": {each.engine: {"reads": each.reads, "note": each.note} for each in contents.engines},
    }


def worst_rows(result: ResultSummary) -> list[tuple[str, ...]]:
    """Return the worst tensors as rows of a table."""
    if result.figures is None:
        return []
    return [
        (decibels(t.sqnr_db), f"{t.max_abs_error:.3g}", f"{t.clamped:,}", f"{t.flushed_to_zero:,}", t.name)
        for t in result.figures.worst(SHOWN)
    ]
