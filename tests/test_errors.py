"""The error classes: one base, fields that survive, messages of one line."""

from __future__ import annotations

import inspect
import pickle
from types import FunctionType
from typing import Any

import pytest

from nemotron_fp8 import NemotronFp8Error, errors
from nemotron_fp8.errors import cluster as cluster_errors
from nemotron_fp8.errors import destination

ARGUMENTS: dict[str, Any] = {
    "str": "some text",
    "str | None": "some text",
    "bool": True,
    "int": 7,
    "int | None": 28,
    "float": 0.5,
    "tuple[int, ...]": (1, 2),
    "tuple[str, ...]": ("a.bin", "b.bin"),
}
"""What a constructor is given, by the annotation of its parameter."""

CLASSES = sorted(
    {
        kind
        for module in (errors, destination, cluster_errors)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, BaseException)
    },
    key=lambda kind: kind.__name__,
)


def make(kind: type[BaseException]) -> BaseException:
    """An error of a class, made the way its signature asks for."""
    if not isinstance(kind.__init__, FunctionType):  # the class adds no fields
        return kind("what went wrong")
    return kind(*(ARGUMENTS[str(p.annotation)] for p in inspect.signature(kind).parameters.values()))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_travel_between_processes(kind: type[BaseException]) -> None:
    """One base; class, message and fields survive pickling; the message is one line; a docstring says what for."""
    error = make(kind)
    assert isinstance(error, NemotronFp8Error)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) != ""
    assert vars(copy) == vars(error)
    assert "\n" not in str(error)
    assert kind.__doc__
    assert getattr(copy, "errno", None) == getattr(error, "errno", None)


def test_there_are_many() -> None:
    """Else the test above looked in the wrong place."""
    assert len(CLASSES) > 25
