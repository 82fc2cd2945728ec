"""Output of ``evaluate`` and ``card``, and of an evaluation in ``report``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from nemotron_fp8._utils import format_bytes
from nemotron_fp8.cli.output import note, print_json, print_table, put, say, show_notices, write_page
from nemotron_fp8.cli.progress_line import clock_time
from nemotron_fp8.evaluation.naming import SOURCE, labels_of
from nemotron_fp8.evaluation.verdict import verdicts
from nemotron_fp8.evaluation.wording import DIGEST, clipped_text, error_text, plain_number, sample_text, texts_of

if TYPE_CHECKING:
    from nemotron_fp8.evaluation.result import Evaluation


COLUMNS = 80
"""Width of a terminal that the table fits."""
NARROWEST_LABEL = 12
"""Fewest characters of the longest label."""
WORST = 3
"""Layers, and modules with clipped values, that are listed for each result."""


def show_evaluation(evaluation: Evaluation, as_json: bool, html: str | None = None, quiet: bool = False) -> None:
    """Print the figures of an evaluation, and write its page.

    Args:
        evaluation: the figures.
        as_json: print one JSON object, which `nemotron_fp8.evaluation.result.parse_evaluation` reads.
        html: the page to write; `nemotron_fp8.cli.show_report.check_outputs` checks it before the measurement.
        quiet: print no notes, and no text.

    Raises:
        WriteError: the page cannot be written.
    """
    if not quiet:
        show_evaluation_notices(evaluation)
    if as_json:
        print_json(evaluation.to_json())
    elif not quiet:
        show_figures(evaluation)
    if html is not None:  # last: a page that cannot be written must not cost the figures of hours
        from nemotron_fp8.report.evaluation_page import render_evaluation

        sys.stdout.flush()
        page = write_page(html, render_evaluation(evaluation))
        if not quiet:
            note(f"note: {page} written")


def show_evaluation_notices(evaluation: Evaluation) -> None:
    """Print the notices of source and results."""
    labels = labels_of(evaluation.results, COLUMNS)
    for label, figures in zip((SOURCE, *labels), (evaluation.source, *evaluation.results), strict=True):
        show_notices([f"{label}: {notice}" for notice in figures.notices])


def show_figures(evaluation: Evaluation) -> None:
    """Print the figures of an evaluation as text: a table of 80 columns, and lines about each result."""
    sample, results = evaluation.sample, evaluation.results
    titles = ("perplexity", "change", "KL (nats)", "same top token")
    rows = [(plain_number(evaluation.source.perplexity, 3), "", "", ""), *map(texts_of, results)]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    labels = labels_of(results, max(COLUMNS - sum(widths) - 2 * len(widths), NARROWEST_LABEL))
    say(f"text: {sample.name} (SHA-256 {sample.sha256[:DIGEST]})")
    say(f"  {sample_text(sample)}")
    say(f"  {error_text(sample)}")
    put()
    named = zip(("", SOURCE, *labels), (titles, *rows), strict=True)
    print_table([(label, *row) for label, row in named], right=(1, 2, 3, 4))
    put()
    for verdict in verdicts(evaluation, labels):
        say(verdict)
    put()
    for label, figures in zip((SOURCE, *labels), (evaluation.source, *results), strict=True):
        say(f"{label}: {figures.name}")
        say(f"  weights {figures.weights}, activations {figures.activations}")
        worst = [(number, step) for number, step in figures.worst_layers(WORST) if step > 0]
        if worst:
            steps = ", ".join(f"{number} ({step:+.2g} to {figures.layers[number]:.2g})" for number, step in worst)
            say(f"  relative error grows most in layers {steps}")
        if clipped := clipped_text(figures):
            say(f"  {clipped}")
            most = ", ".join(f"{each.name} ({each.clipped:,} of {each.values:,})" for each in figures.clipped[:WORST])
            say(f"  most of them in {most}")
    put()
    memory = evaluation.peak_resident_bytes
    peak = "" if memory is None else f", {format_bytes(memory)} of memory at peak"
    say(f"{clock_time(evaluation.seconds)} on {evaluation.device}{peak}")
    versions = [f"{name} {version}" for name, version in sorted(evaluation.libraries.items())]
    say(", ".join([f"nemotron_fp8 {evaluation.version}", *versions]))


def show_card(destination: str, changed: bool, removed: bool, as_json: bool) -> None:
    """Print what happened to the model card of a result."""
    if as_json:
        print_json({"destination": destination, "changed": changed})
    elif not changed:
        say(f"the model card of {destination} is already up to date; nothing was changed")
    elif removed:
        say(f"section Evaluation removed from the model card of {destination}")
    else:
        say(f"section Evaluation written to the model card of {destination}")
