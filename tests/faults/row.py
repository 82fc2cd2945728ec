"""A row of the fault table: its cases, how one runs, and what a run counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@dataclass(frozen=True)
class Share:
    """The share of a row to run.

    Attributes:
        full: everything, or a share that fits a CI job.
        missing: why a tool cannot be used here, by tool.
    """

    full: bool
    missing: Mapping[str, str] = field(default_factory=dict)

    def of(self, full: int, *, ci: int) -> int:
        """The number for this share."""
        return full if self.full else ci


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        wrong: what must not have been.
        counts: what was reached, by name.
    """

    wrong: list[str]
    counts: dict[str, int] = field(default_factory=dict)


class Row:
    """A row of the fault table. ``cases`` runs in one process, ``run`` in several.

    Attributes:
        name: identifier of the row, as pytest and the table show it.
        title: the fault.
        target: number of cases and the required outcome.
        needs: tools of `tests.faults.tools` that it cannot run without.
        partly: tools that some of its cases cannot run without, and what those do; `cases` leaves them out.
    """

    name = ""
    title = ""
    target = ""
    needs: tuple[str, ...] = ()
    partly: Mapping[str, str] = MappingProxyType({})
    alone = False
    """True if its cases must not run beside others."""

    def cases(self, share: Share) -> Iterator[Any]:
        """Yield the cases to run."""
        raise NotImplementedError

    def run(self, case: Any) -> Outcome:
        """Run one case."""
        raise NotImplementedError

    def note(self, counts: Counter[str]) -> str:
        """Return the counts of a row in one line."""
        return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def total(outcomes: Iterable[Outcome]) -> tuple[int, list[str], Counter[str]]:
    """Cases, what was wrong, what was counted."""
    number, wrong, counts = 0, [], Counter[str]()
    for outcome in outcomes:
        number += 1
        wrong += outcome.wrong
        counts.update(outcome.counts)
    return number, wrong, counts
