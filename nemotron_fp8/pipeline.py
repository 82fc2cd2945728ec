"""The whole way: inventory -> plan -> read -> quantise -> write -> index, config; the public functions."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from nemotron_fp8.budget import parse_bytes, usable_cores
from nemotron_fp8.devices import open_engine, resolve_devices
from nemotron_fp8.dtypes import FP8
from nemotron_fp8.errors import DestinationExistsError, RecipeError
from nemotron_fp8.jobs import EngineSpec, Job, Local
from nemotron_fp8.plan import Plan, make_plan
from nemotron_fp8.recipe import Recipe
from nemotron_fp8.rules import listed
from nemotron_fp8.sources import Source, open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nemotron_fp8.jobs import Runner
    from nemotron_fp8.journal import Terms
    from nemotron_fp8.read import Opener
    from nemotron_fp8.source import Inventory
    from nemotron_fp8.unit import NonFinite, Receipt, Unit
    from nemotron_fp8.write import Destination

DEFAULT_MEMORY = "256MiB"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is.

    Attributes:
        done: input bytes worked on; a tensor that is quantised is read twice and counts twice (or more, where other
            shards depend on its amax).
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
        resumed: shards that an earlier run had finished, checked and taken over.
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
    resumed: int
    nonfinite: tuple[NonFinite, ...]
    notices: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]


def plan_repo(
    source: str | os.PathLike[str],
    recipe: Recipe | None = None,
    max_memory: str | int = DEFAULT_MEMORY,
    threads: int | None = None,
) -> Plan:
    """Decide everything about a conversion and write nothing.

    Args:
        source: a checkpoint folder.
        recipe: what to quantise and how; the default quantises ``*_proj.weight`` with one scale a tensor.
        max_memory: bytes that the working buffers may take, as a number or like ``"256MiB"``.
        threads: worker threads; None for as many as this process has cores.

    Raises:
        SourceError: the source cannot be converted; the class says why.
        BudgetError: the budget is too small for some tensor.
        RecipeError: an argument is not understood.
    """
    return _plan(open_source(source), recipe, max_memory, threads)


def _plan(source: Source, recipe: Recipe | None, max_memory: str | int, threads: int | None) -> Plan:
    return make_plan(source.inventory, recipe or Recipe(), parse_bytes(max_memory), threads or usable_cores())


def quantize_repo(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    device: str = "auto",
    max_memory: str | int = DEFAULT_MEMORY,
    progress: Callable[[Progress], None] | None = None,
    *,
    overwrite: bool = False,
    in_place: bool = False,
    restart: bool = False,
    threads: int | None = None,
    digests: bool = True,
    max_device_memory: str | int | None = None,
) -> Report:
    """Quantise a checkpoint folder into a new one, which appears all at once, or in place.

    A run that is stopped, by whatever it may be, is carried on by the same call: it ends with the same bytes
    as one that was not stopped.

    Args:
        source: a checkpoint folder: safetensors shards, with an index if there are several.
        destination: the folder to make; None with ``in_place``. If it already is this very result, nothing
            is changed.
        recipe: what to quantise and how; the default quantises ``*_proj.weight`` with one scale a tensor.
        device: ``auto`` (every CUDA device, else the CPU), ``cpu``, ``cuda``, ``cuda:N`` or a list like
            ``cuda:0,cuda:1``: one worker process for each of several.
        max_memory: bytes that the working buffers of all workers together may take, as a number or like
            ``"256MiB"``.
        progress: called now and then, from any thread, with how far the conversion is.
        overwrite: whether to replace another folder at ``destination``; it is exchanged with the result in
            one step.
        in_place: whether to replace the source's own shards, one after the other. That takes no more room
            than one output shard, and the originals are gone afterwards.
        restart: whether to discard what an unfinished run has left, instead of carrying on with it.
        threads: worker threads; None for as many as this process has cores.
        digests: whether to put the SHA-256 of every file into the manifest. Without, a run that is stopped
            makes its finished shards again.
        max_device_memory: bytes that may be taken on each CUDA device; None for 80% of what is free there.

    Returns:
        What was done.

    Raises:
        SourceError: the source cannot be converted; the class says why. Nothing is left behind, unless it
            could not be read or changed meanwhile.
        BudgetError, DeviceError, RecipeError: an argument asks for what cannot be.
        DestinationError: the result cannot be put there, or an unfinished run cannot be carried on.
        WorkerDiedError: a worker process was killed.
    """
    started = time.monotonic()
    devices = resolve_devices(device)
    # Every worker has its share of the budget and of the threads; a plan is made for one of them.
    spec = EngineSpec(
        devices[0],
        parse_bytes(max_memory) // len(devices),
        None if max_device_memory is None else parse_bytes(max_device_memory),
        max(1, (threads or usable_cores()) // len(devices)),
    )
    run = _Run(recipe or Recipe(), spec, devices, progress, threads or usable_cores(), digests, restart)
    if in_place:
        if destination is not None or overwrite:
            raise RecipeError("in place, there is no destination and nothing to overwrite")
        outcome = run.in_place(Path(source))
    elif destination is None:
        raise RecipeError("no destination; name one, or convert in place (--in-place)")
    else:
        outcome = run.into_folder(source, Path(os.path.realpath(destination)), overwrite)
    inventory, receipts = outcome.inventory, outcome.receipts
    return Report(
        destination=str(outcome.path),
        tensors_quantized=outcome.quantised,
        tensors_kept=outcome.kept,
        bytes_read=sum(shard.size for shard in inventory.shards),
        bytes_written=outcome.bytes_written,
        seconds=time.monotonic() - started,
        peak_resident_bytes=peak_resident_bytes(),
        unchanged=outcome.bytes_written == 0,
        resumed=outcome.resumed,
        nonfinite=tuple({f.tensor: f for r in receipts.values() for f in r.nonfinite}.values()),
        notices=outcome.notices,
        left_out=inventory.left_out,
    )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of a conversion; no bytes are written where the result was there already."""

    path: Path
    inventory: Inventory
    receipts: Mapping[str, Receipt]
    quantised: int
    kept: int
    notices: tuple[str, ...]
    bytes_written: int
    resumed: int


