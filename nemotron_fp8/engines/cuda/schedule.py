"""Schedule of a pass: which bytes go into which slot, in which order, and how they are processed.

Pure: a schedule depends on a shard's task and the sizes of the buffers only, and is made before any file is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from nemotron_fp8.engines.cuda.memory_plan import ALIGN, PAGE, amax_bytes, out_bytes, round_up
from nemotron_fp8.planning.tasks import TensorTask

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nemotron_fp8.checkpoint.tensor_view import Run, TensorView
    from nemotron_fp8.engines.cuda.memory_plan import RingPlan
    from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask


SMALL_SHARE = 4
"""Tensors below this fraction (1/N) of a slot share the slot, and one launch processes all of them."""


class Use(Enum):
    """Processing of a piece."""

    COPY = "written unchanged, without the device"
    WHOLE = "a whole small tensor: amax and cast in one launch with the other tensors of the slot"
    HOLD = "amax, then held on the device until the tensor is cast"
    AMAX = "amax only"
    CAST = "cast with a known amax"
    ROWS = "rows of a tensor with too many scales to hold: amax and cast in one launch"


class Phase(Enum):
    """Purpose of a schedule."""

    BOTH = "amax and cast"
    AMAX = "amaxes only"
    CAST = "cast with given amaxes"


@dataclass(frozen=True, slots=True)
class Piece:
    """A byte range of a tensor in a slot.

    Attributes:
        view: the tensor.
        group: scale group of the tensor; None for a copied tensor.
        use: processing of the piece.
        begin, end: byte range in the tensor.
        at: offset in the pinned slot.
        device_at: offset on the device, in the slot's counterpart or, for HOLD, in the group's region.
        out_at: offset of the codes in the output slot (WHOLE, CAST, ROWS).
        scale_at: offset of the scales in the output slot (WHOLE, ROWS).
    """

    view: TensorView
    group: str | None
    use: Use
    begin: int
    end: int
    at: int
    device_at: int = 0
    out_at: int = 0
    scale_at: int = 0


@dataclass(frozen=True, slots=True)
class Read:
    """A contiguous read from a file into the slot; ``at`` and ``offset`` are equal modulo `PAGE`."""

    file: str
    offset: int
    length: int
    at: int


@dataclass(frozen=True, slots=True)
class Load:
    """Content of a slot.

    Attributes:
        pieces: byte ranges of tensors in the slot.
        reads: contiguous reads that fill the slot.
        gathered: indices of the pieces with scattered bytes, which are gathered run by run.
        admits: groups whose region must be allocated before this load, in one block of the slab.
        block_bytes: bytes of that block.
        completes: groups whose amax is complete after this load.
        out_bytes: used bytes of the output slot.
    """

    pieces: tuple[Piece, ...]
    reads: tuple[Read, ...]
    gathered: tuple[int, ...]
    admits: tuple[str, ...]
    block_bytes: int
    completes: tuple[str, ...]
    out_bytes: int


@dataclass(frozen=True, slots=True)
class Region:
    """Memory of a group in the device's slab.

    Attributes:
        group: id of the group.
        shape: shape of its int32 amaxes, at the beginning of the region.
        at: offset of the region in the block of its load.
        nbytes: bytes of the region.
        chunks: for a held group, the casts: tensor, byte range in the tensor, and offset in the region.
        casts: number of casts, after which the region is free.
    """

    group: str
    shape: tuple[int, ...]
    at: int
    nbytes: int
    chunks: tuple[tuple[TensorView, int, int, int], ...] = ()
    casts: int = 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Schedule of one pass over a shard.

    Attributes:
        loads: contents of the slots, in order.
        regions: region of every group, except of whole small tensors, by group id.
        empty: ids of groups without elements, which are not read.
        reads: times that the bytes of a quantized tensor count as progress.
    """

    loads: tuple[Load, ...]
    regions: dict[str, Region]
    empty: tuple[str, ...]
    reads: int = 2

    @property
    def slab_bytes(self) -> int:
        """Bytes of slab for all blocks at the same time, so that no load waits for a block."""
        return sum(load.block_bytes for load in self.loads)


def schedule(tensor_tasks: Iterable[TensorTask], shard_task: ShardTask, ring: RingPlan, phase: Phase) -> Schedule:
    """Return the schedule of a pass.

    A tensor that fits the slab is read once and held between amax and cast; a larger one is read twice.

    Args:
        tensor_tasks: tensors to emit, in order; ignored with `Phase.AMAX`.
        shard_task: task of the shard, with its groups.
        ring: sizes of the buffers.
        phase: purpose of the pass.
    """
    packer = _Packer(shard_task, ring)
    groups = {group.id: group for group in shard_task.groups}
    tensor_tasks = [] if phase is Phase.AMAX else list(tensor_tasks)
    local: dict[str, list[TensorView]] = {}
    for tensor_task in tensor_tasks:
        if tensor_task.group is not None:
            local.setdefault(tensor_task.group, []).append(tensor_task.view)
    seen: set[str] = set()
    for tensor_task in tensor_tasks:
        if tensor_task.group is None:
            packer.stream(tensor_task.view, None, Use.COPY)
        elif tensor_task.group not in seen:
            seen.add(tensor_task.group)
            packer.group(groups[tensor_task.group], local[tensor_task.group], phase)
    if phase is not Phase.CAST:
        for group in shard_task.groups:
            if group.id not in seen:
                packer.group(group, [], phase)
    return packer.done(2 if phase is Phase.BOTH else 1)


