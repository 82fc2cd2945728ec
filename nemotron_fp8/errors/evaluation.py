"""Errors of evaluations and calibrations: a model, a text or a state that cannot be run layer by layer."""

from __future__ import annotations

from nemotron_fp8.errors.base import NemotronFp8Error


class EvaluationError(NemotronFp8Error, ValueError):
    """A model cannot be evaluated or calibrated, or figures cannot be read."""


class UnsupportedArchitectureError(EvaluationError):
    """A model cannot be run layer by layer, or transformers does not know it.

    Attributes:
        checkpoint: the checkpoint.
        architecture: name of the architecture or model type.
        reason: the obstacle.
    """

    checkpoint: str
    architecture: str
    reason: str
    message = "{checkpoint}: {architecture!a} cannot be run layer by layer: {reason}"


class OtherModelError(EvaluationError):
    """A result is not of the same model as the source.

    Attributes:
        result: the result.
        source: the source.
        problem: the difference.
    """

    result: str
    source: str
    problem: str
    message = "{result}: not a result of {source}: {problem}; pass the source that it was made from"


class SampleError(EvaluationError):
    """A text or a list of tokens cannot be used.

    Attributes:
        file: the file, or the checkpoint without a usable tokenizer.
        problem: the problem, and what to do.
    """

    file: str
    problem: str
    message = "{file}: {problem}"


class EvaluationBudgetError(EvaluationError):
    """The memory budget cannot hold the buffers of an evaluation or a calibration.

    Attributes:
        part: the largest part.
        needed: bytes of all buffers.
        budget: bytes allowed.
        advice: what to do.
    """

    part: str
    needed: int
    budget: int
    advice: str
    message = (
        "{needed:,} bytes of buffers are needed, {_short:,} more than the budget of {budget:,}; the largest"
        " part is {part}; {advice}"
    )

    @property
    def _short(self) -> int:
        return self.needed - self.budget


class NonFiniteOutputError(EvaluationError):
    """A checkpoint computes NaN, infinity, or numbers that are too large for figures or scales.

    Attributes:
        checkpoint: the checkpoint.
        place: the numbers.
    """

    checkpoint: str
    place: str
    message = (
        "{checkpoint}: {place} are NaN, infinite or too large; its weights or scales are, or overflow the dtype of the"
        " model: check it (nemotron-fp8 verify), or leave it out"
    )


class TransformersVersionError(EvaluationError):
    """The installed version of transformers lacks a function that is called.

    Attributes:
        installed: version that is installed.
        problem: the missing function, or the lower limit.
    """

    installed: str
    problem: str
    message = (
        "transformers {installed} cannot be used: {problem}; install the versions that are known to work:"
        " pip install 'nemotron_fp8[evaluate]'"
    )


class EvaluationStateError(EvaluationError):
    """The saved state of an interrupted evaluation or calibration is damaged.

    Attributes:
        path: the file.
        problem: the problem.
    """

    path: str
    problem: str
    message = "{path}: {problem}; start over with restart (--restart)"


class EvaluationBusyError(EvaluationError):
    """Another process does the same evaluation or calibration.

    Attributes:
        path: folder of the saved state.
        owner: the other process; empty if unknown.
    """

    path: str
    owner: str = ""
    message = "{path}: in use by {_owner}, which does the same run; wait for it to finish"

    @property
    def _owner(self) -> str:
        return self.owner or "another process"


class EvaluationFileError(EvaluationError):
    """A file is not one that ``evaluate --json`` wrote.

    Attributes:
        file: the file.
        problem: the first value that is missing or wrong.
    """

    file: str
    problem: str
    message = "{file}: not the figures of an evaluation: {problem}"


class OtherResultError(EvaluationError):
    """A file of figures is about other results.

    Attributes:
        file: the file.
        result: the result without figures in it.
        names: the results in it.
    """

    file: str
    result: str
    names: tuple[str, ...]
    message = (
        "{file}: has figures of {names}, not of {result!a}; pass the evaluation of this result, or name one of them"
        " (--result NAME)"
    )


class AmbiguousResultError(EvaluationError):
    """A file has figures of several results with one name.

    Attributes:
        file: the file.
        result: the name.
        names: the results of this name, as they were named in the evaluation.
    """

    file: str
    result: str
    names: tuple[str, ...]
    message = "{file}: has figures of several results {result!a}: {names}; name one of them (--result NAME)"


class StaleFiguresError(EvaluationError):
    """A file has figures of a result of this name, but of other weights.

    Attributes:
        file: the file.
        result: the result.
    """

    file: str
    result: str
    message = "{file}: its figures of {result!a} are of other weights than its manifest records; evaluate it again"


class CardError(EvaluationError):
    """The model card of a result cannot be changed.

    Attributes:
        path: the card, or the manifest that records it.
        problem: the problem, and what to do.
    """

    path: str
    problem: str
    message = "{path}: {problem}"
