"""What a plan means for the Hub: which source shards each step needs whole, and what tells two jobs apart."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.journal import Terms
    from nemotron_fp8.unit import Unit


def steps_of(units: Sequence[Unit]) -> list[frozenset[str]]:
    """The source files that each unit's own tensors lie in.

    Partners of a scale group that lie elsewhere are not among them: they are read by range.
    """
    return [frozenset(extent.file for work in unit.works for extent in work.view.extents) for unit in units]


def job_digest(terms: Terms) -> str:
    """What tells jobs apart: a hexadecimal digest of the terms that their runs must agree on."""
    return hashlib.sha256(json.dumps(terms.entry(), sort_keys=True).encode()).hexdigest()
