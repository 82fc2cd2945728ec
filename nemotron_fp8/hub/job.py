"""What a plan means for the Hub: which source shards each step needs whole, and what tells two jobs apart."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import nemotron_fp8
from nemotron_fp8.header import serialise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.plan import Plan
    from nemotron_fp8.recipe import Recipe
    from nemotron_fp8.unit import Unit


def steps_of(units: Sequence[Unit]) -> list[frozenset[str]]:
    """The source files that each unit's own tensors lie in.

    Partners of a scale group that lie elsewhere are not among them: they are read by range.
    """
    return [frozenset(extent.file for work in unit.works for extent in work.view.extents) for unit in units]


def job_digest(plan: Plan, recipe: Recipe, origin: str) -> str:
    """A hash of everything that decides the bytes of a result, hexadecimal.

    Runs with the same one may go on with each other's staged shards: it covers the version of this library, the
    source, the recipe, and the header of every output shard.

    Args:
        plan: the plan.
        recipe: what it was made from.
        origin: what pins the source's content: its commit on the Hub, or a digest of a folder's files.
    """
    digest = hashlib.sha256()
    for part in (nemotron_fp8.__version__, origin, recipe.model_dump_json()):
        digest.update(b"%d " % len(part.encode()) + part.encode())
    for unit in plan.units:
        header = serialise(unit.layout)
        digest.update(b"%d %d " % (len(unit.name.encode()), len(header)) + unit.name.encode() + header)
    return digest.hexdigest()
