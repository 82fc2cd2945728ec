"""Performance model of the kernels on an H100: predictions, not measurements.

The inputs are properties of the device, and of the machine code of a kernel. No constant belongs to a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sass import Path

SMS = 132
CLOCK = 1.755e9
"""Cycles per second under load."""
SLOTS = 4
"""Warp instructions that an SM issues per cycle."""
ROOF = 2.95e12
"""Bytes per second of HBM, two read for each one written."""
CROSSBAR = 5.5e12
"""Bytes per second between L2 and the SMs."""
SM_RATE = 64 * CLOCK
"""Bytes per second between L2 and one SM."""
DRAM, L2_HIT, ATOMIC, START = 0.6e-6, 0.25e-6, 0.55e-6, 0.25e-6
"""Seconds: a load from idle memory, a load from L2, an atomic with its result, the start of a program."""
LAUNCH = 1e-6
"""Seconds between the end of a kernel and the first program of the next, in a CUDA graph."""
SERIAL = 30
"""Cycles of a barrier, a shuffle, a load from shared memory, or a reciprocal, until its result is there."""
DEPENDENT = 2
"""Cycles between two instructions of a warp, on average: some wait for the one before."""

REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, 227 << 10
"""Limits of an SM: registers, warps, programs, bytes of shared memory."""
L2_BYTES = 50 << 20
L2_HOT = 24 << 20
"""Bytes of a tensor that L2 still holds when the cast begins at the end of it."""


def programs_per_sm(registers: int, warps: int, shared: int) -> tuple[int, str]:
    """Return how many programs an SM holds, and which of its limits applies.

    Args:
        registers: registers of a thread; the device allocates multiples of 8.
        warps: warps of a program.
        shared: bytes of shared memory of a program; the device adds 1,024.
    """
    # Each of four partitions has a quarter of the registers, and whole warps.
    by_registers = 4 * (REGISTERS // 4 // (-(-registers // 8) * 8 * 32)) // warps
    limits = {
        "registers": by_registers,
        "warps": WARPS // warps,
        "programs": PROGRAMS,
        "shared memory": SHARED // (shared + 1024),
    }
    least = min(limits, key=lambda name: limits[name])
    return limits[least], least


@dataclass(frozen=True)
class Program:
    """Work of a program, read from the machine code.

    Attributes:
        warps: warps of a program.
        resident: programs that an SM holds.
        elements: elements that a program processes on average; lanes beyond the end of a row do not count.
        read: bytes that a program reads per element.
        reread: bytes that it reads again, from L2.
        written: bytes that it writes per element.
        executed: instructions of a thread.
        after: instructions of a thread after its last load.
        serial: serial ones of these.
        in_flight: bytes of loads that a program has out before it uses the first.
    """

    warps: int
    resident: int
    elements: float
    read: float
    reread: float
    written: float
    executed: int
    after: int
    serial: int
    in_flight: float

    @classmethod
    def of(
        cls,
        path: Path,
        warps: int,
        resident: int,
        elements: float,
        itemsize: int,
        *,
        reads: int = 1,
        written: float = 1,
    ) -> Program:
        """Describe a program whose threads execute ``path``."""
        after, serial = path.after_loads()
        share = path.loads_before_use() / max(1, path.data_loads())
        # A loop reads a part at a time: only the loads of one iteration are out.
        return cls(
            warps,
            resident,
            elements,
            itemsize,
            itemsize * (reads - 1),
            written,
            path.executed,
            after,
            serial,
            share * elements * itemsize * reads,
        )

    @property
    def bytes(self) -> float:
        """Return the bytes of HBM of a program."""
        return self.elements * (self.read + self.written)

    @property
    def issue(self) -> float:
        """Return the share of issue slots at the roof."""
        instructions = self.executed * self.warps / self.bytes * ROOF
        return instructions / (SMS * SLOTS * CLOCK)

    @property
    def finish(self) -> float:
        """Return the seconds from the last byte that a program reads to its last store, alone on an SM."""
        cycles = max(self.after * self.warps / SLOTS, self.after * DEPENDENT) + self.serial * SERIAL
        return cycles / CLOCK

    @property
    def chain(self) -> float:
        """Return the seconds of a program alone on the device."""
        moved = self.elements * (self.read + self.reread + self.written)
        return START + DRAM + moved / SM_RATE + self.finish + (L2_HIT if self.reread else 0)

    @property
    def margin(self) -> float:
        """Return by how much the resident programs could exceed the roof, by Little's law."""
        return SMS * self.resident * self.bytes / self.chain / ROOF


