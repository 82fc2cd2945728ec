"""HTML page about one result, or two side by side, self-contained: it loads no other file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8._display import escape
from nemotron_fp8._utils import format_bytes
from nemotron_fp8._version import __version__
from nemotron_fp8.documents.expected_error import CLAMPED, expected_text
from nemotron_fp8.report.contents_page import (
    SCRIPT,
    TABLE_STYLE,
    draw_serving,
    draw_share,
    draw_tensors,
    draw_unquantized,
    has_tensors,
)
from nemotron_fp8.report.series import COLORS, bins_of, color_range, decibels
from nemotron_fp8.report.summary import grid_of
from nemotron_fp8.report.svg import heat_map, histogram, size_bars

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nemotron_fp8.report.summary import ResultSummary


DOCTYPE = "<!doctype html>"
"""Start of every page."""
WORST = 10
SHOWN = 20
"""Lines of the longest list on a page."""
STYLE = """
:root{--ink:#1b1b1f;--paper:#fff;--soft:#5c5f66;--line:#d9dce1;--card:#f6f7f9;--bad:#c62828;
--a:FP8;--b:SCALES;--c:OTHER}
@media (prefers-color-scheme:dark){:root{--ink:#e8e8ea;--paper:#16171a;--soft:#a5a8af;--line:#34373d;--card:#1f2125;
--bad:#ff8a80;--a:#6f9fe0;--b:#f0a94a;--c:#8b98a5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .5rem}
h3{font-size:1rem;overflow-wrap:anywhere;margin:.5rem 0}
p{margin:.5rem 0;max-width:45rem}.soft{color:var(--soft)}.bad{color:var(--bad);font-weight:600}
.columns,.pair{display:grid;grid-template-columns:minmax(0,1fr);gap:0 2rem;align-items:start}
@media (min-width:52rem){.columns.two,.pair{grid-template-columns:repeat(2,minmax(0,1fr))}}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.5rem}
.tile{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}.tile b{display:block;font-size:1.2rem}
.tile span{color:var(--soft);font-size:.85rem}
svg{display:block;width:100%;max-width:35rem;height:auto;font:10px system-ui,sans-serif}
svg text{fill:var(--ink)}svg line{stroke:var(--soft)}
.source,.other{fill:var(--c)}.bar,.fp8{fill:var(--a)}.scales{fill:var(--b)}
table{border-collapse:collapse;width:100%;font-size:.9rem;table-layout:fixed}
th,td{text-align:left;padding:.3rem .4rem;border-bottom:1px solid var(--line);overflow-wrap:anywhere;vertical-align:top}
th{width:10rem}li{overflow-wrap:anywhere}
ol.worst{max-width:45rem;list-style:none;margin:0;padding:0;font-size:.9rem}
ol.worst li{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:0 .5rem;padding:.3rem 0;
border-bottom:1px solid var(--line)}
ol.worst code{grid-column:1/-1}ol.worst span,ol.worst b{text-align:right;font-variant-numeric:tabular-nums}
code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere}
"""
"""Style of every page; narrow screens get one column, and dark ones their own colors."""
for _kind in ("FP8", "scales", "other"):
    STYLE = STYLE.replace(f":{_kind.upper()}", f":{COLORS[_kind]}")


def render_page(results: Sequence[ResultSummary], sections: Sequence[str] = (), style: str = "") -> str:
    """Return the page, for one result or to compare two.

    All text from the files of a result is escaped: it is untrusted.

    Args:
        results: one result or two.
        sections: further sections in HTML, after the summary.
        style: style of these sections.
    """
    title = " and ".join(result.name for result in results)
    parts = [
        _columns(results, "Summary", _summary),
        *sections,
        _pair(results, _columns(results, "Sizes", lambda r: size_bars(r.sizes)), _scales(results)),
        *_errors(results),
        _columns(results, "Unquantized tensors", draw_unquantized),
        _columns(results, "Serving", draw_serving),
        _columns(results, "Every tensor", draw_tensors),
        _columns(results, "Source, recipe and versions", _recipe),
        SCRIPT if has_tensors(results) else "",
    ]
    return whole_page(
        f"{'Report on' if len(results) == 1 else 'Comparison of'} {title}", parts, f"{style}{TABLE_STYLE}"
    )


def whole_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return a page with a title, which is escaped here, and parts in HTML; ``style`` is added to `STYLE`."""
    lines = [
        DOCTYPE,
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        *parts,
        f'<p class="soft">Made by nemotron_fp8 {__version__}.</p>',
        "</main></body></html>\n",
    ]
    return "\n".join(line for line in lines if line)


def _pair(results: Sequence[ResultSummary], *blocks: str) -> str:
    """Place blocks side by side for one result; two results are side by side already."""
    return "\n".join(blocks) if len(results) > 1 else pair(*blocks)


def pair(*blocks: str) -> str:
    """Place blocks side by side where there is room."""
    return f'<div class="pair">{"".join(f"<div>{block}</div>" for block in blocks)}</div>'


def _columns(results: Sequence[ResultSummary], title: str, draw: object) -> str:
    assert callable(draw)
    two = len(results) > 1
    cells = [f"<section>{f'<h3>{escape(r.name)}</h3>' * two}{draw(r)}</section>" for r in results]
    return f'<h2>{escape(title)}</h2><div class="columns{" two" * two}">{"".join(cells)}</div>'


