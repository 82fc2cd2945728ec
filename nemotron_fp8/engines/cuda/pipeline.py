"""Pipeline of one pass over a shard: reader threads, one uploading thread, one casting thread, writer threads.

::

    readers ──up slots──▶ uploader ─────────▶ caster ──down slots──▶ writers
              (pinned)     H2D stream,         compute stream,        (pinned)
                           compute: amax       D2H stream

No deadlock is possible. The reader of the next load acquires its block of the slab and its up slot, in the order of the
loads. An up slot is freed without acquiring another resource, unless its pieces are cast, which acquires a down slot.
A writer frees a down slot and acquires nothing.
"""

from __future__ import annotations

from contextlib import suppress
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.engines.base import matrix, scale_row, scale_rows
from nemotron_fp8.engines.cuda.messages import AmaxCopy, Arrivals, Block, CodesCopy, Group, Part
from nemotron_fp8.engines.cuda.ring import Channel, DeviceArena, Ring, ThreadGroup
from nemotron_fp8.engines.cuda.schedule import Use
from nemotron_fp8.engines.cuda.slot_reader import SlotReader
from nemotron_fp8.sources.reader import TORCH_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.engines.base import Emit, PutScale
    from nemotron_fp8.engines.cuda.buffers import Buffers
    from nemotron_fp8.engines.cuda.device import Device, Event
    from nemotron_fp8.engines.cuda.ring import Slot
    from nemotron_fp8.engines.cuda.schedule import Load, Piece, Schedule
    from nemotron_fp8.planning.number_format import Coverage
    from nemotron_fp8.planning.tasks import ShardTask
    from nemotron_fp8.sources.reader import Reader


