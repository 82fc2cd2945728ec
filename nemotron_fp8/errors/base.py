"""The base classes, and the errors of a call and of its workers."""

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


def printable(name: str | None, limit: int = 200) -> str:
    """Quote a name from a file so that it is safe on a terminal and in one line, shortened to ``limit``."""
    if name is None or len(name) <= limit:
        return ascii(name)
    return f"{name[:limit]!a}...({len(name)} characters)"


class SourceError(NemotronFp8Error):
    """The source cannot be converted as it is."""

    def say_where(self, place: str) -> None:
        """Put before the message what the file lies in that it names; the attributes stay as they are."""
        self.args = (f"{place}: {self}",)


class DestinationError(NemotronFp8Error):
    """The result cannot be put where it was asked for."""


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
