"""Model families: one record each. `register_family` adds another."""

from nemotron_fp8.planning.families.base import (
    DEFAULT_FAMILY,
    Family,
    Rename,
    Rule,
    StackedExperts,
    Unread,
    families,
    family_of,
    register_family,
    unregister_family,
    without_aliases,
)
from nemotron_fp8.planning.families.records import RECORDS

__all__ = [
    "DEFAULT_FAMILY",
    "Family",
    "Rename",
    "Rule",
    "StackedExperts",
    "Unread",
    "families",
    "family_of",
    "register_family",
    "unregister_family",
    "without_aliases",
]

for _family in RECORDS:
    register_family(_family)
