"""What can be wrong with a NeMo checkpoint, one class per violation."""

from __future__ import annotations

from nemotron_fp8.errors.base import SourceError, printable


class NemoError(SourceError):
    """A NeMo checkpoint cannot be converted as it is."""


class NemoConfigError(NemoError, ValueError):
    """The model config is not what NeMo writes.

    Attributes:
        file: its name.
        key: the key in question; None where it is the whole file.
    """

    def __init__(self, file: str, problem: str, key: str | None = None) -> None:
        self.file, self.key = file, key
        super().__init__(f"{file}: {problem}" if key is None else f"{file}: {key}: {problem}")


class UnsupportedModelError(NemoError):
    """The model has something that NemotronForCausalLM has no place for.

    Attributes:
        key: the setting, or the array, that shows it.
    """

    def __init__(self, key: str, problem: str) -> None:
        self.key = key
        super().__init__(f"{printable(key)}: {problem}; only models of the Nemotron-4 architecture are converted")


class HeadsError(NemoError, ValueError):
    """Attention heads do not divide: into query groups, or the hidden size into heads.

    Attributes:
        heads, groups, hidden: attention heads, query groups and hidden size of the model.
    """

    def __init__(self, file: str, heads: int, groups: int, hidden: int, problem: str) -> None:
        self.heads, self.groups, self.hidden = heads, groups, hidden
        super().__init__(f"{file}: {problem}")


class MissingArrayError(NemoError, FileNotFoundError):
    """An array that the model needs is not in the checkpoint.

    Attributes:
        array: its name.
    """

    def __init__(self, source: str, array: str) -> None:
        self.array = array
        super().__init__(f"{source}: array {printable(array)} is missing; fetch the checkpoint again")


class ExtraArrayError(NemoError):
    """An array of the decoder, the embedding or the output layer has no place in NemotronForCausalLM.

    Attributes:
        array: its name.
    """

    def __init__(self, source: str, array: str) -> None:
        self.array = array
        super().__init__(
            f"{source}: array {printable(array)} is a part of the model that its config does not tell of, or that"
            " NemotronForCausalLM does not have; without it the model would compute something else"
        )


class DuplicateArrayError(NemoError):
    """Two arrays are the same part of the model.

    Attributes:
        arrays: their names.
    """

    def __init__(self, source: str, first: str, second: str) -> None:
        self.arrays = (first, second)
        super().__init__(f"{source}: arrays {printable(first)} and {printable(second)} are the same part of the model")


class ArrayShapeError(NemoError, ValueError):
    """An array does not have the shape that the model config gives it.

    Attributes:
        array: its name.
        shape: what it has.
        expected: what it should have.
    """

    def __init__(self, array: str, shape: tuple[int, ...], expected: tuple[int, ...], why: str) -> None:
        self.array, self.shape, self.expected = array, shape, expected
        super().__init__(f"array {printable(array)}: shape {list(shape)}, by the model config {list(expected)} ({why})")


class MalformedArrayError(NemoError, ValueError):
    """What describes an array breaks its format, or says what cannot be read.

    Attributes:
        array: its name.
    """

    def __init__(self, array: str, problem: str) -> None:
        self.array = array
        super().__init__(f"array {printable(array)}: {problem}")


class MissingChunkError(NemoError, FileNotFoundError):
    """A chunk of an array is not there. By zarr's rules it would read as a fill value: as made-up weights.

    Attributes:
        array: name of the array.
        chunk: name of the chunk.
        present, expected: chunks that there are, and that the shape asks for.
    """

    def __init__(self, array: str, chunk: str, present: int, expected: int) -> None:
        self.array, self.chunk, self.present, self.expected = array, chunk, present, expected
        super().__init__(
            f"array {printable(array)}: chunk {printable(chunk)} is missing ({present:,} of {expected:,} chunks"
            " are there); fetch the checkpoint again"
        )


class ChunkSizeError(NemoError, ValueError):
    """A chunk has not the bytes that its array's description gives it.

    Attributes:
        array: name of the array.
        chunk: name of the chunk.
        size, expected: its bytes, and what they should be.
    """

    def __init__(self, array: str, chunk: str, size: int, expected: int) -> None:
        self.array, self.chunk, self.size, self.expected = array, chunk, size, expected
        super().__init__(
            f"array {printable(array)}: chunk {printable(chunk)} has {size:,} bytes, by the array's shape,"
            f" chunks and dtype {expected:,}; fetch it again"
        )


class StrayChunkError(NemoError, ValueError):
    """A chunk lies outside the grid of its array, or over another chunk.

    Attributes:
        array: name of the array.
        chunk: name of the chunk.
    """

    def __init__(self, array: str, chunk: str, problem: str) -> None:
        self.array, self.chunk = array, chunk
        super().__init__(f"array {printable(array)}: chunk {printable(chunk)} {problem}")


class TensorStoreError(NemoError):
    """Compressed chunks need tensorstore, and it is not installed or refuses a chunk.

    Attributes:
        array: name of the array.
    """

    def __init__(self, array: str, problem: str) -> None:
        self.array = array
        super().__init__(f"array {printable(array)}: {problem}")


class MalformedArchiveError(NemoError, ValueError):
    """A ``.nemo`` file is not the tar archive that NeMo writes.

    Attributes:
        file: its name.
    """

    def __init__(self, file: str, problem: str) -> None:
        self.file = file
        super().__init__(f"{file}: {problem}")


class MalformedDistError(NemoError, ValueError):
    """A file of a torch_dist checkpoint breaks its format.

    Attributes:
        file: its name.
    """

    def __init__(self, file: str, problem: str) -> None:
        self.file = file
        super().__init__(f"{printable(file)}: {problem}")


class ForbiddenPickleError(MalformedDistError):
    """A pickle asks for a class or function that its format has no use for. Nothing of it was carried out.

    Attributes:
        wanted: the class or function, with its module.
    """

    def __init__(self, file: str, wanted: str) -> None:
        self.wanted = wanted
        super().__init__(file, f"the pickle asks for {printable(wanted)}, which no such checkpoint needs")


class MalformedTokenizerError(NemoError, ValueError):
    """A SentencePiece model cannot be understood.

    Attributes:
        file: its name.
    """

    def __init__(self, file: str, problem: str) -> None:
        self.file = file
        super().__init__(f"{printable(file)}: {problem}")
