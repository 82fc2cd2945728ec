"""Carries out plans that a test has made or changed, through the package's own loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.conversion.progress import ConversionProgress
from nemotron_fp8.conversion.run import carry_out
from nemotron_fp8.conversion.workers.base import Local
from nemotron_fp8.engines.cpu import CpuEngine
from nemotron_fp8.engines.devices import EngineSpec

if TYPE_CHECKING:
    from nemotron_fp8.destinations.base import Destination
    from nemotron_fp8.engines.base import Engine
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import ShardReceipt
    from nemotron_fp8.sources.files import Opener

SPEC = EngineSpec("cpu", 1 << 28)


def engine() -> Engine:
    """The engine that every machine has."""
    return CpuEngine()


def carry(plan: Plan, opener: Opener, destination: Destination, digests: bool = True) -> dict[str, ShardReceipt]:
    """Make and publish everything that a plan says."""
    return carry_out(plan, opener, destination, Local(SPEC), ConversionProgress(plan, None), digests)