@dataclass(frozen=True)
class Prediction:
    """Predicted speed of a kernel on one tensor or list.

    Attributes:
        shape: rows and columns, or tensors and elements.
        elements: elements in all.
        programs: programs of the launch.
        hbm_bytes: bytes of HBM per element.
        crossbar_bytes: bytes between L2 and the SMs per element.
        issue_share: share of issue slots at the roof.
        margin: speed that the resident programs allow, relative to the roof (Little's law).
        seconds: predicted time of the launch.
        share: predicted share of the roof: time of a kernel that only moves the bytes, divided by ``seconds``.
        limit: what takes the most of the rest.
    """

    shape: str
    elements: int
    programs: int
    hbm_bytes: float
    crossbar_bytes: float
    issue_share: float
    margin: float
    seconds: float
    share: float
    limit: str


def roof_seconds(elements: int, hbm_bytes: float) -> float:
    """Return the predicted seconds of a kernel that only moves the bytes of a tensor."""
    return LAUNCH + DRAM + elements * hbm_bytes / ROOF


def predict(shape: str, elements: int, programs: int, program: Program) -> Prediction:
    """Predict the time of a launch of one kernel.

    The bytes pass at the roof, or at the rate that another limit allows. Before them the first program starts and its
    first load arrives, as in a kernel that only moves bytes. After them the last program finishes.
    """
    hbm = program.read + program.written
    # What a tensor that is read twice has in L2 between the reads: the rows of all resident programs.
    again = SMS * program.resident * program.elements * program.reread
    missed = program.reread if again > L2_BYTES else 0.0
    hbm += missed
    crossbar = program.read + program.reread + program.written
    rates = {
        "memory": 1.0,
        "HBM bytes of the second read": (hbm - missed) / hbm,
        "crossbar": CROSSBAR / crossbar / (ROOF / (hbm - missed)),
        "issue slots": 1 / program.issue,
        "resident programs": program.margin,
    }
    limit = min(rates, key=lambda name: rates[name])
    moved = elements * (hbm - missed) / ROOF / rates[limit]
    finish = program.finish
    seconds = LAUNCH + DRAM + moved + finish
    roof = roof_seconds(elements, hbm - missed)
    if limit == "memory" and finish > 0.01 * seconds:
        limit = "finish of the last program"
    return Prediction(
        shape, elements, programs, hbm, crossbar, program.issue, program.margin, seconds, roof / seconds, limit
    )


def predict_tensor(shape: str, elements: int, amax: Program, cast: Program, kept: int) -> Prediction:
    """Predict the time of one scale per tensor: the launches of a fill, the amax kernel and the cast kernel.

    The cast waits for the amaxes, but not for its own launch, which overlaps with them. The share is that of a kernel
    that moves 5 bytes of a 16-bit element at the roof of the same tensor, as in the measurements.

    Args:
        shape: description of the tensor.
        elements: elements of the tensor.
        amax: work of a program of the amax kernel.
        cast: work of a program of the cast kernel.
        kept: bytes of the largest tensor that the amax kernel asks L2 to keep.
    """
    itemsize = amax.read
    # The amax kernel reads a larger tensor with a policy that keeps nothing of it.
    hits = min(elements * itemsize, L2_HOT) if elements * itemsize <= kept else 0
    first = LAUNCH + DRAM + elements * itemsize / ROOF / min(1.0, amax.margin) + amax.finish + ATOMIC
    hbm = elements * (itemsize + cast.written) - hits
    crossbar = elements * (itemsize + cast.written)
    second = max(hbm / ROOF, crossbar / CROSSBAR) / min(1.0, cast.margin, 1 / cast.issue) + L2_HIT + cast.finish
    seconds = LAUNCH + first + second
    bytes_moved = 2 * itemsize + cast.written
    roof = roof_seconds(elements, itemsize + cast.written) * bytes_moved / (itemsize + cast.written)
    overhead = 2 * LAUNCH + DRAM + amax.finish + ATOMIC + L2_HIT + cast.finish
    limit = "two launches" if overhead > 0.05 * seconds else "memory"
    return Prediction(
        shape,
        elements,
        ceil(elements / amax.elements) + ceil(elements / cast.elements),
        bytes_moved - hits / elements,
        bytes_moved,
        (amax.issue * itemsize + cast.issue * (itemsize + cast.written)) / bytes_moved,
        min(amax.margin, cast.margin),
        seconds,
        roof / seconds,
        limit,
    )