class Pipeline:
    """One pass over a shard.

    Args:
        device: the device.
        buffers: buffers of the engine.
        schedule: schedule of the pass.
        shard_task: task of the shard.
        reader: reads the source.
        put_amax: called with the amaxes of every group with a region, before its bytes are emitted.
        put_scale: called with the scales that a kernel computes with the codes, before their bytes: of whole small
            tensors, and of rows of tensors with too many scales to hold.
        emit: receives the output bytes.
        progress: called with finished input bytes.
        amaxes: known amaxes of groups that are only cast, by group id.
    """

    def __init__(
        self,
        device: Device,
        buffers: Buffers,
        schedule: Schedule,
        shard_task: ShardTask,
        reader: Reader,
        put_amax: PutScale,
        put_scale: PutScale,
        emit: Emit,
        progress: Callable[[int], None],
        amaxes: Mapping[str, torch.Tensor],
    ) -> None:
        self._device, self._plan, self._slab_memory = device, buffers.plan, buffers.slab
        self._schedule, self._recipe, self._amaxes = schedule, shard_task.recipe, amaxes
        self._put_amax, self._put_scale, self._emit, self._progress = put_amax, put_scale, emit, progress
        self._numbers, self._coverage, self._refused = shard_task.numbers, shard_task.numbers.coverage, False
        self._code_dtype = TORCH_DTYPES[shard_task.numbers.element.dtype]
        self._files = SlotReader(reader)
        self._threads = ThreadGroup()
        self._up, self._down = Ring(self._threads, buffers.up), Ring(self._threads, buffers.down)
        self._amax_slots = Ring(self._threads, buffers.notes)
        self._slab = DeviceArena(self._threads, buffers.slab.numel())
        self._groups: dict[str, Group] = {}
        self._draw = Lock()
        self._arrivals = Arrivals()
        self._uploaded: Channel[tuple[Load, Slot | None]] = Channel(self._threads)
        self._written: Channel[AmaxCopy | CodesCopy] = Channel(self._threads)
        self._up_stream, self._compute, self._down_stream = (device.stream() for _ in range(3))

    def run(self) -> bool:
        """Run the pass; return False if a scale was rejected and the pass was stopped.

        Raises:
            NemotronFp8Error: the first error of any thread: of the source, the destination or the device.
        """
        try:
            for i in range(self._plan.readers):
                self._threads.start(f"read-{i}", self._read)
            self._threads.start("upload", self._upload)
            self._threads.start("cast", self._cast)
            for i in range(self._plan.writers):
                self._threads.start(f"write-{i}", self._write)
            self._threads.join()
            self._device.synchronize()
            return not self._refused
        except BaseException:
            self._threads.stop()
            with suppress(Exception):
                self._threads.join()
            # Pending copies use the slots, which the next pass reuses.
            with suppress(Exception):  # the first failure is raised
                self._device.synchronize()
            raise
        finally:
            self._files.close()

    def _read(self) -> None:
        """Fill slots, and emit copied pieces."""
        while (drawn := self._next()) is not None:
            index, load, slot = drawn
            self._threads.check()
            if slot is not None:
                self._files.fill(load, slot.host.data)
                for piece in load.pieces:
                    if piece.use is Use.COPY:
                        data = slot.host.data[piece.at : piece.at + piece.end - piece.begin]
                        self._emit(piece.view.name, piece.begin, data)
                        self._progress(piece.end - piece.begin)
                if all(piece.use is Use.COPY for piece in load.pieces):
                    self._up.give(slot)
                    slot = None
            with self._threads.changed:
                self._arrivals.ready[index] = slot
                self._threads.changed.notify_all()

    def _next(self) -> tuple[int, Load, Slot | None] | None:
        """Return the next load with its block and its slot; None at the end."""
        with self._draw:
            index = self._arrivals.drawn
            if index == len(self._schedule.loads):
                return None
            load = self._schedule.loads[index]
            if load.admits:
                block = Block(self._slab.take(load.block_bytes), load.block_bytes, len(load.admits))
                for group in load.admits:
                    region = self._schedule.regions[group]
                    begin = block.begin + region.at
                    memory = self._slab_memory[begin : begin + region.nbytes]
                    computed = group not in self._amaxes
                    self._groups[group] = Group(region, block, memory, region.casts + computed, not computed)
            slot = self._up.take() if load.pieces else None
            self._arrivals.drawn += 1
            return index, load, slot

    def _upload(self) -> None:
        """Copy slots to the device in order, and launch the amax kernels."""
        ready = self._arrivals.ready
        for index, load in enumerate(self._schedule.loads):
            with self._threads.changed:
                self._threads.until(lambda index=index: index in ready)  # type: ignore[misc]  # binds the loop's value
                slot = ready.pop(index)
            for group in load.admits:
                self._prepare(self._groups[group])
            if slot is not None:
                moved = self._send(load, slot)
                self._compute.after(moved)
                for piece in load.pieces:
                    if piece.use in (Use.HOLD, Use.AMAX):
                        self._raise_amax(piece, slot)
                if not any(piece.use in (Use.WHOLE, Use.CAST, Use.ROWS) for piece in load.pieces):
                    self._up.give(slot, self._compute.record())
                    slot = None
            if slot is not None or load.completes:
                self._uploaded.put((load, slot))
        self._uploaded.close()

    def _prepare(self, group: Group) -> None:
        """Initialize a group's amaxes on the device: zero, or the known amaxes."""
        bits = group.bits
        known = self._amaxes.get(group.region.group)
        if known is None:
            self._compute.launch(lambda: zero(bits))
            return
        note = self._amax_slots.take()
        size = 4 * known.numel()
        note.host.tensor[:size].copy_(known.contiguous().view(-1).view(torch.uint8))
        self._up_stream.copy(group.memory[:size], note.host.tensor[:size])
        self._amax_slots.give(note, self._up_stream.record())

    def _send(self, load: Load, slot: Slot) -> Event:
        """Copy a slot's pieces to the device, adjacent pieces in one copy."""
        spans: list[tuple[torch.Tensor, int, int, int]] = []
        for piece in load.pieces:
            if piece.use is Use.COPY:
                continue
            target = self._memory(piece, slot)
            size = piece.end - piece.begin
            if spans:
                memory, to, at, length = spans[-1]
                if memory is target and (to + length, at + length) == (piece.device_at, piece.at):
                    spans[-1] = (memory, to, at, length + size)
                    continue
            spans.append((target, piece.device_at, piece.at, size))
        for memory, to, at, length in spans:
            self._up_stream.copy(memory[to : to + length], slot.host.tensor[at : at + length])
        return self._up_stream.record()

    def _memory(self, piece: Piece, slot: Slot) -> torch.Tensor:
        """Return the device memory of a piece."""
        if piece.use is Use.HOLD and piece.group is not None:
            return self._groups[piece.group].memory
        assert slot.device is not None
        return slot.device

    def _values(self, memory: torch.Tensor, view: TensorView, at: int, nbytes: int, coverage: Coverage) -> torch.Tensor:
        """Return elements of a tensor on the device, in the shape for the kernels."""
        return matrix(memory[at : at + nbytes].view(TORCH_DTYPES[view.dtype]), view, coverage)

    def _raise_amax(self, piece: Piece, slot: Slot) -> None:
        assert piece.group is not None
        group, size, coverage = self._groups[piece.group], piece.end - piece.begin, self._coverage.held
        w = self._values(self._memory(piece, slot), piece.view, piece.device_at, size, coverage)
        bits = scale_rows(group.bits, piece.view, coverage, piece.begin, piece.end)
        self._compute.launch(lambda: self._device.kernels.amax(w, bits, coverage))
        self._progress(size)

    def _cast(self) -> None:
        """Cast complete groups and slots, and copy codes and amaxes to the host."""
        while (item := self._uploaded.get()) is not None:
            load, slot = item
            complete = [self._groups[group] for group in load.completes]
            for group in complete:
                self._copy_amaxes(group)
            if slot is not None:
                self._cast_slot(load, slot)
            for group in complete:
                for view, begin, end, at in group.region.chunks:
                    part = Part(view, group.region.group, begin, end, 0, None)
                    down = self._down.take()
                    self._launch_cast(group.memory, at, part, down)
                    self._return(down, [part], (end - begin) // view.itemsize)
        self._written.close()

    def _copy_amaxes(self, group: Group) -> None:
        """Copy a group's amaxes to the host, before its codes."""
        slot, size = self._amax_slots.take(), 4 * prod(group.region.shape)
        self._down_stream.after(self._compute.record())
        self._down_stream.copy(slot.host.tensor[:size], group.memory[:size])
        self._written.put(AmaxCopy(group, slot, self._down_stream.record()))

    def _cast_slot(self, load: Load, slot: Slot) -> None:
        """Cast the pieces of a slot: whole tensors in batches, other pieces one by one."""
        assert slot.device is not None
        down, parts = self._down.take(), []
        batches: dict[str, list[Part]] = {}
        sources: dict[str, torch.Tensor] = {}
        for piece in load.pieces:
            if piece.group is None or piece.use not in (Use.WHOLE, Use.CAST, Use.ROWS):
                continue
            scale_at = None if piece.use is Use.CAST else piece.scale_at
            part = Part(piece.view, piece.group, piece.begin, piece.end, piece.out_at, scale_at)
            parts.append(part)
            if scale_at is None:
                self._launch_cast(slot.device, piece.device_at, part, down)
            else:
                batches.setdefault(piece.view.dtype, []).append(part)
                size = piece.end - piece.begin
                sources[piece.group] = self._values(slot.device, piece.view, piece.device_at, size, self._coverage)
        for batch in batches.values():
            self._launch_batch([sources[part.group] for part in batch], batch, down)
        self._up.give(slot, self._compute.record())
        self._return(down, parts, load.out_bytes)

    def _launch_cast(self, memory: torch.Tensor, at: int, part: Part, down: Slot) -> None:
        group, view, coverage = self._groups[part.group], part.view, self._coverage
        if self._recipe.numerics == "original":
            # The multiplier may overflow, which only the host detects.
            with self._threads.changed:
                self._threads.until(lambda: group.scale_written)
        w = self._values(memory, view, at, part.end - part.begin, coverage)
        bits = scale_rows(group.bits, view, coverage, part.begin, part.end)
        out = self._codes(part, down).view(w.shape)
        numerics = self._recipe.numerics
        self._compute.launch(lambda: self._device.kernels.cast(w, bits, out, self._numbers, numerics))

    def _launch_batch(self, weights: list[torch.Tensor], batch: list[Part], down: Slot) -> None:
        outs = [self._codes(part, down).view(w.shape) for w, part in zip(weights, batch, strict=True)]
        assert down.device is not None
        scales = [self._scale(part, down.device) for part in batch]
        self._compute.launch(lambda: self._device.kernels.quantize_many(weights, outs, scales, self._numbers))

    def _codes(self, part: Part, down: Slot) -> torch.Tensor:
        """Return the codes of a part on the device."""
        assert down.device is not None
        count = (part.end - part.begin) // part.view.itemsize
        return down.device[part.out_at : part.out_at + count].view(self._code_dtype)

    def _scale(self, part: Part, memory: torch.Tensor) -> torch.Tensor:
        """Return the scales of a whole tensor, or of rows of a tensor, in a down slot."""
        assert part.scale_at is not None
        view = part.view
        rows = (part.end - part.begin) // view.row_bytes if view.row_bytes else 0
        whole = part.end - part.begin == view.nbytes
        shape = self._coverage.scale_shape(view.shape if whole else (rows, view.row_elements))
        return memory[part.scale_at : part.scale_at + 4 * prod(shape)].view(torch.float32).view(shape)

    def _return(self, down: Slot, parts: list[Part], size: int) -> None:
        """Copy a down slot to the host, and pass it to the writers."""
        assert down.device is not None
        self._down_stream.after(self._compute.record())
        self._down_stream.copy(down.host.tensor[:size], down.device[:size])
        self._written.put(CodesCopy(parts, down, self._down_stream.record()))

    def _write(self) -> None:
        """Pass on scales and emit codes."""
        while (item := self._written.get()) is not None:
            item.arrived.wait()
            if isinstance(item, AmaxCopy):
                shape = item.group.region.shape
                bits = item.slot.host.tensor[: 4 * prod(shape)].clone().view(torch.int32).view(shape)
                self._amax_slots.give(item.slot)
                self._put(self._put_amax, item.group.region.group, bits)
                with self._threads.changed:
                    item.group.scale_written = True
                    self._threads.changed.notify_all()
                self._finish(item.group)
                continue
            for part in item.parts:
                self._write_part(part, item.slot)
            self._down.give(item.slot)

    def _put(self, put: PutScale, group: str, values: torch.Tensor, row: int = 0) -> None:
        """Pass on amaxes or scales of a group; stop the pass if they are rejected."""
        if not put(group, values, row):
            self._refused = True
            self._threads.stop()
            self._threads.check()

    def _write_part(self, part: Part, slot: Slot) -> None:
        view, size = part.view, part.end - part.begin
        count = size // view.itemsize
        data = slot.host.data[part.out_at : part.out_at + count]
        if part.scale_at is not None:
            row = scale_row(view, self._coverage, part.begin)
            self._put(self._put_scale, part.group, self._scale(part, slot.host.tensor).clone(), row)
            self._emit(view.name, part.begin // view.itemsize, data)
            self._progress(self._schedule.reads * size)
            return
        group = self._groups[part.group]
        with self._threads.changed:
            self._threads.until(lambda: group.scale_written)
        self._emit(view.name, part.begin // view.itemsize, data)
        self._progress(size)
        self._finish(group)

    def _finish(self, group: Group) -> None:
        """Count one finished copy of a group, and free the block after the last copy of all its groups."""
        with self._threads.changed:
            group.left -= 1
            if group.left:
                return
            group.block.groups -= 1
            if not group.block.groups:
                self._slab.give(group.block.begin, group.block.nbytes)


def zero(bits: torch.Tensor) -> None:
    """Reset amaxes to zero."""
    bits.zero_()
