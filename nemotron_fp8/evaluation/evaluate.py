"""Evaluate results against their source: run all checkpoints layer by layer on the same sequences, and compare them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8._progress_bar import progress_callback
from nemotron_fp8._utils import check_arguments, shortened
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.evaluation.run import Run
from nemotron_fp8.events import logged
from nemotron_fp8.hub.options import as_hub_options
from nemotron_fp8.inference.session import check_sample, session_of
from nemotron_fp8.sources.open import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nemotron_fp8.evaluation.result import Evaluation
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.progress import Progress
    from nemotron_fp8.sources.base import Source


ACTIVATIONS = ("as-served", "none")
"""Treatments of activations: as the engines that load a checkpoint do it, or in 16 bits everywhere."""


@logged("evaluate")
def evaluate_repo(
    source: str | os.PathLike[str],
    results: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    text: str | os.PathLike[str] | None = None,
    *,
    tokens: str | os.PathLike[str] | None = None,
    sequences: int | None = None,
    length: int | None = None,
    activations: str = "as-served",
    device: str = "auto",
    max_memory: str | int | None = None,
    spill: bool = False,
    state_dir: str | os.PathLike[str] | None = None,
    restart: bool = False,
    threads: int | None = None,
    hub: HubOptions | None = None,
    progress: Callable[[Progress], None] | bool | None = None,
) -> Evaluation:
    """Evaluate results against their source, one decoder layer in memory at a time.

    Args:
        source: the checkpoint that the results were made from, in any place and format of `quantize_repo`.
        results: one result, or several, in any of these places.
        text: a text file, UTF-8; None for the language reference of Python.
        tokens: a file of token ids instead of a text: JSON, a list of equally long lists.
        sequences: sequences to evaluate; None for 16 of a text, or all lists of ``tokens``.
        length: tokens of a sequence; None for 512 of a text, or whole lists of ``tokens``.
        activations: ``as-served`` to quantize activations, and merge weights, as engines do for each checkpoint;
            ``none`` to leave them in 16 bits.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        max_memory: bytes of all buffers, as a number or like ``"8GiB"``; None for half of the free memory.
        spill: True to keep hidden states in a file, which the system writes to disk when memory is short.
        state_dir: folder for the saved state, from which the same call resumes; None for one in the user's cache.
        restart: True to discard the state of an interrupted evaluation.
        threads: threads that read and decode; None for one on each available core.
        hub: options for reading from the Hub.
        progress: called with the progress; True for a bar of tqdm.

    Returns:
        The figures of source and results.

    Raises:
        MissingExtraError: transformers is not installed.
        TransformersVersionError: the installed version of transformers is too old, or too new.
        UnsupportedArchitectureError: the model cannot be run layer by layer.
        OtherModelError: a result is not of the source's model.
        SampleError: the text or the tokens are unusable.
        NonFiniteOutputError: a checkpoint computes NaN, infinity, or numbers that are too large.
        EvaluationBudgetError: the buffers exceed ``max_memory``.
        EvaluationStateError, EvaluationBusyError: the saved state is damaged, or in use.
        SourceError, HubError, AddressError: a checkpoint cannot be read.
        RecipeError, DeviceError: an argument has an unsupported value.
    """
    named = [results] if isinstance(results, (str, os.PathLike)) else list(results)
    check_arguments(source=source, threads=threads, progress=progress)
    for result in named:
        check_arguments(source=result)
    if not named:
        raise RecipeError("no result to evaluate; name at least one", ("results",))
    check_sample(tokens, text, sequences, length)
    if activations not in ACTIVATIONS:
        raise RecipeError(
            f"activations is {shortened(activations)}, not one of {', '.join(ACTIVATIONS)}", ("activations",)
        )

    def opened() -> list[tuple[str, Source]]:
        of_results = replace(as_hub_options(hub), revision=None)  # the revision is that of the source
        found = [(os.fspath(source), open_source(source, hub=hub))]
        return found + [(os.fspath(each), open_source(each, hub=of_results)) for each in named]

    with (
        progress_callback(progress, "evaluate") as callback,
        session_of(
            opened,
            "evaluations",
            [activations],
            text,
            tokens=tokens,
            sequences=sequences,
            length=length,
            as_served=activations == "as-served",
            device=device,
            max_memory=max_memory,
            spill=spill,
            state_dir=state_dir,
            restart=restart,
            threads=threads,
            progress=callback,
        ) as session,
    ):
        return Run(session).evaluate()
