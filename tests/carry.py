"""Carries out plans that a test has made or changed, through the package's own loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.pipeline import _Tally, carry_out
from nemotron_fp8.quantize import CpuEngine

if TYPE_CHECKING:
    from nemotron_fp8.files import Opener
    from nemotron_fp8.plan import Plan
    from nemotron_fp8.unit import Receipt
    from nemotron_fp8.write import Destination


def carry(plan: Plan, opener: Opener, destination: Destination) -> dict[str, Receipt]:
    """Make and publish everything that a plan says."""
    return carry_out(plan, opener, destination, CpuEngine(), _Tally(plan, None))
