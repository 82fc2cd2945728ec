"""Errors of a source that is no checkpoint of safetensors shards, but something that is easily taken for one."""

from __future__ import annotations

from nemotron_fp8.errors.base import SourceError, printable
from nemotron_fp8.errors.checkpoint_files import SourceNotFoundError

SHOWN = 4
"""Maximum names of files or folders in a message; the others are counted."""


def _listed(names: tuple[str, ...]) -> str:
    """Quote names for a message: the first ones, and the number of the others."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more


class LfsPointerError(SourceError, ValueError):
    """A file is a pointer of Git LFS: a text of three lines in place of the file.

    Attributes:
        file: name of the file.
        folder: the folder that contains it.
        size: bytes of the file that the pointer stands for; None if the pointer does not state them.
    """

    file: str
    folder: str
    size: int | None
    message = (
        "{file!a}: a Git LFS pointer, not the file{_bytes}; fetch the files with git lfs pull in {folder}, or download"
        " the checkpoint with hf download"
    )

    @property
    def _bytes(self) -> str:
        return "" if self.size is None else f" of {self.size:,} bytes"


class AdapterError(SourceError):
    """The source is an adapter (LoRA), which holds only changes to the weights of another model.

    Attributes:
        source: the adapter.
        files: names of its files.
        base: name of the other model; None if adapter_config.json does not state it.
    """

    source: str
    files: tuple[str, ...]
    base: str | None
    message = (
        "{source}: an adapter ({_files}){_base}, not a model; merge the two first, with peft:"
        " AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
    )

    @property
    def _files(self) -> str:
        return _listed(self.files)

    @property
    def _base(self) -> str:
        return "" if self.base is None else f" for the model {printable(self.base)}"


class OtherFormatError(SourceNotFoundError):
    """The source holds a model in a format that this library does not read.

    Attributes:
        problem: the next step.
        format: name of the format.
        files: names of the files that show it.
    """

    format: str
    files: tuple[str, ...]
    message = "{source}: {format} ({_files}); {problem}"

    @property
    def _files(self) -> str:
        return _listed(self.files)


class NestedCheckpointsError(SourceNotFoundError):
    """The source is a folder around checkpoints: of the Hub cache, of a diffusers pipeline, or any other.

    Attributes:
        problem: kind of the folder.
        checkpoints: the checkpoints in it.
    """

    checkpoints: tuple[str, ...]
    message = "{source}: {problem}; {_advice}"

    @property
    def _advice(self) -> str:
        if not self.checkpoints:
            return "it holds no checkpoint of safetensors shards; pass a folder that does"
        shown = ", ".join(self.checkpoints[:SHOWN])
        more = f" and {len(self.checkpoints) - SHOWN:,} more" if len(self.checkpoints) > SHOWN else ""
        return (
            f"pass {'the checkpoint' if len(self.checkpoints) == 1 else 'one of the checkpoints'} in it: {shown}{more}"
        )


class IncompleteShardsError(SourceError, FileNotFoundError):
    """Numbered shards are missing, and no index lists the others.

    Attributes:
        source: the checkpoint.
        missing: names of the missing shards.
        expected: number of shards that the names state.
        index: name of the missing index.
    """

    source: str
    missing: tuple[str, ...]
    expected: int
    index: str
    message = (
        "{source}: {_count:,} of {expected:,} shards are missing ({_missing}), and there is no {index}; fetch the"
        " checkpoint again"
    )

    @property
    def _count(self) -> int:
        return len(self.missing)

    @property
    def _missing(self) -> str:
        return _listed(self.missing)


class OneShardError(SourceError):
    """The source is one shard of a checkpoint of several shards.

    Attributes:
        source: path of the shard.
        shards: number of shards of the checkpoint.
        folder: the folder that contains them.
    """

    source: str
    shards: int
    folder: str
    message = "{source}: one of {shards:,} shards of a checkpoint; pass the folder {folder}"
