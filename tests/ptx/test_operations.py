"""Every public operation, compiled: bytes of the reference, with bounds, alignment and races checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8_kernels import reference
from nemotron_fp8_kernels.errors import MultiplierOverflowError
from tests.kernels.strategies import DTYPES, SPECIALS, blocks, granularities, weights
from tests.ptx.compiled import Compiled, placed
from tests.support.ptxemu import formats
from tests.support.ptxemu.schedule import Settings

pytestmark = pytest.mark.ptx

GRANULARITIES = ("tensor", "channel", "block")

WIDTHS = (
    *(
        1,
        2,
        7,
        15,
        16,
        17,
        31,
        100,
        256,
        511,
        512,
        513,
        1000,
        1024,
        1856,
        2000,
        2048,
        2559,
        2560,
        2561,
        2688,
        4096,
        4104,
    ),
    *(5120, 5121, 6144, 7168, 7200, 8192, 10_304, 14_336, 16_384, 18_432, 20_480, 20_481, 36_864, 36_865),
    *(73_720, 73_728, 73_729, 73_744, 98_304),
)
"""Columns: real models', and both sides of each limit of the row kernel, multiples of 16 and others."""

SIZES = (
    *(1, 2, 15, 16, 17, 100, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 16_383, 16_384, 16_385, 24_581),
    *(65_535, 65_536, 65_537, 131_080),
)
"""Elements: both sides of each tile."""


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return normal values with a wide range of magnitudes; the largest is the last."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator) * torch.exp2(4 * torch.randn(shape, generator=generator))
    if values.numel():
        limit = values.abs().amax(dim=-1)
        values[..., -1] = -1.25 * limit
        values.view(-1)[0] = 1.5 * limit.view(-1)[0] if shape[-1] > 1 else values.view(-1)[0]
        values.view(-1)[-1] = 2 * values.abs().max()
    return values.to(dtype)


@pytest.mark.ptx(ci=22)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_rows_of_every_width(compiled: Compiled, columns: int, dtype: torch.dtype) -> None:
    """Rows with computed and known amaxes, also into rows with a stride; a row that fits in registers is read once."""
    for rows in (3, 17) if columns <= 600 else (3,):
        w = random((rows, columns), dtype)
        expected = reference.quantize(w, "channel")
        compiled.quantize(w, expected, "channel")
        if columns % 16 == 0 and columns <= (73_728 if dtype != torch.float32 else 36_864):
            assert compiled.loaded == w.nbytes
        bits = reference.amax_bits(w, "channel")
        compiled.amax_bits(w, bits, "channel")
        compiled.quantize_with_amax(w, bits, expected, "channel")
    out = placed(torch.zeros(rows, columns, dtype=torch.uint8), 5, 3).view(torch.float8_e4m3fn)
    compiled.quantize_with_amax(placed(w, 3, 1), bits, expected, "channel", out=out)


@pytest.mark.ptx(ci=10)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_tensors_of_every_size(compiled: Compiled, size: int, dtype: torch.dtype) -> None:
    """One scale, in two launches that overlap or not, at aligned and odd addresses."""
    w = random((1, size), dtype)
    expected = reference.quantize(w)
    bits = reference.amax_bits(w)
    compiled.quantize(w, expected)
    compiled.amax_bits(w, bits)
    for offset, out_offset in ((0, 0), (1, 0), (0, 1), (8, 8), (3, 5)):
        moved = placed(w, offset)
        out = placed(torch.zeros(1, size, dtype=torch.uint8), out_offset).view(torch.float8_e4m3fn)
        compiled.quantize_with_amax(moved, bits, expected, out=out)
        compiled.amax_bits(moved, bits)
        if size < 9000:
            compiled.restart(Settings(overlap=True, resident=5, seed=offset))
            compiled.quantize(moved, expected)


