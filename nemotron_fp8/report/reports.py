"""Reports on a result, and on two of them, as values."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8._display import Part, display, one_line
from nemotron_fp8._progress_bar import progress_callback
from nemotron_fp8._utils import check_arguments, format_bytes, listed, short_name, shortened
from nemotron_fp8.documents.expected_error import expected_text
from nemotron_fp8.errors import RecipeError
from nemotron_fp8.evaluation.naming import figures_of_folder, read_evaluation
from nemotron_fp8.evaluation.result import Evaluation
from nemotron_fp8.evaluation.wording import texts_of
from nemotron_fp8.report.evaluation_page import EVALUATION_STYLE, evaluation_sections
from nemotron_fp8.report.html import render_page
from nemotron_fp8.report.series import decibels
from nemotron_fp8.report.summary import read_summary
from nemotron_fp8.report.text import SHOWN, differences, result_json, rows_of, worst_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from nemotron_fp8.planning.receipt import TensorStats
    from nemotron_fp8.progress import Progress
    from nemotron_fp8.report.summary import ResultSummary


@dataclass(frozen=True, slots=True, repr=False)
class ResultReport:
    """Report on a result: sizes, scales, quantization error.

    Attributes:
        summary: the figures.
        evaluation: an evaluation of this result alone; None without one.
    """

    summary: ResultSummary
    evaluation: Evaluation | None = None

    def __repr__(self) -> str:
        evaluated = [f"KL {texts_of(self.evaluation.results[0]).kl} nats"] if self.evaluation else []
        return one_line("ResultReport", self.summary.name, [*self.summary.facts, *evaluated])

    def _repr_html_(self) -> str:
        summary, evaluated = self.summary, self.evaluation
        facts = [(label, value) for label, value in rows_of([summary])]
        if evaluated is not None:
            figures = texts_of(evaluated.results[0])
            facts += [("KL divergence (nats)", figures.kl), ("change of the perplexity", figures.change)]
        facts.append(("error", "" if summary.figures is None else expected_text(summary.figures)))
        contents = summary.contents
        left = contents.unquantized if contents else ()
        reasons = [
            (each.reason, f"{each.tensors:,}", format_bytes(each.bytes), listed(list(each.names))) for each in left
        ]
        served = contents.serving if contents else None
        problems = [(each.tensor, each.problem) for each in summary.problems]
        titles = ("SQNR", "largest error", "clamped", "to 0", "tensor")
        parts = [
            Part("Problems", problems, ("tensor or file", "problem"), (), True),
            Part("Worst tensors", worst_rows(summary), titles, (0, 1, 2, 3)),
            Part("Unquantized tensors", reasons, ("why", "tensors", "bytes", "names"), (1, 2)),
            Part("Serving", [(line,) for line in (*served.commands, *served.notes)] if served else ()),
        ]
        return display("Report", summary.name, facts, parts)

    @property
    def results(self) -> tuple[ResultSummary, ...]:
        """The summary alone."""
        return (self.summary,)

    def to_html(self) -> str:
        """Return the self-contained page that ``nemotron-fp8 report --html`` writes."""
        sections = evaluation_sections(self.evaluation) if self.evaluation else ()
        return render_page(self.results, sections, EVALUATION_STYLE if self.evaluation else "")

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values; a SQNR may be infinite, or NaN."""
        found = result_json(self.summary)
        return found if self.evaluation is None else {**found, "evaluation": self.evaluation.to_json()}


@dataclass(frozen=True, slots=True, repr=False)
class ResultComparison:
    """Two results side by side.

    Attributes:
        first, second: the figures of each.
    """

    first: ResultSummary
    second: ResultSummary

    def __repr__(self) -> str:
        facts = [f"{each.name} ({', '.join(each.facts)})" for each in self.results]
        return one_line("ResultComparison", "", [*facts, f"{len(self.differences):,} tensors differ in SQNR"])

    def _repr_html_(self) -> str:
        names = [each.name for each in self.results]
        different = [(decibels(x.sqnr_db), decibels(y.sqnr_db), x.name) for x, y in self.differences[: SHOWN * 4]]
        problems = [(each.name, p.tensor, p.problem) for each in self.results for p in each.problems]
        parts = [
            Part("Problems", problems, ("result", "tensor or file", "problem"), (), True),
            Part("Figures", rows_of(self.results), ("", *names), (), True),
            Part("Largest differences of SQNR", different, (*names, "tensor"), (0, 1)),
        ]
        return display("Comparison", "", [("results", " and ".join(names))], parts)

    @property
    def results(self) -> tuple[ResultSummary, ...]:
        """Both summaries."""
        return self.first, self.second

    @property
    def differences(self) -> list[tuple[TensorStats, TensorStats]]:
        """Tensors that are FP8 in both, by decreasing difference of SQNR; empty if errors are unknown."""
        return differences(self.first, self.second)

    def to_html(self) -> str:
        """Return the self-contained page that ``nemotron-fp8 compare --html`` writes."""
        return render_page(self.results)

    def to_json(self) -> dict[str, Any]:
        """Return the figures of both as JSON values; a SQNR may be infinite, or NaN."""
        return {"results": [result_json(each) for each in self.results]}


