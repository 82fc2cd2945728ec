"""HTML page about an evaluation, self-contained, and the same sections for the page of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8._display import escape
from nemotron_fp8._utils import format_bytes, listed, short_name
from nemotron_fp8.evaluation.naming import labels_of
from nemotron_fp8.evaluation.verdict import verdicts
from nemotron_fp8.evaluation.wording import SIGN, clipped_text, error_text, plain_number, sample_text, texts_of
from nemotron_fp8.report.html import key_table, pair, tile_row, whole_page
from nemotron_fp8.report.series import DARK_LINE_COLORS, LINE_COLORS
from nemotron_fp8.report.svg import LONGEST, Line, line_plot

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nemotron_fp8.evaluation.figures import CheckpointFigures
    from nemotron_fp8.evaluation.result import Evaluation
    from nemotron_fp8.evaluation.wording import Texts
    from nemotron_fp8.inference.sample_record import Sample


WORST_LAYERS, FEWER_LAYERS = 6, 3
"""Layers that a page lists of one result, and of each of several."""
WORST_SEQUENCES = 8
"""Sequences that a page lists."""
EXCERPT = 240
"""Characters of the text of a sequence."""
NAME = 200
"""Characters of a name in a title."""
MOST_NAMES = 3
"""Most names in a title."""
MOST_COLUMNS = 5
"""Most results with a column of their own; of more, a column has the mean."""


def _style() -> str:
    """Return the style of the sections: a color for each line, in light and dark."""

    def variables(colors: Sequence[str]) -> str:
        return "".join(f"--s{number}:{value};" for number, value in enumerate(colors))

    lines = "".join(
        f"svg .line.s{number}{{stroke:var(--s{number})}}.dot.s{number}{{fill:var(--s{number})}}"
        for number in range(len(LINE_COLORS))
    )
    dark = f"@media (prefers-color-scheme:dark){{:root{{{variables(DARK_LINE_COLORS)}}}}}"
    return (
        f":root{{{variables(LINE_COLORS)}}}\n{dark}\n{lines}\n"
        "svg .line{fill:none;stroke-width:1.5}svg .grid{stroke:var(--line)}svg .again{stroke-dasharray:4 3}\n"
        "ol.worst li{grid-template-columns:repeat(var(--columns,4),minmax(0,1fr))}\n"
        "ol.worst p{grid-column:1/-1;margin:.2rem 0;color:var(--soft);overflow-wrap:anywhere}\n"
    )


EVALUATION_STYLE = _style()


def render_evaluation(evaluation: Evaluation) -> str:
    """Return a page about an evaluation.

    All text of the evaluation is escaped: it may be read from a file.
    """
    names = listed([_cut(short_name(each.name), NAME) for each in evaluation.results], MOST_NAMES)
    return whole_page(f"Evaluation of {names}", evaluation_sections(evaluation), EVALUATION_STYLE)


def evaluation_sections(evaluation: Evaluation) -> list[str]:
    """Return the sections about an evaluation, for a page with `EVALUATION_STYLE`."""
    results = evaluation.results
    labels = labels_of(results, LONGEST)
    return [
        "<h2>Predictions against the source</h2>",
        _headlines(results, labels),
        _list(verdict.replace("+-", SIGN) for verdict in verdicts(evaluation, labels)),
        *([_table(evaluation, labels)] if len(results) > 1 else []),
        pair(_layers(results, labels), _worst_layers(results, labels)),
        pair(_positions(evaluation, labels), _sequences(results, labels)),
        _worst_sequences(evaluation, labels),
        *_clipped(evaluation, labels),
        *_notices(evaluation, labels),
        _about(evaluation),
    ]


def _headlines(results: Sequence[CheckpointFigures], labels: Sequence[str]) -> str:
    two = len(results) > 1
    cells = []
    for figures, label in zip(results, labels, strict=True):
        texts = texts_of(figures, SIGN)
        tiles = [
            ("KL divergence from the source (nats)", texts.kl),
            ("change of the perplexity", texts.change),
            ("positions with the same top token", texts.top1),
        ]
        cells.append(f"<section>{f'<h3>{escape(label)}</h3>' * two}{tile_row(tiles)}</section>")
    return f'<div class="columns{" two" * two}">{"".join(cells)}</div>'


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _table(evaluation: Evaluation, labels: Sequence[str]) -> str:
    """Return the results side by side."""
    titles = "<li><b>perplexity</b><b>change</b><b>KL (nats)</b><b>same top token</b></li>"
    source = f"<li><code>source</code><span>{plain_number(evaluation.source.perplexity, 3)}</span></li>"
    rows = [
        f"<li><code>{escape(label)}</code>{_cells(texts_of(figures, SIGN))}</li>"
        for figures, label in zip(evaluation.results, labels, strict=True)
    ]
    return f'<h2>Results</h2><ol class="worst">{titles}{source}{"".join(rows)}</ol>'


def _cells(texts: Iterable[str] | Texts) -> str:
    return "".join(f"<span>{escape(text)}</span>" for text in texts)


def _layers(results: Sequence[CheckpointFigures], labels: Sequence[str]) -> str:
    title = "Relative error by layer"
    lines = [Line(label, list(enumerate(each.layers))) for each, label in zip(results, labels, strict=True)]
    return f"<h2>{title}</h2>" + _plot(
        lines, (0, len(results[0].layers) - 1), "layer", "relative L2 error of the hidden states", title
    )


def _plot(lines: Sequence[Line], ends: tuple[int, int], across: str, up: str, title: str) -> str:
    if not any(line.points for line in lines):
        return '<p class="soft">None.</p>'
    return line_plot(lines, ends, across, up, title)


def _worst_layers(results: Sequence[CheckpointFigures], labels: Sequence[str]) -> str:
    title = "Layers that add most to the error"
    items = []
    for figures, label in zip(results, labels, strict=True):
        worst = [
            (number, step)
            for number, step in figures.worst_layers(WORST_LAYERS if len(results) == 1 else FEWER_LAYERS)
            if step > 0
        ]
        named = f"<h3>{escape(label)}</h3>" * (len(results) > 1)
        rows = [
            f"<li><span>{number}</span><span>{step:+.3g}</span><span>{figures.layers[number]:.3g}</span></li>"
            for number, step in worst
        ]
        titles = "<li><b>layer</b><b>increase</b><b>error after it</b></li>"
        items.append(
            named + (f'<ol class="worst" style="--columns:3">{titles}{"".join(rows)}</ol>' if rows else "<p>None.</p>")
        )
    return f"<h2>{title}</h2>{''.join(items)}"


def _positions(evaluation: Evaluation, labels: Sequence[str]) -> str:
    title, last = "KL divergence by position", max(evaluation.sample.length - 1, 1)
    lines = []
    for figures, label in zip(evaluation.results, labels, strict=True):
        width = last / max(len(figures.position_kl), 1)
        lines.append(Line(label, [((at + 0.5) * width, value) for at, value in enumerate(figures.position_kl)]))
    return f"<h2>{title}</h2>" + _plot(lines, (0, last), "position in the sequence", "KL divergence (nats)", title)


def _sequences(results: Sequence[CheckpointFigures], labels: Sequence[str]) -> str:
    title, count = "KL divergence by sequence", len(results[0].sequence_kl)
    lines = [
        Line(label, list(enumerate(sorted(each.sequence_kl, reverse=True), 1)))
        for each, label in zip(results, labels, strict=True)
    ]
    return f"<h2>{title}</h2>" + _plot(
        lines, (1, count), "sequence, by decreasing divergence", "KL divergence (nats)", title
    )


def _worst_sequences(evaluation: Evaluation, labels: Sequence[str]) -> str:
    """Return the sequences with the largest divergence, over all results, and the beginning of each."""
    sample, results = evaluation.sample, evaluation.results
    totals = [sum(each.sequence_kl[at] for each in results) for at in range(sample.sequences)]
    order = sorted(range(sample.sequences), key=lambda at: (-totals[at], at))[:WORST_SEQUENCES]
    several = 1 < len(results) <= MOST_COLUMNS
    heads = labels if several else ["KL (nats)" if len(results) == 1 else "mean KL of the results (nats)"]
    titles = "".join(f"<b>{escape(label)}</b>" for label in heads)
    rows = []
    for at in order:
        shown = [each.sequence_kl[at] for each in results] if several else [totals[at] / len(results)]
        cells = _cells(f"{value:.3g}" for value in shown)
        rows.append(f"<li><span>{sample.indices[at]:,}</span>{cells}{_excerpt(sample, at)}</li>")
    return (
        "<h2>Sequences with the largest divergence</h2>"
        f'<ol class="worst" style="--columns:{len(heads) + 1}"><li><b>number</b>{titles}</li>{"".join(rows)}</ol>'
    )


def _excerpt(sample: Sample, at: int) -> str:
    return f"<p>{escape(_cut(sample.excerpts[at], EXCERPT))}</p>" if sample.excerpts else ""


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _clipped(evaluation: Evaluation, labels: Sequence[str]) -> list[str]:
    """Return the modules with values beyond the range of a stored scale."""
    items = []
    for label, figures in zip(("source", *labels), (evaluation.source, *evaluation.results), strict=True):
        if text := clipped_text(figures):
            rows = "".join(
                f"<li><code>{escape(_cut(each.name, NAME))}</code><span>{each.clipped:,}</span>"
                f"<span>{each.values:,}</span></li>"
                for each in figures.clipped
            )
            titles = "<li><b>module</b><b>beyond the range</b><b>of</b></li>"
            items.append(
                f"<h3>{escape(label)}</h3><p>{escape(text)}</p>"
                f'<ol class="worst" style="--columns:3">{titles}{rows}</ol>'
            )
    return [f"<h2>Clipped values</h2>{''.join(items)}"] if items else []


def _notices(evaluation: Evaluation, labels: Sequence[str]) -> list[str]:
    named = zip(("source", *labels), (evaluation.source, *evaluation.results), strict=True)
    lines = [f"{label}: {notice}" for label, figures in named for notice in figures.notices]
    return [f"<h2>Notes</h2>{_list(lines)}"] if lines else []


def _about(evaluation: Evaluation) -> str:
    """Return the text, the checkpoints, and what computed."""
    sample = evaluation.sample
    rows = [
        ("text", f"{sample.name} (SHA-256 {sample.sha256})"),
        ("sample", sample_text(sample)),
        ("errors", error_text(sample, SIGN)),
    ]
    for kind, figures in (("source", evaluation.source), *(("result", each) for each in evaluation.results)):
        rows.append((kind, f"{figures.name}: weights {figures.weights}, activations {figures.activations}"))
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(evaluation.libraries.items()))
    rows.append(("measured by", ", ".join(filter(None, [f"nemotron_fp8 {evaluation.version}", libraries]))))
    rows.append(("device", evaluation.device))
    if evaluation.peak_resident_bytes is not None:
        rows.append(("memory at peak", format_bytes(evaluation.peak_resident_bytes)))
    return f"<h2>Text and versions</h2>{key_table(rows)}"