@dataclass
class _Slot:
    """A load under construction; ``earlier`` is True if it holds a piece of a group that an earlier load admits."""

    pieces: list[Piece] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    gathered: list[int] = field(default_factory=list)
    admits: dict[str, None] = field(default_factory=dict)
    earlier: bool = False
    completes: list[str] = field(default_factory=list)
    block_end: int = 0
    end: int = 0
    device_end: int = 0
    out_end: int = 0


class _Packer:
    """Packs pieces into slots, one slot after the other."""

    def __init__(self, shard_task: ShardTask, ring: RingPlan) -> None:
        self._numbers, self._numerics = shard_task.numbers, shard_task.recipe.numerics
        self._coverage = shard_task.numbers.coverage
        self._ring = ring
        self._slot = _Slot()
        self._loads: list[Load] = []
        self._regions: dict[str, Region] = {}
        self._empty: list[str] = []

    def group(self, group: ScaleGroup, local: list[TensorView], phase: Phase) -> None:
        """Schedule a group: amaxes over its members, casts of those in ``local``."""
        if not any(member.numel for member in group.members):
            self._empty.append(group.id)
            return
        if phase is Phase.BOTH and self._is_small(group, local):
            self._whole(local[0], group.id)
            return
        if local and self._coverage.fine and phase is not Phase.AMAX:
            self.stream(local[0], group.id, Use.ROWS)
            return
        shape = self._coverage.held.scale_shape(group.members[0].shape)
        head = round_up(amax_bytes(group, self._coverage), ALIGN)
        names = {view.name for view in local}
        held = head + sum(round_up(view.nbytes, ALIGN) for view in local)
        hold = phase is Phase.BOTH and bool(local) and held <= self._ring.slab_bytes
        region_at = self._admit(group, local, held if hold else head)
        casts = 0
        chunks: list[tuple[TensorView, int, int, int]] = []
        if phase is not Phase.CAST:
            at = head
            for view in group.members:
                if hold and view.name in names:
                    self.stream(view, group.id, Use.HOLD, at)
                    chunks += self._chunks(view, group.id, at)
                    at += round_up(view.nbytes, ALIGN)
                else:
                    self.stream(view, group.id, Use.AMAX)
            self._slot.completes.append(group.id)
        if hold:
            casts = len(chunks)
        elif phase is not Phase.AMAX:
            for view in local:
                casts += self.stream(view, group.id, Use.CAST)
        nbytes = held if hold else head
        self._regions[group.id] = Region(group.id, shape, region_at, nbytes, tuple(chunks), casts)

    def _admit(self, group: ScaleGroup, local: list[TensorView], nbytes: int) -> int:
        """Allocate a group's region in the block of the current load, and return its offset.

        A load waits for its block before it is read. To avoid a deadlock, it must contain no piece that an earlier
        block waits for, and its block must fit the slab.
        """
        slot = self._slot
        # A tensor that fits an empty slot is not split, even if this slot is partly filled.
        size = sum(view.nbytes for view in local)
        fits = size <= self._ring.up_bytes - 2 * PAGE
        torn = bool(local and slot.pieces) and fits and self._room(local[0], 0, Use.HOLD) < size
        if slot.earlier or torn or slot.block_end + nbytes > self._ring.slab_bytes:
            self._flush()
        slot = self._slot
        at, slot.block_end = slot.block_end, slot.block_end + nbytes
        slot.admits[group.id] = None
        return at

    def stream(self, view: TensorView, group: str | None, use: Use, region_at: int = 0) -> int:
        """Schedule all bytes of a tensor, one piece for each slot, and return the number of pieces."""
        quantum = 1 if use is Use.COPY else TensorTask(view, group).row_quantum(self._numbers) * view.itemsize
        begin, count = 0, 0
        while begin < view.nbytes:
            left = view.nbytes - begin
            room = self._room(view, begin, use)
            # A piece much smaller than the rest costs more in calls than it saves: put it into the next slot.
            if room < min(left, max(quantum, self._ring.up_bytes // 8)):
                self._flush()
                room = self._room(view, begin, use)
            end = begin + (left if room == left else room // quantum * quantum)
            self._put(view, group, use, begin, end, region_at + begin if use is Use.HOLD else None)
            begin, count = end, count + 1
        return count

    def done(self, reads: int) -> Schedule:
        """Close the last slot and return the schedule."""
        self._flush()
        return Schedule(tuple(self._loads), self._regions, tuple(self._empty), reads)

    def _is_small(self, group: ScaleGroup, local: list[TensorView]) -> bool:
        """Return True for a group of one small tensor; the batched kernel implements float32 numerics only."""
        view = group.members[0]
        if len(group.members) > 1 or len(local) != 1 or self._numerics != "float32":
            return False
        out = out_bytes(view, view.nbytes, self._coverage)
        return (
            view.nbytes + 2 * PAGE <= self._ring.up_bytes // SMALL_SHARE and out <= self._ring.down_bytes // SMALL_SHARE
        )

    def _whole(self, view: TensorView, group: str) -> None:
        out = out_bytes(view, view.nbytes, self._coverage)
        if self._room(view, 0, Use.AMAX) < view.nbytes or self._slot.out_end + out > self._ring.down_bytes:
            self._flush()
        out_at = self._slot.out_end
        self._put(view, group, Use.WHOLE, 0, view.nbytes, None)
        self._slot.out_end = out_at + out

    def _chunks(self, view: TensorView, group: str, at: int) -> Iterator[tuple[TensorView, int, int, int]]:
        """Yield the casts of a held tensor: as many elements at a time as an output slot holds."""
        quantum = TensorTask(view, group).row_quantum(self._numbers)
        step = max(self._ring.down_bytes // quantum, 1) * quantum * view.itemsize
        for begin in range(0, view.nbytes, step):
            yield view, begin, min(begin + step, view.nbytes), at + begin

    def _place(self, view: TensorView, begin: int, end: int) -> tuple[int, Run | None, bool]:
        """Return the offset of a byte range in the slot, its run or None, and True if it continues the last read."""
        slot = self._slot
        runs = view.runs(begin, end)
        run = next(runs, None)
        if run is None or run.count != 1 or run.item or run.length != end - begin:
            return round_up(slot.end, PAGE), None, False
        if slot.reads:
            last = slot.reads[-1]
            if (last.file, last.offset + last.length, last.at + last.length) == (run.file, run.offset, slot.end):
                return slot.end, run, True
        return round_up(slot.end, PAGE) + run.offset % PAGE, run, False

    def _room(self, view: TensorView, begin: int, use: Use) -> int:
        """Return the number of bytes of a tensor, from ``begin`` on, that fit into the slot."""
        slot, ring = self._slot, self._ring
        at, run, _ = self._place(view, begin, view.nbytes)
        # O_DIRECT reads to the end of a page, and a part of scattered bytes may be contiguous at any offset in a page.
        room = ring.up_bytes - at - (PAGE if run else 2 * PAGE)
        if use in (Use.AMAX, Use.CAST, Use.ROWS):
            room = min(room, ring.up_bytes - slot.device_end)
        if use is Use.CAST:
            room = min(room, (ring.down_bytes - slot.out_end) * view.itemsize)
        if use is Use.ROWS:
            row = view.row_elements * (self._coverage.rows or 1)
            scales = 4 * self._coverage.scale_shape((1, view.row_elements))[1]
            rows = max(ring.down_bytes - slot.out_end - 2 * ALIGN, 0) // (row + scales)
            room = min(room, rows * row * view.itemsize)
        return min(max(room, 0), view.nbytes - begin)

    def _put(self, view: TensorView, group: str | None, use: Use, begin: int, end: int, region_at: int | None) -> None:
        """Add a piece to the slot."""
        slot = self._slot
        at, run, joins = self._place(view, begin, end)
        if run is None:
            slot.gathered.append(len(slot.pieces))
        elif joins:
            last = slot.reads[-1]
            slot.reads[-1] = Read(last.file, last.offset, last.length + run.length, last.at)
        else:
            slot.reads.append(Read(run.file, run.offset, run.length, at))
        device_at = slot.device_end if region_at is None else region_at
        out_at, scale_at = slot.out_end, 0
        if use in (Use.WHOLE, Use.AMAX, Use.CAST, Use.ROWS):
            slot.device_end = round_up(slot.device_end + end - begin, ALIGN)
        if use in (Use.WHOLE, Use.CAST, Use.ROWS):
            scale_at = slot.out_end = round_up(slot.out_end + (end - begin) // view.itemsize, ALIGN)
        if use is Use.ROWS:
            slot.out_end = out_at + out_bytes(view, end - begin, self._coverage)
        slot.earlier |= use in (Use.HOLD, Use.AMAX, Use.CAST) and group not in slot.admits
        slot.pieces.append(Piece(view, group, use, begin, end, at, device_at, out_at, scale_at))
        slot.end = at + end - begin

    def _flush(self) -> None:
        """Close the slot and begin the next one."""
        slot, self._slot = self._slot, _Slot()
        if slot.pieces or slot.admits or slot.completes:
            self._loads.append(
                Load(
                    tuple(slot.pieces),
                    tuple(slot.reads),
                    tuple(slot.gathered),
                    tuple(slot.admits),
                    slot.block_end,
                    tuple(slot.completes),
                    slot.out_end,
                )
            )
