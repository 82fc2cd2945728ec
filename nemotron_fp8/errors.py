"""Every error this library raises on purpose, under one base class.

Each class stands for one violation and carries the names and numbers of it as attributes, so that a caller
can react without parsing a message. The message itself says what, where and what to do next.
"""

from __future__ import annotations

from typing import Any


class NemotronFp8Error(Exception):
    """Base of every error raised on purpose; the command line prints it as one ``error:`` line."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers in other processes raise these too; the default would call __init__ with the message alone.
        return _restore, (type(self), self.args, self.__dict__, getattr(self, "errno", None))


def _restore(
    kind: type[NemotronFp8Error], args: tuple[object, ...], state: dict[str, object], errno: int | None
) -> NemotronFp8Error:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    if isinstance(error, OSError):  # which keeps it outside of the dictionary
        error.errno = errno
    return error


class SourceError(NemotronFp8Error):
    """The source cannot be converted as it is."""


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


def printable(name: str | None, limit: int = 200) -> str:
    """Quote a name from a file so that it is safe on a terminal and in one line, shortened to ``limit``."""
    if name is None or len(name) <= limit:
        return ascii(name)
    return f"{name[:limit]!a}...({len(name)} characters)"


class SourceNotFoundError(SourceError, FileNotFoundError):
    """The source is no folder with a checkpoint in it.

    Attributes:
        source: what was asked for.
    """

    def __init__(self, source: str, problem: str) -> None:
        self.source = source
        super().__init__(f"{source}: {problem}")


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
        super().__init__(f"{file}: {problem}")


class MalformedConfigError(SourceError, ValueError):
    """config.json is not a JSON object.

    Attributes:
        file: its name.
    """

    def __init__(self, file: str, problem: str) -> None:
        self.file = file
        super().__init__(f"{file}: {problem}")


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


class AlreadyQuantizedError(SourceError):
    """The source is quantised already; quantising codes again would destroy it.

    Attributes:
        evidence: what shows it.
    """

    def __init__(self, source: str, evidence: str) -> None:
        self.evidence = evidence
        super().__init__(
            f"{source}: already quantised ({evidence}); start from the original checkpoint, or make it plain first"
            " with dequantize_repo (nemotron-fp8 dequantize)"
        )


class NotQuantizedError(SourceError):
    """The source holds no FP8 weight to make plain.

    Attributes:
        tensors: how many tensors there are.
    """

    def __init__(self, source: str, tensors: int) -> None:
        self.tensors = tensors
        super().__init__(f"{source}: none of {tensors:,} tensors is F8_E4M3; there is nothing to dequantise")


class LayoutError(SourceError, ValueError):
    """A quantised tensor is laid out as no known format lays it out.

    Attributes:
        tensor: its name.
    """

    def __init__(self, tensor: str, problem: str) -> None:
        self.tensor = tensor
        super().__init__(f"tensor {printable(tensor)}: {problem}")


class StackedExpertsError(SourceError):
    """The experts of a layer are stacked in one tensor, and no engine's names for single ones are known.

    Attributes:
        tensor: the stack.
        shape: its shape.
    """

    def __init__(self, tensor: str, shape: tuple[int, ...]) -> None:
        self.tensor, self.shape = tensor, shape
        super().__init__(
            f"tensor {printable(tensor)} {list(shape)}: stacked experts of a family whose names for single experts are"
            f" not known; leave them as they are with ignore (--ignore '{tensor.rsplit('.', 1)[-1]}'), or save the"
            " checkpoint with one tensor for each expert"
        )


class NothingSelectedError(SourceError):
    """No tensor would be quantised.

    Attributes:
        tensors: how many tensors there are.
    """

    def __init__(self, source: str, tensors: int, hint: str) -> None:
        self.tensors = tensors
        super().__init__(f"{source}: none of {tensors:,} tensors is selected for FP8; {hint}")


class NonFiniteError(SourceError, ValueError):
    """A tensor to be quantised holds NaN or Inf.

    Attributes:
        tensor: its name.
        count: how many of its elements.
        position: index of the first, one number a dimension.
    """

    def __init__(self, tensor: str, count: int, position: tuple[int, ...], value: str) -> None:
        self.tensor, self.count, self.position, self.value = tensor, count, position, value
        where = ", ".join(map(str, position))
        super().__init__(
            f"tensor {printable(tensor)}: {count:,} values are NaN or Inf, the first ({value}) at [{where}];"
            " nonfinite='keep' (--nonfinite keep) leaves such tensors as they are"
        )


class UnrepresentableError(SourceError, ValueError):
    """The original numerics cannot quantise this fp16 tensor: its multiplier overflows.

    Attributes:
        tensor: its name.
        amax: its largest absolute value.
    """

    def __init__(self, tensor: str, amax: float) -> None:
        self.tensor, self.amax = tensor, amax
        super().__init__(
            f"tensor {printable(tensor)}: in fp16 448 / {amax:.6g} overflows, and the original script"
            " writes garbage; use numerics 'float32'"
        )


class UnsteadyReadError(SourceError):
    """Shards that share a scale group do not find the same in it, however often they are made.

    Attributes:
        shard: one of them.
        group: the scale group.
        attempts: how often they were made.
    """

    def __init__(self, shard: str, group: str, attempts: int) -> None:
        self.shard, self.group, self.attempts = shard, group, attempts
        super().__init__(
            f"{printable(shard)}: the scale of {printable(group)} came out otherwise than in another shard,"
            f" {attempts} times; look for a disk, memory or a proxy that alters data, then run again"
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


def is_hopeless(error: BaseException | None) -> bool:
    """Whether a source can never be converted: running again would end the same way."""
    return isinstance(error, SourceError) and not isinstance(
        error, (SourceReadError, SourceChangedError, UnsteadyReadError)
    )


class RecipeError(NemotronFp8Error, ValueError):
    """The recipe, or another argument, asks for something that is not offered."""


class MissingExtraError(NemotronFp8Error, ImportError):
    """Something was asked for that needs a package which is not installed.

    Attributes:
        extra: the extra of this package that brings it.
        package: what is missing.
    """

    def __init__(self, extra: str, package: str) -> None:
        self.extra, self.package = extra, package
        super().__init__(f"{package} is not installed; pip install 'nemotron_fp8[{extra}]' brings it")


class BudgetError(NemotronFp8Error, ValueError):
    """The memory budget cannot hold the working buffers.

    Attributes:
        tensor: the tensor that needs the most.
        needed: bytes that it needs.
        budget: bytes allowed.
        option: the argument that allows more.
    """

    def __init__(self, tensor: str, needed: int, budget: int, option: str = "max_memory (--max-memory)") -> None:
        self.tensor, self.needed, self.budget, self.option = tensor, needed, budget, option
        super().__init__(
            f"tensor {printable(tensor)}: needs {needed:,} bytes of buffers, {needed - budget:,} more"
            f" than the budget of {budget:,}; raise {option}"
        )


class DeviceError(NemotronFp8Error, ValueError):
    """The device asked for is not there, or its name is not understood.

    Attributes:
        device: what was asked for.
    """

    def __init__(self, device: str, problem: str) -> None:
        self.device = device
        super().__init__(f"device {printable(device)}: {problem}")


class DestinationError(NemotronFp8Error):
    """The result cannot be put where it was asked for."""


class DestinationExistsError(DestinationError, FileExistsError):
    """The destination holds something else already.

    Attributes:
        path: the destination.
    """

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}; choose another destination or overwrite it (--overwrite)")


class OverlapError(DestinationError, ValueError):
    """Source and destination lie inside each other.

    Attributes:
        source, destination: the two paths, resolved.
    """

    def __init__(self, source: str, destination: str) -> None:
        self.source, self.destination = source, destination
        super().__init__(f"{destination}: lies in the source, or the source in it ({source}); choose a folder apart")


class DestinationBusyError(DestinationError):
    """Another process is making this destination.

    Attributes:
        path: its partial folder.
        owner: who that is, as far as is known.
    """

    def __init__(self, path: str, owner: str = "") -> None:
        self.path, self.owner = path, owner
        who = owner or "another process"
        super().__init__(f"{path}: in use by {who}, which makes the same destination; wait for it")


class WriteError(DestinationError, OSError):
    """The destination cannot be written.

    Attributes:
        path: the file.
        errno: the system's number of the error; None where the system did not refuse.
    """

    def __init__(self, path: str, problem: str, errno: int | None = None) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")
        self.errno = errno


class UnfinishedError(SourceError):
    """The folder is half-way through a conversion in place: some shards are FP8, others are not.

    Attributes:
        source: the folder.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        super().__init__(
            f"{source}: half-way through a conversion in place; finish it first (nemotron-fp8 quantize"
            f" {source} --in-place, with the same options)"
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


class WorkerDiedError(NemotronFp8Error):
    """A worker process ended before its work was done.

    Attributes:
        device: the device it worked on.
        shard: the output file it was making; None before the first.
        exit_code: its exit status; negative for the signal that killed it.
    """

    def __init__(self, device: str, shard: str | None, exit_code: int) -> None:
        self.device, self.shard, self.exit_code = device, shard, exit_code
        how = f"ended with status {exit_code}" if exit_code >= 0 else f"was killed by {_signal(-exit_code)}"
        at = f" while it made {printable(shard)}" if shard else ""
        hint = _SIGNAL_HINTS.get(-exit_code, "; see its messages above")
        super().__init__(f"the worker on {device} {how}{at}{hint}")


_SIGNAL_HINTS = {
    9: "; where memory is short, the system does this: lower max_memory (--max-memory)",
    7: "; a source file was cut short while it was read: check it and run again",
}
"""What a killing signal most often means (9 SIGKILL, 7 SIGBUS on Linux)."""


def _signal(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