def _summary(result: ResultSummary) -> str:
    sizes = result.sizes
    tiles = [
        ("FP8 tensors", f"{result.quantized:,}"),
        ("other tensors", f"{result.unquantized:,}"),
        ("tensors of the result", format_bytes(sizes.result)),
    ]
    if sizes.source:
        tiles.append(("of the source's size", f"{sizes.result / sizes.source:.1%}"))
    if result.figures:
        typical = result.figures.typical
        tiles.append(("SQNR, median tensor", "none" if typical is None else f"{typical:.2f} dB"))
        worst = result.figures.worst(1)
        tiles.append(("SQNR, worst tensor", decibels(worst[0].sqnr_db) if worst else "none"))
        tiles.append(("values clamped, by rounding alone", f"{result.clamped:,}"))
        tiles.append(("values that became 0", f"{result.flushed:,}"))
        tiles.append(("tensors with NaN or Inf", f"{len(result.figures.nonfinite):,}"))
    return tile_row(tiles) + draw_share(result) + _expectation(result) + _verdict(result)


def _expectation(result: ResultSummary) -> str:
    """Return if the errors are as expected of FP8, and the meaning of the clamped values."""
    if result.figures is None:
        return ""
    sentences = [expected_text(result.figures)]
    if result.clamped:
        sentences.append(f"{result.clamped:,} values were clamped. {CLAMPED}")
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences if sentence)


def tile_row(tiles: Iterable[tuple[str, str]]) -> str:
    """Return tiles, each of a label and a value."""
    made = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in tiles
    )
    return f'<div class="tiles">{made}</div>'


def _verdict(result: ResultSummary) -> str:
    if not result.checked:
        return ""
    if not result.problems:
        return "<p>Compared with its source: every weight matches.</p>"
    shown = _list(f"{p.tensor}: {p.problem}" for p in result.problems)
    return f'<p class="bad">Does not match its source: {len(result.problems):,} problems.</p>{shown}'


def _list(lines: Iterable[str]) -> str:
    lines = list(lines)
    more = f"<li>and {len(lines) - SHOWN:,} more</li>" if len(lines) > SHOWN else ""
    return f"<ul>{''.join(f'<li><code>{escape(line)}</code></li>' for line in lines[:SHOWN])}{more}</ul>"


def _errors(results: Sequence[ResultSummary]) -> list[str]:
    if not any(result.figures for result in results):
        return [
            '<h2>Errors</h2><p class="soft">Not measured. Quantize with <code>--stats</code>, or pass the source with'
            " <code>--source</code>.</p>"
        ]
    ends = color_range([grid_of(r.figures) for r in results if r.figures])

    def map_of(result: ResultSummary) -> str:
        return heat_map(grid_of(result.figures), ends) if result.figures else _nothing()

    intro = (
        "<p>Signal-to-quantization-noise ratio of every weight w with codes q, 10 log10(&Sigma;w&sup2; /"
        " &Sigma;(w - q&middot;scale)&sup2;): higher is better. The cell of a layer's experts shows the worst"
        " expert.</p>"
    )
    return [
        _pair(
            results,
            _columns(results, "Errors by layer and projection", map_of) + intro,
            _columns(results, "Worst tensors", _worst) + _columns(results, "NaN and Inf", _nonfinite),
        )
    ]


def _nothing() -> str:
    return '<p class="soft">Not measured.</p>'


def _worst(result: ResultSummary) -> str:
    if not result.figures:
        return _nothing()
    rows = [
        f"<li><code>{escape(t.name)}</code><span>{decibels(t.sqnr_db)}</span><span>{t.max_abs_error:.3g}</span>"
        f"<span>{t.clamped:,}</span><span>{t.flushed_to_zero:,}</span></li>"
        for t in result.figures.worst(WORST)
    ]
    titles = "<li><b>SQNR</b><b>largest error</b><b>clamped</b><b>became 0</b></li>"
    return f'<ol class="worst">{titles}{"".join(rows)}</ol>'


def _nonfinite(result: ResultSummary) -> str:
    if not result.figures:
        return _nothing()
    if not result.figures.nonfinite:
        return "<p>None found.</p>"
    return _list(
        f"{f.tensor}: {f.count:,} values, the first ({f.value}) at [{', '.join(map(str, f.position))}]; unquantized"
        for f in result.figures.nonfinite
    )


def _scales(results: Sequence[ResultSummary]) -> str:
    ends = bins_of([result.scales for result in results])

    def draw(result: ResultSummary) -> str:
        scales = result.scales
        if not scales.count or ends is None:
            return "<p>None.</p>"
        text = f"{scales.count:,} scales from {scales.smallest:.3g} to {scales.largest:.3g}."
        return f"<p>{text}</p>{histogram(scales, ends)}"

    return _columns(results, "Scales", draw)


def _recipe(result: ResultSummary) -> str:
    rows = [
        ("source", result.source or "unknown: neither the model card nor the call names it"),
        ("model", result.model or "unknown: no config.json that names it"),
        ("date of the manifest", result.made or "unknown: no manifest in a local folder"),
        ("made by", f"nemotron_fp8 {result.version}" if result.version else "unknown: no manifest"),
    ]
    if result.layout and not result.asked:
        rows.append(("layout", f"{result.layout.format}, {result.layout.granularity}"))
    rows += [(str(key), _plain(value)) for key, value in result.asked.items()]
    return key_table(rows)


def key_table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of keys and values."""
    cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows)
    return f"<table>{cells}</table>"


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
