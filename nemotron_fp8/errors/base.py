"""Base classes of all errors, and the errors of a call and of its workers."""

from __future__ import annotations

import copyreg
import signal
from inspect import Parameter, Signature, get_annotations
from itertools import islice
from string import Formatter
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: object) -> Any:
        """Do nothing at run time; type checkers derive each constructor from the fields."""
        return lambda kind: kind


LONGEST = 5000
"""Maximum characters of one value in a message; a path on Linux has at most 4,096."""


def printable(name: str | None, limit: int = 200) -> str:
    """Quote a name from a file for a message: one line of ASCII, truncated to ``limit`` characters."""
    if name is None or len(name) <= limit:
        return ascii(name)
    return f"{name[:limit]!a}...({len(name)} characters)"


def excerpt(value: object, limit: int = 60) -> str:
    """Return a value from outside for a message, like its ``repr``, but cut before it is made.

    A ``repr`` of a value whose parts are shared, or nested deep, can take gigabytes.

    Args:
        value: builtin values; of any other value, its type is named.
        limit: maximum characters of a text in it.
    """
    return _excerpt(value, limit, 2)


_ITEMS = 3
"""Items of a collection that an excerpt shows."""
_BITS = 256
"""Bits of the longest integer that an excerpt shows."""


def _excerpt(value: object, limit: int, depth: int) -> str:
    kind = type(value)
    if kind is str or isinstance(value, str):
        return printable(str(value), limit)
    if kind in (bytes, bytearray):
        whole: bytes = value  # type: ignore[assignment]  # checked
        return repr(bytes(whole[:limit])) + (f"...({len(whole)} bytes)" if len(whole) > limit else "")
    if kind is int:
        number: int = value  # type: ignore[assignment]  # checked
        return str(number) if number.bit_length() <= _BITS else f"an integer of {number.bit_length():,} bits"
    if value is None or kind in (bool, float):
        return repr(value)
    if isinstance(value, (list, tuple, dict)):
        if not value:
            return repr(value)
        if not depth:
            return f"{kind.__name__} of {len(value):,}"
        if isinstance(value, dict):
            parts = [
                f"{_excerpt(key, limit, depth - 1)}: {_excerpt(value[key], limit, depth - 1)}"
                for key in islice(value, _ITEMS)
            ]
        else:
            parts = [_excerpt(item, limit, depth - 1) for item in value[:_ITEMS]]
        parts += ["..."] * (len(value) > _ITEMS)
        begin, end = "{}" if kind is dict else "[]" if kind is list else "()"
        return f"{begin}{', '.join(parts)}{',' * (kind is tuple and len(value) == 1)}{end}"
    return f"a {kind.__name__}"


class _Template(Formatter):
    """Formats messages: ``!a`` quotes like `printable`, tuples are shown as lists, control characters are escaped."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return getattr(args[0], str(key))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion == "a":
            return printable(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        text = format(list(value) if isinstance(value, tuple) else value, format_spec)
        if not text.isprintable():
            text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}...({len(text)} characters)"


@dataclass_transform(eq_default=False)
class NemotronFp8Error(Exception):
    """Base class of all errors of this library; the command line prints an error as one ``error:`` line.

    A subclass declares its fields as annotations, and its text as ``message``: a format template over the fields and
    properties of the error. The constructor accepts the fields in their order, by position or by name.
    """

    message: ClassVar[str] = ""
    _signature: ClassVar[Signature] = Signature()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        fields: dict[str, Parameter] = {}
        for base in reversed(cls.__mro__):
            for name, kind in get_annotations(base).items():
                if not kind.startswith("ClassVar"):
                    default = vars(base).get(name, Parameter.empty)
                    fields[name] = Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
        cls._signature = Signature(list(fields.values()))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values = self._signature.bind(*args, **kwargs)
        values.apply_defaults()
        vars(self).update(values.arguments)
        super().__init__(_Template().vformat(self.message, (self,), {}))

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors are pickled between processes; the default would call __init__ with the message alone.
        return copyreg.__newobj__, (type(self),), {**vars(self), "args": self.args}  # type: ignore[attr-defined]  # untyped


class SourceError(NemotronFp8Error):
    """The source cannot be converted.

    Attributes:
        permanent: True if a second run would fail too; False for failures of a disk and for changing files.
    """

    permanent: ClassVar[bool] = True

    def add_place(self, place: str) -> None:
        """Prefix the message with the place that contains the named file; the fields are unchanged."""
        self.args = (f"{place}: {self}",)


class DestinationError(NemotronFp8Error):
    """The result cannot be written to the destination."""


class RecipeError(NemotronFp8Error, ValueError):
    """The recipe, or another argument, has an unsupported value.

    Attributes:
        arguments: names of the wrong arguments, or of the wrong fields of the recipe; empty if unknown.
    """

    problem: str
    arguments: tuple[str, ...] = ()
    message = "{problem}"


class MissingExtraError(NemotronFp8Error, ImportError):
    """A feature needs a package that is not installed.

    Attributes:
        extra: the extra of this package that installs the missing package.
        package: the missing package.
    """

    extra: str
    package: str
    message = "{package} is not installed; install it with pip install 'nemotron_fp8[{extra}]'"


class BudgetError(NemotronFp8Error, ValueError):
    """The memory budget cannot hold the working buffers.

    Attributes:
        tensor: the tensor that needs the largest buffers.
        needed: bytes of its buffers.
        budget: bytes allowed.
        option: the argument that sets the budget.
    """

    tensor: str
    needed: int
    budget: int
    option: str = "max_memory (--max-memory)"
    message = (
        "tensor {tensor!a}: needs {needed:,} bytes of buffers, {_short:,} more than the budget of {budget:,};"
        " raise {option}"
    )

    @property
    def _short(self) -> int:
        return self.needed - self.budget


class DeviceError(NemotronFp8Error, ValueError):
    """The device does not exist or is not supported, or its name is malformed.

    Attributes:
        device: the requested device.
    """

    device: str
    problem: str
    message = "device {device!a}: {problem}"


class WorkerDiedError(NemotronFp8Error):
    """A worker process died before its work was finished.

    Attributes:
        device: the worker's device.
        shard: the output file that the worker was writing; None before the first shard.
        exit_code: exit status of the worker; the negative signal number if a signal killed it.
    """

    device: str
    shard: str | None
    exit_code: int
    message = "the worker on {device} {_end}{_shard}; {_advice}"

    @property
    def _end(self) -> str:
        if self.exit_code >= 0:
            return f"exited with status {self.exit_code}"
        known = {number.value: number.name for number in signal.Signals}
        return f"was killed by {known.get(-self.exit_code, f'signal {-self.exit_code}')}"

    @property
    def _shard(self) -> str:
        return f" while it wrote {printable(self.shard)}" if self.shard else ""

    @property
    def _advice(self) -> str:
        if self.exit_code == -signal.SIGKILL:
            return "the system kills processes when memory runs out: lower max_memory (--max-memory)"
        if self.exit_code == -signal.SIGBUS:
            return "a source file was truncated during the read: check the source and run again"
        return "see the messages of the worker above"
