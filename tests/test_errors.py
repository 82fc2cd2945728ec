"""The error classes: one base, fields that survive, messages of one line that name the values."""

from __future__ import annotations

import inspect
import pickle
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from nemotron_fp8 import NemotronFp8Error, errors

MODULES = [import_module(f"nemotron_fp8.errors.{module.name}") for module in pkgutil.iter_modules(errors.__path__)]
CLASSES = sorted(
    {
        kind
        for module in MODULES
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, NemotronFp8Error) and not kind.__name__.startswith("_")
    },
    key=lambda kind: kind.__name__,
)
ABSTRACT = {
    "CalibrationError",
    "ClusterError",
    "DestinationError",
    "EvaluationError",
    "HubError",
    "NemoArrayError",
    "NemoError",
    "NemotronFp8Error",
    "SourceError",
    "StoreError",
}
"""Bases that no code raises; they have no message."""

BUILTIN = {
    ConnectionError: {"ClusterLostError", "ClusterUnreachableError"},
    FileExistsError: {"DestinationExistsError", "OccupiedPrefixError"},
    FileNotFoundError: {
        "IncompleteShardsError",
        "MissingArrayError",
        "MissingChunkError",
        "MissingShardError",
        "NestedCheckpointsError",
        "OtherFormatError",
        "SourceNotFoundError",
    },
    ImportError: {"MissingExtraError", "RayMissingError"},
    OSError: {"DiskSpaceError", "LocalDiskError", "SourceReadError", "WriteError"},
    ValueError: {
        "AddressError",
        "AmaxesFileError",
        "AmbiguousResultError",
        "ArrayShapeError",
        "BudgetError",
        "CalibrationError",
        "CardError",
        "ChunkSizeError",
        "DeviceError",
        "EvaluationBudgetError",
        "EvaluationBusyError",
        "EvaluationError",
        "EvaluationFileError",
        "EvaluationStateError",
        "ForbiddenPickleError",
        "HeadsError",
        "LayoutError",
        "LfsPointerError",
        "MalformedArchiveError",
        "MalformedArrayError",
        "MalformedConfigError",
        "MalformedDistError",
        "MalformedHeaderError",
        "MalformedIndexError",
        "MalformedManifestError",
        "MalformedTokenizerError",
        "MissingAmaxError",
        "NemoConfigError",
        "NonFiniteCodesError",
        "NonFiniteError",
        "NonFiniteOutputError",
        "OtherAmaxesError",
        "OtherModelError",
        "OtherResultError",
        "OverlapError",
        "RecipeError",
        "SampleError",
        "ScaleError",
        "StaleFiguresError",
        "StoreAddressError",
        "StoreSettingsError",
        "StrayChunkError",
        "TransformersVersionError",
        "UnknownDtypeError",
        "UnrepresentableError",
        "UnsupportedArchitectureError",
    },
}
"""The built-in class that a caller may catch instead."""

SILENT = {
    "AlreadyQuantizedError.fp8",  # these choose the advice
    "PackedWeightsError.fp8",
    "GatedRepoError.has_token",
    "MissingRepoError.has_token",
    "NodeBlindError.on_hub",
    "OtherRunError.final",
    "OtherRunError.what",
    "HeadsError.groups",  # the problem names the two that do not divide
    "HeadsError.heads",
    "HeadsError.hidden",
    "RecipeError.arguments",  # the problem names them
    "DamagedJournalError.line",  # the problem replaces it
    "DiskSpaceError.errno",
    "NodeBlindError.in_store",
    "WriteError.errno",
}
"""Fields whose values a message does not repeat."""


def signature(kind: type[NemotronFp8Error]) -> inspect.Signature:
    """The parameters of a class's constructor: its own, or its fields."""
    own = "__init__" in vars(kind) and kind is not NemotronFp8Error
    return inspect.signature(kind) if own else kind._signature


def samples(kind: type[NemotronFp8Error]) -> dict[str, Any]:
    """One value for each parameter, by its annotation; all different."""
    values: dict[str, Any] = {}
    for number, (name, parameter) in enumerate(signature(kind).parameters.items(), 2):
        values[name] = {
            "str": f"the {name}",
            "str | None": f"the {name}",
            "bool": True,
            "int": 1000 * number,
            "int | None": number,
            "float": float(number * 1000),
            "float | None": float(number * 1000),
            "tuple[int, ...]": (number, number + 1),
            "tuple[str, ...]": ("first.bin", "b.bin"),
        }[str(parameter.annotation)]
    return values


def spellings(value: Any) -> list[str]:
    """Return the spellings of a value that a message may use."""
    if isinstance(value, float):
        return [f"{value:,.0f}", f"{value:.6g}"]
    if isinstance(value, tuple):
        return [str(list(value)), str(value[0])]
    return [f"{value:,}", str(value)] if isinstance(value, int) else [str(value)]


def make(kind: type[NemotronFp8Error]) -> NemotronFp8Error:
    return kind(**samples(kind))


