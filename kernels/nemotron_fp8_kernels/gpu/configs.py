"""Launch configurations, few and named. Nothing is tuned at run time.

They were measured on an H100 (docs/kernels.md has the figures); ``python -m benchmarks.measure.kernels --sweep``
measures alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """One launch configuration.

    Attributes:
        tile: elements of a tile, a power of two.
        tiles: tiles that a program holds (amax: reads) one beside another.
        warps: warps of a program.
        measured: the device it was tuned on, None where it was not.
    """

    tile: int
    tiles: int
    warps: int
    measured: str | None = None


H100 = "H100 80GB HBM3"

AMAX = Config(tile=4096, tiles=2, warps=8, measured=H100)
CAST = Config(tile=2048, tiles=1, warps=8, measured=H100)
BLOCKS = Config(tile=128 * 128, tiles=1, warps=8, measured=H100)
DEQUANT = Config(tile=4096, tiles=1, warps=8)
GROUPED = Config(tile=4096, tiles=4, warps=8, measured=H100)

SWEEP: dict[str, tuple[Config, ...]] = {
    "amax": (AMAX, Config(4096, 1, 8), Config(4096, 4, 8), Config(8192, 4, 16)),
    "cast": (CAST, Config(2048, 1, 4), Config(4096, 1, 8), Config(8192, 1, 8)),
    "grouped": (GROUPED, Config(4096, 2, 8), Config(4096, 2, 16), Config(4096, 4, 16)),
}
"""Alternatives that the benchmark's sweep measures, the default first."""

KEPT_BYTES = (24 << 20, 64 << 20)
"""Sizes of a tensor that the amax pass asks L2 to keep, which makes both passes of 16 M elements 9% faster.

A smaller one stays anyway; of a larger one nothing is left when the cast comes, and asking for its tail alone costs
more than it brings (3% of 340 M elements).
"""

GROUPED_BYTES = 64 << 20
"""Largest group of tensors for the grouped kernel, and the largest measured: 8% faster there than two launches each."""

L2_BYTES = 20 << 20
"""Bytes that the grouped kernel finds again in L2: a larger group is cast from its end, which was read last."""

PROGRAMS_PER_SM = 3
"""Programs of the grouped kernel that run at once."""

LEAD = 9 << 18
"""Elements by which the next amax runs ahead of a cast in the grouped kernel (2.36 M).

That is a third of what all programs work on at once (132 SMs x 3 programs x 16,384 elements): a cast that comes a
little early has its elements on their way while it waits. A longer lead takes L2 from the data that waits.
"""


@dataclass(frozen=True)
class Rows:
    """Division of a tensor's rows among programs.

    Attributes:
        height: rows of a program.
        tile: columns of a piece, a power of two.
        pieces: pieces that a program holds at a time.
        warps: warps of a program.
        held: whether those are the row.
    """

    height: int
    tile: int
    pieces: int
    warps: int
    held: bool


GOOD_PIECES, MOST_PIECES = 5, 9
"""Pieces of a row that a program holds: 8 elements each of every thread, so up to 36 registers of 16-bit elements.

Five are as many loads as keep the memory busy. At 32 warps a thread has 64 registers, and with ten pieces would spill.
"""


def rows_plan(columns: int, itemsize: int) -> Rows:
    """Choose how rows are shared out: rows are held in registers wherever they fit.

    Args:
        columns: of the tensor, at least 1.
        itemsize: bytes of an element, 2 or 4.
    """
    if columns <= 512:
        # 16 elements a thread, of as many rows as that takes.
        tile = max(16, 1 << (columns - 1).bit_length())
        return Rows(4096 // tile, tile, 1, 8, held=True)
    # Elements of 4 bytes fill twice the registers, which 32 warps do not have.
    widest = 32 if itemsize < 4 else 16
    for most, warps in ((GOOD_PIECES, 2), (GOOD_PIECES, 4), (GOOD_PIECES, 8), (GOOD_PIECES, 16), (MOST_PIECES, widest)):
        tile = 256 * warps
        pieces = -(-columns // tile)
        if pieces <= most:
            return Rows(1, tile, pieces, warps, held=True)
    # Few programs at once, so that the rows they read twice lie in L2 in between.
    return Rows(1, 4096, 8, 16, held=False)
