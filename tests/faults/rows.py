"""All rows of the fault table, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.disk import Refused
from tests.faults.flips import Flips, JournalBytes
from tests.faults.hostile import Fuzz, Malformed, Names
from tests.faults.kills import EveryPoint, KilledTwice
from tests.faults.model import Sequences
from tests.faults.planted import Planted
from tests.faults.power import PowerLoss
from tests.faults.races import Races, Reader
from tests.faults.scale import ManyShards

if TYPE_CHECKING:
    from tests.faults.row import Row

ROWS: tuple[Row, ...] = (
    Planted(),
    EveryPoint(),
    KilledTwice(),
    PowerLoss(),
    Refused(),
    Malformed(),
    Fuzz(),
    Flips(),
    JournalBytes(),
    Races(),
    ManyShards(),
    Reader(),
    Sequences(),
    Names(),
)
