"""quantize_many: the order of tickets, and the bytes of every path."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nemotron_fp8_kernels
from nemotron_fp8_kernels import cpu, grouping, reference
from nemotron_fp8_kernels.errors import SharedScaleError
from tests.kernels.strategies import DTYPES, weights
from tests.kernels.test_paths import assert_same, where
from tests.kernels.tickets import specified

if TYPE_CHECKING:
    from types import ModuleType


@st.composite
def partitions(draw: st.DrawFn, count: int) -> list[list[int]]:
    """Draw disjoint groups of some of ``count`` indices."""
    labels = draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))
    groups = [[i for i, label in enumerate(labels) if label == wanted] for wanted in range(3)]
    return [group for group in groups if group]


@given(data=st.data(), tiles=st.lists(st.integers(1, 40), min_size=1, max_size=12), lead=st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_order_is_complete_and_cannot_wait_for_later_tickets(data: st.DataObject, tiles: list[int], lead: int) -> None:
    """Each tile has one ticket per phase, and every cast follows all amaxes of its group, so that every wait ends."""
    groups = grouping.partition(len(tiles), data.draw(partitions(len(tiles))))
    found = grouping.order(tiles, groups, lead, l2_tiles=data.draw(st.integers(1, 100)))
    tickets = [(which // 2, which % 2, tile) for which, tile in found.work.tolist()]
    wanted = Counter((i, phase, t) for i, n in enumerate(tiles) for phase in (0, 1) for t in range(n))
    assert Counter(tickets) == wanted
    assert found.is_cast.tolist() == [bool(phase) for _, phase, _ in tickets]
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    arrived: Counter[int] = Counter()
    for index, phase, _ in tickets:
        group = group_of[index]
        if phase:
            assert arrived[group] == found.amax_tiles[group]
        else:
            arrived[group] += 1


@given(
    data=st.data(),
    tiles=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    lead=st.integers(0, 60),
    l2_tiles=st.integers(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_order_is_the_specified_one(data: st.DataObject, tiles: list[int], lead: int, l2_tiles: int) -> None:
    """Batches, lead, alternation and reversal are those of the loops in tickets.py, ticket by ticket."""
    groups = grouping.partition(len(tiles), data.draw(partitions(len(tiles))))
    found = grouping.order(tiles, groups, lead, l2_tiles)
    assert [tuple(ticket) for ticket in found.work.tolist()] == specified(tiles, groups, lead, l2_tiles)
    assert found.work.dtype == torch.int32
    assert found.amax_tiles == [sum(tiles[index] for index in group) for group in groups]


@pytest.mark.parametrize(("count", "tiles"), [(64, 320), (600, 19), (3, 2048)])
def test_order_of_production_lists(count: int, tiles: int) -> None:
    """64 tensors of 5 M elements, 600 of 0.3 M and 3 of 32 M, in chunks of 16,384."""
    groups = [[index] for index in range(count)]
    found = grouping.order([tiles] * count, groups, 144, 640)
    assert [tuple(ticket) for ticket in found.work.tolist()] == specified([tiles] * count, groups, 144, 640)


@given(count=st.integers(2, 12), size=st.integers(20, 60), lead=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_about_one_tensor_is_read_between_amax_and_cast(count: int, size: int, lead: int) -> None:
    """Between amax and cast of a tile, L2 must hold at most one tensor and the lead."""
    found = grouping.order([size] * count, [[i] for i in range(count)], lead, l2_tiles=10**6)
    seen: dict[tuple[int, int], int] = {}
    reads = 0
    for which, tile in found.work.tolist():
        if which % 2 == 0:
            reads += 1
            seen[which // 2, tile] = reads
        else:
            assert reads - seen[which // 2, tile] <= size + lead


def test_partition_rejects_invalid_groups() -> None:
    assert grouping.partition(4, [[2, 0]]) == [[0, 2], [1], [3]]
    for groups in ([[]], [[4]], [[-1]], [[0, 0]], [[0, 1], [1, 2]]):
        with pytest.raises(SharedScaleError):
            grouping.partition(4, groups)


@given(
    data=st.data(),
    tensors=st.lists(weights(max_rows=6, max_columns=90), min_size=1, max_size=6),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_of_every_path(triton_ops: ModuleType, data: st.DataObject, tensors: list[torch.Tensor]) -> None:
    """CPU, one launch and two launches equal the reference for all shapes, dtypes, strides and groups."""
    from nemotron_fp8_kernels.gpu.configs import Config
    from nemotron_fp8_kernels.gpu.many import quantize_many

    shared = data.draw(partitions(len(tensors)))
    expected = reference.quantize_many(tensors, shared=shared)
    for group in shared:
        assert len({float(expected[index][1]) for index in group}) == 1
    moved = [where(triton_ops, w) for w in tensors]
    # Outputs in one slab, as in the pipeline: some at odd addresses, which the grouped kernel does not support.
    gap = data.draw(st.sampled_from((0, 1, 16)))
    slab = torch.full((sum(w.numel() + gap for w in tensors) + 1,), 0x55, dtype=torch.uint8, device=moved[0].device)
    ends = list(accumulate(w.numel() + gap for w in tensors))
    begins = [end - w.numel() for end, w in zip(ends, tensors, strict=True)]
    outs = [
        slab[begin : begin + w.numel()].view(torch.float8_e4m3fn).view(w.shape)
        for begin, w in zip(begins, tensors, strict=True)
    ]
    found = quantize_many(moved, shared=shared, config=Config(64, 3, 4), out=outs)
    for (q, scale), out, wanted in zip(found, outs, expected, strict=True):
        assert q is out
        assert_same((q, scale), wanted)
        q.view(torch.uint8).fill_(0x55)
    assert bool((slab == 0x55).all())
    runs = [
        cpu.quantize_many(tensors, shared=shared),
        quantize_many(moved, shared=shared, two_launches=True, config=Config(128, 1, 4)),
        quantize_many(moved, shared=shared, config=Config(128, 1, 4)),
        quantize_many(moved, shared=shared, config=Config(64, 3, 4)),
    ]
    for found in runs:
        for got, wanted in zip(found, expected, strict=True):
            assert_same(got, wanted)


@pytest.mark.parametrize("numerics", ["float32", "original"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_outputs_of_every_path(triton_ops: ModuleType, granularity: Any, numerics: Any) -> None:
    """Every path writes to ``out`` and returns it: dense, in columns of a matrix, in rows of one, and empty."""
    from nemotron_fp8_kernels.gpu.many import quantize_many

    if numerics == "original" and granularity != "tensor":
        pytest.skip("not supported")
    generator = torch.Generator().manual_seed(14)
    tensors = [torch.randn(shape, generator=generator) for shape in ((6, 20), (6, 13), (6, 7), (40, 33), (0, 5))]
    tensors = [w.to(DTYPES[i % 3]) for i, w in enumerate(tensors)]
    expected = reference.quantize_many(tensors, granularity, (4, 8), numerics)
    for path in (reference, cpu, triton_ops, nemotron_fp8_kernels):
        moved = [where(triton_ops, w) if path is triton_ops else w for w in tensors]
        frame = torch.full((8, 50), 0x55, dtype=torch.uint8, device=moved[0].device)
        codes = frame.view(torch.float8_e4m3fn)
        # Both matrices alternate row by row in one buffer: their spans overlap, their bytes do not.
        outs = [codes[1:7, :20], codes[1:7, 20:33], torch.empty_like(moved[2], dtype=codes.dtype)]
        outs += [torch.empty_like(w, dtype=codes.dtype) for w in moved[3:]]
        call = quantize_many if path is triton_ops else path.quantize_many
        found = call(moved, granularity, (4, 8), numerics, out=outs)
        for (q, scale), out, wanted in zip(found, outs, expected, strict=True):
            assert q is out
            assert_same((q, scale), wanted)
        frame[1:7, :33] = 0x55
        assert bool((frame == 0x55).all())


@given(
    data=st.data(),
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    lead=st.integers(1, 40),
    programs=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_programs_that_take_the_next_ticket_early_always_terminate(
    data: st.DataObject, chunks: list[int], lead: int, programs: int
) -> None:
    """In a simulation with any interleaving, each program holds two tickets, and one program can always proceed."""
    groups = grouping.partition(len(chunks), data.draw(partitions(len(chunks))))
    work = grouping.order(chunks, groups, lead, l2_tiles=data.draw(st.integers(1, 60))).work.tolist()
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    missing = [sum(chunks[index] for index in group) for group in groups]
    order = data.draw(st.randoms(use_true_random=False))
    drawn = min(programs, len(work))
    # Current ticket of each program, and its next ticket, which it takes when it starts.
    at: dict[int, int] = dict(enumerate(range(drawn)))
    ahead: dict[int, int] = {}
    done = 0
    while at:
        able = []
        for program, ticket in at.items():
            which = work[ticket][0]
            if program not in ahead or which % 2 == 0 or not missing[group_of[which // 2]]:
                able.append(program)
        assert able, "deadlock"
        program = order.choice(able)
        if program not in ahead:
            ahead[program] = drawn
            drawn += 1
            continue
        which = work[at[program]][0]
        if which % 2 == 0:
            missing[group_of[which // 2]] -= 1
        done += 1
        following = ahead.pop(program)
        if following < len(work):
            at[program] = following
        else:
            del at[program]
    assert done == len(work)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_more_chunks_than_are_read_at_once(triton_ops: ModuleType, dtype: torch.dtype) -> None:
    """A program of 32 threads reads 128 slots at a time; a group with 143 has its largest amax in the last."""
    from nemotron_fp8_kernels.gpu.configs import Config
    from nemotron_fp8_kernels.gpu.many import quantize_many

    w = torch.randn(16 * 142 + 5, generator=torch.Generator().manual_seed(4)).to(dtype)
    w[-1] = -50.0
    found = quantize_many([where(triton_ops, w)], config=Config(16, 1, 1))
    assert_same(found[0], reference.quantize(w))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 250])
def test_ends_of_tensors(triton_ops: ModuleType, length: int) -> None:
    """Tensors end within, at and after a vector, a tile and a chunk; nothing is written beyond their ends."""
    from nemotron_fp8_kernels.gpu.configs import Config
    from nemotron_fp8_kernels.gpu.many import prepare

    w = where(triton_ops, torch.randn(2, 256, generator=torch.Generator().manual_seed(length)).bfloat16())
    frame = torch.full((2, 256), 0x55, dtype=torch.uint8, device=w.device)
    weights, codes = [row[:length] for row in w], [row[:length].view(torch.float8_e4m3fn) for row in frame]
    prepared = prepare(weights, codes, [[0], [1]], config=Config(64, 2, 4))
    for _ in range(2):  # a run must not affect the next one
        prepared.run()
        for index, weight in enumerate(weights):
            assert_same((codes[index], prepared.scales[index]), reference.quantize(weight.cpu()))
    assert bool((frame[:, length:] == 0x55).all())


@pytest.mark.parametrize("shared", [None, [[0, 2]]])
def test_large_groups_use_the_single_tensor_kernels(
    triton_ops: ModuleType, shared: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemotron_fp8_kernels.gpu import configs, many

    monkeypatch.setattr(configs, "GROUPED_BYTES", 1000)
    sizes: list[int] = []
    prepare = many.prepare

    def noted(tensors: list[torch.Tensor], codes: object, groups: list[list[int]], *more: object) -> object:
        sizes.extend(tensors[index].numel() for group in groups for index in group)
        return prepare(tensors, codes, groups, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(many, "prepare", noted)
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (499, 501, 500, 300)]
    found = many.quantize_many([where(triton_ops, w) for w in tensors], shared=shared)
    for got, wanted in zip(found, reference.quantize_many(tensors, shared=shared), strict=True):
        assert_same(got, wanted)
    assert sorted(sizes) == ([300, 499, 500] if shared is None else [300])


def test_empty_members_do_not_affect_the_scale_of_a_group(triton_ops: ModuleType) -> None:
    from nemotron_fp8_kernels.gpu.many import quantize_many

    tensors = [torch.empty(0, 3), torch.tensor([[0.5]]), torch.empty(0), torch.empty(0)]
    shared = [[0, 1], [2, 3]]
    for found in (
        reference.quantize_many(tensors, shared=shared),
        cpu.quantize_many(tensors, shared=shared),
        quantize_many([where(triton_ops, w) for w in tensors], shared=shared),
    ):
        scales = [float(scale) for _, scale in found]
        assert scales[0] == scales[1] == float(reference.quantize(tensors[1])[1])
        assert scales[2] == scales[3] == float(reference.quantize(tensors[2])[1])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [100, 1 << 20, 5 << 20, 13 << 20])
def test_grouped_kernel_on_the_device(size: int) -> None:
    """Repeated launches on many tensors, some larger than L2, terminate with the bytes of the reference."""
    from nemotron_fp8_kernels import quantize_many

    count = 3000 if size < 1000 else 24
    tensors = [torch.randn(size, device="cuda").bfloat16() * 2.0 ** -(i % 20) for i in range(count)]
    expected = [reference.quantize(w.cpu()) for w in tensors[:8]]
    for _ in range(3):
        for got, wanted in zip(quantize_many(tensors), expected, strict=False):
            assert_same(got, wanted)


@pytest.mark.gpu
def test_grouped_kernel_beside_another_on_the_device() -> None:
    """The launch terminates although another kernel leaves room for only some of its programs at a time."""
    from nemotron_fp8_kernels.gpu.many import quantize_many

    tensors = [torch.randn(3 << 20, device="cuda").bfloat16() for _ in range(16)]
    expected = [reference.quantize(w.cpu()) for w in tensors[:2]]
    busy, a = torch.cuda.Stream(), torch.randn(8192, 8192, device="cuda")
    for _ in range(5):
        with torch.cuda.stream(busy):
            a @ a
        for got, wanted in zip(quantize_many(tensors), expected, strict=False):
            assert_same(got, wanted)
