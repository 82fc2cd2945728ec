"""Run plans, jobs and shards that a test has made or changed: the one place in tests/ that knows inner modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.conversion.progress import ConversionProgress
from nemotron_fp8.conversion.run import write_result
from nemotron_fp8.conversion.shard import make_shard
from nemotron_fp8.conversion.workers.base import InProcess, Job
from nemotron_fp8.conversion.workers.processes import Processes
from nemotron_fp8.destinations.base import RunOptions
from nemotron_fp8.destinations.folder import FolderDestination
from nemotron_fp8.destinations.run_identity import run_identity
from nemotron_fp8.documents.render import planned_sizes
from nemotron_fp8.engines.cpu import CpuEngine
from nemotron_fp8.engines.devices import EngineSpec
from nemotron_fp8.hub.options import HubOptions
from nemotron_fp8.sources.base import Source

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.conversion.report import Report
    from nemotron_fp8.conversion.workers.base import WorkerPool
    from nemotron_fp8.destinations.base import OpenDestination
    from nemotron_fp8.engines.base import Engine
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.sources.files import Opener

__all__ = ["NO_PROGRESS", "SPEC", "InProcess", "Job", "Processes", "carry", "engine", "folder_of", "make_shard"]

SPEC = EngineSpec("cpu", 1 << 28)
NO_PROGRESS = ConversionProgress((), None)


def engine() -> Engine:
    """The engine that every machine has."""
    return CpuEngine()


def folder_of(plan: Plan, path: Path, source: Path, threads: int = 1) -> FolderDestination:
    """A folder that a plan is to be written to."""
    return FolderDestination(path, source, run_identity(plan, {}, "folder"), planned_sizes(plan), threads=threads)


def carry(
    plan: Plan,
    opener: Opener,
    destination: OpenDestination,
    workers: WorkerPool | None = None,
    progress: ConversionProgress | None = None,
) -> Report:
    """Make and publish everything that a plan says."""
    return write_result(
        destination,
        Source(plan.inventory, opener, None),
        plan,
        workers or InProcess(SPEC),
        progress or ConversionProgress(plan.shard_tasks, None),
        RunOptions(HubOptions(), SPEC.host_bytes),
    )
