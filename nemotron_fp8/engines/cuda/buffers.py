"""Buffers of the CUDA engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.engines.cuda.ring import Slot

if TYPE_CHECKING:
    from nemotron_fp8.engines.cuda.device import Device
    from nemotron_fp8.engines.cuda.memory_plan import RingPlan


class Buffers:
    """Memory of an engine: input slots, output slots, slots for amaxes, and the slab."""

    def __init__(self, device: Device, plan: RingPlan) -> None:
        self.plan = plan
        self._device = device
        self.up = [self._slot(plan.up_bytes) for _ in range(plan.up_slots)]
        self.down = [self._slot(plan.down_bytes) for _ in range(plan.down_slots)]
        self.notes = [Slot(device.host_buffer(plan.note_bytes), None) for _ in range(plan.notes)]
        self.slab = device.memory(0)

    def _slot(self, nbytes: int) -> Slot:
        return Slot(self._device.host_buffer(nbytes), self._device.memory(nbytes))

    def grow_slab(self, wanted: int) -> None:
        """Grow the slab to ``wanted`` bytes, at most to the bytes of the plan."""
        size = min(wanted, self.plan.slab_bytes)
        if size > self.slab.numel():
            self.slab = self._device.memory(0)  # free the old slab before the new one is allocated
            self.slab = self._device.memory(size)