@pytest.mark.ptx(ci=4)
@pytest.mark.parametrize("per_warp", [False, True])
@pytest.mark.parametrize("resident", [1, 2, 7, 132])
@pytest.mark.parametrize("policy", ["random", "newest", "oldest", "victim"])
def test_dependent_launch(compiled: Compiled, policy: str, resident: int, per_warp: bool) -> None:
    """The cast starts while the amax kernel runs: no schedule lets it use the amax early."""
    for seed in range(2 if per_warp else 4):
        w = random((1, 30_000 if resident > 7 and not per_warp else 12_001), DTYPES[seed % 3], seed)
        compiled.restart(Settings(overlap=True, resident=resident, policy=policy, seed=seed, per_warp=per_warp))
        compiled.quantize(w, reference.quantize(w))
        compiled.counts["schedules"] += 1


BLOCKS = ((128, 128), (1, 16), (16, 32), (5, 48), (24, 70), (64, 256), (200, 300), (1, 1), (256, 8), (7, 1 << 20))
SHAPES = ((1, 1), (130, 272), (128, 128), (127, 129), (256, 1000), (200, 4104), (3, 2000), (129, 16), (300, 17))


@pytest.mark.ptx(ci=14)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_every_size(
    compiled: Compiled, shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype
) -> None:
    """Whole and ragged blocks, smaller and larger than a tile, dense and with strides."""
    if -(-shape[0] // block[0]) * -(-shape[1] // block[1]) > 5000:
        shape = (min(shape[0], 40), min(shape[1], 70))
    w = random(shape, dtype)
    expected = (
        reference.quantize(w, "block", block) if block[1] < 1 << 20 else reference.quantize(w, "block", (7, 4104))
    )
    compiled.quantize(w, expected, "block", block)
    bits = expected_bits = reference.amax_bits(w, "block", block if block[1] < 1 << 20 else (7, 4104))
    compiled.amax_bits(w, expected_bits, "block", block)
    out = placed(torch.zeros(shape, dtype=torch.uint8), 1, 2).view(torch.float8_e4m3fn)
    compiled.quantize_with_amax(placed(w, 1, 5), bits, expected, "block", block, out=out)


@given(
    w=weights(max_rows=70, max_columns=700),
    granularity=granularities,
    block=blocks,
    offsets=st.tuples(st.integers(0, 17), st.integers(0, 17)),
    paddings=st.tuples(st.sampled_from((0, 1, 8, 16)), st.sampled_from((0, 1, 8, 16))),
)
def test_any_weight_anywhere(
    compiled: Compiled,
    w: torch.Tensor,
    granularity: Any,
    block: tuple[int, int],
    offsets: tuple[int, int],
    paddings: tuple[int, int],
) -> None:
    """Any shape, stride, dtype and range, at any offset in its allocation, to any offset."""
    expected = reference.quantize(w, granularity, block)
    bits = reference.amax_bits(w, granularity, block)
    moved = placed(w, offsets[0], paddings[0])
    out = placed(torch.zeros(w.shape, dtype=torch.uint8), offsets[1], paddings[1]).view(torch.float8_e4m3fn)
    compiled.quantize(moved, expected, granularity, block)
    compiled.amax_bits(moved, bits, granularity, block)
    compiled.quantize_with_amax(moved, bits.view(torch.float32), expected, granularity, block, out=out)
    restored = reference.dequantize(*expected, granularity, block, w.dtype)
    compiled.dequantize(out, expected[1], restored, granularity, block, w.dtype)


@pytest.mark.ptx(ci=10)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (1,), (1, 1), (3, 4, 5), ()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_shapes(compiled: Compiled, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Tensors without elements, with one, and of other numbers of dimensions."""
    w = torch.full(shape, -3.0, dtype=dtype)
    for granularity in GRANULARITIES if len(shape) == 2 else ("tensor",):
        compiled.quantize(w, reference.quantize(w, granularity), granularity)  # type: ignore[arg-type]  # a literal


def all_codes(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.ptx(ci=2)
@pytest.mark.parametrize("keeps_nan", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_inputs(compiled: Compiled, dtype: torch.dtype, keeps_nan: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 65,536 inputs is cast at several scales, and is the amax of a row and of a block, NaN of both signs too.

    The PTX ISA leaves open which NaN `abs` and a widening conversion return.
    """
    monkeypatch.setattr(formats.Open, "abs_keeps_nan", keeps_nan)
    monkeypatch.setattr(formats.Open, "widening_keeps_nan", keeps_nan)
    inputs = all_codes(dtype)
    largest = torch.finfo(dtype).max
    for amax in (448.0, 1.0, 0.0, 1e-12, 2.0**-20, 447.0, 3.0e-5, largest, torch.inf, torch.nan):
        bits = torch.tensor(amax)
        compiled.quantize_with_amax(inputs, bits, reference.quantize_with_amax(inputs, bits))
    rows = torch.zeros(1 << 12, 16, dtype=dtype)
    for start in range(0, 1 << 16, 1 << 12):
        rows[:, 5] = inputs[start : start + (1 << 12)]
        expected = reference.quantize(rows, "channel")
        compiled.quantize(rows, expected, "channel")
        compiled.amax_bits(rows, reference.amax_bits(rows, "channel"), "channel")
    some = torch.cat([inputs[::97], inputs[inputs.isnan()][::13]])
    rows = torch.zeros(len(some), 16, dtype=dtype)
    rows[:, 15] = some
    compiled.amax_bits(rows, reference.amax_bits(rows, "block", (1, 16)), "block", (1, 16))
    for value in [*some[some.isnan()][::40].tolist(), -torch.inf, torch.inf]:
        w = random((1, 9000), dtype)
        w[0, 8193] = value
        w[0, 8193] = -w[0, 8193]
        compiled.amax_bits(w, reference.amax_bits(w))
        compiled.quantize(w, reference.quantize(w))


@pytest.mark.ptx(ci=4)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(compiled: Compiled, dtype: torch.dtype, granularity: Any) -> None:
    """NaN, Inf, subnormal numbers and zeros, alone and among others, under their own amaxes and under 1."""
    limit = torch.finfo(dtype).max
    finite = [max(-limit, min(limit, value)) for value in SPECIALS]
    for values in (
        [0.0],
        [-0.0],
        [torch.nan, 1.0],
        [-torch.inf, 2.0],
        [-torch.nan, -torch.inf],
        finite,
        [1e-45, -1e-40],
    ):
        w = torch.zeros(40, 50, dtype=dtype)
        w[3, : len(values)] = w[37, -len(values) :] = torch.tensor(values).to(dtype)
        if torch.tensor(values).isnan().any():
            w.view(torch.int16 if dtype != torch.float32 else torch.int32)[5, 7] |= -1  # a NaN of negative sign
        for block in ((128, 128), (16, 16)):
            compiled.quantize(w, reference.quantize(w, granularity, block), granularity, block)
        amax = torch.ones_like(reference.amax(w, granularity))
        compiled.quantize_with_amax(w, amax, reference.quantize_with_amax(w, amax, granularity), granularity)


@pytest.mark.ptx(ci=4)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("amax", [0.5, 3.0, 448.0, 60_000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_original_numerics(compiled: Compiled, dtype: torch.dtype, amax: float, padding: int) -> None:
    """The formula of the original script, in the dtype of the tensor, dense and with strided rows."""
    w = random((33, 300), dtype).float()
    w = placed((w / w.abs().max() * amax).to(dtype), 1, padding)
    compiled.quantize(w, reference.quantize(w, numerics="original"), numerics="original")
    bits = reference.amax_bits(w) + (1 << 17)
    expected = reference.quantize_with_amax(w, bits, numerics="original")
    compiled.quantize_with_amax(w, bits, expected, numerics="original")


def test_original_numerics_reject_tiny_float16(compiled: Compiled) -> None:
    with pytest.raises(MultiplierOverflowError):
        compiled.quantize(torch.full((4,), 0.001).half(), (torch.empty(0), torch.empty(0)), numerics="original")


@pytest.mark.ptx(ci=5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(1, 1), (256, 256), (33, 1000), (70, 4104), (129, 300)])
def test_dequantize(compiled: Compiled, shape: tuple[int, int], granularity: Any, dtype: torch.dtype) -> None:
    """All codes at scales of the whole range, with NaN and Inf, dense, with strides, and at odd addresses."""
    count = shape[0] * shape[1]
    codes = (torch.arange(count) * 37 % 256).to(torch.uint8).reshape(shape)
    for block in ((128, 128), (16, 32), (5, 48)):
        scales = reference.scale_from_amax(reference.amax_bits(random(shape, dtype), granularity, block))[1]
        if scales.ndim and scales.numel() > 2:
            scales.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, 1e-38])
        for offset, padding in ((0, 0), (1, 0), (0, 3), (7, 16)):
            q = placed(codes, offset, padding).view(torch.float8_e4m3fn)
            expected = reference.dequantize(q, scales, granularity, block, dtype)
            compiled.dequantize(q, scales, expected, granularity, block, dtype)


LISTS: dict[str, tuple[list[tuple[int, ...]], list[list[int]] | None]] = {
    "one": ([(1,)], None),
    "small": ([(7, 9), (16,), (1, 1), (100, 3)], None),
    "shared": ([(7, 9), (160, 17), (1, 1), (100, 3), (20, 20)], [[0, 2], [1, 4]]),
    "empty members": ([(0, 3), (5, 5), (0,), (0,), (4, 4)], [[0, 1], [2, 3]]),
    "several chunks": ([(70, 1000), (1, 40_001), (300, 7)], [[0, 2]]),
    "one chunk exactly": ([(16_384,), (16_383,), (16_385,), (32_768,)], [[1, 3]]),
}


@pytest.mark.ptx(ci=8)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LISTS)
def test_lists(compiled: Compiled, name: str, dtype: torch.dtype, granularity: Any) -> None:
    """Lists with and without shared scales, in the production configuration of the grouped kernel."""
    shapes, shared = LISTS[name]
    tensors = [random(shape, dtype, i) * 2.0**-i for i, shape in enumerate(shapes)]
    if granularity != "tensor":
        tensors, shared = [w for w in tensors if w.ndim == 2], None
    expected = reference.quantize_many(tensors, granularity, shared=shared)
    compiled.quantize_many(tensors, expected, granularity=granularity, shared=shared)
    if granularity == "tensor":
        compiled.quantize_many(tensors, expected, shared=shared, two_launches=True)


