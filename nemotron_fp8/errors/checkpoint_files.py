"""Errors of a source whose files are missing, malformed or unreadable."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar

from nemotron_fp8.errors.base import SourceError, printable

if TYPE_CHECKING:
    from pathlib import Path


SIMILARITY = 0.6
"""Least similarity, from 0 to 1, of a misspelled name to its suggestion."""


class MalformedHeaderError(SourceError, ValueError):
    """A safetensors header violates a rule of the format, or a stricter rule of this library.

    Attributes:
        file: name of the shard, as passed by the caller.
        problem: the violated rule, with numbers.
        tensor: name of the tensor that violates the rule; None if the rule is not about one tensor.
    """

    file: str
    problem: str
    tensor: str | None = None
    message = "{file}: {_tensor}{problem}"

    @property
    def _tensor(self) -> str:
        return f"tensor {printable(self.tensor)}: " if self.tensor is not None else ""


class UnknownDtypeError(MalformedHeaderError):
    """Safetensors does not define the dtype of a tensor.

    Attributes:
        dtype: name of the unknown dtype.
    """

    def __init__(self, file: str, dtype: str, tensor: str) -> None:
        self.dtype = dtype
        super().__init__(file, f"unknown dtype {printable(dtype)}", tensor)


class SourceNotFoundError(SourceError, FileNotFoundError):
    """The source does not exist, or contains no checkpoint.

    Attributes:
        source: the requested source.
        problem: what is missing.
    """

    source: str
    problem: str
    message = "{source}: {problem}"

    @classmethod
    def absent(cls, path: Path, what: str = "folder", otherwise: str = "") -> SourceNotFoundError:
        """Return the error for a missing path; it suggests the most similar name, or else the hint ``otherwise``."""
        near: list[str] = []
        with suppress(OSError, ValueError):  # the parent folder may be missing or unreadable
            if path.is_file():
                return cls(str(path), f"a file, not a {what}; name the folder that contains it")
            if path.exists():
                return cls(str(path), f"neither a {what} nor a file")
            if path.is_symlink():
                return cls(str(path), f"a link to {printable(str(path.readlink()))}, which is missing")
            near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1, SIMILARITY)
        # A name with a control character is shown escaped, and could look like the one that was passed.
        hint = f"did you mean {path.with_name(near[0])}?" if near and near[0].isprintable() else otherwise
        return cls(str(path), f"no such {what}" + (f"; {hint}" if hint else ""))


class MissingShardError(SourceError, FileNotFoundError):
    """A shard that the index lists is missing.

    Attributes:
        shard: file name of the shard.
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
        tensor: name of the tensor.
        shard: file name of the shard.
        problem: the difference.
    """

    tensor: str
    shard: str
    problem: str
    message = "{shard!a}: tensor {tensor!a}: {problem}"


class _MalformedJsonError(SourceError, ValueError):
    """A JSON file does not have the expected content.

    Attributes:
        file: name of the file.
    """

    file: str
    problem: str
    message = "{file}: {problem}{_advice}"

    @property
    def _advice(self) -> str:
        # A truncated download is not JSON. A wrong value is in the uploaded file: fetching it again does not help.
        return "; fetch the file again" if self.problem.startswith("not JSON") else ""


class MalformedIndexError(_MalformedJsonError):
    """The index is malformed: it must be an object with a ``weight_map`` of file names.

    Attributes:
        file: the index.
    """


class MalformedConfigError(_MalformedJsonError):
    """config.json is not a JSON object.

    Attributes:
        file: name of the file.
    """


class MalformedManifestError(SourceError, ValueError):
    """The manifest or the statistics of a result are malformed or were changed.

    Attributes:
        file: name of the file.
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
    """A file of the source is a link that leaves its folder; an untrusted link could name any file.

    Attributes:
        file: name of the link.
        target: the target of the link.
    """

    file: str
    target: str
    message = (
        "{file!a}: a link to {target!a}, which is neither in the folder nor among the blobs of a Hub cache; replace the"
        " link by a copy of the file"
    )


class SourceReadError(SourceError, OSError):
    """A source file cannot be read.

    Attributes:
        file: path of the file.
    """

    permanent: ClassVar[bool] = False
    file: str
    problem: str
    message = "{file}: {problem}"


class SourceChangedError(SourceError):
    """A source file changed during the read, so the result would be inconsistent.

    Attributes:
        file: path of the file.
        before: size in bytes when the file was opened.
        after: size in bytes when the file was closed.
    """

    permanent: ClassVar[bool] = False
    file: str
    before: int
    after: int
    message = (
        "{file}: changed during the read ({before:,} bytes when opened, {after:,} now); run again when the file is"
        " complete, with --restart (restart=True) if shards of the files before are finished"
    )
