"""Errors of a source whose files are missing, malformed or unreadable."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar

from nemotron_fp8.errors.base import SourceError, printable

if TYPE_CHECKING:
    from pathlib import Path


SIMILARITY = 0.6
"""Ratio, of 1, from which two names count as a misspelling of each other."""


class MalformedHeaderError(SourceError, ValueError):
    """A safetensors header breaks a rule of the format, or of this library's stricter reading of it.

    Attributes:
        file: the shard, as the caller named it.
        problem: the broken rule, with the numbers of the case.
        tensor: name of the tensor at fault, if there is one.
    """

    file: str
    problem: str
    tensor: str | None = None
    message = "{file}: {_tensor}{problem}"

    @property
    def _tensor(self) -> str:
        return f"tensor {printable(self.tensor)}: " if self.tensor is not None else ""


class UnknownDtypeError(MalformedHeaderError):
    """A tensor's dtype is not defined by safetensors.

    Attributes:
        dtype: the unknown name.
    """

    def __init__(self, file: str, dtype: str, tensor: str) -> None:
        self.dtype = dtype
        super().__init__(file, f"unknown dtype {printable(dtype)}", tensor)


class SourceNotFoundError(SourceError, FileNotFoundError):
    """The source is not a folder with a checkpoint in it.

    Attributes:
        source: the requested source.
        problem: what is missing.
    """

    source: str
    problem: str
    message = "{source}: {problem}"

    @classmethod
    def absent(cls, path: Path, what: str = "folder", otherwise: str = "") -> SourceNotFoundError:
        """Return the error for a missing path, with the most similar name beside it, or else the hint ``otherwise``."""
        near: list[str] = []
        with suppress(OSError, ValueError):  # the parent folder may be missing or unreadable
            near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1, SIMILARITY)
        hint = f"did you mean {path.with_name(near[0])}?" if near else otherwise
        return cls(str(path), f"no such {what}" + (f"; {hint}" if hint else ""))


class MissingShardError(SourceError, FileNotFoundError):
    """A shard that the index names is missing.

    Attributes:
        shard: its file name.
        tensors: number of tensors that the index places in it.
        index: name of the index.
    """

    shard: str
    tensors: int
    index: str
    message = "{shard!a}: missing, but {index} places {tensors:,} tensors in it; fetch the shard again"


class IndexMismatchError(SourceError):
    """The index and the shards disagree about the place of a tensor.

    Attributes:
        tensor: its name.
        shard: the shard in question.
        problem: how they disagree.
    """

    tensor: str
    shard: str
    problem: str
    message = "{shard!a}: tensor {tensor!a}: {problem}"


class _MalformedJsonError(SourceError, ValueError):
    """A JSON file does not have the expected content.

    Attributes:
        file: its name.
    """

    file: str
    problem: str
    message = "{file}: {problem}{_advice}"

    @property
    def _advice(self) -> str:
        # A truncated download is no longer JSON; a wrong value was uploaded as it is.
        return "; fetch the file again" if self.problem.startswith("not JSON") else ""


class MalformedIndexError(_MalformedJsonError):
    """The index is not what Hugging Face writes: an object with a ``weight_map`` of file names.

    Attributes:
        file: the index.
    """


class MalformedConfigError(_MalformedJsonError):
    """config.json is not a JSON object.

    Attributes:
        file: its name.
    """


class MalformedManifestError(SourceError, ValueError):
    """The manifest or the statistics of a result are not what this library writes.

    Attributes:
        file: its name.
    """

    file: str
    problem: str
    message = "{file}: {problem}"


class PickledWeightsError(SourceError):
    """All weights are pickles, which run code when loaded; they are never opened.

    Attributes:
        source: the checkpoint.
        files: names of the pickles.
    """

    source: str
    files: tuple[str, ...]
    message = (
        "{source}: only pickled weights ({_some}), which run code when loaded; convert them to safetensors first, for"
        " example with transformers' save_pretrained"
    )

    @property
    def _some(self) -> str:
        return ", ".join(map(printable, self.files[:3]))


class SourceLinkError(SourceError):
    """A file of the source is a link to another place; an untrusted link could name any file.

    Attributes:
        file: its name.
        target: the target of the link.
    """

    file: str
    target: str
    message = (
        "{file!a}: a link to {target!a}, which is neither in the folder nor among the blobs of a Hub cache; copy the"
        " file there"
    )


class SourceReadError(SourceError, OSError):
    """A source file cannot be read.

    Attributes:
        file: its path.
    """

    permanent: ClassVar[bool] = False
    file: str
    problem: str
    message = "{file}: {problem}"


class SourceChangedError(SourceError):
    """A source file changed while it was read, so the result would be a mixture.

    Attributes:
        file: its path.
        before: its size in bytes when it was opened.
        after: its size in bytes when it was closed.
    """

    permanent: ClassVar[bool] = False
    file: str
    before: int
    after: int
    message = (
        "{file}: changed while it was read ({before:,} bytes when opened, {after:,} now); run again when it is complete"
    )