@pytest.mark.ptx(ci=1)
@pytest.mark.parametrize("seed", range(8))
def test_mixed_lists(compiled: Compiled, seed: int) -> None:
    """Members of all dtypes, aligned, at odd addresses, with strides and empty, in one list."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for number in range(12):
        rows, columns = (int(torch.randint(1, limit, (), generator=generator)) for limit in (40, 300))
        w = random((rows, columns), DTYPES[number % 3], number)
        kind = int(torch.randint(5, (), generator=generator))
        tensors.append([w, placed(w, 1), placed(w, 0, 3), placed(w, 16, 16), w[:0]][kind])
    for shared in (None, [[0, 3, 6], [1, 4]], [[0, 1, 2]]):
        expected = reference.quantize_many(tensors, shared=shared)
        compiled.quantize_many(tensors, expected, shared=shared)


def test_large_groups_take_the_single_kernels(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.many.configs, "GROUPED_BYTES", 1000)
    tensors = [random((n,), torch.bfloat16) for n in (499, 501, 500, 300)]
    for shared in (None, [[0, 2]]):
        compiled.quantize_many(tensors, reference.quantize_many(tensors, shared=shared), shared=shared)


def lazily_zero(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros whose pages exist once they are written."""
    words = np.zeros(count, f"u{dtype.itemsize}")
    return torch.from_numpy(words.view(f"i{dtype.itemsize}")).view(dtype)


