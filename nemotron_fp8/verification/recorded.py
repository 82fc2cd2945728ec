"""Recipe or task that the manifest of a result records, as far as this version understands it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8._version import __version__
from nemotron_fp8.documents.model_card import PATTERN_FIELDS
from nemotron_fp8.errors import MalformedManifestError, RecipeError, printable
from nemotron_fp8.planning.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.documents.manifest import Manifest
    from nemotron_fp8.verification.result_files import ResultFiles


PATTERNS = tuple(name for name in PATTERN_FIELDS if name != "force_select")
"""Fields of a recipe that hold regular expressions. Those of a result are a stranger's, who can write one that runs for
years: they are never run."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Record of a result.

    Attributes:
        manifest: the manifest; None without a readable one.
        recipe: its recipe without patterns; None for another task, another version, or an invalid recipe.
        current: True if this version of the library wrote the manifest.
        has_patterns: True if its recipe has patterns.
        invalid: why its recipe is no recipe of this version; empty if it is one, or of another version.
    """

    manifest: Manifest | None = None
    recipe: Recipe | None = None
    current: bool = False
    has_patterns: bool = False
    invalid: str = ""

    @property
    def asked(self) -> Mapping[str, Any]:
        """Recipe or task as recorded; empty without a manifest."""
        return self.manifest.recipe if self.manifest else {}


def read_record(files: ResultFiles) -> Recorded:
    """Read the manifest of a result; one that cannot be read is reported elsewhere, and counts as none."""
    try:
        manifest = files.manifest()
    except MalformedManifestError:
        return Recorded()
    if manifest is None:
        return Recorded()
    asked = manifest.recipe
    # A development version before this one may have the same number; the fields of its recipe tell it apart.
    fields = asked.keys() == Recipe.model_fields.keys() or asked.keys() in ({"task"}, {"task", "dtype"})
    current = manifest.version == __version__ and fields
    recipe, invalid = None, ""
    if manifest.version == __version__ and not fields and not asked.keys() <= Recipe.model_fields.keys():
        invalid = f"{', '.join(sorted(map(printable, asked)))} are not the fields of a recipe"
    if current and "task" not in asked:
        settings: dict[str, Any] = {
            key: tuple(value) if type(value) is list else value
            for key, value in asked.items()
            if key not in PATTERN_FIELDS
        }
        try:
            recipe = Recipe(**settings)
        except RecipeError as error:
            invalid = str(error)
    return Recorded(manifest, recipe, current and not invalid, any(map(asked.get, PATTERNS)), invalid)
