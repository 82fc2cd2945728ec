"""The rows, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.disk import Refused
from tests.faults.flips import Flips, JournalBytes
from tests.faults.kills import EveryPoint, KilledTwice
from tests.faults.power import PowerLoss

if TYPE_CHECKING:
    from tests.faults.row import Row

ROWS: tuple[Row, ...] = (EveryPoint(), KilledTwice(), PowerLoss(), Refused(), Flips(), JournalBytes())