def test_more_than_2_to_the_31_elements(compiled: Compiled) -> None:
    """Offsets have 64 bits: of 2^31 + 4101 elements the first and last programs run, of far rows all."""
    count = (1 << 31) + 4096 + 5
    w, q = lazily_zero(count, torch.bfloat16), lazily_zero(count, torch.uint8).view(torch.float8_e4m3fn)
    tail = random((1, 40), torch.bfloat16)[0]
    w[-40:] = tail
    bits = reference.amax_bits(tail)
    expected = reference.quantize_with_amax(tail, bits)
    compiled.restart(Settings(only=lambda size: [0, 1, size - 3, size - 2, size - 1]))
    compiled.amax_bits(w, bits)
    found, scale = compiled.call(compiled.ops.quantize_with_amax, w, bits, out=q)
    compiled.same((found[-40:], scale), expected)
    compiled.same_bytes(found[-4000:-40].view(torch.uint8), torch.zeros(3960, dtype=torch.uint8))
    compiled.restart(Settings())
    for columns in (300, 304):
        rows, rows_q = (whole.as_strided((3, columns), ((1 << 30) + 16, 1), 8) for whole in (w, q))
        rows.copy_(random((3, columns), torch.bfloat16))
        for granularity in GRANULARITIES:
            expected = reference.quantize(rows, granularity)  # type: ignore[arg-type]  # a literal
            amax = reference.amax_bits(rows, granularity)  # type: ignore[arg-type]  # a literal
            compiled.quantize_with_amax(rows, amax, expected, granularity, out=rows_q)


