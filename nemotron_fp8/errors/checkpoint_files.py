"""A source whose files are missing, malformed or unreadable."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING

from nemotron_fp8.errors.base import SourceError, printable

if TYPE_CHECKING:
    from pathlib import Path


ALIKE = 0.6
"""How alike two names must be, of 1, for one to be taken for a misspelling of the other."""


class MalformedHeaderError(SourceError, ValueError):
    """A safetensors header breaks a rule of the format (or of this library's stricter reading of it).

    Attributes:
        file: the shard, as it was named to the reader.
        problem: the rule that is broken, with the numbers of the case.
        tensor: the tensor's name, where the problem belongs to one.
    """

    def __init__(self, file: str, problem: str, tensor: str | None = None) -> None:
        self.file, self.problem, self.tensor = file, problem, tensor
        where = f"{file}: tensor {printable(tensor)}" if tensor is not None else file
        super().__init__(f"{where}: {problem}")


class UnknownDtypeError(MalformedHeaderError):
    """A tensor's dtype is none that safetensors defines.

    Attributes:
        dtype: the unknown name.
    """

    def __init__(self, file: str, dtype: str, tensor: str) -> None:
        self.dtype = dtype
        super().__init__(file, f"unknown dtype {printable(dtype)}", tensor)


class SourceNotFoundError(SourceError, FileNotFoundError):
    """The source is no folder with a checkpoint in it.

    Attributes:
        source: what was asked for.
    """

    def __init__(self, source: str, problem: str) -> None:
        self.source = source
        super().__init__(f"{source}: {problem}")

    @classmethod
    def absent(cls, path: Path, what: str = "folder", otherwise: str = "") -> SourceNotFoundError:
        """The error for what is not there; it names what is like it, or says what could be named ``otherwise``."""
        near: list[str] = []
        with suppress(OSError, ValueError):  # there may be no folder to look in, or one that is closed to us
            near = get_close_matches(path.name, [there.name for there in path.parent.iterdir()], n=1, cutoff=ALIKE)
        hint = f"did you mean {path.with_name(near[0])}?" if near else otherwise
        return cls(str(path), f"no such {what}" + (f"; {hint}" if hint else ""))


class MissingShardError(SourceError, FileNotFoundError):
    """A shard that the index names is not there.

    Attributes:
        shard: its file name.
        tensors: how many tensors the index places in it.
    """

    def __init__(self, shard: str, tensors: int, index: str) -> None:
        self.shard, self.tensors = shard, tensors
        super().__init__(
            f"{printable(shard)}: missing, but {index} places {tensors:,} tensors in it; fetch the shard again"
        )


class IndexMismatchError(SourceError):
    """The index and the shards disagree about where a tensor is.

    Attributes:
        tensor: its name.
        shard: the shard in question.
    """

    def __init__(self, tensor: str, shard: str, problem: str) -> None:
        self.tensor, self.shard = tensor, shard
        super().__init__(f"{printable(shard)}: tensor {printable(tensor)}: {problem}")


class MalformedIndexError(SourceError, ValueError):
    """The index is not what Hugging Face writes: an object with a ``weight_map`` of file names.

    Attributes:
        file: the index.
    """

    def __init__(self, file: str, problem: str) -> None:
        self.file = file
        super().__init__(f"{file}: {problem}{_again(problem)}")


class MalformedConfigError(SourceError, ValueError):
    """config.json is not a JSON object.

    Attributes:
        file: its name.
    """

    def __init__(self, file: str, problem: str) -> None:
        self.file = file
        super().__init__(f"{file}: {problem}{_again(problem)}")


class MalformedManifestError(SourceError, ValueError):
    """The manifest of a result is not what this library writes.

    Attributes:
        file: its name.
    """

    def __init__(self, file: str, problem: str) -> None:
        self.file = file
        super().__init__(f"{file}: {problem}")


class PickledWeightsError(SourceError):
    """The only weights are pickles, which run code when they are loaded; they are never opened.

    Attributes:
        files: their names.
    """

    def __init__(self, source: str, files: tuple[str, ...]) -> None:
        self.files = files
        super().__init__(
            f"{source}: only pickled weights ({', '.join(map(printable, files[:3]))}), which run code when"
            " loaded; convert them to safetensors first, for example with transformers' save_pretrained"
        )


class SourceLinkError(SourceError):
    """A file of the source is a link to somewhere else: a stranger's link could name any file.

    Attributes:
        file: its name.
        target: where the link leads.
    """

    def __init__(self, file: str, target: str) -> None:
        self.file, self.target = file, target
        super().__init__(
            f"{printable(file)}: a link to {printable(target)}, which is neither in the folder nor among the"
            " blobs of a Hub cache; copy the file there"
        )


class SourceReadError(SourceError, OSError):
    """A source file cannot be read.

    Attributes:
        file: its path.
    """

    def __init__(self, file: str, problem: str) -> None:
        self.file = file
        super().__init__(f"{file}: {problem}")


class SourceChangedError(SourceError):
    """A source file was changed while it was read; the result would be a mixture.

    Attributes:
        file: its path.
        before, after: its sizes in bytes when opened and when closed.
    """

    def __init__(self, file: str, before: int, after: int) -> None:
        self.file, self.before, self.after = file, before, after
        super().__init__(
            f"{file}: changed while it was read ({before:,} bytes when opened, {after:,} now); run"
            " again when it is complete"
        )


def _again(problem: str) -> str:
    """What to do about a file that is cut short or no text; one that says what it should not came so."""
    return "; fetch the file again" if problem.startswith("not JSON") else ""
