"""Weights and lists that the run measures, in the order of their importance, and small ones for a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8_kernels.formats import MX_BLOCK

if TYPE_CHECKING:
    from nemotron_fp8_kernels.formats import Granularity, ScaleRounding

Shape = tuple[int, int]


class Lists(NamedTuple):
    """A list of equal tensors: their number, and the elements of each."""

    count: int
    size: int


SHAPES: dict[str, Shape] = {
    "340B o_proj (18432x18432)": (18432, 18432),
    "Minitron-8B up (16384x4096)": (16384, 4096),
    "340B up (73728x18432)": (73728, 18432),
    "expert 8 M (2048x4096)": (2048, 4096),
    "340B down (18432x73728)": (18432, 73728),
    "Minitron-8B down (4096x16384)": (4096, 16384),
    "105 M (10240x10304)": (10240, 10304),
    "expert 5 M (2688x1856)": (2688, 1856),
    "51 M (7168x7168)": (7168, 7168),
    "15 M (7168x2048)": (7168, 2048),
    "Minitron-8B q (4096x4096)": (4096, 4096),
}
"""Rows x columns of weights: of Nemotron models, and widths on both sides of the limits of the row kernel."""

PEERS = (
    "expert 8 M (2048x4096)",
    "Minitron-8B up (16384x4096)",
    "340B o_proj (18432x18432)",
    "340B up (73728x18432)",
)
"""Shapes on which torch.compile and torchao are measured, too."""

RAGGED: dict[str, Shape] = {"1000 columns (65536x1000)": (65536, 1000), "4104 columns (16384x4104)": (16384, 4104)}
"""Widths that are no multiple of 16."""

ODD = "Minitron-8B up (16384x4096)"
"""Shape that is also measured at odd addresses."""

FLOAT32: dict[str, Shape] = {
    "340B o_proj (18432x18432)": (18432, 18432),
    "a quarter of 340B down (4608x73728)": (4608, 73728),
}
"""Shapes of float32 weights."""

ROUNDED: dict[str, Shape] = {
    "expert 8 M (2048x4096)": (2048, 4096),
    "340B o_proj (18432x18432)": (18432, 18432),
}
"""Shapes that are also measured with scales that are powers of two."""

ROUNDINGS: dict[str, tuple[Granularity, Shape, ScaleRounding]] = {
    "block, power-of-two": ("block", (128, 128), "power-of-two"),
    "MX": ("block", MX_BLOCK, "mx"),
}
"""Granularity, block and rounding of scales that are powers of two."""

LISTS: dict[str, Lists] = {
    "64 x 5 M": Lists(64, 5 << 20),
    "128 x 2 M": Lists(128, 2 << 20),
    "64 x 8 M": Lists(64, 8 << 20),
    "64 x 12 M": Lists(64, 12 << 20),
    "32 x 16 M": Lists(32, 16 << 20),
    "600 x 0.3 M": Lists(600, 300 << 10),
    "16 x 32 M": Lists(16, 32 << 20),
    "24 x 24 M": Lists(24, 24 << 20),
}
"""Lists of equal tensors for quantize_many."""

CHECKED: tuple[Shape, ...] = (
    (1024, 4096),
    (257, 1856),
    (130, 2688),
    (64, 10304),
    (9, 18432),
    (3, 73728),
    (2, 147456),
    (300, 4104),
    (257, 1000),
    (129, 1),
    (1, 129),
)
"""Shapes whose bytes are compared with the reference before anything is timed."""

CHECKED_LISTS: tuple[tuple[int, ...], ...] = (
    (300, 1 << 20, 17, 5 << 20, (5 << 20) + 3),
    tuple(5 << 20 for _ in range(12)),
    tuple((i * 7919) % 100_000 + 1 for i in range(200)),
)
"""Lists whose bytes are compared: sizes of their tensors."""

DRY_SHAPES: dict[str, Shape] = {"small (128x128)": (128, 128), "wide (2x2688)": (2, 2688)}
DRY_PEERS = ("small (128x128)",)
DRY_RAGGED: dict[str, Shape] = {"ragged (3x1000)": (3, 1000)}
DRY_ODD = "small (128x128)"
DRY_FLOAT32: dict[str, Shape] = {"small (128x128)": (128, 128)}
DRY_ROUNDED: dict[str, Shape] = {"small (128x128)": (128, 128)}
DRY_LISTS: dict[str, Lists] = {"3 x 2000": Lists(3, 2000)}
DRY_CHECKED: tuple[Shape, ...] = ((5, 272),)
DRY_CHECKED_LISTS: tuple[tuple[int, ...], ...] = ((300, 17, 17_000),)
