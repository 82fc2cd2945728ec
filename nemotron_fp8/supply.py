"""How a source's bytes come to where shards are made: at hand already, or fetched a little ahead of their use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Self

    from nemotron_fp8.planning.tasks import Unit
    from nemotron_fp8.progress import Transfers


class Supply(Protocol):
    """Has the source's bytes at hand while shards are made. A context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def units(self, left: Sequence[Unit]) -> Iterable[Unit]:
        """The units of ``left``: a sequence where all can be made at once, else one by one as their bytes arrive.

        Raises:
            NemotronFp8Error: while it is iterated over, if bytes cannot be had.
        """

    def done(self, name: str) -> None:
        """Say that a unit is made: what was fetched for it may go."""


class Supplier(Protocol):
    """What makes the supply of a source, for one conversion."""

    def supply(self, largest_output: int, workers: int, transfers: Transfers) -> Supply:
        """Make the supply.

        Args:
            largest_output: bytes of the largest shard that is staged on the same disk; 0 where it is not.
            workers: how many units are in the making at a time.
            transfers: is told what is on its way.
        """

    def room(self, units: Sequence[Unit], largest_output: int, workers: int) -> int:
        """Bytes that such a supply takes of its disk at any one time to have these units made, staged shards too."""


class AtHand:
    """The supply of a local source."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def units(self, left: Sequence[Unit]) -> Sequence[Unit]:
        """See `Supply.units`: all."""
        return left

    def done(self, name: str) -> None:
        """See `Supply.done`: nothing was fetched."""
