"""Conversion in place: every shard of a folder is replaced by its FP8 counterpart, one after the other.

A scale may depend on tensors of several shards. All amaxes are therefore computed and saved before the first shard is
replaced, together with the headers, index and config behind the plan. Until the end config.json is unchanged and a
marker file describes the state; the same command resumes from every point. Beside the folder's own files the disk holds
at most one output shard and four bytes for each scale of the shards that are not replaced yet; the memory holds the
amaxes of one shard.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemotron_fp8._filesystem import (
    AMAXES,
    JOURNAL,
    SAVED,
    SMALL_BLOCKS,
    WORKING,
    as_write_error,
    names_in,
    remove,
    space_needed_and_free,
    sync_folder,
)
from nemotron_fp8._utils import listed, peak_resident_bytes
from nemotron_fp8.checkpoint.header import LENGTH_BYTES, read_header
from nemotron_fp8.checkpoint.inventory import AMAXES as AMAXES_FILE
from nemotron_fp8.checkpoint.inventory import (
    CARD,
    CONFIG,
    INDEX,
    MARKER,
    Inventory,
    Shard,
    SideFile,
    assemble,
    is_adapter,
    load_config,
    load_index,
    make_shard,
    without_remnants,
)
from nemotron_fp8.checkpoint.local_files import FileDigest, check_files, read_small, what_differs
from nemotron_fp8.checkpoint.stated_quantization import last_name, states_quantization
from nemotron_fp8.conversion.progress import ConversionProgress
from nemotron_fp8.conversion.report import Report, report_of
from nemotron_fp8.conversion.shard import Measured, measure, write_shard
from nemotron_fp8.destinations.file_sink import commit_file, write_file
from nemotron_fp8.destinations.folder_staging import FolderStaging
from nemotron_fp8.destinations.journal import Journal, Terms, dated, first_entry
from nemotron_fp8.destinations.partial_folder import PartialFolder
from nemotron_fp8.destinations.run_identity import run_identity
from nemotron_fp8.documents.manifest import read_manifest
from nemotron_fp8.documents.render import planned_sizes, with_manifest
from nemotron_fp8.engines.base import as_bytes
from nemotron_fp8.engines.devices import check_engine, open_engine
from nemotron_fp8.errors import SourceError, SourceNotFoundError, is_permanent
from nemotron_fp8.errors.destination import DamagedJournalError, DiskSpaceError, InPlaceError, OtherRunError
from nemotron_fp8.events import emit
from nemotron_fp8.planning.layouts import execution_scales, quantized_dtypes
from nemotron_fp8.planning.receipt import ShardReceipt, nonfinite_rows, parse_nonfinite, receipt_entry
from nemotron_fp8.planning.tasks import files_of_views
from nemotron_fp8.sources.base import Source, local_stamps, stamp
from nemotron_fp8.sources.files import FolderOpener, identify, side_file_pieces
from nemotron_fp8.sources.folder import read_folder
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.sources.reader import Reader
from nemotron_fp8.untrusted.guard import guarded
from nemotron_fp8.untrusted.regular_files import open_regular, read_descriptor, read_start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from nemotron_fp8.destinations.base import RunOptions
    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.engines.base import Engine
    from nemotron_fp8.engines.devices import EngineSpec
    from nemotron_fp8.planning.amaxes import Amaxes
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import NonFinite
    from nemotron_fp8.planning.recipe import Recipe
    from nemotron_fp8.planning.tasks import ShardTask


_LINES = 1024
"""Bytes of the journal for each shard: the digest of its amaxes, and its receipt."""
_MARK = (
    b"This folder is being quantized to FP8 in place: some of its shards are FP8 already, the others are"
    b" not.\nTo finish: nemotron-fp8 quantize FOLDER --in-place, with the same options as before.\n"
)


def convert_in_place(
    root: Path,
    planner: Callable[[Inventory], Plan],
    recipe: Recipe,
    amaxes: Amaxes | None,
    spec: EngineSpec,
    options: RunOptions,
) -> Report:
    """Replace every shard of a folder by its FP8 counterpart.

    A single engine makes the shards, because each shard must replace its original before the next original is touched.

    Args:
        root: the folder.
        planner: makes the plan of an inventory, for the budget of the engine.
        recipe: recipe of the conversion.
        amaxes: amaxes whose scales the result stores; None without a calibration.
        spec: the engine.
        options: options of the conversion.

    Raises:
        SourceError, DestinationError: the subclass names the cause.
        BudgetError, DeviceError: the buffers do not fit the budget, or the device is missing.
    """
    done = finished_inventory(root, recipe, amaxes)
    if done is not None:
        return _unchanged(root, done, amaxes, options)
    with InPlaceFolder(root, restart=options.restart) as folder:
        source = folder.open()
        plan = planner(source.inventory)
        check_engine(spec, plan.shard_tasks)
        emit(
            "run.planned",
            f"{source.label}: {len(plan.shard_tasks)} shards, {len(plan.tensors)} tensors",
            shards=len(plan.shard_tasks),
            tensors=len(plan.tensors),
            bytes_in=plan.bytes_in,
            bytes_out=plan.bytes_out,
        )
        folder.agree(plan, source, run_identity(plan, source.stamps, "in-place"))
        resumed = len(folder.finished())
        progress = ShardCounter(ConversionProgress(plan.shard_tasks, options.progress))
        with open_engine(spec, progress.add) as engine:
            folder.replace_shards(plan, source, engine, progress)
        receipts = folder.finished()
        sizes = folder.side_sizes(side.name for side in plan.inventory.side_files)
        copies = {name: side_file_pieces(source.opener, SideFile(name, size)) for name, size in sizes.items()}
        documents = with_manifest(plan, receipts, copies, options.digests)
        written = sum(r.size for r in receipts.values()) + sum(map(len, documents.values()))
        folder.publish(receipts, documents, copies)
        return report_of(plan, str(folder.root), receipts, written, resumed, options.started)


def _unchanged(root: Path, inventory: Inventory, amaxes: Amaxes | None, options: RunOptions) -> Report:
    """Return the report of a folder that already is the complete result."""
    dtypes = quantized_dtypes(inventory.quantization_config)
    quantized = sum(view.dtype in dtypes for view in inventory.views)
    stored = 0 if amaxes is None else sum(last_name(view.name) in execution_scales() for view in inventory.views)
    return Report(
        destination=str(root),
        tensors_quantized=quantized,
        tensors_kept=len(inventory.views) - 2 * quantized - stored,  # every FP8 tensor has a scale
        bytes_read=sum(shard.size for shard in inventory.shards),
        bytes_written=0,
        seconds=time.monotonic() - options.started,
        peak_resident_bytes=peak_resident_bytes(),
        unchanged=True,
        resumed=0,
        nonfinite=(),
        notices=(),
        left_out=inventory.left_out,
    )


class ShardCounter:
    """Progress of the one shard in progress.

    Args:
        conversion: progress of all shards.

    Attributes:
        shard: name of the shard.
    """

    def __init__(self, conversion: ConversionProgress) -> None:
        self._conversion = conversion
        self.shard = ""

    def add(self, nbytes: int) -> None:
        """Count processed input bytes."""
        self._conversion.add(self.shard, nbytes)

    def skip(self) -> None:
        """Count a shard that an earlier run has finished."""
        self._conversion.skip(self.shard)

    def finish(self, size: int) -> None:
        """Count a shard as processed.

        Args:
            size: bytes of the output file.
        """
        self._conversion.finish(self.shard, size)


class InPlaceFolder:
    """A folder during its conversion in place. A context manager: `open`, `agree`, `replace_shards`, `publish`.

    Args:
        root: the folder.
        restart: True to discard an unfinished run; rejected once a shard is replaced.

    Raises:
        SourceNotFoundError: the folder does not exist.
        DestinationBusyError: another process converts the folder.
        DamagedJournalError, InPlaceError: an unfinished run cannot be resumed.
        WriteError: the operating system rejects a write.
    """

    def __init__(self, root: Path, *, restart: bool = False) -> None:
        self.root = Path(os.path.realpath(root))
        if not self.root.is_dir():
            raise SourceNotFoundError.absent(root)
        self._restart = restart
        self._saved = self.root / WORKING / SAVED
        self._amaxes = self.root / WORKING / AMAXES
        self._journal: Journal | None = None
        self._receipts: dict[str, ShardReceipt] = {}
        self._sizes: dict[str, int] = {}
        self._small: list[int] = []

    def __enter__(self) -> InPlaceFolder:
        self._partial = PartialFolder(self.root / WORKING)
        try:
            self._journal = self._open_journal()
            if self._restart:
                self._start_over()
            if self._journal is None:
                self._partial.restart()  # contains at most the preparations of an interrupted run
        except BaseException as error:
            self._leave(error)
            raise
        return self

    @property
    def marked(self) -> bool:
        """True once the replacement of shards has begun."""
        return os.path.lexists(self.root / MARKER)

    def _open_journal(self) -> Journal | None:
        """Open the journal of an unfinished run; None without a journal, or if a restart discards a damaged one."""
        try:
            with as_write_error(self._partial.path):
                journal = Journal.open(self._partial.journal)
            if journal is not None or not self.marked:
                return journal
            problem = "is missing or empty"
        except DamagedJournalError as error:
            if not self.marked and self._restart:
                return None
            if not self.marked:
                raise
            problem = error.problem
        # Only the journal records the replaced shards, and the amaxes that the other shards need.
        raise InPlaceError(
            str(self.root),
            f"the conversion is unfinished, and its journal {self._partial.journal} cannot be used ({problem}), so it"
            " can be neither resumed nor restarted; restore the journal, or fetch the checkpoint again",
        )

    def _start_over(self) -> None:
        """Discard an unfinished run, if every shard is still the original."""
        if self.marked:
            terms = self._journal.terms if self._journal else None
            now = {name: stamp(identity) for name, identity in identify(self.root).items()}
            stamps = terms.source if terms else {}
            shards = (terms.saved if terms else {}).keys() - {CARD, CONFIG, INDEX}
            if not shards or any(stamps.get(name) != now.get(name) for name in shards):
                raise InPlaceError(str(self.root), "shards are already replaced; resume without restart (--restart)")
            remove(self.root / MARKER)
            with as_write_error(self.root):
                sync_folder(self.root)
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._partial.restart()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if is_permanent(error) and not self.marked and not self._receipts:
            self._partial.discard()
        self._leave(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            if isinstance(error, DiskSpaceError):
                return
            raise DiskSpaceError(str(self.root), *self._room(2 * SMALL_BLOCKS), error.errno) from error

    def _leave(self, error: BaseException | None) -> None:
        self._partial.discard_work()
        if not self.marked:
            self._partial.discard_unused()
        if self._journal is not None:
            self._journal.close()
        self._partial.close(error)

    def open(self) -> Source:
        """Return the folder as a source, with the inventory from before the first replacement.

        Raises:
            SourceError: the folder cannot be converted.
            InPlaceError: a file is a link, or a saved file is damaged.
        """
        if self._journal is None:
            return self._open_new()
        identities = identify(self.root)
        inventory = self._inventory(self._journal.terms)
        opener = FolderOpener(self.root, identities)
        return Source(inventory, opener, self.root, local_stamps(inventory, identities))

    def _open_new(self) -> Source:
        source = open_source(self.root)
        for name in (*(shard.name for shard in source.inventory.shards), INDEX, CONFIG, CARD):
            if (self.root / name).is_symlink():
                raise InPlaceError(
                    str(self.root), f"{name} is a link, as in a Hub cache; convert into a destination instead"
                )
        names = [name for name, _ in source.inventory.left_out]
        if stale := [name for name in names if states_quantization(name)]:
            raise InPlaceError(
                str(self.root),
                f"{listed(stale)}: states another quantization than the result has, and engines would read it; move it"
                " to another folder, or convert into a destination instead",
            )
        notices = source.inventory.notices
        if adapter := [name for name in names if is_adapter(name)]:
            notices += (f"{listed(adapter)}: an adapter, which is not merged into the weights and stays in the folder",)
        return replace(source, inventory=replace(source.inventory, left_out=(), notices=notices))

    def _inventory(self, terms: Terms) -> Inventory:
        """Restore the inventory of the first run from its saved files."""
        side = tuple(SideFile(name, size) for name, size in terms.side)
        shards: list[Shard] = []
        index, weight_map, config, card = None, None, None, None
        for name, (size, digest) in terms.saved.items():
            path = self._saved / name
            length = path.stat().st_size if path.exists() else 0
            if differs := what_differs(path, FileDigest(length, digest)):
                raise InPlaceError(
                    str(self.root),
                    f"the saved copy of {name} in {WORKING} is damaged ({differs}); start over (--restart), or fetch"
                    " the checkpoint again if shards are already replaced",
                )
            if name == CONFIG:
                config = load_config(read_small(path))
            elif name == CARD:
                card = read_small(path)
            elif name == INDEX:
                index, weight_map = load_index(read_small(path))
            else:
                with open_regular(path) as fd:
                    shards.append(make_shard(name, read_header(fd, name, size), size))
        inventory = assemble(str(self.root), tuple(shards), weight_map, index, config, side, ())
        return replace(without_remnants(inventory), card=card, notices=terms.notices)

    def agree(self, plan: Plan, source: Source, terms: RunIdentity) -> None:
        """Check that an unfinished run belongs to this conversion, or start the journal of a new run.

        Raises:
            OtherRunError: the unfinished run has another recipe, or an original shard has changed.
            InPlaceError: a shard is neither the original nor its replacement.
            DiskSpaceError: the disk has too little free space for one output shard.
        """
        self._sizes = {shard_task.name: shard_task.layout.file_size for shard_task in plan.shard_tasks}
        stay = self._sizes.keys() | {side.name for side in source.inventory.side_files}
        self._small = [size for name, size in planned_sizes(plan).items() if name not in stay]
        with as_write_error(self._partial.path):
            if self._journal is not None:
                self._resume(self._journal, terms)
            else:
                # Approximate size of each saved header and of its lines in the journal.
                self._small += [shard_task.layout.data_start for shard_task in plan.shard_tasks]
                self._small += [amax_bytes(shard_task) for shard_task in plan.shard_tasks]
                self._small.append(_LINES * len(plan.shard_tasks))
            needed, free = self._room()
            if needed > free:
                raise DiskSpaceError(str(self.root), needed, free)
            self._partial.begin()
            if self._journal is None:
                self._begin(source, terms)
            else:
                self._journal.append(dated({"kind": "run"}))

    def _begin(self, source: Source, terms: RunIdentity) -> None:
        """Save the files behind the plan, then create the journal."""
        self._saved.mkdir()
        self._amaxes.mkdir()
        saved: dict[str, tuple[int, str]] = {}
        for name in (*self._sizes, *(n for n in (INDEX, CONFIG, CARD) if n in terms.stamps)):
            size, data = _head(self.root / name, whole=name in (INDEX, CONFIG, CARD))
            write_file(self._saved / name, iter([data]), self._partial.work / name)
            saved[name] = size, hashlib.sha256(data).hexdigest()
        sync_folder(self._saved)
        sync_folder(self._partial.path)
        side = [[file.name, file.size] for file in source.inventory.side_files]
        first = first_entry(
            {**terms.entry(), "saved": saved, "side": side, "notices": source.inventory.notices}, "", self._sizes
        )
        self._journal = Journal.create(self._partial.journal, self._partial.work / "journal", first)
        sync_folder(self._partial.path)

    def _resume(self, journal: Journal, terms: RunIdentity) -> None:
        """Find the shards that are already replaced, and finish an interrupted replacement."""
        before = journal.terms.source
        for name, receipt in journal.receipts().items():
            if name not in self._sizes:
                continue
            expected = FileDigest(receipt.size, receipt.sha256)
            if not what_differs(self._partial.out / name, expected):
                self._replace(name)
            elif what_differs(self.root / name, expected):
                if terms.stamps.get(name) != before.get(name):
                    raise InPlaceError(
                        str(self.root), f"{name} is neither the original nor its replacement; restore the file"
                    )
                continue  # the new shard was lost before it replaced the original: make it again
            self._receipts[name] = receipt
        if self._partial.out.is_dir():
            for name in names_in(self._partial.out):
                remove(self._partial.out / name)
        unreplaced = {n: s for n, s in terms.stamps.items() if n in self._sizes and n not in self._receipts}
        try:
            terms.check(journal.entries[0], str(journal.path), unreplaced)
        except OtherRunError as error:
            if self._receipts:
                raise OtherRunError(error.path, error.what, error.problem, final=True) from None
            raise

    def _room(self, small_blocks: int = SMALL_BLOCKS) -> tuple[int, int]:
        """Return the bytes of the largest remaining shard and the small files, and the free bytes."""
        largest = max((size for n, size in self._sizes.items() if n not in self._receipts), default=0)
        return space_needed_and_free(self.root, [largest, *self._small], small_blocks)

    def replace_shards(self, plan: Plan, source: Source, engine: Engine, progress: ShardCounter) -> None:
        """Measure every shard, then make and replace one after the other.

        Args:
            plan: plan of the conversion.
            source: the source that `open` returned.
            engine: computes amaxes and casts.
            progress: counts the shards and the bytes of each.

        Raises:
            SourceError, DestinationError: as `nemotron_fp8.conversion.shard.make_shard`.
        """
        measured = self._measured()
        for shard_task in plan.shard_tasks:
            if shard_task.name not in measured and shard_task.name not in self._receipts:
                progress.shard = shard_task.name
                with Reader(source.opener) as reader:
                    found = measure(shard_task, reader, engine)
                found.scales(shard_task, found.unquantized(shard_task))  # raises before any shard is replaced
                measured[shard_task.name] = self._save(shard_task, found)
        if not self.marked:
            with as_write_error(self.root):
                write_file(self.root / MARKER, iter([_MARK]), self._partial.work / MARKER)
                sync_folder(self.root)
        for shard_task in plan.shard_tasks:
            progress.shard = shard_task.name
            if shard_task.name in self._receipts:
                progress.skip()
                continue
            with Reader(source.opener) as reader:
                found = self._load(shard_task, measured[shard_task.name]) or self._measure_again(
                    shard_task, reader, engine
                )
                receipt = write_shard(shard_task, found, reader, self.staging, engine, progress.add)
            assert receipt is not None  # only a single pass returns None
            self.record(receipt)
            progress.finish(receipt.size)

    def _measured(self) -> dict[str, SavedAmaxes]:
        assert self._journal is not None  # set by agree()
        found: dict[str, SavedAmaxes] = {}
        for number, entry in enumerate(self._journal.entries, 1):
            if entry.get("kind") == "amax":
                damaged = DamagedJournalError(str(self._journal.path), number)
                with guarded(lambda _, damaged=damaged: damaged):  # type: ignore[misc]  # a default binds it
                    found[_text(entry["name"])] = SavedAmaxes.parse(entry)
        return found

    def _save(self, shard_task: ShardTask, measured: Measured) -> SavedAmaxes:
        """Save the amaxes of a shard in a file, and journal its digest."""
        assert self._journal is not None  # set by agree()
        data = amax_data(shard_task, measured)
        saved = SavedAmaxes(FileDigest(len(data), hashlib.sha256(data).hexdigest()), measured.nonfinite)
        with as_write_error(self._journal.path):
            write_file(self._amaxes / shard_task.name, iter([data]), self._partial.work / shard_task.name)
            sync_folder(self._amaxes)
            self._journal.append(dated(saved.entry(shard_task.name)))
        emit("shard.measured", f"{shard_task.name}: measured", shard=shard_task.name)
        return saved

    def _load(self, shard_task: ShardTask, saved: SavedAmaxes) -> Measured | None:
        """Return the saved amaxes of a shard; None if their file is damaged."""
        path = self._amaxes / shard_task.name
        if saved.file.size != amax_bytes(shard_task) or what_differs(path, saved.file):
            return None
        return Measured(parse_amaxes(shard_task, read_start(path, saved.file.size)), saved.nonfinite)

    def _measure_again(self, shard_task: ShardTask, reader: Reader, engine: Engine) -> Measured:
        """Compute the amaxes of a shard again after the loss of their file.

        Raises:
            InPlaceError: they depend on a shard that is already replaced.
        """
        if lost := members_files(shard_task) & self._receipts.keys():
            raise InPlaceError(
                str(self.root),
                f"the amaxes of {shard_task.name} in {WORKING} are damaged, and {listed(sorted(lost))}, on which they"
                " depend, is already replaced; restore the file of amaxes, or fetch the checkpoint again",
            )
        return measure(shard_task, reader, engine)

    def finished(self) -> Mapping[str, ShardReceipt]:
        """Return the receipts of the replaced shards, by name."""
        return dict(self._receipts)

    @property
    def staging(self) -> FolderStaging:
        """Staging of the shards; always with digests, which identify the replaced shards after an interruption."""
        return FolderStaging(self._partial.work, digests=True)

    def record(self, receipt: ShardReceipt) -> None:
        """Make a shard durable, journal its receipt, and replace the original."""
        assert self._journal is not None  # set by agree()
        commit_file(self._partial.work / receipt.name, receipt.size, self._partial.out / receipt.name)
        with as_write_error(self._journal.path):
            self._journal.append(dated(receipt_entry(receipt)))
            self._replace(receipt.name)
            remove(self._amaxes / receipt.name)  # its blocks are free for the next shard
        self._receipts[receipt.name] = receipt

    def _replace(self, name: str) -> None:
        os.rename(self._partial.out / name, self.root / name)
        sync_folder(self.root)

    def side_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Return the sizes of the existing side files."""
        return {n: (self.root / n).stat().st_size for n in names if (self.root / n).is_file()}

    def publish(
        self,
        receipts: Mapping[str, ShardReceipt],
        documents: Mapping[str, bytes],
        copies: Mapping[str, Callable[[], Iterator[bytes]]],
    ) -> None:
        """Write the small files, config.json last, and remove the working folder; side files are left in place."""
        del receipts, copies
        with as_write_error(self.root):
            for name, data in sorted(documents.items(), key=lambda item: item[0] == CONFIG):
                if name == CONFIG:
                    sync_folder(self.root)
                write_file(self.root / name, iter([data]), self._partial.work / name)
            sync_folder(self.root)
            (self.root / MARKER).unlink()
            sync_folder(self.root)
            # Remove the journal first: without journal and marker, a later run discards the rest of the working folder.
            self._partial.journal.unlink()
            sync_folder(self._partial.path)
        self._partial.discard()


