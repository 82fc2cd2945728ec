"""Figures of an evaluation: what is printed, written as JSON, drawn on a page, and read by a model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from nemotron_fp8.errors import EvaluationFileError, printable
from nemotron_fp8.inference.sample_record import Sample
from nemotron_fp8.untrusted import strict_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BUCKETS = 32
"""Groups of neighboring positions for which the KL divergence is stated."""
MOST_CLIPPED = 10
"""Modules for which clipped values are stated."""
LARGEST = 1e30
"""Largest magnitude of a figure in a file: sums and squares of such figures are finite."""
MOST = 1 << 60
"""Largest count in a file."""


@dataclass(frozen=True, slots=True)
class ClippedModule:
    """Values beyond the range of a stored scale: inputs of a module, or its cached keys or values.

    Attributes:
        name: the module, or the one that engines merge it into.
        clipped: values beyond the range.
        values: all values that were cast with this scale.
    """

    name: str
    clipped: int
    values: int


@dataclass(frozen=True, slots=True)
class CheckpointFigures:
    """Figures of one checkpoint. All errors are standard errors over sequences.

    Attributes:
        name: the checkpoint, as it was named in the call.
        weights: number format and layout of its weights.
        activations: treatment of activations that was emulated.
        perplexity: exp of the mean negative log-likelihood of a token, in nats.
        perplexity_change: change of the perplexity against the source, as a fraction.
        perplexity_error: standard error of that change.
        kl: mean KL divergence of the predicted distribution from that of the source, in nats.
        kl_error: standard error of the divergence.
        top1: fraction of positions at which source and checkpoint predict the same token.
        top1_error: standard error of that fraction.
        layers: relative L2 error of the hidden states after each layer.
        sequence_kl: mean KL divergence of each sequence.
        sequence_nll: mean negative log-likelihood of each sequence, in nats.
        position_kl: mean KL divergence of each group of neighboring positions, the first position first.
        notices: caveats for the user.
        digest: digest of the shards that its manifest records (`shards_digest`); empty without one.
        static_values: activations, keys and values that were cast with a stored scale.
        clipped_values: those beyond the range of their scale.
        clipped: modules with most of them, the worst first, at most `MOST_CLIPPED`.
    """

    name: str
    weights: str
    activations: str
    perplexity: float
    perplexity_change: float
    perplexity_error: float
    kl: float
    kl_error: float
    top1: float
    top1_error: float
    layers: tuple[float, ...]
    sequence_kl: tuple[float, ...]
    sequence_nll: tuple[float, ...]
    position_kl: tuple[float, ...]
    notices: tuple[str, ...] = ()
    digest: str = ""
    static_values: int = 0
    clipped_values: int = 0
    clipped: tuple[ClippedModule, ...] = ()

    def worst_layers(self, count: int) -> list[tuple[int, float]]:
        """Return the layers that add most to the error: number and increase over the layer before."""
        before = (0.0, *self.layers)
        steps = [(number, error - before[number]) for number, error in enumerate(self.layers)]
        return sorted(steps, key=lambda step: (-step[1], step[0]))[:count]


@dataclass(frozen=True, slots=True)
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