def report_repo(
    destination: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    max_memory: str | int = "256MiB",
    threads: int | None = None,
    *,
    evaluation: Evaluation | str | os.PathLike[str] | None = None,
    result: str | None = None,
    progress: Callable[[Progress], None] | bool | None = None,
) -> ResultReport:
    """Summarize a result: sizes, scales, quantization error.

    Args:
        destination: the result: a folder, a repository on the Hub (``hf://owner/name``), or a folder of an object
            store.
        source: source of the result, to measure the errors and compare every weight; None to read the errors from the
            result, if it was quantized with ``Recipe(stats=True)``.
        max_memory: bytes of the working buffers, as a number or like ``"256MiB"``.
        threads: worker threads; None for one on each available core.
        evaluation: an evaluation (`evaluate_repo`), or the file that ``evaluate --json`` wrote, whose figures of this
            result belong to the report.
        result: name of the result in the evaluation, if it is not that of the folder.
        progress: called with the progress of `verify_repo`, which measures the errors; True for a bar of tqdm.

    Returns:
        The report. Problems of a result that does not match its source are in ``summary.problems``.

    Raises:
        SourceError: the result, the source or the evaluation cannot be read.
        EvaluationFileError: the file is not one that ``evaluate --json`` wrote.
        OtherResultError, AmbiguousResultError: the evaluation is not about this result, or about several such results.
        StaleFiguresError: the evaluation was made of other weights than those of the folder.
        HubError, AddressError, StoreError: the result or the source cannot be fetched, or an address is malformed.
        RecipeError: an argument has an unsupported value.
        BudgetError: the buffers of a tensor exceed ``max_memory``.
    """
    _check(source, max_memory, threads, progress, destination=destination)
    found = None if evaluation is None else _evaluation(evaluation, destination, result)
    if found is None and result is not None:
        raise RecipeError(f"result is {shortened(result)}, a name in an evaluation, which is missing", ("result",))
    return ResultReport(_summary(destination, source, max_memory, threads, progress), found)


def compare_repos(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    max_memory: str | int = "256MiB",
    threads: int | None = None,
    *,
    progress: Callable[[Progress], None] | bool | None = None,
) -> ResultComparison:
    """Compare two results: layouts, sizes, scales, errors.

    Args:
        first: a result, in any place of `report_repo`.
        second: the other result.
        source: source of both, as in `report_repo`.
        max_memory: as in `report_repo`.
        threads: as in `report_repo`.
        progress: as in `report_repo`.

    Returns:
        Both summaries. If a result was made from another source, its ``problems`` say so, and its errors are not those
        of its weights.

    Raises:
        SourceError, RecipeError, BudgetError, HubError, AddressError, StoreError: as in `report_repo`.
    """
    _check(source, max_memory, threads, progress, first=first, second=second)
    one, other = (_summary(each, source, max_memory, threads, progress) for each in (first, second))
    return ResultComparison(one, other)


def _check(source: object, max_memory: str | int, threads: int | None, progress: object, **results: object) -> None:
    check_arguments(**results, max_memory=max_memory, threads=threads, progress=progress)
    if source is not None:
        check_arguments(source=source)


def _summary(
    destination: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    max_memory: str | int,
    threads: int | None,
    progress: Callable[[Progress], None] | bool | None,
) -> ResultSummary:
    # Without a source, nothing is measured that would take long.
    with progress_callback(progress if source is not None else None, short_name(os.fspath(destination))) as callback:
        return read_summary(destination, source, max_memory, threads, callback)


def _evaluation(
    given: Evaluation | str | os.PathLike[str], destination: str | os.PathLike[str], chosen: str | None
) -> Evaluation:
    """Return the evaluation of one result, from one that may be about several."""
    if isinstance(given, Evaluation):
        evaluation, name = given, "evaluation"
    elif isinstance(given, (str, os.PathLike)):
        evaluation, name = read_evaluation(given), os.fspath(given)
    else:
        raise RecipeError(f"evaluation is {shortened(given)}, not an Evaluation or the path of a file", ("evaluation",))
    found = figures_of_folder(evaluation, name, destination, chosen)
    return replace(evaluation, results=(found,))