def _head(path: Path, *, whole: bool) -> tuple[int, bytes]:
    """Return the size of a file, and its safetensors header or its whole content."""
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        length = os.pread(fd, LENGTH_BYTES, 0)
        return size, read_descriptor(fd, size if whole else LENGTH_BYTES + int.from_bytes(length, "little"))


@dataclass(frozen=True, slots=True)
class SavedAmaxes:
    """Amaxes of a shard in a file, whose memory the run does not hold: they follow the size of the checkpoint.

    Attributes:
        file: size and digest of the file.
        nonfinite: tensors of the groups that hold NaN or Inf.
    """

    file: FileDigest
    nonfinite: tuple[NonFinite, ...]

    def entry(self, name: str) -> dict[str, Any]:
        """Return the entry of the journal."""
        rows = nonfinite_rows(self.nonfinite)
        return {"kind": "amax", "name": name, "size": self.file.size, "sha256": self.file.sha256, "nonfinite": rows}

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> SavedAmaxes:
        """Parse an entry of the journal.

        Raises:
            TypeError, ValueError, LookupError: the entry is malformed.
        """
        size, digest, rows = entry["size"], _text(entry["sha256"]), entry["nonfinite"]
        if type(size) is not int or type(rows) is not list:
            raise TypeError
        return cls(FileDigest(size, digest), tuple([parse_nonfinite(row) for row in rows]))


