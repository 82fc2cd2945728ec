"""Launch configurations, few and named. Nothing is tuned at run time.

None of these was measured: they follow from what a Hopper SM needs in flight (16 elements a thread, that is
two 16-byte loads and one 16-byte store, and about 32 KiB of loads per SM). ``python -m benchmarks.measure.kernels
--sweep`` measures the alternatives; a configuration that won is recorded here with the device it was
measured on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """One launch configuration.

    Attributes:
        tile: elements that a program holds at a time, a power of two.
        tiles: tiles that an amax program reads one after another.
        warps: warps of a program.
        measured: the device it was tuned on, None where it was not.
    """

    tile: int
    tiles: int
    warps: int
    measured: str | None = None


AMAX = Config(tile=4096, tiles=8, warps=8)
CAST = Config(tile=4096, tiles=1, warps=8)
ROWS = Config(tile=8192, tiles=1, warps=8)
BLOCKS = Config(tile=128 * 128, tiles=1, warps=8)
DEQUANT = Config(tile=4096, tiles=1, warps=8)
GROUPED = Config(tile=4096, tiles=1, warps=8)

SWEEP: dict[str, tuple[Config, ...]] = {
    "amax": (AMAX, Config(2048, 8, 4), Config(4096, 4, 8), Config(8192, 8, 16)),
    "cast": (CAST, Config(2048, 1, 4), Config(8192, 1, 8), Config(8192, 1, 16)),
    "grouped": (GROUPED, Config(2048, 1, 4), Config(8192, 1, 8), Config(8192, 1, 16)),
}
"""Alternatives that the benchmark's sweep measures, the default first."""

HOT_BYTES = 24 << 20
"""Tail of a tensor that the amax pass asks L2 to keep: half of Hopper's 50 MB (two partitions)."""

L2_BYTES = 30 << 20
"""What the grouped kernel counts on finding again in L2."""

LEAD = 9 << 18
"""Elements by which the next amax runs ahead of a cast in the grouped kernel (2.36 M).

It covers what all SMs work on at once (132 SMs x 4 programs x 4096 elements = 2.16 M), so that a group's
amax has arrived when its first cast is taken up; a longer lead would only take L2 from the data that waits.
"""
