"""The whole way: inventory -> plan -> read -> quantise -> write -> index, config; the public functions."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8.budget import parse_bytes, usable_cores
from nemotron_fp8.errors import DestinationExistsError
from nemotron_fp8.plan import Plan, make_plan
from nemotron_fp8.recipe import Recipe
from nemotron_fp8.sources import Source, open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.quantize import Engine
    from nemotron_fp8.read import Opener
    from nemotron_fp8.source import SideFile
    from nemotron_fp8.unit import NonFinite, Receipt
    from nemotron_fp8.write import Destination

DEFAULT_MEMORY = "256MiB"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is.

    Attributes:
        done: input bytes worked on; a tensor that is quantised is read twice and counts twice.
        total: input bytes to work on.
        shard: the output file in the making.
    """

    done: int
    total: int
    shard: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did.

    Attributes:
        destination: where the result is.
        tensors_quantized: tensors that became FP8.
        tensors_kept: tensors that stayed as they were.
        bytes_read: bytes of the source's shards.
        bytes_written: bytes of all files of the result; 0 where it was there already.
        seconds: wall time.
        peak_resident_bytes: the most memory that this process has had resident; None where the system does
            not tell.
        unchanged: whether the destination was this very result already.
        nonfinite: tensors kept because they, or what is fused with them, hold NaN or Inf.
        notices: what a person should know.
        left_out: files of the source that were not copied, each with the reason.
    """

    destination: str
    tensors_quantized: int
    tensors_kept: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_resident_bytes: int | None
    unchanged: bool
    nonfinite: tuple[NonFinite, ...]
    notices: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]


def plan_repo(
    source: str | os.PathLike[str],
    recipe: Recipe | None = None,
    max_memory: str | int = DEFAULT_MEMORY,
    threads: int | None = None,
    shard_size: str | int | None = None,
) -> Plan:
    """Decide everything about a conversion and write nothing.

    Args:
        source: a checkpoint folder.
        recipe: what to quantise and how; the default quantises ``*_proj.weight`` with one scale a tensor.
        max_memory: bytes that the working buffers may take, as a number or like ``"256MiB"``.
        threads: worker threads; None for as many as this process has cores.
        shard_size: as `quantize_repo`.

    Raises:
        SourceError: the source cannot be converted; the class says why.
        BudgetError: the budget is too small for some tensor.
        RecipeError: an argument is not understood.
    """
    return _plan(open_source(source, shard_size), recipe, max_memory, threads)


def _plan(source: Source, recipe: Recipe | None, max_memory: str | int, threads: int | None) -> Plan:
    return make_plan(source.inventory, recipe or Recipe(), parse_bytes(max_memory), threads or usable_cores())


def quantize_repo(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: Recipe | None = None,
    device: str = "auto",
    max_memory: str | int = DEFAULT_MEMORY,
    progress: Callable[[Progress], None] | None = None,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    digests: bool = True,
    shard_size: str | int | None = None,
) -> Report:
    """Quantise a checkpoint folder into a new one, which appears all at once.

    Args:
        source: a checkpoint folder: safetensors shards, with an index if there are several; or a NeMo checkpoint,
            a folder or a ``.nemo`` archive.
        destination: the folder to make. If it already is this very result, nothing is changed.
        recipe: what to quantise and how; the default quantises ``*_proj.weight`` with one scale a tensor.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_memory: bytes that the working buffers may take, as a number or like ``"256MiB"``.
        progress: called now and then, from any thread, with how far the conversion is.
        overwrite: whether to replace another folder at ``destination``; it is exchanged with the result in
            one step.
        threads: worker threads; None for as many as this process has cores.
        digests: whether to take the SHA-256 of every shard.
        shard_size: bytes of tensors in a shard of the result, as a number or like ``"5GB"`` (the default), for a
            NeMo checkpoint; other sources have shards of their own.

    Returns:
        What was done.

    Raises:
        SourceError: the source cannot be converted; the class says why. Nothing is left behind.
        BudgetError, DeviceError, RecipeError: an argument asks for what cannot be.
        DestinationError: the result cannot be put there.
    """
    started = time.monotonic()
    opened = open_source(source, shard_size)
    plan = _plan(opened, recipe, max_memory, threads)
    return _run(opened, plan, destination, device, progress, overwrite, digests, started)


def convert_repo(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    max_memory: str | int = DEFAULT_MEMORY,
    progress: Callable[[Progress], None] | None = None,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    digests: bool = True,
    shard_size: str | int | None = None,
) -> Report:
    """Convert a NeMo checkpoint into a Hugging Face folder that appears all at once; every tensor keeps its dtype.

    Args:
        source: a NeMo checkpoint, a folder or a ``.nemo`` archive; a checkpoint folder is copied.
        destination, max_memory, progress, overwrite, threads, digests, shard_size: as `quantize_repo`.

    Returns:
        What was done.

    Raises:
        SourceError, BudgetError, RecipeError, DestinationError: as `quantize_repo`.
    """
    from nemotron_fp8.convert import plan_convert

    started = time.monotonic()
    opened = open_source(source, shard_size)
    plan = plan_convert(opened.inventory, parse_bytes(max_memory), threads or usable_cores())
    return _run(opened, plan, destination, "cpu", progress, overwrite, digests, started)


def _run(
    opened: Source,
    plan: Plan,
    destination: str | os.PathLike[str],
    device: str,
    progress: Callable[[Progress], None] | None,
    overwrite: bool,
    digests: bool,
    started: float,
) -> Report:
    """Carry out a plan into a folder, or find that the folder is its result already."""

    from nemotron_fp8.compare import ComparingDestination, DifferentError
    from nemotron_fp8.folder import FolderDestination, is_occupied, refuse_overlap
    from nemotron_fp8.quantize import engine_for

    target = Path(os.path.realpath(destination))
    if opened.root is not None:
        refuse_overlap(opened.root, target)
    opener = opened.opener
    tally = _Tally(plan, progress)
    engine = engine_for(device, tally.add)
    unchanged = False
    if is_occupied(target) and target.is_dir() and not overwrite:
        try:
            receipts = carry_out(plan, opener, ComparingDestination(target), engine, tally)
            unchanged = True
        except DifferentError:
            raise DestinationExistsError(str(target), "holds files already, and not this result") from None
    else:
        with FolderDestination(target, opened.root, overwrite=overwrite, digests=digests) as folder:
            receipts = carry_out(plan, opener, folder, engine, tally)
    kept = frozenset().union(*(receipt.kept for receipt in receipts.values()))
    quantised = len(plan.quantised(kept))
    side = sum(file.size for file in plan.inventory.side_files)
    written = sum(r.size for r in receipts.values()) + side + sum(map(len, plan.documents(receipts).values()))
    return Report(
        destination=str(target),
        tensors_quantized=quantised,
        tensors_kept=len(plan.tensors) - quantised,
        bytes_read=sum(shard.size for shard in plan.inventory.shards),
        bytes_written=0 if unchanged else written,
        seconds=time.monotonic() - started,
        peak_resident_bytes=peak_resident_bytes(),
        unchanged=unchanged,
        nonfinite=tuple({f.tensor: f for r in receipts.values() for f in r.nonfinite}.values()),
        notices=(*plan.notices, *_small_scales(receipts)),
        left_out=plan.inventory.left_out,
    )


def _small_scales(receipts: dict[str, Receipt]) -> tuple[str, ...]:
    """A warning where shared scales are so small that an engine's merging loses codes all the same."""
    groups = sorted({group for receipt in receipts.values() for group in receipt.small_scales})
    if not groups:
        return ()
    more = f" and {len(groups) - 4} more" if len(groups) > 4 else ""
    return (
        f"the shared scales of {', '.join(groups[:4])}{more} are under 2^-15: vLLM merges fused tensors through fp16,"
        " where these underflow and lose codes",
    )


