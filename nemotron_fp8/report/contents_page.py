"""Parts of a page about the tensors of a result: what is unquantized and why, serving, and a table of every tensor."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from nemotron_fp8._display import counted, cut, escape
from nemotron_fp8._utils import format_bytes
from nemotron_fp8.planning.linear_share import NAMES_SHOWN, percent
from nemotron_fp8.report.series import decibels

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nemotron_fp8.planning.receipt import TensorStats
    from nemotron_fp8.report.contents import ResultTensor, Unquantized
    from nemotron_fp8.report.summary import ResultSummary

MOST_TENSORS = 5000
"""Most rows of the table of tensors: a page of a checkpoint with 100,000 tensors stays small and quick."""
MOST_REASONS = 40
"""Most reasons that a page lists."""
LONGEST = 240
"""Characters of a name in a table."""

TABLE_STYLE = """
details.all>summary{cursor:pointer;padding:.3rem 0}
table.all{table-layout:fixed}table.all tr{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));
border-bottom:1px solid var(--line);padding:.25rem 0}
table.all th,table.all td{border:0;padding:0 .4rem 0 0;width:auto}
table.all .name{grid-column:1/-1}table.all .why{grid-column:span 2}
table.all .n{text-align:right;font-variant-numeric:tabular-nums}
table.all button{all:unset;cursor:pointer;font-weight:600}
table.all button:focus-visible{outline:2px solid var(--a)}
table.all [aria-sort=ascending] button::after{content:" \\2191"}
table.all [aria-sort=descending] button::after{content:" \\2193"}
@media (min-width:60rem){.columns:not(.two) table.all tr{grid-template-columns:minmax(0,5fr) minmax(0,4fr)
repeat(var(--numbers),minmax(0,1.5fr))}.columns:not(.two) table.all :is(.name,.why){grid-column:auto}}
ul.reasons{list-style:none;margin:0;padding:0;font-size:.9rem;max-width:45rem}
ul.reasons li{border-bottom:1px solid var(--line);padding:.3rem 0}
ul.reasons b{font-weight:600}pre{background:var(--card);border-radius:.5rem;padding:.6rem .8rem;margin:.5rem 0;
white-space:pre-wrap;overflow-wrap:anywhere}
"""
"""Style of these parts; narrow screens show the name of a tensor above its figures."""

SCRIPT = """<script>
for (const table of document.querySelectorAll("table.all")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const keyed = [...body.rows].map(row => {
        const cell = row.cells[column], number = cell.dataset.v;
        return {row, text: cell.textContent, number: number === undefined ? NaN : Number(number)};
      });
      keyed.sort((a, b) => {
        if (!cellIsNumber(a) || !cellIsNumber(b)) {
          if (cellIsNumber(a) !== cellIsNumber(b)) return cellIsNumber(a) ? -1 : 1;
          return sign * a.text.localeCompare(b.text, "en", {numeric: true});
        }
        return sign * (a.number - b.number || 0);
      });
      body.replaceChildren(...keyed.map(each => each.row));
    });
  });
}
function cellIsNumber(cell) { return !Number.isNaN(cell.number); }
</script>"""
"""Script that sorts a table by the column whose title is clicked. Without it, the table is in the order of the page."""


def draw_unquantized(result: ResultSummary) -> str:
    """Return the unquantized tensors by reason: number, bytes, and kinds of names."""
    if result.contents is None:
        return '<p class="soft">Unknown.</p>'
    groups = result.contents.unquantized
    if not groups:
        return "<p>None.</p>"
    rows = "".join(map(_reason, groups[:MOST_REASONS]))
    more = len(groups) - MOST_REASONS
    return f'<ul class="reasons">{rows}{f"<li>and {more:,} more reasons</li>" if more > 0 else ""}</ul>'


def _reason(group: Unquantized) -> str:
    names = ", ".join(f"<code>{escape(cut(name, LONGEST))}</code>" for name in group.names[:NAMES_SHOWN])
    more = f" and {len(group.names) - NAMES_SHOWN:,} more kinds" if len(group.names) > NAMES_SHOWN else ""
    size = f"{counted(group.tensors, 'tensor')}, {format_bytes(group.bytes)}"
    return f'<li><b>{escape(group.reason)}</b><br><span class="soft">{size}</span>: {names}{more}</li>'


def draw_share(result: ResultSummary) -> str:
    """Return a sentence about the share of the linear weights that is FP8; a warning if it is low."""
    share = result.contents.share if result.contents else None
    if share is None or share.share is None or not result.quantized:
        return ""
    text = f"{percent(share.share)} of the bytes of the decoder's linear weights are FP8"
    if share.is_low:
        return f'<p class="bad">Only {text}: see the unquantized tensors.</p>'
    return f"<p>{text}.</p>"


def draw_serving(result: ResultSummary) -> str:
    """Return the commands that serve a result, and what to know of each engine."""
    serving = result.contents.serving if result.contents else None
    if serving is None:
        return '<p class="soft">Unknown: its config describes no layout of this library.</p>'
    lines = "\n".join(map(escape, serving.commands))
    commands = f"<p>With <code>PATH</code> for the folder or repository:</p><pre><code>{lines}</code></pre>"
    sentences = (*serving.notes, *([" ".join(serving.own_code)] if serving.own_code else []))
    notes = "".join(f"<li>{_marked(sentence)}</li>" for sentence in sentences)
    return f"{commands if lines else ''}{f'<ul>{notes}</ul>' if notes else ''}"


def _marked(text: str) -> str:
    """Return a text with code in backticks as HTML."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def draw_tensors(result: ResultSummary) -> str:
    """Return a table of every tensor: FP8 tensors by increasing SQNR, then the others by decreasing size.

    Of more than `MOST_TENSORS` tensors, the table has the first ones, and says so.
    """
    if result.contents is None:
        return '<p class="soft">Unknown.</p>'
    tensors = result.contents.tensors
    errors = {t.name: t for t in result.figures.tensors} if result.figures else {}

    def rank(tensor: ResultTensor) -> tuple[bool, float, int]:
        error = errors.get(tensor.name)
        known = error is not None and not math.isnan(error.sqnr_db)
        return bool(tensor.reason), error.sqnr_db if error and known else math.inf, -tensor.bytes

    shown = sorted(tensors, key=rank)[:MOST_TENSORS]
    rows = "".join(_row(tensor, errors.get(tensor.name), bool(errors)) for tensor in shown)
    titles = ["tensor", "dtype, and why unquantized", "shape", "bytes"]
    titles += ["SQNR (dB)", "largest error", "clamped", "became 0"] if errors else []
    head = "".join(f'<th scope="col" class="{_class(at)}">{title}</th>' for at, title in enumerate(titles))
    limit = ""
    if len(tensors) > MOST_TENSORS:
        limit = (
            f'<p class="soft">The {MOST_TENSORS:,} of {len(tensors):,} tensors with the lowest SQNR, then the largest.'
            " <code>nemotron-fp8 inspect DST --json</code> lists every tensor, and"
            " <code>nemotron-fp8 report DST --json</code> every error.</p>"
        )
    return (
        f'<details class="all"><summary>{len(shown):,} tensors</summary>{limit}'
        f'<table class="all" style="--numbers:{len(titles) - 2}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></details>"
    )


