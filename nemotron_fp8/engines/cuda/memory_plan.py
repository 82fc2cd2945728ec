"""Number and size of the engine's buffers within the memory budgets of host and device. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from nemotron_fp8.errors import BudgetError
from nemotron_fp8.planning.tasks import MIN_SLICE_ELEMENTS, TensorTask

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.number_format import Coverage, NumberFormat
    from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask


PAGE = 4096
"""Alignment of slots and of O_DIRECT reads, in bytes; no file system requires more."""
ALIGN = 256
"""Alignment of tensors on the device in bytes, as in CUDA's allocator; the kernels require 16."""
MAX_SLOT_BYTES = 64 << 20
"""Largest slot in bytes; larger slots only delay the first byte."""
GOOD_SLOT_BYTES = 16 << 20
"""Smallest efficient slot in bytes: the calls for a smaller slot cost as much as its copy."""
MAX_READERS, MAX_WRITERS = 6, 4
"""Maximum threads for reading and for writing; each copies several GB/s between page cache and pinned slots."""
NOTE_STEP = 1 << 16


@dataclass(frozen=True, slots=True)
class RingPlan:
    """The buffers of one worker.

    Attributes:
        readers, writers: threads.
        up_slots, up_bytes: number and bytes of pinned input slots, each with a counterpart on the device.
        down_slots, down_bytes: the same of output slots, half as large.
        notes, note_bytes: number and bytes of pinned slots for amaxes.
        slab_bytes: most bytes on the device for tensors that are held between amax and cast.
    """

    readers: int
    writers: int
    up_slots: int
    up_bytes: int
    down_slots: int
    down_bytes: int
    notes: int
    note_bytes: int
    slab_bytes: int

    @property
    def host_bytes(self) -> int:
        """Bytes of all pinned buffers."""
        return self.up_slots * self.up_bytes + self.down_slots * self.down_bytes + self.notes * self.note_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of all buffers on the device: slots, the largest slab, and the output of a batch of small tensors."""
        return self.up_slots * self.up_bytes + (self.down_slots + 1) * self.down_bytes + self.slab_bytes


def ring_plan(shard_tasks: Iterable[ShardTask], host_bytes: int, device_bytes: int, threads: int) -> RingPlan:
    """Return buffers within the budgets that are large enough for every tensor of some shards.

    Args:
        shard_tasks: tasks of the shards.
        host_bytes: bytes of host memory for the worker.
        device_bytes: bytes on its device.
        threads: threads of the worker.

    Raises:
        BudgetError: a budget is too small for the buffers of some tensor.
    """
    up, worst = 2 * PAGE, ""
    note, largest = NOTE_STEP, ""
    for shard_task in shard_tasks:
        for tensor_task in _works(shard_task):
            if (need := smallest_slot(tensor_task, shard_task.numbers)) > up:
                up, worst = need, tensor_task.view.name
        for group in shard_task.groups:
            if (size := round_up(amax_bytes(group, shard_task.numbers.coverage), NOTE_STEP)) > note:
                note, largest = size, group.id
    notes = 2
    # Two slots in each direction, one being filled while the other is copied, and the slots for amaxes. Output slots
    # are half as large. The device has one more output slot, for the codes of small tensors before they are packed.
    least_host, least_lanes = 3 * up + notes * note, 3 * up + up // 2
    if least_host > host_bytes:
        raise BudgetError(worst or largest, least_host, host_bytes)
    if least_lanes + note > device_bytes:
        option = "max_device_memory (--max-device-memory)"
        raise BudgetError(worst or largest, least_lanes + note, device_bytes, option)
    host_room = host_bytes - notes * note
    # At most half of the device's memory for slots, so that the rest can hold tensors.
    device_room = max(min(device_bytes // 2, device_bytes - note), least_lanes)
    readers, writers = min(MAX_READERS, max(1, threads // 2)), min(MAX_WRITERS, max(1, threads // 2))
    for up_slots, down_slots in ((readers + 2, writers + 2), (4, 4), (3, 3), (2, 2)):
        halves = 2 * up_slots + down_slots
        size = min(2 * host_room // halves, 2 * device_room // (halves + 1), MAX_SLOT_BYTES)
        # An even number of pages, so that half a slot is a whole number of pages.
        size = size // (2 * PAGE) * (2 * PAGE)
        if size >= max(up, GOOD_SLOT_BYTES) or up_slots == 2:
            break
    slab = device_bytes - up_slots * size - (down_slots + 1) * (size // 2)
    return RingPlan(readers, writers, up_slots, size, down_slots, size // 2, notes, note, slab // ALIGN * ALIGN)


def _works(shard_task: ShardTask) -> Iterable[TensorTask]:
    """Yield the tensors that a shard reads: its own, and members of its groups in other shards."""
    yield from shard_task.tensor_tasks
    own = {tensor_task.view.name for tensor_task in shard_task.tensor_tasks}
    yield from (TensorTask(m, group.id) for group in shard_task.groups for m in group.members if m.name not in own)


def smallest_slot(tensor_task: TensorTask, numbers: NumberFormat) -> int:
    """Return the bytes of the smallest input slot for a tensor: an even number of pages.

    The slot holds the smallest slice worth processing, at any offset in a page of its file; half a slot, its codes.
    """
    if tensor_task.group is None or not tensor_task.view.numel:
        return 4 * PAGE
    quantum = tensor_task.row_quantum(numbers)
    elements = min(tensor_task.view.numel, max(quantum, MIN_SLICE_ELEMENTS // quantum * quantum))
    out = round_up(elements, ALIGN)
    if numbers.coverage.fine:
        out = out_bytes(tensor_task.view, elements * tensor_task.view.itemsize, numbers.coverage)
    return round_up(max(elements * tensor_task.view.itemsize + 2 * PAGE, 2 * out), 2 * PAGE)


def amax_bytes(group: ScaleGroup, coverage: Coverage) -> int:
    """Return the bytes of the int32 amaxes that are held for a group."""
    return 4 * prod(coverage.held.scale_shape(group.members[0].shape))


def out_bytes(view: TensorView, nbytes: int, coverage: Coverage) -> int:
    """Return the bytes in an output slot for the codes of whole rows of a tensor, and for their float32 scales.

    Args:
        view: the tensor.
        nbytes: bytes of its rows.
        coverage: elements under one scale.
    """
    count = nbytes // view.itemsize
    rows = view.shape if nbytes == view.nbytes else (count // view.row_elements, view.row_elements)
    return round_up(count, ALIGN) + round_up(4 * prod(coverage.scale_shape(rows)), ALIGN)


def round_up(count: int, step: int) -> int:
    """Return the next multiple of ``step``."""
    return -(-count // step) * step
