"""Words for the contents of a destination, and for the difference of two recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemotron_fp8._filesystem import names_in
from nemotron_fp8._utils import listed
from nemotron_fp8.checkpoint.inventory import CARD
from nemotron_fp8.checkpoint.local_files import read_small
from nemotron_fp8.documents.front_matter import split_card
from nemotron_fp8.documents.manifest import read_manifest
from nemotron_fp8.errors import MalformedManifestError, SourceError, excerpt, printable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_NONE = object()
SHOWN_FILES = 3
"""Files of a folder that a message names."""
QUANTIZE = "quantize"
"""Task of a recipe; the records of other tasks have a field ``task``."""


def contents_of(path: Path, recipe: Mapping[str, Any] | None = None) -> str:
    """Return what a destination is that cannot be written: a file, a folder with other files, or another result.

    Args:
        path: the destination.
        recipe: recipe or task of the conversion; None if it is not known yet.
    """
    if not path.is_dir():
        return "is a file"
    other = "already holds other files"
    try:
        manifest = read_manifest(path)
    except MalformedManifestError:
        manifest = None
    if manifest is None:
        return f"{other} ({listed([printable(name) for name in names_in(path)], SHOWN_FILES)})"
    task = manifest.recipe.get("task", QUANTIZE)
    what = f"a result of {excerpt(task)[1:-1]} by nemotron_fp8 {manifest.version}{_made_from(path)}"
    if recipe is None:
        return f"{other}: {what}"
    difference = recipe_difference(manifest.recipe, recipe)
    return f"{other}: {what}; {difference or 'its recipe is the same, but its source or its files differ'}"


def _made_from(path: Path) -> str:
    """Return the name of the source that the model card of a result states; empty without one."""
    try:
        named = split_card(read_small(path / CARD))[0].get("base_model")
    except SourceError:
        return ""
    return f", made from {printable(named)[1:-1]}" if isinstance(named, str) else ""


def recipe_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Return how two recipes or tasks differ; empty if they do not.

    Args:
        theirs: fields of the recipe on the disk, or name and options of another task.
        ours: those of the conversion.
    """
    tasks = [fields.get("task", QUANTIZE) for fields in (theirs, ours)]
    if tasks[0] != tasks[1]:
        return f"its task is {excerpt(tasks[0])}, yours {excerpt(tasks[1])}"
    names = [name for name in {**ours, **theirs} if theirs.get(name, _NONE) != ours.get(name, _NONE)]
    different = [f"{printable(name)[1:-1]} is {_setting(theirs, name)}, yours {_setting(ours, name)}" for name in names]
    return f"its recipe differs: {'; '.join(different)}" if different else ""


def _setting(fields: Mapping[str, Any], name: str) -> str:
    return excerpt(fields[name]) if name in fields else "not recorded"
