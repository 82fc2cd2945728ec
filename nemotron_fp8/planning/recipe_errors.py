"""Messages about a bad recipe: the field, its value, the values allowed, and the nearest name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from nemotron_fp8._utils import shortened
from nemotron_fp8.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

SIMILARITY = 0.5
"""Least similarity, from 0 to 1, of a misspelled word to its suggestion."""

EXPECTED = {
    "bool_parsing": "True or False",
    "bool_type": "True or False",
    "string_type": "a string",
    "tuple_type": "a tuple of regular expressions such as ('q_proj',)",
}
"""Values that a field accepts, by pydantic's error type."""


def invalid_fields(error: ValidationError, fields: Collection[str]) -> RecipeError:
    """Return the error for the fields of a recipe that pydantic rejects.

    Args:
        error: all findings of pydantic.
        fields: the recipe's field names.
    """
    findings = error.errors(include_url=False)
    names = {str(finding["loc"][0]): None for finding in findings if finding["loc"]}  # in order, once each
    return RecipeError("; ".join(_problem(finding, fields) for finding in findings), tuple(names))


def _problem(finding: ErrorDetails, fields: Collection[str]) -> str:
    name, *position = finding["loc"] or ("",)
    place, value, kind = f"{name}{''.join(f'[{index}]' for index in position)}", finding["input"], finding["type"]
    if kind == "extra_forbidden":
        hint = _nearest(name, fields) or f"; its fields are {', '.join(fields)}"
        return f"a recipe has no field {shortened(name)}{hint}"
    if kind == "literal_error":
        expected = finding["ctx"]["expected"]
        return f"{place} is {shortened(value)}, not {expected}{_nearest(value, expected.split(chr(39))[1::2])}"
    if kind in EXPECTED:
        return f"{place} is {shortened(value)}, not {EXPECTED[kind]}"
    text = finding["msg"].removeprefix("Value error, ")
    return f"{place}: {text}" if place else text


def not_a_recipe(value: object, choices: Mapping[str, Collection[str]]) -> RecipeError:
    """Return the error for an argument that is not a recipe.

    Args:
        value: the argument.
        choices: allowed values of each recipe field; empty for a flag or for free text.
    """
    kind = "a class" if isinstance(value, type) else type(value).__name__
    call = _example(value, choices)
    return RecipeError(f"recipe is {shortened(value)} ({kind}); pass a Recipe, for example {call}", ("recipe",))


def by_name(value: object, choices: Mapping[str, Collection[str]]) -> RecipeError:
    """Return the error for a value that was passed to `Recipe` without the name of its field.

    Args:
        value: the first such value.
        choices: as in `not_a_recipe`.
    """
    call = _example(value, choices)
    return RecipeError(f"a recipe takes fields by their names, not {shortened(value)} alone; write {call}", ())


def _example(value: object, choices: Mapping[str, Collection[str]]) -> str:
    """Return a call that makes a recipe, of the value if it has one of its fields."""
    example: dict[str, Any] = {"granularity": "block"}
    if isinstance(value, dict) and value and set(value) <= set(choices):
        example = value
    elif isinstance(value, str):
        example = next(({name: value} for name, words in choices.items() if value in words), example)
    return f"Recipe({', '.join(f'{name}={shortened(each)}' for name, each in example.items())})"


def _nearest(word: object, words: Collection[str]) -> str:
    found = get_close_matches(word.lower(), list(words), 1, SIMILARITY) if isinstance(word, str) else ()
    return f" (did you mean {found[0]!r}?)" if found else ""
