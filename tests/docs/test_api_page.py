"""docs/api.md is complete: every public name, every parameter, every field, and every class that they name."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import nemotron_fp8
from nemotron_fp8 import Recipe

PACKAGE = Path(str(nemotron_fp8.__file__)).parent
SHOWN = re.findall(
    r"^::: (nemotron_fp8(?:\.\w+)+)$", (PACKAGE.parent / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
)
INTERNAL = {
    "Inventory": "the plan's own view of the source; `tensors` of the plan has what users need",
    "ShardTask": "the tasks of workers",
}
"""Classes of attributes that are not part of the interface, with the reason."""


def _object(path: str) -> Any:
    """Return the object of an entry of the page; None for a module of errors."""
    home, _, name = path.rpartition(".")
    return getattr(import_module(home), name, None)


ENTRIES = {path: found for path in SHOWN if not inspect.ismodule(found := _object(path)) and found is not None}
FUNCTIONS = [path for path, found in ENTRIES.items() if inspect.isfunction(found)]
CLASSES = [path for path, found in ENTRIES.items() if inspect.isclass(found)]


def section(text: str, title: str) -> dict[str, str]:
    """Return the entries of a section of a docstring in Google's style, by name; ``a, b: text`` describes both."""
    found = re.search(rf"^ *{title}:\n((?: +\S.*\n?|\n)*)", f"{inspect.cleandoc(text)}\n", re.MULTILINE)
    entries: dict[str, str] = {}
    for line in found.group(1).splitlines() if found else ():
        if entry := re.match(r"^    (\w+(?:, \w+)*): (\S.*)", line):
            entries |= dict.fromkeys(entry.group(1).split(", "), entry.group(2))
        elif line and not line.startswith("     "):
            break
    return entries


def test_every_public_name_is_on_the_page() -> None:
    names = {name for name in nemotron_fp8.__all__ if name not in ("__version__", "NemotronFp8Error")}
    assert names <= {path.rpartition(".")[2] for path in SHOWN if path.count(".") == 1}
    assert "nemotron_fp8.errors.base" in SHOWN, "the page of the base of all errors"
    assert len(SHOWN) == len(set(SHOWN))


@pytest.mark.parametrize("path", FUNCTIONS)
def test_every_parameter_is_documented(path: str) -> None:
    """In the order of the signature; with what is returned, and what is raised."""
    found = ENTRIES[path]
    text = str(found.__doc__)
    assert list(section(text, "Args")) == list(inspect.signature(found).parameters)
    assert re.search(r"^ *Returns:\n +\S", text, re.MULTILINE)
    assert re.search(r"^ *Raises:\n +\S", text, re.MULTILINE)


@pytest.mark.parametrize("path", CLASSES)
def test_every_field_and_method_is_documented(path: str) -> None:
    found = ENTRIES[path]
    fields = [field.name for field in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else []
    fields += getattr(found, "_fields", ())
    documented = section(str(found.__doc__), "Attributes")
    assert list(documented) == fields or found is Recipe
    if found is Recipe:
        assert all(field.description for field in Recipe.model_fields.values())
        return
    for name, member in vars(found).items():
        if name.startswith("_") or name in fields or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        assert member.__doc__, f"{path}.{name}"
        if inspect.isfunction(member) and len(parameters := list(inspect.signature(member).parameters)) > 2:
            assert list(section(member.__doc__, "Args")) == parameters[1:], f"{path}.{name}"


def classes_of_the_package() -> set[str]:
    """Return the names of all classes of the package."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py"))
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


OURS = classes_of_the_package()


@pytest.mark.parametrize("path", [*CLASSES, *FUNCTIONS])
def test_every_class_that_is_named_is_on_the_page(path: str) -> None:
    """A reader of a field or of a result finds its class."""
    found = ENTRIES[path]
    annotations = dict(getattr(found, "__annotations__", {}))
    shown = {each.rpartition(".")[2] for each in CLASSES}
    words = {word for text in annotations.values() for word in re.findall(r"\b[A-Z]\w+", str(text))}
    assert words & OURS - INTERNAL.keys() <= shown
