"""Ragged tensors, views at odd offsets and long blocks: vectors and edges give the bytes of the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_fp8_kernels import reference
from tests.kernels.strategies import DTYPES, blocks, granularities
from tests.kernels.test_paths import assert_same

if TYPE_CHECKING:
    from types import ModuleType

offsets = st.integers(0, 9)


def view(rows: int, columns: int, offset: int, padding: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return a view of ``rows`` x ``columns`` at an element offset, with a row stride."""
    stride = columns + padding
    flat = torch.zeros(offset + rows * stride, dtype=dtype, device=device)
    return flat[offset:].view(rows, stride)[:, :columns]


@given(
    dtype=st.sampled_from(DTYPES),
    granularity=granularities,
    block=blocks,
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    offset=offsets,
    padding=st.sampled_from((0, 0, 1, 3, 8)),
    q_offset=offsets,
    q_padding=st.sampled_from((0, 0, 1, 3, 8)),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_views_at_any_offset(
    triton_ops: ModuleType,
    device: str,
    dtype: torch.dtype,
    granularity: Any,
    block: tuple[int, int],
    rows: int,
    columns: int,
    offset: int,
    padding: int,
    q_offset: int,
    q_padding: int,
) -> None:
    """quantize, quantize_with_amax into a view, and dequantize from it equal the reference; nothing else is written."""
    w = view(rows, columns, offset, padding, dtype, device)
    w.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)))
    expected = reference.quantize(w.cpu(), granularity, block)
    assert_same(triton_ops.quantize(w, granularity, block), expected)
    frame = view(rows, columns, q_offset, q_padding, torch.uint8, device)
    out = frame.view(torch.float8_e4m3fn)
    bits = triton_ops.amax_bits(w, granularity, block)
    triton_ops.quantize_with_amax(w, bits, granularity, block, out=out)
    assert_same((out, expected[1].to(device)), expected)
    found = triton_ops.dequantize(out, expected[1].to(device), granularity, block, dtype)
    assert torch.equal(found.cpu(), reference.dequantize(*expected, granularity, block, dtype))
    frame.zero_()
    assert not frame._base.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("block", [(1, 1 << 31), (1 << 40, 3), (1 << 31, 1 << 70)])
def test_blocks_with_sides_beyond_31_bits(triton_ops: ModuleType, device: str, block: tuple[int, int]) -> None:
    """A side of any length is valid; it covers the rest of the tensor."""
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(8)).bfloat16()
    same = (min(block[0], 8), min(block[1], 64))
    expected = reference.quantize(w, "block", same)
    assert_same(triton_ops.quantize(w.to(device), "block", block), expected)
    assert torch.equal(triton_ops.amax_bits(w.to(device), "block", block).cpu(), reference.amax_bits(w, "block", same))
    found = triton_ops.dequantize(expected[0].to(device), expected[1].to(device), "block", block)
    assert torch.equal(found.cpu(), reference.dequantize(*expected, "block", same))


@given(itemsize=st.sampled_from((2, 4)), offset=offsets, q_offset=offsets, steps=st.tuples(offsets, offsets))
def test_vectors_are_aligned(
    triton_ops: ModuleType, itemsize: int, offset: int, q_offset: int, steps: tuple[int, int]
) -> None:
    """The first weight of every vector is aligned to 16 bytes, and its code to the width that the kernel stores."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    w = torch.empty(64, dtype=dtype)[offset:]
    q = torch.empty(64, dtype=torch.uint8)[q_offset:].view(torch.float8_e4m3fn)
    w_stride, q_stride = steps
    found = triton_ops._vectors(w, q, 48, w_stride=w_stride, q_stride=q_stride)
    assert found.edges == (w.data_ptr() % 16 != 0 or q.data_ptr() % 16 != 0 or w_stride % 16 != 0 or q_stride % 16 != 0)
    for row in range(9):
        head = -(found.phase + row * w_stride) % 8
        assert (w.data_ptr() + itemsize * (row * w_stride + head)) % 16 == 0
        assert (q.data_ptr() + row * q_stride + head) % found.width == 0


@given(count=st.integers(1, 1 << 24))
@settings(max_examples=100)
def test_small_tensors_have_enough_programs(count: int) -> None:
    """Four programs per SM where each can have 512 elements, and the measured tiles from there on."""
    from nemotron_fp8_kernels.gpu import configs

    for config in (configs.AMAX, configs.CAST):
        found = configs.sized(config, count)
        programs = -(-count // (found.tile * found.tiles))
        assert programs >= min(configs.PROGRAMS, count // 512)
        assert found.tile * found.tiles <= config.tile * config.tiles
        assert found == config or count < configs.PROGRAMS * config.tile * config.tiles
        assert found.tile >= 8 * 32 * found.warps


@given(count=st.integers(16, 1 << 26), itemsize=st.sampled_from((2, 4)))
@settings(max_examples=100)
def test_programs_of_groups(count: int, itemsize: int) -> None:
    """Four programs per SM where each can have 1,024 elements; a program has whole groups, a thread whole vectors."""
    from nemotron_fp8_kernels.gpu import configs

    tile, warps = configs.groups_tile(count, itemsize)
    assert tile % configs.GROUP_SIDES[1] == tile & (tile - 1) == 0
    assert -(-count // tile) >= min(configs.PROGRAMS, count // 1024)
    assert 16 <= tile // (32 * warps) <= 64 // itemsize


@given(sides=st.tuples(st.integers(1, 1 << 31), st.integers(1, 1 << 31)), itemsize=st.sampled_from((2, 4)))
@settings(max_examples=100)
def test_tiles_of_blocks_fit_the_registers(sides: tuple[int, int], itemsize: int) -> None:
    """Powers of two of at most 64 elements per thread, of which a block of one tile has no more than it needs."""
    from nemotron_fp8_kernels.gpu.configs import BLOCKS, block_tile

    for edges in (False, True):
        high, wide, warps = block_tile(sides, itemsize, edges)
        assert high & (high - 1) == wide & (wide - 1) == warps & (warps - 1) == 0
        assert high * wide <= BLOCKS.tile
        assert high * wide <= 32 * warps * (32 if edges or sides != (high, wide) else 64) or high * wide < 512
        assert high < 2 * sides[0]
        assert wide < 2 * sides[1]