def _class(column: int) -> str:
    return "name" if column == 0 else "why" if column == 1 else "n"


def _row(tensor: ResultTensor, error: TensorStats | None, has_errors: bool) -> str:
    kind = f"{tensor.dtype}: {tensor.reason}" if tensor.reason else tensor.dtype
    cells = [
        f'<td class="name"><code>{escape(cut(tensor.name, LONGEST))}</code></td><td class="why">{escape(kind)}</td>',
        _number(math.prod(tensor.shape), "x".join(map(str, tensor.shape)) or "scalar"),
        _number(tensor.bytes, f"{tensor.bytes:,}"),
    ]
    if error is not None:
        cells += [
            _number(error.sqnr_db, decibels(error.sqnr_db).removesuffix(" dB")),
            _number(error.max_abs_error, f"{error.max_abs_error:.3g}"),
            _number(error.clamped, f"{error.clamped:,}"),
            _number(error.flushed_to_zero, f"{error.flushed_to_zero:,}"),
        ]
    elif has_errors:
        cells.append('<td class="n"></td>' * 4)
    return f"<tr>{''.join(cells)}</tr>"


def _number(value: float, text: str) -> str:
    """Return a cell with the number by which the script sorts."""
    key = "" if math.isnan(value) else f' data-v="{_key(value)}"'
    return f'<td class="n"{key}>{escape(text)}</td>'


def _key(value: float) -> str:
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return f"{value:.17g}" if isinstance(value, float) else str(value)


def has_tensors(results: Iterable[ResultSummary]) -> bool:
    """Return True if a page about these results has a table of tensors, which its script sorts."""
    return any(result.contents is not None for result in results)