def _outcome(plan: Plan, path: Path, receipts: Mapping[str, Receipt], written: int, resumed: int = 0) -> _Outcome:
    kept = frozenset().union(*(receipt.kept for receipt in receipts.values()))
    quantised = len(plan.quantised(kept))
    rest = len(plan.tensors) - quantised
    notices = (*plan.notices, *_followers(plan, receipts), *_small_scales(receipts))
    return _Outcome(path, plan.inventory, receipts, quantised, rest, notices, written, resumed)


def _followers(plan: Plan, receipts: Mapping[str, Receipt]) -> tuple[str, ...]:
    """A notice for every fused module that stays whole because a part of it is not finite."""
    spoilt = {finding.tensor for receipt in receipts.values() for finding in receipt.nonfinite}
    members: dict[str, dict[str, None]] = {}
    for group in (group for unit in plan.units for group in unit.groups):
        members.setdefault(group.bundle, {}).update((view.name, None) for view in group.members)
    notices = []
    for bundle in sorted(frozenset[str]().union(*(receipt.kept for receipt in receipts.values()))):
        cause = [name for name in members[bundle] if name in spoilt]
        followers = [name for name in members[bundle] if name not in spoilt]
        if followers:
            notices.append(
                f"{bundle}: engines load {listed([*members[bundle]])} as one; {listed(cause)} holds NaN or Inf and"
                f" stays, so {listed(followers)} stays with it"
            )
    return tuple(notices)


