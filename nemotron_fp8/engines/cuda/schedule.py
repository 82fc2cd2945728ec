"""What goes through the ring, slot by slot: which bytes are read when, where they lie, what is done with them.

Pure: a schedule is made from a unit and the sizes of the buffers alone, before anything is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import TYPE_CHECKING

from nemotron_fp8.engines.cuda.memory_plan import ALIGN, PAGE, amax_bytes, round_up
from nemotron_fp8.planning.tasks import TensorTask

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nemotron_fp8.checkpoint.tensor_view import Run, TensorView
    from nemotron_fp8.engines.cuda.memory_plan import RingPlan
    from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask


SMALL_SHARE = 4
"""A tensor under one part in so many of a slot travels with others, whole: one launch for all of a slot."""


class Use(Enum):
    """What is done with a piece."""

    COPY = "written as it is; never seen by the device"
    WHOLE = "a whole small tensor: amax and cast in one launch with its neighbors"
    HOLD = "amax, then kept on the device until the tensor is cast"
    AMAX = "amax only"
    CAST = "cast with an amax that is known"


class Phase(Enum):
    """What a schedule is for."""

    BOTH = "amax and cast"
    AMAX = "amaxes only"
    CAST = "cast with given amaxes"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a tensor in a slot.

    Attributes:
        view: the tensor.
        group: its scale group; None where it is copied.
        use: what is done with it.
        begin, end: its bytes in the tensor.
        at: where they lie in the pinned slot.
        device_at: where they lie on the device, in the slot's counterpart or, for HOLD, in the group's region.
        out_at: where the codes lie in the output slot (WHOLE, CAST).
        scale_at: where the scales lie in the output slot (WHOLE).
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
    """Bytes that lie together in a file and in the slot; ``at`` and ``offset`` agree modulo `PAGE`."""

    file: str
    offset: int
    length: int
    at: int


@dataclass(frozen=True, slots=True)
class Load:
    """One filling of a slot.

    Attributes:
        pieces: what lies in it.
        reads: what to read, in one go each.
        gathered: indices of the pieces whose bytes lie scattered and are gathered one run at a time.
        admits: groups that need their place on the device before this load; all in one block of the slab.
        block_bytes: bytes of that block.
        completes: groups whose amax is complete with it.
        out_bytes: bytes used of the output slot.
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
    """What a group takes of the device's slab.

    Attributes:
        group: its id.
        shape: of its amaxes, int32, which lie at the beginning.
        at: where the region begins in its load's block.
        nbytes: bytes of all.
        chunks: for a group that is held: tensor, bytes of it and where they lie, for each cast.
        casts: casts of the group, after which the region is free.
    """

    group: str
    shape: tuple[int, ...]
    at: int
    nbytes: int
    chunks: tuple[tuple[TensorView, int, int, int], ...] = ()
    casts: int = 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that goes through the ring for one unit.

    Attributes:
        loads: in order.
        regions: by group, of all groups but those of tensors that travel whole.
        empty: groups without elements: nothing of them is read.
    """

    loads: tuple[Load, ...]
    regions: dict[str, Region]
    empty: tuple[str, ...]

    @property
    def slab_bytes(self) -> int:
        """Bytes of slab at which nothing waits for a place."""
        return sum(load.block_bytes for load in self.loads)


def schedule(tensor_tasks: Iterable[TensorTask], shard_task: ShardTask, ring: RingPlan, phase: Phase) -> Schedule:
    """Lay out what goes through a ring.

    A tensor that fits the slab is read once and held between amax and cast; a larger one is read twice.

    Args:
        works: the tensors to emit, in order; with `Phase.AMAX` they are not looked at.
        unit: the unit, with the groups.
        ring: the sizes of the buffers.
        phase: what to do.
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
    return packer.done()


