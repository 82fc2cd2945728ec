"""Read pickles as inert records, without unpickling.

Nothing in this module calls anything. A class or function that a pickle names becomes a `Global`, a call of it a
`Record` of the name and the arguments; a name outside the caller's list raises an error. Dicts are lists of
pairs, so that no untrusted value is ever hashed or compared. Source of the opcodes: Python's ``pickletools``.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemotron_fp8.errors.nemo import ForbiddenPickleError, MalformedDistError
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Collection


MAX_OPCODES = 20_000_000
"""Cap on the length of a pickle's program; one opcode costs at most some hundred bytes of memory."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES")
)
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclass(frozen=True, slots=True)
class Global:
    """Class or function that a pickle names; never looked up.

    Attributes:
        name: module and name, with a dot between them.
    """

    name: str


@dataclass(slots=True)
class Record:
    """Call of a class or function in a pickle.

    Attributes:
        kind: name of the class or function.
        args: arguments of the call.
        state: state that unpickling would set afterwards.
    """

    kind: str
    args: tuple[Any, ...]
    state: Any = None

    def fields(self) -> dict[str, Any]:
        """Return the attributes of the object, by name."""
        if not isinstance(self.state, Pairs):
            return {}
        return {key: value for key, value in self.state.items if type(key) is str}


@dataclass(slots=True)
class Pairs:
    """Dict of a pickle.

    Attributes:
        items: keys and values, in order.
    """

    items: list[tuple[Any, Any]] = field(default_factory=list)


def read_pickle(data: bytes, file: str, allowed: Collection[str]) -> Any:
    """Return the value that a pickle describes.

    Args:
        data: the pickle.
        file: name of the pickle in errors.
        allowed: names of the classes and functions that may occur.

    Raises:
        ForbiddenPickleError: another class or function occurs.
        MalformedDistError: the pickle is malformed, too long, or uses opcodes that its format does not need.
    """
    with guarded(lambda problem: MalformedDistError(file, f"not a pickle of this format, or truncated: {problem}")):
        return _Machine(file, allowed).run(data)


class _Machine:
    """Stack and memo of one pickle."""

    def __init__(self, file: str, allowed: Collection[str]) -> None:
        self._file, self._allowed = file, allowed
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Run the program."""
        for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise MalformedDistError(self._file, f"the pickle has more than {MAX_OPCODES:,} opcodes, the limit")
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _VALUES:
                self._stack.append(arg)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _TUPLES:
                self._stack.append(self._take(_TUPLES[name]))
            elif name not in ("PROTO", "FRAME"):
                self._step(name, arg)
        raise ValueError("the opcode STOP is missing")

    def _step(self, name: str, arg: Any) -> None:
        stack = self._stack
        if name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[arg])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append(Pairs())
        elif name in ("APPEND", "APPENDS"):
            values = self._to_mark() if name == "APPENDS" else self._take(1)
            self._top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._to_mark() if name == "SETITEMS" else self._take(2)
            self._top(Pairs).items.extend(zip(values[::2], values[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(self._global(arg.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            module, qualified = self._take(2)
            stack.append(self._global(f"{module}.{qualified}"))
        elif name in ("REDUCE", "NEWOBJ"):
            callee, args = self._take(2)
            if type(callee) is not Global or type(args) is not tuple:
                raise ValueError("a call of something other than a class or function")
            stack.append(Record(callee.name, args))
        elif name == "BUILD":
            state = stack.pop()
            self._top(Record).state = state
        elif name == "BINPERSID":
            stack.append(Record("persistent", (stack.pop(),)))
        else:
            raise MalformedDistError(self._file, f"the pickle uses the opcode {name}, which this format does not need")

    def _global(self, name: str) -> Global:
        if name not in self._allowed:
            raise ForbiddenPickleError(self._file, name)
        return Global(name)

    def _top(self, kind: type) -> Any:
        """Return the topmost value; reject a value of another type."""
        if type(self._stack[-1]) is not kind:
            raise ValueError(f"a {type(self._stack[-1]).__name__} in place of a {kind.__name__}")
        return self._stack[-1]

    def _take(self, count: int) -> tuple[Any, ...]:
        """Pop a number of values off the stack."""
        if count > len(self._stack):
            raise ValueError("the stack is empty")
        if not count:
            return ()
        values = tuple(self._stack[-count:])
        if any(value is _MARK for value in values):
            raise ValueError("a mark in place of a value")
        del self._stack[-count:]
        return values

    def _to_mark(self) -> list[Any]:
        """Pop everything above the topmost mark, and the mark."""
        values = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]
