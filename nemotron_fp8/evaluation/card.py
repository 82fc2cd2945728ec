"""Put the figures of an evaluation into the model card of a result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._utils import short_name
from nemotron_fp8.destinations.card_update import update_card
from nemotron_fp8.destinations.open import repository_of, store_of
from nemotron_fp8.documents.evaluation_section import VERDICTS, CardFigures, render_evaluation_section
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.evaluation.naming import figures_of_folder, read_evaluation
from nemotron_fp8.evaluation.verdict import judge_perplexity
from nemotron_fp8.evaluation.wording import SIGN, clipped_text, error_text, plain_number, sample_text, texts_of

if TYPE_CHECKING:
    from nemotron_fp8.evaluation.figures import CheckpointFigures
    from nemotron_fp8.evaluation.result import Evaluation


WORST = 3
"""Layers that a card names."""


def write_card(
    destination: str | os.PathLike[str], evaluation: str | os.PathLike[str] | None, result: str | None = None
) -> bool:
    """Write the section "Evaluation" into the model card of a result, or remove it; the manifest records the new card.

    Args:
        destination: folder of the result.
        evaluation: file that ``evaluate --json`` wrote; None to remove the section.
        result: name of the result in the file; None for the name of the folder.

    Returns:
        True if the card has changed.

    Raises:
        EvaluationFileError: the file is not one that ``evaluate --json`` wrote.
        OtherResultError, AmbiguousResultError: the file has no figures of this result, or of several such results.
        StaleFiguresError: its figures are of other weights.
        CardError: the card or the manifest was changed, or is not one of this library.
        SourceError, DestinationError: a file cannot be read or written.
        RecipeError: the result is on the Hub or in an object store.
    """
    repo = repository_of(destination)
    if repo is not None:
        raise RecipeError(
            f"card changes local folders only; download the result (hf download {repo} --local-dir DIR), run card DIR,"
            f" and upload both changed files (hf upload {repo} DIR . --include README.md nemotron_fp8.json)"
        )
    store = store_of(destination)
    if store is not None:
        raise RecipeError(
            f"card changes local folders only, since an object store cannot exchange two files at once; copy {store} to"
            " a folder, run card there, and copy it to a new folder of the store"
        )
    root = Path(destination)
    if evaluation is None:
        return update_card(root, None)
    found = read_evaluation(evaluation)
    figures = figures_of_folder(found, os.fspath(evaluation), root, result)
    return update_card(root, render_evaluation_section(card_figures(found, figures)))


def card_figures(evaluation: Evaluation, figures: CheckpointFigures) -> CardFigures:
    """Return the figures of one result as text, without paths: a card is for strangers."""
    source, sample, texts = evaluation.source, evaluation.sample, texts_of(figures, SIGN)
    worst = [f"{number} ({increase:+.3g})" for number, increase in figures.worst_layers(WORST) if increase > 0]
    return CardFigures(
        source_perplexity=plain_number(source.perplexity, 3),
        perplexity=texts.perplexity,
        change=texts.change,
        kl=texts.kl,
        top1=texts.top1,
        verdict=VERDICTS[judge_perplexity(figures, len(evaluation.results))],
        text=short_name(sample.name),
        digest=sample.sha256,
        sample=sample_text(sample),
        errors=error_text(sample, SIGN),
        source_weights=source.weights,
        source_activations=source.activations,
        weights=figures.weights,
        activations=figures.activations,
        clipped=f"; {clipped}" if (clipped := clipped_text(figures)) else "",
        layers=", ".join(worst) or "none",
        version=evaluation.version,
        device=evaluation.device,
        libraries=", ".join(f"{name} {version}" for name, version in sorted(evaluation.libraries.items())),
    )
