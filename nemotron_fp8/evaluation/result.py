"""Figures of an evaluation: what is printed, written as JSON, drawn on a page, and read by a model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from nemotron_fp8._display import Part, display, one_line
from nemotron_fp8._utils import format_bytes, listed
from nemotron_fp8.errors import EvaluationFileError, printable
from nemotron_fp8.evaluation.figures import MOST_CLIPPED, CheckpointFigures, ClippedModule
from nemotron_fp8.evaluation.wording import SIGN, clipped_text, error_text, plain_number, sample_text, texts_of
from nemotron_fp8.inference.sample_record import Sample
from nemotron_fp8.untrusted import strict_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BUCKETS = 32
"""Groups of neighboring positions for which the KL divergence is stated."""
LARGEST = 1e30
"""Largest magnitude of a figure in a file: sums and squares of such figures are finite."""
MOST = 1 << 60
"""Largest count in a file."""
NAMED = 3
"""Most results that a repr names."""


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """Figures of a source and of results.

    Attributes:
        source: the source; its differences from itself are 0.
        results: the results, in the order of the call.
        sample: the text.
        version: version of this library.
        libraries: versions of torch and transformers, by name.
        device: device that computed.
        seconds: wall time of the run that finished the evaluation.
        peak_resident_bytes: peak memory of the process; None if unknown.
    """

    source: CheckpointFigures
    results: tuple[CheckpointFigures, ...]
    sample: Sample
    version: str
    libraries: Mapping[str, str]
    device: str
    seconds: float
    peak_resident_bytes: int | None = None

    def __repr__(self) -> str:
        results = [f"{each.name} (KL {texts_of(each).kl} nats)" for each in self.results]
        return one_line("Evaluation", self.source.name, [listed(results, NAMED), sample_text(self.sample)])

    def _repr_html_(self) -> str:
        """Return the figures of source and results as HTML for a notebook."""
        sample, source = self.sample, ("source", plain_number(self.source.perplexity, 3), "", "", "")
        rows = [source, *((each.name, *texts_of(each, SIGN)) for each in self.results)]
        header = ("", "perplexity", "change", "KL (nats)", "same top token")
        clipped = [(each.name, clipped_text(each)) for each in (self.source, *self.results)]
        notices = [(each.name, notice) for each in (self.source, *self.results) for notice in each.notices]
        versions = [f"{name} {version}" for name, version in sorted(self.libraries.items())]
        memory = self.peak_resident_bytes
        facts = [
            ("text", f"{sample.name}: {sample_text(sample)}"),
            ("errors", error_text(sample, SIGN)),
            ("time", f"{self.seconds:.1f} s on {self.device}"),
            ("memory at peak", "" if memory is None else format_bytes(memory)),
            ("versions", ", ".join([f"nemotron_fp8 {self.version}", *versions])),
        ]
        formats = [(each.name, each.weights, each.activations) for each in (self.source, *self.results)]
        parts = [
            Part("Results against the source", rows, header, (1, 2, 3, 4), opened=True),
            Part("Number formats", formats, ("", "weights", "activations")),
            Part("Clipped values", [row for row in clipped if row[1]]),
            Part("Notices", notices),
        ]
        return display("Evaluation", self.source.name, facts, parts)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


def parse_evaluation(data: bytes, file: str) -> Evaluation:
    """Return the figures in a file that ``evaluate --json`` wrote.

    Args:
        data: the text of the file.
        file: its name in messages.

    Raises:
        EvaluationFileError: the text is not such a file.
    """
    found = strict_json.load_object(data, file, EvaluationFileError)

    def record(kind: type[Any], value: object, place: str) -> Any:
        if not isinstance(value, dict):
            raise EvaluationFileError(file, f"{place} is not an object; write the file by evaluate --json")
        given = {}
        for field in fields(kind):
            name = f"{place}.{field.name}".removeprefix("the file.")
            if field.name not in value:
                raise EvaluationFileError(file, f"{name} is missing; write the file by evaluate --json")
            given[field.name] = convert(str(field.type), value[field.name], name)
        return kind(**given)

    def convert(kind: str, value: Any, place: str) -> Any:
        if kind in RECORDS:
            return record(RECORDS[kind], value, place)
        if kind in LISTS_OF_RECORDS and isinstance(value, list):
            return tuple(record(LISTS_OF_RECORDS[kind], item, f"{place}[{at}]") for at, item in enumerate(value))
        if kind in LISTS and isinstance(value, list) and all(LISTS[kind](item) for item in value):
            return tuple(value)
        if kind in SCALARS and SCALARS[kind](value):
            return value
        raise EvaluationFileError(file, f"{place} has a wrong type; write the file by evaluate --json")

    evaluation: Evaluation = record(Evaluation, found, "the file")
    _check_counts(evaluation, file)
    return evaluation


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # type: ignore[arg-type]  # checked


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_text(value: object) -> bool:
    return isinstance(value, str)


RECORDS: dict[str, type] = {"CheckpointFigures": CheckpointFigures, "Sample": Sample}
LISTS_OF_RECORDS: dict[str, type] = {
    "tuple[CheckpointFigures, ...]": CheckpointFigures,
    "tuple[ClippedModule, ...]": ClippedModule,
}
SCALARS: dict[str, Callable[[Any], bool]] = {
    "float": _is_number,
    "int": _is_count,
    "str": _is_text,
    "int | None": lambda value: value is None or _is_count(value),
    "Mapping[str, str]": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
}
LISTS = {"tuple[float, ...]": _is_number, "tuple[int, ...]": _is_count, "tuple[str, ...]": _is_text}
"""Checks of the values of fields, by the annotation of the field."""


def _check_counts(evaluation: Evaluation, file: str) -> None:
    """Raise EvaluationFileError if numbers of sequences, layers or groups of positions disagree."""
    sample = evaluation.sample
    if not evaluation.results:
        raise EvaluationFileError(file, "it has no results; write the file by evaluate --json")
    if sample.sequences < 1 or sample.length < 2:
        raise EvaluationFileError(file, "its sample predicts nothing: sample.sequences or sample.length is too small")
    if len(sample.excerpts) not in (0, sample.sequences):
        raise EvaluationFileError(file, "the numbers of sequences and of sample.excerpts disagree")
    for figures in (evaluation.source, *evaluation.results):
        counts = {len(figures.sequence_kl), len(figures.sequence_nll), len(sample.indices), sample.sequences}
        if len(counts) != 1 or len(figures.layers) != len(evaluation.source.layers):
            place = printable(figures.name)
            raise EvaluationFileError(file, f"the numbers of sequences or layers of {place} disagree")
        if len(figures.position_kl) > BUCKETS:
            place = printable(figures.name)
            raise EvaluationFileError(file, f"position_kl of {place} has more than {BUCKETS} groups of positions")
        if len(figures.clipped) > MOST_CLIPPED:
            place = printable(figures.name)
            raise EvaluationFileError(file, f"clipped of {place} names more than {MOST_CLIPPED} modules")