def _small_scales(receipts: Mapping[str, Receipt]) -> tuple[str, ...]:
    """A warning where shared scales are so small that an engine's merging loses codes all the same."""
    groups = sorted({group for receipt in receipts.values() for group in receipt.small_scales})
    if not groups:
        return ()
    more = f" and {len(groups) - 4} more" if len(groups) > 4 else ""
    return (
        f"the shared scales of {', '.join(groups[:4])}{more} are under 2^-15: vLLM merges fused tensors through fp16,"
        " where these underflow and lose codes",
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """The arguments that every way of converting takes, and the ways."""

    recipe: Recipe
    spec: EngineSpec
    devices: tuple[str, ...]
    progress: Callable[[Progress], None] | None
    threads: int
    digests: bool
    restart: bool

    def prepare(self, source: Source, mode: str) -> tuple[Plan, _Tally, Terms]:
        """The plan, what counts its progress, and what a later run must agree with."""
        from nemotron_fp8.journal import Terms, plan_digest

        plan = _plan(source, self.recipe, self.spec.host_bytes, self.spec.threads)
        terms = Terms(plan_digest(plan), plan.recipe.model_dump(mode="json"), source.stamps, mode)
        return plan, _Tally(plan, self.progress), terms

    def runner(self, tally: _Tally) -> Runner:
        """What carries out the shards: this process for one device, a process each for several."""
        if len(self.devices) == 1:
            return Local(self.spec, tally.add)
        from nemotron_fp8.multi import Processes

        return Processes([replace(self.spec, device=device) for device in self.devices], tally.add)

    def into_folder(self, source: str | os.PathLike[str], target: Path, overwrite: bool) -> _Outcome:
        """Convert into another folder."""
        from nemotron_fp8.compare import ComparingDestination, DifferentError
        from nemotron_fp8.folder import (
            FolderDestination,
            discard_leftover,
            is_occupied,
            refuse_overlap,
            take_published,
        )
        from nemotron_fp8.manifest import has_digests, planned_sizes

        opened = open_source(source)
        if opened.root is not None:
            refuse_overlap(opened.root, target)
        plan, tally, terms = self.prepare(opened, "folder")
        runner = self.runner(tally)
        if is_occupied(target) and target.is_dir():
            taken = take_published(target, terms, self.threads)
            if taken is not None:
                return _outcome(plan, target, taken, 0, len(taken))
            if not overwrite:
                there = ComparingDestination(target, has_digests(target))
                try:
                    receipts = carry_out(plan, opened.opener, there, runner, tally, there.digests)
                except DifferentError:
                    raise DestinationExistsError(str(target), "holds files already, and not this result") from None
                discard_leftover(target, terms)
                return _outcome(plan, target, receipts, 0)
        destination = FolderDestination(
            target,
            opened.root,
            terms,
            planned_sizes(plan),
            overwrite=overwrite,
            restart=self.restart,
            digests=self.digests,
            threads=self.threads,
        )
        with destination as folder:
            resumed = len(folder.finished())
            receipts = carry_out(plan, opened.opener, folder, runner, tally, self.digests)
            return _outcome(plan, target, receipts, folder.bytes_published, resumed)

    def in_place(self, root: Path) -> _Outcome:
        """Convert a folder in place."""
        from nemotron_fp8.inplace import InPlaceFolder, finished_inventory

        done = finished_inventory(root, self.recipe)
        if done is not None:
            quantised = sum(view.dtype == FP8 for view in done.views)
            kept = len(done.views) - 2 * quantised  # every FP8 tensor has a scale beside it
            return _Outcome(root, done, {}, quantised, kept, (), 0, 0)
        with InPlaceFolder(root, restart=self.restart) as folder:
            opened = folder.open()
            plan, tally, terms = self.prepare(opened, "in-place")
            folder.agree(plan, opened, terms)
            resumed = len(folder.finished())

            shard = ""

            def started(unit: Unit, finished: bool) -> None:
                nonlocal shard
                shard = unit.name
                if finished:
                    tally.skip(unit)

            # One device: the originals go one by one, and each must be replaced before the next is touched.
            with open_engine(self.spec, lambda count: tally.add(shard, count)) as engine:
                folder.convert(plan, opened, engine, started)
            receipts = folder.finished()
            sizes = folder.side_sizes(side.name for side in plan.inventory.side_files)
            copies = {name: _pieces(opened.opener, name, size) for name, size in sizes.items()}
            documents = with_manifest(plan, receipts, copies, self.digests)
            written = sum(r.size for r in receipts.values()) + sum(map(len, documents.values()))
            folder.publish(receipts, documents, copies)
            return _outcome(plan, folder.root, receipts, written, resumed)


def carry_out(
    plan: Plan, opener: Opener, destination: Destination, runner: Runner, tally: _Tally, digests: bool
) -> dict[str, Receipt]:
    """Carry out every unit that is not finished yet, record the receipts in one place, publish once."""
    found = dict(destination.finished())
    left = [unit for unit in plan.units if unit.name not in found]
    for unit in plan.units:
        if unit.name in found:
            tally.skip(unit)
    staging = destination.staging
    with closing(runner.run(Job(unit, opener, staging) for unit in left)) as receipts_as_done:
        for receipt in receipts_as_done:
            destination.record(receipt)
            found[receipt.name] = receipt
    # In the order of the plan, whatever order they were done in.
    receipts = {unit.name: found[unit.name] for unit in plan.units}
    copies = {file.name: _pieces(opener, file.name, file.size) for file in plan.inventory.side_files}
    destination.publish(receipts, with_manifest(plan, receipts, copies, digests), copies)
    return receipts


def with_manifest(
    plan: Plan,
    receipts: Mapping[str, Receipt],
    copies: Mapping[str, Callable[[], Iterator[bytes]]],
    digests: bool,
) -> dict[str, bytes]:
    """The small files that are written anew, with the manifest over all files."""
    from nemotron_fp8.manifest import digests_of, render_manifest
    from nemotron_fp8.source import MANIFEST

    documents = plan.documents(receipts)
    files = digests_of(receipts, documents, copies, digests)
    return {**documents, MANIFEST: render_manifest(plan, files, digests)}


def _pieces(opener: Opener, name: str, size: int, step: int = 1 << 20) -> Callable[[], Iterator[bytes]]:
    """A function that gives the bytes of a source file, a piece at a time."""

    def pieces() -> Iterator[bytes]:
        file = opener.open(name)
        for offset in range(0, size, step):
            buffer = bytearray(min(step, size - offset))
            file.read_into(offset, memoryview(buffer))
            yield bytes(buffer)
        file.close()

    return pieces


class _Tally:
    """Adds up finished slices of all threads for the progress callback."""

    def __init__(self, plan: Plan, progress: Callable[[Progress], None] | None) -> None:
        self._total = sum(map(_work_of, plan.units))
        self._done = 0
        self._lock = Lock()
        self._progress = progress

    def skip(self, unit: Unit) -> None:
        """Count the input bytes of a shard that was finished before."""
        self.add(unit.name, _work_of(unit))

    def add(self, shard: str, count: int) -> None:
        """Count input bytes of a shard."""
        if self._progress is None:
            return
        with self._lock:
            self._done += count
            done = self._done
        self._progress(Progress(done, max(done, self._total), shard))


def _work_of(unit: Unit) -> int:
    """Input bytes to work on: all tensors, and for the amaxes those of every group, wherever its members lie."""
    amaxes = sum(view.nbytes for group in unit.groups for view in group.members)
    return amaxes + sum(work.view.nbytes for work in unit.works)


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