@dataclass
class _Slot:
    """A load in the making; ``earlier`` says whether a group that an earlier load admits has a piece in it."""

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
    """Fills one slot after another."""

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
        shape = self._coverage.scale_shape(group.members[0].shape)
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
        """Give a group its place in the current load's block.

        A load waits for its block before it is read. So it must hold nothing that an earlier block waits for, or
        neither would ever come; and blocks must fit the slab.
        """
        slot = self._slot
        # A tensor that fits a slot whole is not torn in two because of what lies in this one already.
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
        """Schedule all bytes of a tensor, a piece for each slot; return how many pieces."""
        quantum = 1 if use is Use.COPY else TensorTask(view, group).row_quantum(self._numbers) * view.itemsize
        begin, count = 0, 0
        while begin < view.nbytes:
            left = view.nbytes - begin
            room = self._room(view, begin, use)
            # A piece far smaller than what is left is not worth its calls: the next slot takes it.
            if room < min(left, max(quantum, self._ring.up_bytes // 8)):
                self._flush()
                room = self._room(view, begin, use)
            end = begin + (left if room == left else room // quantum * quantum)
            self._put(view, group, use, begin, end, region_at + begin if use is Use.HOLD else None)
            begin, count = end, count + 1
        return count

    def done(self) -> Schedule:
        """Close the last slot."""
        self._flush()
        return Schedule(tuple(self._loads), self._regions, tuple(self._empty))

    def _is_small(self, group: ScaleGroup, local: list[TensorView]) -> bool:
        """Whether a group is one tensor that may travel whole; the batched kernel knows the float32 formula only."""
        view = group.members[0]
        if len(group.members) > 1 or len(local) != 1 or self._numerics != "float32":
            return False
        out = round_up(view.numel, ALIGN) + round_up(amax_bytes(group, self._coverage), ALIGN)
        return (
            view.nbytes + 2 * PAGE <= self._ring.up_bytes // SMALL_SHARE and out <= self._ring.down_bytes // SMALL_SHARE
        )

    def _whole(self, view: TensorView, group: str) -> None:
        scales = 4 * prod(self._coverage.scale_shape(view.shape))
        out = round_up(view.numel, ALIGN) + round_up(scales, ALIGN)
        if self._room(view, 0, Use.AMAX) < view.nbytes or self._slot.out_end + out > self._ring.down_bytes:
            self._flush()
        out_at = self._slot.out_end
        self._put(view, group, Use.WHOLE, 0, view.nbytes, None)
        self._slot.out_end = out_at + out

    def _chunks(self, view: TensorView, group: str, at: int) -> Iterator[tuple[TensorView, int, int, int]]:
        """Casts of a held tensor: as many elements at a time as an output slot takes."""
        quantum = TensorTask(view, group).row_quantum(self._numbers)
        step = max(self._ring.down_bytes // quantum, 1) * quantum * view.itemsize
        for begin in range(0, view.nbytes, step):
            yield view, begin, min(begin + step, view.nbytes), at + begin

    def _place(self, view: TensorView, begin: int, end: int) -> tuple[int, Run | None, bool]:
        """Where bytes of a tensor would lie in the slot, the one run that they are if they are one, and whether
        they go on where the slot's last read ends.
        """
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
        """Bytes of a tensor from ``begin`` on that the slot has room for."""
        slot, ring = self._slot, self._ring
        at, run, _ = self._place(view, begin, view.nbytes)
        # O_DIRECT reads to the end of a page; and a part of what is scattered may lie together, anywhere in a page.
        room = ring.up_bytes - at - (PAGE if run else 2 * PAGE)
        if use in (Use.AMAX, Use.CAST):
            room = min(room, ring.up_bytes - slot.device_end)
        if use is Use.CAST:
            room = min(room, (ring.down_bytes - slot.out_end) * view.itemsize)
        return min(max(room, 0), view.nbytes - begin)

    def _put(self, view: TensorView, group: str | None, use: Use, begin: int, end: int, region_at: int | None) -> None:
        """Put a piece into the slot."""
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
        if use in (Use.WHOLE, Use.AMAX, Use.CAST):
            slot.device_end = round_up(slot.device_end + end - begin, ALIGN)
        if use in (Use.WHOLE, Use.CAST):
            scale_at = slot.out_end = round_up(slot.out_end + (end - begin) // view.itemsize, ALIGN)
        slot.earlier |= use in (Use.HOLD, Use.AMAX, Use.CAST) and group not in slot.admits
        slot.pieces.append(Piece(view, group, use, begin, end, at, device_at, out_at, scale_at))
        slot.end = at + end - begin

    def _flush(self) -> None:
        """Begin the next slot."""
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
