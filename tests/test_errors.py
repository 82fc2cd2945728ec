"""The error classes: one base, fields that survive, messages of one line."""

from __future__ import annotations

import inspect
import pickle
from types import FunctionType
from typing import Any

import pytest

from nemotron_fp8 import NemotronFp8Error, errors


def every_error() -> list[NemotronFp8Error]:
    """One of every class, made the way its signature asks for."""
    made: list[NemotronFp8Error] = []
    arguments: dict[str, Any] = {
        "tensors": 3,
        "count": 2,
        "position": (1, 2),
        "files": ("a.bin",),
        "before": 1,
        "after": 2,
        "needed": 20,
        "budget": 10,
        "amax": 0.5,
    }
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, NemotronFp8Error):
            plain = not isinstance(kind.__init__, FunctionType)  # the class adds no fields
            names = [] if plain else list(inspect.signature(kind).parameters)
            if not names:
                made.append(kind("what went wrong"))
            else:
                made.append(kind(*(arguments.get(name, f"some {name}") for name in names)))
    return made


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_errors_travel_between_processes(error: NemotronFp8Error) -> None:
    """Class, message and fields survive pickling; the message is one line; the class says what it stands for."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) != ""
    assert vars(copy) == vars(error)
    assert "\n" not in str(error)
    assert type(error).__doc__


def test_every_error_has_one_base() -> None:
    assert len(every_error()) > 20
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, BaseException):
            assert issubclass(kind, NemotronFp8Error), name
