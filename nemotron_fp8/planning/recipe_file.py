"""Recipe files: the fields of a recipe as one YAML mapping, each below a comment with its description."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8._version import __version__
from nemotron_fp8.errors import RecipeError, SourceReadError, excerpt, printable
from nemotron_fp8.untrusted import yaml_text
from nemotron_fp8.untrusted.regular_files import read_start

if TYPE_CHECKING:
    from pydantic import BaseModel

    from nemotron_fp8.untrusted.yaml_text import Tree

WIDTH = 100
"""Columns of the comments."""
HEAD = f"# Recipe of nemotron_fp8 {__version__}, for nemotron-fp8 quantize SRC DST --recipe FILE\n"


def read_fields(path: str | os.PathLike[str], model: type[BaseModel]) -> dict[str, Any]:
    """Return the fields that a recipe file names, each checked by itself: others may still be overridden.

    Args:
        path: the file.
        model: the class of the recipe.

    Raises:
        RecipeError: the file cannot be read, is no YAML mapping, names an unknown field or one field twice, or a value
            is unsupported. The message names the file, the field, and the nearest name.
    """
    try:
        data = read_start(Path(path), yaml_text.MAX_BYTES + 1)
    except (SourceReadError, ValueError) as error:  # a null byte in the name
        problem = error.problem if isinstance(error, SourceReadError) else str(error)
        raise refused(path, f"cannot be read: {problem}") from None
    tree = yaml_text.load_mapping(data, lambda problem: refused(path, problem))
    fields = {name: _value(path, name, value, model) for name, value in tree.items()}
    for name, value in fields.items():
        try:
            model(**{name: value})
        except RecipeError as error:
            if name not in model.model_fields or name in error.arguments:
                raise refused(path, error.problem, error.arguments) from None
    return fields


def _value(path: str | os.PathLike[str], name: str, value: Tree, model: type[BaseModel]) -> Any:
    """Return the value of a field with the type that the recipe expects.

    Raises:
        RecipeError: the value has another type.
    """
    field = model.model_fields.get(name)
    if field is None:  # the model names the nearest field
        return value
    shown = "null" if value is None else excerpt(value)
    if isinstance(field.default, bool):
        flag = yaml_text.as_flag(value)
        if flag is None:
            raise refused(path, f"{name} is {shown}, not true or false", (name,))
        return flag
    if isinstance(field.default, tuple):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise refused(path, f"{name} is {shown}, not a list of regular expressions", (name,))
        return tuple(map(str, value))
    return str(value) if isinstance(value, str) else value


def refused(path: str | os.PathLike[str], problem: str, arguments: tuple[str, ...] = ()) -> RecipeError:
    """Return the error for a recipe file.

    Args:
        path: the file.
        problem: what is wrong with it.
        arguments: names of the wrong fields.
    """
    return RecipeError(f"recipe file {printable(os.fspath(path))}: {problem}", arguments)


def fields_text(recipe: BaseModel) -> str:
    """Return a recipe as a file: every field, below its description.

    Args:
        recipe: the recipe.
    """
    parts = [HEAD]
    for name, field in type(recipe).model_fields.items():
        lines = textwrap.wrap(field.description or "", WIDTH - 2, break_long_words=False, break_on_hyphens=False)
        parts.append("".join(f"# {line}\n" for line in lines) + f"{name}: {_written(getattr(recipe, name))}\n")
    return "\n".join(parts)


def is_unedited(data: bytes, recipe: BaseModel) -> bool:
    """Return True if a file is what `fields_text` writes for the recipe that was read from it, or is empty.

    Args:
        data: contents of the file.
        recipe: recipe of the file.
    """
    return not data.strip() or data == fields_text(recipe).encode()


def _written(value: str | bool | tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "".join(f"\n- {_quoted(text)}" for text in value) or "[]"
    plain = value.isascii() and value.replace("-", "").isalnum() and yaml_text.is_text(yaml_text.Plain(value))
    return value if plain and value not in yaml_text.NULLS else _quoted(value)


def _quoted(text: str) -> str:
    """Return a text in double quotes, in ASCII, with the escapes of YAML 1.1."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    if " " <= char <= "~":
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 1 << 8 else f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"
