"""Errors of a NeMo checkpoint."""

from __future__ import annotations

from nemotron_fp8.errors.base import SourceError, printable


class NemoError(SourceError):
    """A NeMo checkpoint cannot be converted as it is."""


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
    """The model config is not what NeMo writes.

    Attributes:
        file: name of the config.
        key: the setting at fault; None if it is the whole file.
    """

    key: str | None = None
    message = "{file}: {_key}{problem}"

    @property
    def _key(self) -> str:
        return "" if self.key is None else f"{self.key}: "


class UnsupportedModelError(NemoError):
    """The model has a part that NemotronForCausalLM does not have.

    Attributes:
        key: the setting, or the array, that shows it.
        problem: what is unsupported.
    """

    key: str
    problem: str
    message = "{key!a}: {problem}; only models of the Nemotron-4 architecture are converted"


class HeadsError(NemoError, ValueError):
    """Attention heads do not divide into query groups, or the hidden size does not divide into heads.

    Attributes:
        file: the model config.
        heads: attention heads of the model.
        groups: its query groups.
        hidden: its hidden size.
        problem: what does not divide.
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
        "{source}: array {array!a} is a part of the model that its config does not mention, or that NemotronForCausalLM"
        " does not have; without it the model would compute something else"
    )


class DuplicateArrayError(NemoError):
    """Two arrays are the same part of the model.

    Attributes:
        source: the checkpoint.
        first: name of the first array.
        second: name of the second array.
    """

    source: str
    first: str
    second: str
    message = "{source}: arrays {first!a} and {second!a} are the same part of the model"


class ArrayShapeError(NemoArrayError, ValueError):
    """An array's shape contradicts the model config.

    Attributes:
        shape: its shape.
        expected: the shape by the model config.
        why: the settings that give the expected shape.
    """

    shape: tuple[int, ...]
    expected: tuple[int, ...]
    why: str
    message = "array {array!a}: shape {shape}, by the model config {expected} ({why})"


class MalformedArrayError(NemoArrayError, ValueError):
    """The description of an array breaks its format, or is not supported."""

    problem: str
    message = "array {array!a}: {problem}"


class MissingChunkError(NemoArrayError, FileNotFoundError):
    """A chunk of an array is missing. By zarr's rules it would read as a fill value: as made-up weights.

    Attributes:
        chunk: name of the chunk.
        present: number of chunks in the checkpoint.
        expected: number of chunks by the array's shape.
    """

    chunk: str
    present: int
    expected: int
    message = (
        "array {array!a}: chunk {chunk!a} is missing ({present:,} of {expected:,} chunks are there); fetch the"
        " checkpoint again"
    )


class ChunkSizeError(NemoArrayError, ValueError):
    """A chunk's size contradicts the description of its array.

    Attributes:
        chunk: name of the chunk.
        size: its bytes.
        expected: bytes by the array's shape, chunks and dtype.
    """

    chunk: str
    size: int
    expected: int
    message = (
        "array {array!a}: chunk {chunk!a} has {size:,} bytes instead of {expected:,} by the array's shape, chunks and"
        " dtype; fetch it again"
    )


class StrayChunkError(NemoArrayError, ValueError):
    """A chunk lies outside the grid of its array, or overlaps another chunk.

    Attributes:
        chunk: name of the chunk.
        problem: where it lies.
    """

    chunk: str
    problem: str
    message = "array {array!a}: chunk {chunk!a} {problem}"


class ChunkDecodeError(NemoArrayError):
    """A compressed chunk cannot be decoded, or needs numcodecs, which is not installed."""

    problem: str
    message = "array {array!a}: {problem}"


class MalformedArchiveError(_NemoFileError):
    """A ``.nemo`` file is not a tar archive as NeMo writes it.

    Attributes:
        file: its name.
    """

    message = "{file}: {problem}"


class MalformedDistError(_NemoFileError):
    """A file of a torch_dist checkpoint breaks its format.

    Attributes:
        file: its name.
    """


class ForbiddenPickleError(MalformedDistError):
    """A pickle refers to a class or function that its format does not need. Nothing of it was executed.

    Attributes:
        wanted: the class or function, with its module.
    """

    def __init__(self, file: str, wanted: str) -> None:
        self.wanted = wanted
        super().__init__(file, f"the pickle asks for {printable(wanted)}, which no such checkpoint needs")


class MalformedTokenizerError(_NemoFileError):
    """A SentencePiece model cannot be parsed.

    Attributes:
        file: its name.
    """
