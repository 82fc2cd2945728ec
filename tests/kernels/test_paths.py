"""Every path returns the bytes of the reference: the CPU path and Triton, interpreted or on the device."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemotron_fp8_kernels import cpu, native, reference, torch_cpu
from tests.kernels.cpu_paths import CPU_PATHS, compiled
from tests.kernels.strategies import DTYPES, blocks, granularities, weights

if TYPE_CHECKING:
    from types import ModuleType

Results = tuple[torch.Tensor, torch.Tensor]
FIXTURES = [HealthCheck.function_scoped_fixture]


@pytest.fixture(params=[*CPU_PATHS, "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "triton":
        return request.getfixturevalue("triton_ops")  # type: ignore[no-any-return]
    kernels = compiled(request.param)
    monkeypatch.setattr(native, "load", lambda: kernels)
    return cpu


def where(path: ModuleType, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the device of a path, with the same strides."""
    if path is cpu or path.INTERPRETED:
        return tensor
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return moved.copy_(tensor)


def assert_same(found: Results, expected: Results, q_bits: torch.dtype = torch.uint8) -> None:
    """Compare shapes, dtypes and bytes."""
    for got, wanted, bits in zip(found, expected, (q_bits, torch.int32), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(got.cpu().contiguous().view(bits), wanted.contiguous().view(bits))


def all_codes(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def some_amaxes(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return amaxes for exhaustive tests: powers of two, extremes, the floor, and numbers of the whole range."""
    info = torch.finfo(dtype)
    edges = [448.0, 1.0, 2.0**-20, 0.0, 1e-12, 1.1e-12, 9.9e-13, info.tiny, info.max, 7 * 2.0**-6, 447.0, 449.0]
    generator = torch.Generator().manual_seed(3)
    low = torch.tensor(max(info.tiny, 1e-13)).log2()
    high = torch.tensor(info.max).log2()
    drawn = torch.exp2(torch.rand(count, generator=generator) * (high - low) + low).clamp(max=info.max)
    return torch.cat([torch.tensor(edges), drawn.to(dtype).float()])[:count]


@given(w=weights(), granularity=granularities, block=blocks)
@example(w=torch.randn(140, 300).bfloat16(), granularity="block", block=(128, 128))
@settings(max_examples=25, deadline=None, suppress_health_check=FIXTURES)
def test_quantize(path: ModuleType, w: torch.Tensor, granularity: Any, block: tuple[int, int]) -> None:
    """quantize, amax_bits and quantize_with_amax equal the reference for any shape, stride, dtype and range."""
    expected = reference.quantize(w, granularity, block)
    moved = where(path, w)
    assert_same(path.quantize(moved, granularity, block), expected)
    bits = reference.amax_bits(w, granularity, block)
    found = path.amax_bits(moved, granularity, block)
    assert (found.dtype, found.shape) == (bits.dtype, bits.shape)
    assert torch.equal(found.cpu(), bits)
    for amax in (found, found.view(torch.float32)):
        assert_same(path.quantize_with_amax(moved, amax, granularity, block), expected)


@given(w=weights(max_rows=12, max_columns=100))
@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURES)
def test_original(path: ModuleType, w: torch.Tensor) -> None:
    """Numerics "original" equal the reference, with the same errors."""
    try:
        expected = reference.quantize(w, numerics="original")
    except ValueError as refusal:
        with pytest.raises(type(refusal)):
            path.quantize(where(path, w), numerics="original")
        return
    assert_same(path.quantize(where(path, w), numerics="original"), expected)


@given(w=weights(), granularity=granularities, block=blocks, dtype=st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None, suppress_health_check=FIXTURES)
def test_dequantize(
    path: ModuleType, w: torch.Tensor, granularity: Any, block: tuple[int, int], dtype: torch.dtype
) -> None:
    q, scale = reference.quantize(w, granularity, block)
    expected = reference.dequantize(q, scale, granularity, block, dtype)
    found = path.dequantize(where(path, q), where(path, scale), granularity, block, dtype)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("numerics", ["float32", "original"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_inputs_at_a_thousand_scales_on_the_cpu(
    dtype: torch.dtype, numerics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 65,536 inputs, with NaNs and infinities, compiled, and by the table that float32 scratch fills."""
    monkeypatch.setattr(torch_cpu, "TABLE_FROM", 0)
    inputs = all_codes(dtype)
    paths = [compiled(name) for name in CPU_PATHS]
    for amax in some_amaxes(1000, dtype):
        if numerics == "original" and dtype == torch.float16 and amax <= 0.00684:
            continue
        expected = reference.quantize_with_amax(inputs, amax, numerics=numerics)
        for kernels in paths:
            monkeypatch.setattr(native, "load", lambda kernels=kernels: kernels)
            assert_same(cpu.quantize_with_amax(inputs, amax, numerics=numerics), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_inputs_at_many_scales_in_triton(triton_ops: ModuleType, dtype: torch.dtype) -> None:
    """All 65,536 inputs at 1,000 scales on a device, at 100 in the interpreter."""
    from nemotron_fp8_kernels.gpu.configs import Config

    inputs = all_codes(dtype)
    moved = where(triton_ops, inputs)
    q = torch.empty_like(moved, dtype=torch.float8_e4m3fn)
    scale = torch.empty((), device=moved.device)
    config = Config(1 << 16, 1, 8) if triton_ops.INTERPRETED else Config(4096, 1, 8)
    for amax in some_amaxes(100 if triton_ops.INTERPRETED else 1000, dtype):
        bits = where(triton_ops, amax.view(torch.int32))
        triton_ops.launch_cast(moved, q, bits, scale, original=False, pdl=False, config=config)
        assert_same((q, scale), reference.quantize_with_amax(inputs, amax))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_the_same_everywhere(path: ModuleType, dtype: torch.dtype, granularity: Any) -> None:
    """Non-finite elements under their own amax and under a finite one."""
    w = torch.randn(40, 50, generator=torch.Generator().manual_seed(5))
    w[3, 4], w[7, 7], w[20, 1] = float("nan"), -float("inf"), -float("nan")
    for values in (w, w.nan_to_num(nan=1.0, posinf=float("inf"), neginf=-float("inf"))):
        cast = values.to(dtype)
        expected = reference.quantize(cast, granularity, (16, 16))
        assert_same(path.quantize(where(path, cast), granularity, (16, 16)), expected)
        amax = torch.ones_like(reference.amax(cast, granularity, (16, 16)))
        expected = reference.quantize_with_amax(cast, amax, granularity, (16, 16))
        found = path.quantize_with_amax(where(path, cast), where(path, amax), granularity, (16, 16))
        assert_same(found, expected)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_nothing_is_written_outside_of_out(path: ModuleType, granularity: Any, padding: int) -> None:
    w = where(path, torch.randn(20, 33).bfloat16())
    frame = torch.full((22, 33 + padding), 0x55, dtype=torch.uint8, device=w.device)
    out = frame[1:21, :33].view(torch.float8_e4m3fn)
    amax = path.amax_bits(w, granularity, (16, 16))
    q, _ = path.quantize_with_amax(w, amax, granularity, (16, 16), out=out)
    assert q.data_ptr() == out.data_ptr()
    expected = reference.quantize(w.cpu(), granularity, (16, 16))[0]
    assert torch.equal(frame[1:21, :33].cpu(), expected.view(torch.uint8))
    if path is not cpu:
        path.quantize(w, granularity, (16, 16), out=out)
        assert torch.equal(frame[1:21, :33].cpu(), expected.view(torch.uint8))
    frame[1:21, :33] = 0x55
    assert bool((frame == 0x55).all())


def test_slices_with_the_whole_amax_give_the_whole(path: ModuleType) -> None:
    """Streaming: amaxes of slices combine by max, and casts of slices concatenate."""
    w = torch.randn(96, 40, generator=torch.Generator().manual_seed(6)).bfloat16()
    parts = [where(path, part) for part in w.split([1, 50, 45])]
    amax = torch.stack([path.amax_bits(part) for part in parts]).max()
    q = torch.cat([path.quantize_with_amax(part, amax)[0].cpu().view(torch.uint8) for part in parts])
    assert torch.equal(q, reference.quantize(w)[0].view(torch.uint8))


@pytest.mark.parametrize("tile", [64, 1024, 8192])
def test_results_do_not_depend_on_tile_or_number_of_programs(triton_ops: ModuleType, tile: int) -> None:
    from nemotron_fp8_kernels.gpu.configs import Config

    w = torch.randn(3000, generator=torch.Generator().manual_seed(8)).bfloat16()
    moved = where(triton_ops, w)
    for tiles in (1, 3):
        bits = torch.zeros((), dtype=torch.int32, device=moved.device)
        triton_ops.launch_amax(moved, bits, pdl=False, config=Config(tile, tiles, 4))
        q = torch.empty_like(moved, dtype=torch.float8_e4m3fn)
        scale = torch.empty((), device=moved.device)
        triton_ops.launch_cast(moved, q, bits, scale, original=False, pdl=False, config=Config(tile, 1, 4))
        assert_same((q, scale), reference.quantize(w))


@given(columns=st.integers(1, 1 << 20), itemsize=st.sampled_from((2, 4)))
@example(columns=73728, itemsize=2)
@settings(max_examples=300, deadline=None)
def test_rows_plan_fits_the_registers_of_a_program(columns: int, itemsize: int) -> None:
    """The pieces cover a held row, none is superfluous, and their elements fit in the registers of a thread."""
    from nemotron_fp8_kernels.gpu.configs import rows_plan

    plan = rows_plan(columns, itemsize)
    assert plan.tile & (plan.tile - 1) == 0
    elements = plan.height * plan.tile * plan.pieces / (32 * plan.warps)
    # The threads of a program share 65,536 registers, and each thread needs 24 for other purposes.
    assert elements * itemsize / 4 + 24 <= min(255, 65_536 // (32 * plan.warps))
    if plan.held:
        assert (plan.pieces - 1) * plan.tile < columns <= plan.pieces * plan.tile
        assert plan.height == 1 or plan.pieces == 1
    else:
        assert columns > (73_728 if itemsize == 2 else 36_864)


PLANS = (1, 16, 511, 512, 513, 1000, 1024, 2560, 2561, 5121, 10_304, 20_480, 20_481, 36_865, 73_728, 73_729, 73_744)
"""Row widths on both sides of each limit in `rows_plan`, aligned and unaligned."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", PLANS)
def test_rows_of_every_width(path: ModuleType, columns: int, dtype: torch.dtype) -> None:
    """Whole, ragged and unaligned rows, with computed and with known amaxes; the largest element is last."""
    w = torch.randn(3, columns, generator=torch.Generator().manual_seed(9)).to(dtype)
    w[:, -1] = torch.tensor([7.0, -9.0, 0.0])
    expected = reference.quantize(w, "channel")
    moved = where(path, w)
    assert_same(path.quantize(moved, "channel"), expected)
    bits = path.amax_bits(moved, "channel")
    assert torch.equal(bits.cpu(), reference.amax_bits(w, "channel"))
    assert_same(path.quantize_with_amax(moved, bits, "channel"), expected)


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_every_small_shape(path: ModuleType, granularity: Any) -> None:
    """All shapes of up to 5 x 20 elements equal the reference."""
    whole = torch.randn(5, 20, generator=torch.Generator().manual_seed(12)).bfloat16()
    for rows in range(1, 6):
        for columns in range(1, 21):
            w = whole[:rows, :columns].contiguous()
            found = path.quantize(where(path, w), granularity, (4, 8))
            assert_same(found, reference.quantize(w, granularity, (4, 8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_amax_of_every_code(path: ModuleType, dtype: torch.dtype) -> None:
    """Each of 65,536 inputs is the amax of a row and of a block: magnitudes of 16 bits compare correctly, with NaN."""
    inputs = all_codes(dtype)
    if path is not cpu and path.INTERPRETED:
        inputs = torch.cat([inputs[::97], inputs[inputs.isnan()][::13]])
    w = torch.zeros(len(inputs), 16, dtype=dtype)
    w[:, 5] = inputs
    expected = reference.amax_bits(w, "channel")
    moved = where(path, w)
    assert torch.equal(path.amax_bits(moved, "channel").cpu(), expected)
    if path is not cpu and path.INTERPRETED:
        w, expected = w[:60], expected[:60]
    assert torch.equal(path.amax_bits(where(path, w), "block", (1, 16)).cpu(), expected)


@pytest.mark.parametrize("kept", [(0, 1 << 40), (1 << 40, 0)])
def test_results_do_not_depend_on_what_stays_in_l2(
    triton_ops: ModuleType, kept: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemotron_fp8_kernels.gpu import configs

    monkeypatch.setattr(configs, "KEPT_BYTES", kept)
    w = torch.randn(20_001, generator=torch.Generator().manual_seed(13)).bfloat16()
    assert_same(triton_ops.quantize(where(triton_ops, w)), reference.quantize(w))


def test_threads_share_no_scratch() -> None:
    """Eight threads concurrently cast slices with different scales, through table and scratch."""
    generator = torch.Generator().manual_seed(10)
    slices = [(torch.randn(300_000, generator=generator) * 10.0**-i).to(DTYPES[i % 3]) for i in range(8)]
    expected = [reference.quantize(w) for w in slices]
    found: list[Results | None] = [None] * 8

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = cpu.quantize(slices[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(found, expected, strict=True):
        assert got is not None
        assert_same(got, wanted)


@pytest.mark.gpu
def test_concurrent_streams() -> None:
    """Concurrent calls on different streams are independent: each has its own amaxes and counters."""
    from nemotron_fp8_kernels import quantize, quantize_many

    tensors = [torch.randn(1 << 20, device="cuda").bfloat16() * 2.0**-i for i in range(16)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found: list[list[Results]] = []
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            found.append([quantize(w) for w in tensors] + quantize_many(tensors))
    torch.cuda.synchronize()
    expected = [reference.quantize(w.cpu()) for w in tensors] * 2
    for results in found:
        for got, wanted in zip(results, expected, strict=True):
            assert_same(got, wanted)


@pytest.mark.gpu
def test_a_cast_loads_elements_after_their_producer() -> None:
    """The cast loads its elements before the amax kernel finishes, but not before their producer does."""
    from nemotron_fp8_kernels import quantize

    w = torch.empty(8 << 20, dtype=torch.bfloat16, device="cuda")
    for i in range(100):
        w.normal_(0, 0.01 * (1 + i % 7))
        found = quantize(w)
        if i % 20 == 0:
            assert_same(found, reference.quantize(w.cpu()))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    """Offsets have 64 bits: the last of 2^31 + 100 elements are cast, dense and strided."""
    from nemotron_fp8_kernels import quantize

    count = (1 << 31) + 100
    if torch.cuda.mem_get_info()[0] < 4 * count:
        pytest.skip(f"needs {4 * count} bytes of free device memory")
    w = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    w[-1], w[-100] = 3.0, -1.5
    q, scale = quantize(w)
    assert_same((q[-128:], scale), reference.quantize(w[-128:].cpu()))
    rows = w[: 1 << 31].view(4, -1)
    rows[3, -2] = 7.0
    q, scale = quantize(rows[:, 1:])
    assert_same((q[3, -128:], scale), reference.quantize(rows[3, -128:].cpu()))