def one_of_ours(values: list[type[NemotronFp8Error]]) -> Any:
    return pytest.mark.parametrize("kind", values, ids=lambda kind: kind.__name__)


every_class = one_of_ours(CLASSES)
every_raised = one_of_ours([kind for kind in CLASSES if kind.__name__ not in ABSTRACT])


@every_class
def test_errors_travel_between_processes(kind: type[NemotronFp8Error]) -> None:
    """Class, message and fields survive pickling by every protocol; so does a message with a place before it."""
    error = make(kind)
    if isinstance(error, errors.SourceError):
        error.add_place("a place")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is kind
        assert str(copy) == str(error)
        assert copy.args == error.args
        assert vars(copy) == vars(error)
        assert getattr(copy, "errno", None) == getattr(error, "errno", None)


@every_raised
def test_the_message_names_the_values(kind: type[NemotronFp8Error]) -> None:
    error = make(kind)
    for name, value in samples(kind).items():
        assert getattr(error, name) == value
        if f"{kind.__name__}.{name}" not in SILENT:
            assert any(text in str(error) for text in spellings(value)), (name, str(error))
    assert str(error).isprintable()
    assert not re.search(r"\{|\}|  |None$", str(error))


@every_raised
def test_values_are_text_and_never_a_template(kind: type[NemotronFp8Error]) -> None:
    """Braces, line ends and terminal codes of a hostile name neither format nor break the line; a huge one is cut."""
    hostile = "\x1b[2J\r\n\u202e{problem}{0.__class__}{" + "x" * 100_000
    values = samples(kind)
    texts = [name for name, value in values.items() if isinstance(value, str)]
    for name in texts:
        error = kind(**(values | {name: hostile}))
        assert getattr(error, name) == hostile
        assert str(error).isprintable()
        assert len(str(error)) < 12_000  # twice the longest, where a message repeats a value
        if f"{kind.__name__}.{name}" not in SILENT and hostile[7:30] not in str(error):
            assert hostile[:1] not in str(error)
            assert name in {"expected", "actual"}  # cut to twelve or sixteen digits


@every_class
def test_constructors_check_their_arguments(kind: type[NemotronFp8Error]) -> None:
    values = list(samples(kind).values())
    assert str(kind(*values)) == str(make(kind))
    with pytest.raises(TypeError):
        kind(*values, "one too many")
    with pytest.raises(TypeError):
        kind(**samples(kind), strange=1)
    required = [p for p in signature(kind).parameters.values() if p.default is inspect.Parameter.empty]
    if required:
        with pytest.raises(TypeError, match=required[-1].name):
            kind(*values[: len(required) - 1])


@every_class
def test_every_field_is_documented(kind: type[NemotronFp8Error]) -> None:
    """In the docstring of the class or of a base; only a field named ``problem`` explains itself."""
    text = "\n".join(str(base.__doc__) for base in kind.__mro__ if issubclass(base, NemotronFp8Error))
    assert kind.__doc__
    for name in {*signature(kind).parameters, *kind._signature.parameters} - {"problem"}:
        assert re.search(rf"^        {name}: \S", text, re.MULTILINE), name


def test_every_class_is_importable_and_documented() -> None:
    """From `nemotron_fp8.errors`; docs/api.md shows each module of that package."""
    assert {kind.__name__ for kind in CLASSES} == {name for name in errors.__all__ if name[0].isupper()}
    assert len(CLASSES) > 85
    page = Path(__file__).parents[1].joinpath("docs", "api.md").read_text(encoding="utf-8")
    for module in MODULES:
        assert f"::: {module.__name__}\n" in page


def test_built_in_bases() -> None:
    """Callers that do not know this library catch the most specific built-in base class, if there is one."""
    expected = {name: builtin for builtin, names in BUILTIN.items() for name in names}
    for kind in CLASSES:
        assert issubclass(kind, NemotronFp8Error)
        found = next((base for base in kind.__mro__ if base.__module__ == "builtins"), None)
        assert found is expected.get(kind.__name__, Exception), kind


def test_permanent_errors_are_those_of_the_source_itself() -> None:
    passing = {"ChangedObjectError", "MissingObjectError", "SourceReadError", "SourceChangedError", "UnsteadyReadError"}
    for kind in CLASSES:
        assert errors.is_permanent(make(kind)) == (
            issubclass(kind, errors.SourceError) and kind.__name__ not in passing
        )
    assert not errors.is_permanent(None)
    assert not errors.is_permanent(OSError())


def test_an_error_outside_of_the_package_takes_part() -> None:
    """A subclass adds fields after those of its bases, with defaults, properties and its own text."""

    class OuterError(errors.HubError, ValueError):
        count: int = 3
        message = "{repo} {count:>3} {_twice}"

        @property
        def _twice(self) -> int:
            return 2 * self.count

    assert str(OuterError("a/b")) == "a/b   3 6"
    assert str(OuterError("a/b", count=4)) == "a/b   4 8"