def _text(value: object) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def amax_shapes(shard_task: ShardTask) -> dict[str, tuple[int, ...]]:
    """Return the shape of the amaxes that are held for every scale group of a shard, by its id."""
    coverage = shard_task.numbers.coverage
    return {group.id: coverage.held.scale_shape(group.members[0].shape) for group in shard_task.groups}


def amax_bytes(shard_task: ShardTask) -> int:
    """Return the bytes of the file of a shard's amaxes: int32 each."""
    return 4 * sum(map(prod, amax_shapes(shard_task).values()))


def amax_data(shard_task: ShardTask, measured: Measured) -> bytes:
    """Return the amaxes of a shard, one group after the other, as int32 in the byte order of this machine."""
    amaxes = (measured.amaxes[group.id] for group in shard_task.groups)
    return b"".join(as_bytes(amax.to("cpu", torch.int32).contiguous()) for amax in amaxes)


def parse_amaxes(shard_task: ShardTask, data: bytes) -> dict[str, torch.Tensor]:
    """Parse the bytes of `amax_data`."""
    shapes = amax_shapes(shard_task)
    values = torch.frombuffer(bytearray(data), dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32)
    parts = torch.split(values, [prod(shape) for shape in shapes.values()])
    return {group: part.reshape(shape) for (group, shape), part in zip(shapes.items(), parts, strict=True)}


