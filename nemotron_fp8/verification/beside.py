"""Check the files of a result that state its quantization beside config.json: engines may read them first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.inventory import CONFIG
from nemotron_fp8.checkpoint.json_text import same_json
from nemotron_fp8.checkpoint.stated_quantization import states_quantization
from nemotron_fp8.errors import MalformedConfigError, SourceError, printable
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.verification.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.planning.layouts import Layout
    from nemotron_fp8.verification.result_files import ResultFiles


def check_beside(files: ResultFiles, layout: Layout, quantization: Mapping[str, Any]) -> list[Problem]:
    """Compare the files that must state a quantization with the statement of config.json.

    Args:
        files: files of the result.
        layout: layout that config.json describes.
        quantization: ``quantization_config`` of config.json.

    Returns:
        A problem for each file that is missing or says something else, and for each further file that engines may read
        as a statement.
    """
    wanted, names = layout.beside(quantization), files.names()
    problems = [Problem(name, "missing") for name in wanted if name not in names]
    problems += [
        Problem(name, f"states a quantization beside {CONFIG}, which engines may read; no conversion writes it")
        for name in names
        if states_quantization(name) and name not in wanted
    ]
    for name in wanted.keys() & set(names):
        try:
            found = strict_json.load_object(files.read(name), name, MalformedConfigError)
        except SourceError as error:
            problems.append(Problem(name, str(error)))
            continue
        if where := _where(found, wanted[name]):
            problems.append(Problem(name, f"contradicts the quantization_config of {CONFIG} in {printable(where)}"))
    return problems


def _where(found: object, wanted: object, place: str = "") -> str:
    """Return the place of the first difference of two values; empty if they are the same JSON."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return "" if same_json(found, wanted) else place or "its contents"
    for key in (*wanted, *found):
        inner = f"{place}.{key}" if place else str(key)
        if key not in found or key not in wanted:
            return inner
        if where := _where(found[key], wanted[key], inner):
            return where
    return ""