def carry_out(
    plan: Plan, opener: Opener, destination: Destination, engine: Engine, tally: _Tally
) -> dict[str, Receipt]:
    """Carry out every unit of a plan, record the receipts, publish once."""
    from nemotron_fp8.execute import execute

    receipts: dict[str, Receipt] = {}
    for unit in plan.units:
        tally.shard = unit.name
        receipts[unit.name] = execute(unit, opener, destination, engine)
    copies = {file.name: _pieces(opener, file) for file in plan.inventory.side_files}
    destination.publish(receipts, plan.documents(receipts), copies)
    return receipts


def _pieces(opener: Opener, side: SideFile, step: int = 1 << 20) -> Callable[[], Iterator[bytes]]:
    """A function that gives the bytes of a source file, a piece at a time."""

    def pieces() -> Iterator[bytes]:
        file = opener.open(side.file or side.name)
        for done in range(0, side.size, step):
            buffer = bytearray(min(step, side.size - done))
            file.read_into(side.offset + done, memoryview(buffer))
            yield bytes(buffer)
        file.close()

    return pieces


class _Tally:
    """Adds up finished slices of all threads for the progress callback."""

    def __init__(self, plan: Plan, progress: Callable[[Progress], None] | None) -> None:
        self._total = sum(t.bytes_in * (2 if t.quantise else 1) for t in plan.tensors)
        self._done = 0
        self._lock = Lock()
        self._progress = progress
        self.shard = ""

    def add(self, count: int) -> None:
        """Count input bytes."""
        if self._progress is None:
            return
        with self._lock:
            self._done += count
            done = self._done
        self._progress(Progress(done, max(done, self._total), self.shard))


def peak_resident_bytes() -> int | None:
    """The most bytes this process has had resident (``VmHWM``); None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