def members_files(shard_task: ShardTask) -> frozenset[str]:
    """Return the source files that the amaxes of a shard depend on."""
    views = [member for group in shard_task.groups for member in group.members]
    return files_of_views(views)


def finished_inventory(root: Path, recipe: Recipe, amaxes: Amaxes | None) -> Inventory | None:
    """Return the inventory of a folder that already is the complete result of this recipe and amaxes, else None.

    Only the manifest, the amaxes and the file sizes are compared, so no shard is read; `verify` compares the digests.
    """
    working = root / WORKING
    if os.path.lexists(root / MARKER) or os.path.lexists(working / JOURNAL):
        return None
    try:
        manifest = read_manifest(root)
        if manifest is None or manifest.recipe != recipe.model_dump(mode="json"):
            return None
        sizes = {name: FileDigest(file.size, None) for name, file in manifest.files.items()}
        if check_files(root, sizes, 1) or (AMAXES_FILE in sizes) != (amaxes is not None):
            return None
        if amaxes is not None and read_small(root / AMAXES_FILE) != amaxes.render():
            return None
        inventory = replace(read_folder(root), left_out=())
    except SourceError:
        return None
    if working.is_dir() and not working.is_symlink():  # left by a run that was interrupted during its cleanup
        partial = PartialFolder(working)
        partial.discard()
        partial.close()
    return inventory