@pytest.mark.ptx(ci=2)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_into_given_outputs(compiled: Compiled, dtype: torch.dtype, granularity: Any) -> None:
    """Outputs that are dense, at odd addresses, or have rows with a stride; nothing beside them is written."""
    places = ((0, 0), (1, 0), (16, 16), (5, 3))
    tensors = [placed(random((9, 240), dtype, i), *places[i % 4]) for i in range(8)]
    frames = [torch.full((16, 300), 0x55, dtype=torch.uint8) for _ in tensors]
    outs = [
        frame.view(-1).as_strided((9, 240), (240 + padding, 1), offset).view(torch.float8_e4m3fn)
        for frame, (offset, padding) in zip(frames, places[2:] + places[:2] + places, strict=True)
    ]
    for shared in (None, [[0, 5], [1, 2, 7]]) if granularity == "tensor" else (None,):
        expected = reference.quantize_many(tensors, granularity, shared=shared)
        compiled.quantize_many(tensors, expected, granularity=granularity, shared=shared, out=outs)
    for frame, out in zip(frames, outs, strict=True):
        out.view(torch.uint8).fill_(0x55)
        assert bool((frame == 0x55).all())


@pytest.mark.ptx(ci=1)
@pytest.mark.parametrize("sides", [(1, 1 << 31), (1 << 31, 16), (1 << 40, 1 << 33)])
def test_blocks_beyond_the_tensor(compiled: Compiled, sides: tuple[int, int]) -> None:
    """Sides of more than 31 bits give the bytes of sides as long as the tensor's."""
    w = random((5, 300), torch.bfloat16)
    clamped = (min(sides[0], 5), min(sides[1], 300))
    expected = reference.quantize(w, "block", clamped)
    compiled.quantize(w, expected, "block", sides)
    compiled.amax_bits(w, reference.amax_bits(w, "block", clamped), "block", sides)
    compiled.dequantize(*expected, reference.dequantize(*expected, "block", clamped), "block", sides)
