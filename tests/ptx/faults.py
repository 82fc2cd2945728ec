"""Planted faults of the kernels, each with a check that must report it as the right error.

A fault is a change of the source, in a copy of the package, or of the PTX. A change that matches nothing is an error,
so that no fault is lost when a kernel changes.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemotron_fp8_kernels import reference
from tests.ptx.compiled import Compiled, placed
from tests.ptx.schedules import draw, run
from tests.support.ptxemu.errors import DeadlockError, MisalignedError, OutOfBoundsError, RaceError
from tests.support.ptxemu.schedule import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.ptxemu.driver import Emulator

Errors = tuple[type[Exception], ...]

BYTES: Errors = (AssertionError,)
BOUNDS: Errors = (OutOfBoundsError,)
RACE: Errors = (RaceError,)
DEADLOCK: Errors = (DeadlockError,)
DEADLOCK_OR_BYTES: Errors = (DeadlockError, AssertionError)
RACE_OR_BYTES: Errors = (RaceError, AssertionError)
BOUNDS_OR_BYTES: Errors = (OutOfBoundsError, AssertionError)
MISALIGNED: Errors = (MisalignedError,)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# Checks


def values(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Return normal values; the last of each row is the largest, and negative."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w[:, -1] = -5.0 - torch.arange(rows) % 7 / 7
    w[-1, -1] = -7.3
    return w.to(dtype)


def tensors(compiled: Compiled) -> None:
    """Cast dense tensors with one scale, of whole and ragged tiles."""
    for size in (16, 8192, 24_592):
        for dtype in DTYPES:
            w = values(1, size, dtype, size)
            compiled.quantize(w, reference.quantize(w))
            bits = reference.amax_bits(w)
            compiled.quantize_with_amax(w, bits, reference.quantize_with_amax(w, bits))


def dependent_launches(compiled: Compiled) -> None:
    """Cast while the amax kernel runs, under several schedules."""
    for seed in range(8):
        w = values(1, 40_000, seed=seed)
        policy = ("random", "newest", "victim", "bursts")[seed % 4]
        compiled.restart(Settings(overlap=True, resident=12, seed=seed, policy=policy, per_warp=seed % 4 == 3))
        compiled.quantize(w, reference.quantize(w))


def scales(compiled: Compiled) -> None:
    """Take scales of many amaxes, small ones and those of non-finite tensors."""
    for dtype in DTYPES:
        w = values(400, 16, dtype) * torch.rand(400, 1, generator=torch.Generator().manual_seed(1)).to(dtype)
        w[3] = 0.0
        w[7, 2], w[8, 3], w[9, 4] = torch.inf, -torch.inf, torch.nan
        w[10] *= 1e-13
        compiled.quantize(w, reference.quantize(w, "channel"), "channel")


def original(compiled: Compiled) -> None:
    """Cast by the formula of the original script, dense and with strides."""
    for dtype in DTYPES[:2]:
        for padding in (0, 16):
            w = placed(values(30, 256, dtype), 0, padding)
            compiled.quantize(w, reference.quantize(w, numerics="original"), numerics="original")


def rows(compiled: Compiled) -> None:
    """Cast rows: several per program, in one piece, in several pieces, and longer than the registers."""
    for shape in ((5, 48), (9, 256), (3, 1040), (2, 6160), (1, 73_744)):
        for w in (values(*shape), values(*shape).roll(-shape[1] // 2, 1)):
            compiled.quantize(w, reference.quantize(w, "channel"), "channel")


def several_tiles(compiled: Compiled) -> None:
    """Take the amax of tensors whose programs have three tiles, with the largest element in each of them."""
    config = compiled.many.configs.Config(512, 3, 4)
    for place in (5, 700, 1300, 2000):
        w = values(1, 4000)[0]
        w[place] = 30.0
        bits = torch.zeros((), dtype=torch.int32)
        compiled.call(compiled.ops.launch_amax, w, bits=bits, pdl=False, config=config)
        compiled.same_bytes(bits, reference.amax_bits(w))


def largest_anywhere(compiled: Compiled) -> None:
    """Take the amaxes of rows with the largest element in each warp, and in each lane of one."""
    w = torch.ones(40, 8192).bfloat16()
    w[torch.arange(8), 256 * torch.arange(8) + 3] = -3.0
    w[torch.arange(8, 40), 8 * torch.arange(32) + 4099] = 5.0
    compiled.amax_bits(w, reference.amax_bits(w, "channel"), "channel")


def block_scales(compiled: Compiled) -> None:
    """Cast ragged blocks, with one scale each, and with one of all."""
    w = values(200, 272)
    compiled.quantize(w, reference.quantize(w, "block"), "block")
    w = placed(w, 0, 16)
    compiled.quantize(w, reference.quantize(w, "block"), "block")
    compiled.quantize(w, reference.quantize(w))


def dequantized(compiled: Compiled) -> None:
    """Restore dense and strided codes, with one scale, one per row and one per block."""
    codes = (torch.arange(70 * 272) * 37 % 127).to(torch.uint8).reshape(70, 272)
    for padding in (0, 16):
        q = placed(codes, 0, padding).view(torch.float8_e4m3fn)
        for granularity, scale in (
            ("tensor", torch.tensor(0.3)),
            ("channel", torch.rand(70, 1) + 0.1),
            ("block", torch.rand(5, 9) + 0.1),
        ):
            expected = reference.dequantize(q, scale, granularity, (16, 32))  # type: ignore[arg-type]  # a literal
            compiled.dequantize(q, scale, expected, granularity, (16, 32))


def lists(compiled: Compiled) -> None:
    """Quantize lists with members at all alignments, twice, in the production configuration."""
    tensors = [values(3, 700), values(1, 16_400), placed(values(2, 40), 1), values(1, 1)]
    for shared in (None, [[0, 1], [2, 3]]):
        compiled.quantize_many(tensors, reference.quantize_many(tensors, shared=shared), shared=shared)


def schedules(compiled: Compiled) -> None:
    """Run the grouped kernel under some schedules of each number of resident programs."""
    for seed in range(14):
        for resident in (7, 2, 1):
            run(compiled, draw(resident, seed))


def repeated(compiled: Compiled) -> None:
    """Run the grouped kernel twice with the same tables."""
    for seed in range(4):
        run(compiled, replace(draw(7, seed), runs=2))


def lone_program(compiled: Compiled) -> None:
    """Run the grouped kernel by one resident program."""
    for seed in range(12):
        run(compiled, draw(1, seed))


def odd_places(compiled: Compiled) -> None:
    """Quantize and restore tensors of any width at any offset, with codes of the same and of another phase."""
    for offset, out_offset, columns in ((1, 1, 1000), (3, 0, 1001), (0, 5, 77), (7, 7, 4104), (0, 0, 3)):
        w = placed(values(3, columns), offset)
        out = placed(torch.zeros(3, columns, dtype=torch.uint8), out_offset).view(torch.float8_e4m3fn)
        for granularity in ("tensor", "channel", "block"):
            expected = reference.quantize(w, granularity)  # type: ignore[arg-type]  # a literal
            bits = reference.amax_bits(w, granularity)  # type: ignore[arg-type]  # a literal
            compiled.amax_bits(w, bits, granularity)
            compiled.quantize_with_amax(w, bits, expected, granularity, out=out)
            restored = reference.dequantize(out, expected[1], granularity)  # type: ignore[arg-type]  # a literal
            compiled.dequantize(out, expected[1], restored, granularity)


def rounded_scales(compiled: Compiled) -> None:
    """Take powers of two from amaxes at and beside the limits of the rules, and from Inf and NaN."""
    edges = [1.75 * 2.0**x for x in (-130, -118, -30, 0, 50)] + [1e-4, 3e38, 2.0**-149, torch.inf, torch.nan, 0.0]
    bits = torch.tensor(edges).view(torch.int32)[:, None]
    amaxes = torch.cat((bits, bits + 1)).contiguous()
    w = values(len(amaxes), 48)
    for rule in ("power-of-two", "mx"):
        expected = reference.quantize_with_amax(w, amaxes, "channel", rounding=rule)  # type: ignore[arg-type]  # a literal
        compiled.quantize_with_amax(w, amaxes, expected, "channel", rounding=rule)


def short_groups(compiled: Compiled) -> None:
    """Cast groups of 32 elements: of ragged programs, of several, and of rows that are no whole groups."""
    for shape in ((3, 64), (5, 4096), (9, 96), (7, 80)):
        w = values(*shape)
        compiled.quantize(w, reference.quantize(w, "block", (1, 32), rounding="mx"), "block", (1, 32), rounding="mx")


CHECKS = (
    odd_places,
    rounded_scales,
    short_groups,
    tensors,
    dependent_launches,
    scales,
    original,
    rows,
    several_tiles,
    largest_anywhere,
    block_scales,
    dequantized,
    lists,
    schedules,
    repeated,
    lone_program,
)


# Faults


@dataclass(frozen=True)
class SourceFault:
    """A change of the package.

    Attributes:
        name: short description.
        file: file of the package.
        pattern: regular expression; every match is replaced.
        replacement: as for `re.sub`.
        check: function that must raise.
        errors: classes of errors that count as a report.
    """

    name: str
    file: str
    pattern: str
    replacement: str
    check: Callable[[Compiled], None]
    errors: Errors

    def plant(self, emulator: Emulator, folder: Path) -> Compiled:
        """Return the kernels of a changed copy of the package, in a new folder."""
        package = f"planted_{re.sub(r'[^a-z0-9]+', '_', self.name.lower())}"
        origin = Path(import_module("nemotron_fp8_kernels").__path__[0])
        target = folder / package
        shutil.copytree(origin, target, ignore=shutil.ignore_patterns("__pycache__"))
        changed, count = re.subn(self.pattern, self.replacement, (target / self.file).read_text(), flags=re.M)
        if not count:
            raise LookupError(f"{self.name}: nothing in {self.file} matches {self.pattern}")
        (target / self.file).write_text(changed)
        spec = importlib.util.spec_from_file_location(package, target / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
        return Compiled(emulator, package)


@dataclass(frozen=True)
class PtxFault:
    """A change of the PTX of all kernels that have the pattern; the attributes are those of `SourceFault`."""

    name: str
    pattern: str
    replacement: str
    check: Callable[[Compiled], None]
    errors: Errors

    def rewrite(self, text: str) -> tuple[str, int]:
        """Return the changed PTX and the number of changes."""
        return re.subn(self.pattern, self.replacement, text)


GROUPED, ROWS, BLOCKS, CAST, AMAX = (f"gpu/{name}.py" for name in ("grouped", "rows", "blocks", "cast", "amax"))
GROUPS, OPS = "gpu/groups.py", "gpu/ops.py"
AMAX, COMMON, DEQUANT, MANY = "gpu/amax.py", "gpu/common.py", "gpu/dequant.py", "gpu/many.py"

SOURCE_FAULTS = (
    SourceFault(
        "an edge is one longer",
        COMMON,
        r"at < tl\.where\(before, tl\.minimum\(head, count\), count\)",
        "at <= tl.where(before, tl.minimum(head, count), count)",
        odd_places,
        (OutOfBoundsError, RaceError, AssertionError),
    ),
    SourceFault(
        "an edge is one shorter",
        COMMON,
        r"at < tl\.where\(before, tl\.minimum\(head, count\), count\)",
        "at < tl.where(before, tl.minimum(head, count), count - 1)",
        odd_places,
        BYTES,
    ),
    SourceFault("vectors start at half of a vector", COMMON, r"-at & 7", "-at & 3", odd_places, MISALIGNED),
    SourceFault(
        "the last vector is not whole",
        COMMON,
        r"tl\.maximum\(count - head, 0\) // 8 \* 8",
        "(tl.maximum(count - head, 0) + 7) // 8 * 8",
        odd_places,
        (OutOfBoundsError, AssertionError),
    ),
    SourceFault(
        "the elements after the vectors start one later", COMMON, r"lane - 8\)", "lane - 7)", odd_places, BYTES
    ),
    SourceFault(
        "codes count as aligned like weights", "gpu/ops.py", r"widths\[best\]\)", "VECTOR)", odd_places, MISALIGNED
    ),
    SourceFault(
        "the edges have no amax", AMAX, r"if EDGES and tl\.program_id\(0\) == 0", "if False", odd_places, BYTES
    ),
    # Order of accesses in the grouped kernel
    SourceFault(
        "the maximum of a group is read by a plain load",
        GROUPED,
        r"(mask=lanes == 0, other=0), volatile=True\)",
        r"\1)",
        schedules,
        RACE,
    ),
    SourceFault(
        "slots are read by plain loads",
        GROUPED,
        r"(mask=at \+ lanes < count, other=0), volatile=True\)",
        r"\1)",
        schedules,
        RACE,
    ),
    SourceFault(
        "slots are read once, before all are there",
        GROUPED,
        r"while top > MISSING:\n",
        "if top > MISSING:\n",
        schedules,
        RACE_OR_BYTES,
    ),
    SourceFault(
        "an amax is stored by a plain store",
        GROUPED,
        r"tl\.atomic_xchg\((slots_ptr.*), (float32_bits\(.*\)), sem=\"relaxed\"\)",
        r"tl.store(\1, \2)",
        schedules,
        RACE,
    ),
    SourceFault(
        "the maximum of a group is stored by a plain store",
        GROUPED,
        r"tl\.atomic_xchg\((found_ptr.*), (top.*), sem=\"relaxed\"\)",
        r"tl.store(\1, \2)",
        schedules,
        RACE,
    ),
    SourceFault(
        "slots are compared as signed integers",
        GROUPED,
        r"tl\.max\(seen\.to\(tl\.uint32, bitcast=True\), axis=0\)\)\n",
        "tl.max(seen, axis=0).to(tl.uint32, bitcast=True))\n",
        schedules,
        RACE_OR_BYTES,  # two scales for one group, or wrong codes
    ),
    SourceFault(
        "the last slot is not awaited",
        GROUPED,
        r"mask=at \+ lanes < count,",
        "mask=at + lanes < count - 1,",
        schedules,
        BYTES,
    ),
    SourceFault(
        "a slot of the next group is awaited",
        GROUPED,
        r"mask=at \+ lanes < count,",
        "mask=at + lanes < count + 1,",
        schedules,
        (OutOfBoundsError, DeadlockError, AssertionError),
    ),
    SourceFault(
        "all chunks of a tensor have one slot",
        GROUPED,
        r"(tl\.load\(entry \+ 6\)) \+ chunk",
        r"\1",
        lone_program,
        DEADLOCK,
    ),
    SourceFault(
        "every lane takes a ticket",
        GROUPED,
        r"(tl\.atomic_add\(ticket_ptr \+ lanes \* 0, 1), mask=lanes == 0",
        r"\1",
        lone_program,
        DEADLOCK_OR_BYTES,
    ),
    SourceFault(
        "a program takes two tickets and drops one",
        GROUPED,
        r"^(    ticket = tl\.atomic_add.*)$",
        r"\1\n    ticket = tl.atomic_add(ticket_ptr, 1, sem='relaxed') + 1",
        lone_program,
        DEADLOCK_OR_BYTES,
    ),
    SourceFault(
        "casts have lower tickets than their amaxes",
        "grouping.py",
        r"return Order\((work(?:\.view\(torch\.int32\)\.view\(-1, 2\))?),",
        r"return Order((\1).flip(0).contiguous(),",
        lone_program,
        DEADLOCK,
    ),
    SourceFault(
        "amaxes of the last run are still there",
        MANY,
        r"            self\.state\.fill_\(-1\)",
        "            self.state[0].fill_(-1) if self.state[1] == 7 else self.state.fill_(-1)[1].fill_(7)",
        repeated,
        BYTES,
    ),
    SourceFault(
        "tensors at any address take the grouped kernel",
        MANY,
        r"^ALIGNMENT = 16",
        "ALIGNMENT = 2",
        lists,
        MISALIGNED,
    ),
    SourceFault(
        "the ragged end counts as whole vectors",
        GROUPED,
        r"whole = n // 16 \* 16",
        "whole = (n + 15) // 16 * 16",
        schedules,
        BOUNDS,
    ),
    SourceFault("the ragged end is one longer", GROUPED, r"tail < n\b", "tail <= n", schedules, BOUNDS),
    SourceFault("the ragged end is one shorter", GROUPED, r"tail < n\b", "tail < n - 1", schedules, BYTES),
    SourceFault(
        "a chunk is one vector longer",
        GROUPED,
        r"inside = i \* TILE \+ offsets < limit",
        "inside = i * TILE + offsets < limit + 16",
        schedules,
        (OutOfBoundsError, RaceError, AssertionError),
    ),
    SourceFault(
        "the second chunk stores the scale",
        GROUPED,
        r"if chunk == 0:",
        "if chunk == 1:",
        schedules,
        BYTES,
    ),
    # One scale per tensor
    SourceFault("the cast does not wait", CAST, r"^        gdc_wait\(\)", "        pass", dependent_launches, RACE),
    SourceFault(
        "the amax is read before the wait",
        CAST,
        r"    if PDL:\n        gdc_wait\(\)\n    factor = tl\.load\(amax_ptr\)\n",
        "    factor = tl.load(amax_ptr)\n    if PDL:\n        gdc_wait()\n",
        dependent_launches,
        RACE,
    ),
    SourceFault("a ragged cast is one longer", CAST, r"(offsets <) n$", r"\1= n", tensors, BOUNDS),
    SourceFault("a ragged cast is one shorter", CAST, r"(offsets < n)$", r"\1 - 1", tensors, BYTES),
    SourceFault(
        "the tiles are counted from one",
        CAST,
        r"(num_programs\(0\)) - 1 - tile",
        r"\1 - tile",
        tensors,
        BOUNDS_OR_BYTES,
    ),
    SourceFault("every program stores the scale", CAST, r"^    if tile == 0:", "    if tile >= 0:", tensors, BYTES),
    SourceFault("an amax is one longer", AMAX, r"(offsets <) n$", r"\1= n", tensors, BOUNDS),
    SourceFault("an amax is one shorter", AMAX, r"(offsets < n)$", r"\1 - 1", tensors, BYTES),
    SourceFault("a ragged tile counts as whole", AMAX, r"TILES <= n:", "TILES <= n + TILE * TILES:", tensors, BOUNDS),
    SourceFault(
        "the amax is stored, not raised",
        AMAX,
        r"tl\.atomic_max\(amax_ptr, (.*), sem=\"relaxed\"\)",
        r"tl.store(amax_ptr, \1)",
        tensors,
        RACE_OR_BYTES,
    ),
    SourceFault(
        "the first tiles of a program are forgotten",
        AMAX,
        r"best = tl\.maximum\(best, magnitude\(x\)\)",
        "best = magnitude(x)",
        several_tiles,
        BYTES,
    ),
    # Arithmetic
    SourceFault(
        "the multiplier is rounded twice",
        COMMON,
        r"tl\.div_rn\(tl\.full\(amax\.shape, E4M3_MAX, tl\.float32\), amax\)",
        "tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), amax) * E4M3_MAX",
        scales,
        BYTES,
    ),
    SourceFault(
        "products are rounded twice",
        COMMON,
        r"return product\.to\(tl\.float8e4nv\)",
        "return product.to(tl.bfloat16).to(tl.float32).to(tl.float8e4nv)",
        rows,
        BYTES,
    ),
    SourceFault(
        "the amax has no floor",
        COMMON,
        r"amax = tl\.where\(amax < AMAX_FLOOR, AMAX_FLOOR, amax\)",
        "amax = amax",
        scales,
        BYTES,
    ),
    SourceFault("magnitudes keep their sign", COMMON, r"bitcast=True\) & 0x7F+", "bitcast=True)", tensors, BYTES),
    SourceFault("infinities count as NaN", COMMON, r"tl\.where\(wide > INF", "tl.where(wide >= INF", scales, BYTES),
    SourceFault(
        "a NaN of the scale keeps its bits",
        COMMON,
        r"bits = tl\.where\(\(bits & 0x7FFFFFFF\) > INF_BITS, NAN_BITS, bits\)",
        "bits = bits",
        scales,
        BYTES,
    ),
    SourceFault(
        "the original formula is not rounded",
        COMMON,
        r"product = widen\(product\.to\(x\.dtype\)\)",
        "product = product",
        original,
        BYTES,
    ),
    SourceFault(
        "an amax of 448 has the next power of two",
        COMMON,
        r"- formats\.SCALE_1_MANTISSA",
        "- formats.SCALE_1_MANTISSA + 1",
        rounded_scales,
        BYTES,
    ),
    SourceFault("a scale has no least exponent", COMMON, r"(exponent, MOST_\w+)\)", r"\1 + 99)", rounded_scales, BYTES),
    SourceFault("zeros have the least scale", COMMON, r"where\(bits > 0", "where(bits >= 0", rounded_scales, BYTES),
    SourceFault(
        "an infinite amax has a power of two",
        COMMON,
        r"where\(amax < float\(\"inf\"\)",
        'where(amax <= float("inf")',
        rounded_scales,
        BYTES,
    ),
    SourceFault("a subnormal scale is zero", COMMON, r", 0x400000\)", ", 0)", rounded_scales, BYTES),
    SourceFault(
        "a rounded scale of zero is finite",
        COMMON,
        r"where\(mult == 0, INF",
        "where(mult == 1, INF",
        rounded_scales,
        BYTES,
    ),
    # Groups
    SourceFault("a program has one group more", GROUPS, r"group < groups", "group <= groups", short_groups, BOUNDS),
    SourceFault("a program has one group less", GROUPS, r"group < groups", "group < groups - 1", short_groups, BYTES),
    SourceFault(
        "a program has one amax",
        GROUPS,
        r"largest\(magnitude\(x\), 1\)",
        "tl.zeros([GROUPS], tl.int32) + largest(magnitude(x), None)",
        short_groups,
        BYTES,
    ),
    SourceFault(
        "all programs store the same scales",
        GROUPS,
        r"scale_ptr \+ first \+ group",
        "scale_ptr + group",
        short_groups,
        RACE_OR_BYTES,
    ),
    SourceFault("ragged rows are groups", OPS, r" or w\.shape\[1\] % block\[1\]:", ":", short_groups, BOUNDS_OR_BYTES),
    # Rows, blocks and dequantization
    SourceFault("a program has one row more", ROWS, r"row_mask = row < rows", "row_mask = row <= rows", rows, BOUNDS),
    SourceFault("a row is one longer", ROWS, r"\(column < (columns|limit)\)", r"(column <= \1)", rows, BOUNDS),
    SourceFault("a row is one shorter", ROWS, r"\(column < (columns|limit)\)", r"(column < \1 - 1)", rows, BYTES),
    SourceFault("the last piece has no mask", ROWS, r"i < PIECES - 1", "i < PIECES", rows, BOUNDS),
    SourceFault("a piece has no amax", ROWS, r"range\(1, PIECES\)", "range(2, PIECES)", rows, BYTES),
    SourceFault("a block is one row longer", BLOCKS, r"(rows - top), B0", r"\1 + 1, B0", block_scales, BOUNDS_OR_BYTES),
    SourceFault("a block is one row shorter", BLOCKS, r"(rows - top), B0", r"\1 - 1, B0", block_scales, BYTES),
    SourceFault(
        "a block is one column longer",
        BLOCKS,
        r"(left \+ column <) columns",
        r"\1= columns",
        block_scales,
        BOUNDS_OR_BYTES,
    ),
    SourceFault(
        "scales of blocks overlap", BLOCKS, r"(across_at.* \* amax_across)", r"0 * \1", block_scales, RACE_OR_BYTES
    ),
    SourceFault(
        "every block stores the one scale", BLOCKS, r"amax_across > 0 or", "amax_across >= 0 or", block_scales, BYTES
    ),
    SourceFault("rows of scales have the width of blocks", DEQUANT, r"row // B0", "row // B1", dequantized, BYTES),
    SourceFault("dequantization is one row longer", DEQUANT, r"row < rows", "row <= rows", dequantized, BOUNDS),
)

PTX_FAULTS = (
    PtxFault("no wait for the primary launch", r"griddepcontrol\.wait;", "", dependent_launches, RACE),
    PtxFault("no barrier", r"bar\.sync\s+0;", "", tensors, RACE),
    PtxFault(
        "a step of a reduction is missing",
        r"(shfl\.sync\.bfly\.b32[^;]*), 2, 31",
        r"\1, 1, 31",
        largest_anywhere,
        BYTES,
    ),
    PtxFault("volatile loads are plain", r"ld\.volatile\.global", "ld.global", schedules, RACE),
    PtxFault(
        "an exchange is a plain store",
        r"atom\.global\.gpu\.relaxed\.exch\.b32 %r\d+, (\[[^]]*\]), (%r\d+);",
        r"st.global.b32 \1, \2;",
        schedules,
        RACE,
    ),
    PtxFault(
        "two codes are exchanged",
        r"(cvt\.rn\.satfinite\.e4m3x2\.f32\s+%rs\d+), (%r\d+), (%r\d+);",
        r"\1, \3, \2;",
        tensors,
        BYTES,
    ),
    PtxFault("a maximum is a minimum", r"\bmax\.([us]16x2)", r"min.\1", tensors, BYTES),
    PtxFault(
        "vectors are stored four bytes further",
        r"(st\.global[\w.:]*\.v[24]\.b32 \[ %rd\d+ \+ )0 \]",
        r"\g<1>4 ]",
        tensors,
        MISALIGNED,
    ),
    PtxFault("stores have no predicate", r"@%p\d+ (st\.global)", r"\1", rows, BOUNDS_OR_BYTES),
    PtxFault("loads have no predicate", r"@%p\d+ (ld\.global)", r"\1", tensors, BOUNDS),
    PtxFault(
        "tickets are taken in twos",
        r"(relaxed\.add\.u32 %r\d+, \[[^]]*\]), %r\d+;",
        r"\1, 2;",
        lone_program,
        DEADLOCK_OR_BYTES,
    ),
)
