"""Launch configurations, fixed and named; the kernels are not tuned at run time.

The configurations were tuned on an H100 (figures in docs/kernels.md). ``python -m benchmarks.measure.kernels --sweep``
measures alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Launch configuration of a kernel.

    Attributes:
        tile: elements of a tile, a power of two.
        tiles: adjacent tiles that a program holds (amax: reads).
        warps: warps of a program.
        measured: device on which the configuration was tuned; None if it was not tuned.
    """

    tile: int
    tiles: int
    warps: int
    measured: str | None = None


H100 = "H100 80GB HBM3"
H200 = "H200"

AMAX = Config(tile=4096, tiles=2, warps=8, measured=H100)
CAST = Config(tile=2048, tiles=1, warps=8, measured=H100)
BLOCKS = Config(tile=128 * 128, tiles=1, warps=8, measured=H100)
DEQUANT = Config(tile=4096, tiles=1, warps=8)
GROUPED = Config(tile=4096, tiles=4, warps=8, measured=H100)

PROGRAMS = 528
"""Programs that a small tensor is divided into at least, where it has the elements: four on each of 132 SMs."""

SMALL = (Config(4096, 1, 8), Config(2048, 1, 8), Config(1024, 1, 4), Config(512, 1, 2))
"""Configurations for tensors that `AMAX` or `CAST` would divide into fewer programs; a thread has 8 elements at least.

None of them was measured.
"""

SWEEP: dict[str, tuple[Config, ...]] = {
    "amax": (AMAX, Config(4096, 1, 8), Config(4096, 4, 8), Config(8192, 4, 16)),
    "cast": (CAST, Config(2048, 1, 4), Config(4096, 1, 8), Config(8192, 1, 8)),
    "grouped": (GROUPED, Config(4096, 2, 8), Config(4096, 2, 16), Config(4096, 4, 16)),
}
"""Alternatives that the sweep of the benchmark measures; the default is first."""

KEPT_BYTES = (24 << 20, 64 << 20)
"""Smallest and largest size of a tensor that the amax kernel loads with ``evict_last``.

The policy makes amax and cast of 16 M elements 9% faster. A smaller tensor stays in L2 without the policy. L2 loses a
larger tensor before its cast, and keeping only its tail costs more than it saves (3% of 340 M elements).
"""

GROUPED_BYTES = 64 << 20
"""Largest group for the grouped kernel, and the largest measured: 8% faster there than two launches per tensor."""

L2_BYTES = 20 << 20
"""Bytes that L2 still holds for the casts of the grouped kernel; a larger group is cast from its end, read last."""

PROGRAMS_PER_SM = 3
"""Resident programs of the grouped kernel on each SM."""

LEAD = 9 << 18
"""Elements by which amaxes of the next batch are ahead of casts in the grouped kernel (2.36 M).

The lead is a third of the elements that all programs process at once (132 SMs x 3 programs x 16,384 elements). A cast
that must wait has its loads in flight meanwhile. A longer lead displaces data from L2 before its cast.
"""


def sized(config: Config, count: int) -> Config:
    """Return a configuration for ``count`` elements: ``config``, or a smaller one that makes enough programs."""
    elements = config.tile * config.tiles
    if count >= PROGRAMS * elements:
        return config
    smaller = [other for other in SMALL if other.tile < elements]
    return next((other for other in smaller if count >= PROGRAMS * other.tile), smaller[-1])


GROUP_SIDES = (16, 256)
"""Smallest and largest group of the groups kernel: two whole vectors, and the elements of a warp."""

GROUPS = (Config(2048, 1, 4, measured=H200), Config(1024, 1, 2))
"""Configurations of the groups kernel, the first for large tensors; a thread has 16 elements.

On an H200, 2,048 elements are 4% faster than 8,192 with 32 for each thread, for 340 M elements, and 6% for 67 M.
"""


def groups_tile(count: int, itemsize: int) -> tuple[int, int]:
    """Return the elements and the warps of a program of the groups kernel; a thread holds 64 bytes at most.

    Args:
        count: elements of the tensor.
        itemsize: bytes of an element, 2 or 4.
    """
    config = next((config for config in GROUPS if count >= PROGRAMS * config.tile), GROUPS[-1])
    return min(config.tile, 32 * config.warps * 64 // itemsize), config.warps


WARP_ELEMENTS = 512
"""Elements of a tile of a block for each warp of its program."""

TWICE_BYTES = 16 << 10
"""Bytes of a tile of a block that does not fit in one tile, and is read twice: more would spill registers."""


@dataclass(frozen=True)
class Rows:
    """Division of the rows of a tensor among programs.

    Attributes:
        height: rows of a program.
        tile: columns of a piece, a power of two.
        pieces: pieces that a program holds at a time.
        warps: warps of a program.
        held: True if the pieces cover the whole row.
    """

    height: int
    tile: int
    pieces: int
    warps: int
    held: bool


GOOD_PIECES, MOST_PIECES = 5, 9
"""Pieces of a row that a program holds: 8 elements per thread and piece, so up to 36 registers of 16-bit elements.

Loads of five pieces saturate the memory. At 32 warps a thread has 64 registers: ten pieces would spill.
"""


def rows_plan(columns: int, itemsize: int) -> Rows:
    """Return the division of rows among programs; a row that fits in registers is held there.

    Args:
        columns: columns of the tensor, at least 1.
        itemsize: bytes of an element, 2 or 4.
    """
    if columns <= 512:
        # 16 elements per thread, from as many rows as necessary.
        tile = max(16, 1 << (columns - 1).bit_length())
        return Rows(4096 // tile, tile, 1, 8, held=True)
    # Elements of 4 bytes need twice the registers, too many for 32 warps.
    widest = 32 if itemsize < 4 else 16
    for most, warps in ((GOOD_PIECES, 2), (GOOD_PIECES, 4), (GOOD_PIECES, 8), (GOOD_PIECES, 16), (MOST_PIECES, widest)):
        tile = 256 * warps
        pieces = -(-columns // tile)
        if pieces <= most:
            return Rows(1, tile, pieces, warps, held=True)
    # One program per SM, so that L2 holds their rows between the two reads: up to 190,000 columns of 16 bits.
    return Rows(1, 8192, 6, 32, held=False) if itemsize < 4 else Rows(1, 4096, 8, 16, held=False)


def block_tile(block: tuple[int, int], itemsize: int, edges: bool) -> tuple[int, int, int]:
    """Return rows, columns and warps of the tiles of a block.

    Args:
        block: rows and columns of a block.
        itemsize: bytes of an element, 2 or 4.
        edges: True if the rows of the block may consist of more than whole vectors.
    """
    high = min(_power_of_2(block[0]), 128)
    wide = _power_of_2(block[1])
    if high * wide > BLOCKS.tile:
        tile = TWICE_BYTES // itemsize
        high = min(high, tile // 128)
        wide = min(wide, tile // high)
    # The positions of the edges need registers: half the elements per thread.
    most = 2 * BLOCKS.warps if edges or block != (high, wide) else BLOCKS.warps
    return high, wide, max(1, min(most, high * wide // WARP_ELEMENTS))


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
