"""Errors of a NeMo checkpoint."""

from __future__ import annotations

from nemotron_fp8.errors.base import SourceError, printable


class NemoError(SourceError):
    """A NeMo checkpoint cannot be converted."""


class _NemoFileError(NemoError, ValueError):
    file: str
    problem: str
    message = "{file!a}: {problem}"


class NemoArrayError(NemoError):
    """Base of the errors about one array of a checkpoint.

    Attributes:
        array: name of the array.
    """

    array: str


class NemoConfigError(_NemoFileError):
    """The model config is not a config of NeMo, or a setting is malformed.

    Attributes:
        file: name of the config.
        key: the malformed setting; None for the whole file.
    """

    key: str | None = None
    message = "{file}: {_key}{problem}"

    @property
    def _key(self) -> str:
        return "" if self.key is None else f"{self.key}: "


class UnsupportedModelError(NemoError):
    """The model has a part that NemotronForCausalLM does not have.

    Attributes:
        key: the setting or the array that shows the unsupported part.
        problem: the unsupported part.
    """

    key: str
    problem: str
    message = "{key!a}: {problem}; only models of the Nemotron-4 architecture can be converted"


class HeadsError(NemoError, ValueError):
    """Attention heads do not divide into query groups, or the hidden size does not divide into heads.

    Attributes:
        file: the model config.
        heads: attention heads of the model.
        groups: query groups of the model.
        hidden: hidden size of the model.
        problem: the numbers that do not divide.
    """

    file: str
    heads: int
    groups: int
    hidden: int
    problem: str
    message = "{file}: {problem}"


class MissingArrayError(NemoArrayError, FileNotFoundError):
    """An array that the model needs is not in the checkpoint.

    Attributes:
        source: the checkpoint.
    """

    source: str
    message = "{source}: array {array!a} is missing; fetch the checkpoint again"


class ExtraArrayError(NemoArrayError):
    """An array of the decoder, the embedding or the output layer has no counterpart in NemotronForCausalLM.

    Attributes:
        source: the checkpoint.
    """

    source: str
    message = (
        "{source}: array {array!a} is a part of the model that the model config does not mention, or that"
        " NemotronForCausalLM does not have; a model without it would compute other values, so it is not converted"
    )


class DuplicateArrayError(NemoError):
    """Two arrays hold the same part of the model.

    Attributes:
        source: the checkpoint.
        first: name of the first array.
        second: name of the second array.
    """

    source: str
    first: str
    second: str
    message = "{source}: arrays {first!a} and {second!a} hold the same part of the model; remove one of them"


class ArrayShapeError(NemoArrayError, ValueError):
    """An array's shape contradicts the model config.

    Attributes:
        shape: shape of the array.
        expected: shape that follows from the model config.
        why: the settings that determine the expected shape.
    """

    shape: tuple[int, ...]
    expected: tuple[int, ...]
    why: str
    message = "array {array!a}: shape {shape} instead of {expected}, the shape by the model config ({why})"


class MalformedArrayError(NemoArrayError, ValueError):
    """The metadata of an array is malformed or not supported."""

    problem: str
    message = "array {array!a}: {problem}"


class MissingChunkError(NemoArrayError, FileNotFoundError):
    """A chunk of an array is missing. A zarr reader would replace it by a fill value, not by the weights.

    Attributes:
        chunk: name of the chunk.
        present: number of chunks in the checkpoint.
        expected: number of chunks by the array's shape.
    """

    chunk: str
    present: int
    expected: int
    message = (
        "array {array!a}: chunk {chunk!a} is missing ({present:,} of {expected:,} chunks exist); fetch the"
        " checkpoint again"
    )


class ChunkSizeError(NemoArrayError, ValueError):
    """A chunk's size contradicts the metadata of its array.

    Attributes:
        chunk: name of the chunk.
        size: bytes of the chunk.
        expected: bytes by the array's shape, chunks and dtype.
    """

    chunk: str
    size: int
    expected: int
    message = (
        "array {array!a}: chunk {chunk!a} has {size:,} bytes instead of {expected:,} by the array's shape, chunks and"
        " dtype; fetch the chunk again"
    )


class StrayChunkError(NemoArrayError, ValueError):
    """A chunk lies outside the grid of its array, or overlaps another chunk.

    Attributes:
        chunk: name of the chunk.
        problem: the wrong position.
    """

    chunk: str
    problem: str
    message = "array {array!a}: chunk {chunk!a} {problem}"


class ChunkDecodeError(NemoArrayError):
    """A compressed chunk cannot be decoded, or needs numcodecs, which is not installed."""

    problem: str
    message = "array {array!a}: {problem}"


class MalformedArchiveError(_NemoFileError):
    """A ``.nemo`` file is not a tar archive of NeMo, or is damaged.

    Attributes:
        file: name of the archive.
    """

    message = "{file}: {problem}"


class MalformedDistError(_NemoFileError):
    """A file of a torch_dist checkpoint violates its format.

    Attributes:
        file: name of the file.
    """


class ForbiddenPickleError(MalformedDistError):
    """A pickle refers to a class or function that its format does not need. The pickle was not executed.

    Attributes:
        wanted: the class or function, with its module.
    """

    def __init__(self, file: str, wanted: str) -> None:
        self.wanted = wanted
        super().__init__(
            file, f"the pickle refers to {printable(wanted)}, which is not part of the format; it was not executed"
        )


class MalformedTokenizerError(_NemoFileError):
    """A SentencePiece model cannot be parsed.

    Attributes:
        file: name of the file.
    """
