"""Budgets to buffers, units to schedules, schedules to reads: what the CUDA engine decides before it does anything."""

from __future__ import annotations

import itertools
import os
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8.checkpoint.dtypes import nbytes
from nemotron_fp8.checkpoint.tensor_view import Extent, TensorView, contiguous
from nemotron_fp8.engines.cuda.memory_plan import ALIGN, PAGE, RingPlan, ring_plan
from nemotron_fp8.engines.cuda.schedule import Phase, Use, schedule
from nemotron_fp8.engines.cuda.slot_reader import SlotReader, cached_share
from nemotron_fp8.errors import BudgetError
from nemotron_fp8.planning.tasks import ScaleGroup, ShardTask, Slicing, TensorTask, layout_of
from nemotron_fp8.sources.reader import FolderOpener, Reader
from tests.support.random_weights import DTYPES, RECIPES
from tests.support.recipes import PUBLISHED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@st.composite
def shard_tasks(draw: st.DrawFn) -> ShardTask:
    """A unit of tensors that lie anywhere in files, in one piece, in parts or transposed, in groups of any size."""
    recipe = draw(st.sampled_from(RECIPES))
    edges = st.sampled_from([0, 1, 3, 64, 128, 200, 512, 1000])
    tensor_tasks, views = [], []
    offset = draw(st.integers(0, 5000)) * 2
    for i in range(draw(st.integers(1, 12))):
        dtype, shape = draw(st.sampled_from(list(DTYPES))), (draw(edges), draw(edges))
        name = f"t{i}.weight"
        kind = draw(st.sampled_from(["whole", "parts", "transposed"]))
        if kind == "transposed" and all(shape):
            item = nbytes(dtype, (1,))
            step = item * shape[0]
            extent = Extent("d", offset, item, shape[0], item * shape[1], item=item, step=step)
            view = TensorView(name, dtype, shape, (extent,))
        elif kind == "whole" or not shape[1]:
            view = contiguous("a", name, dtype, shape, offset)
        else:  # two parts side by side, as tensor parallelism leaves them
            item = nbytes(dtype, (1,))
            left = shape[1] // 2 * item
            right = shape[1] * item - left
            parts = [Extent("b", offset, left, shape[0], left, 0, 0)] if left and shape[0] else []
            parts += [Extent("c", offset, right, shape[0], right, 0, left)] if shape[0] else []
            view = TensorView(name, dtype, shape, tuple(parts))
        offset += view.nbytes + (0 if draw(st.booleans()) else draw(st.integers(0, 9000)))
        views.append(view)
    groups: list[ScaleGroup] = []
    for view in views:
        if not draw(st.booleans()):
            tensor_tasks.append(TensorTask(view))
            continue
        last = groups[-1].members if groups else ()
        if recipe.share_scales and last and last[0].dtype == view.dtype and draw(st.booleans()):
            groups[-1] = ScaleGroup(groups[-1].id, (*last, view), groups[-1].fused_module)
        else:
            groups.append(ScaleGroup(view.name, (view,), view.name))
        if draw(st.integers(0, 5)):  # else it lies in another shard
            tensor_tasks.append(TensorTask(view, groups[-1].id))
    weights = recipe.weight_format
    layout = layout_of(tensor_tasks, None, weights)
    return ShardTask(
        "u", None, tuple(tensor_tasks), tuple(groups), layout, recipe, Slicing(1, 1 << 20, weights.numbers), weights
    )


@settings(max_examples=150, deadline=None)
@given(shard_tasks(), st.integers(0, 1 << 28), st.integers(0, 1 << 28), st.integers(1, 32))
def test_a_plan_keeps_to_its_budgets_or_says_what_is_missing(
    shard_task: ShardTask, host: int, memory: int, threads: int
) -> None:
    """And what an error says is needed is enough, and no byte too much."""
    for _ in range(3):
        try:
            plan = ring_plan([shard_task], host, memory, threads)
        except BudgetError as error:
            assert error.needed > error.budget
            if "device" in error.option:
                assert error.budget == memory
                memory = error.needed
            else:
                assert error.budget == host
                host = error.needed
            with pytest.raises(BudgetError):
                ring_plan([shard_task], host - 1, memory, threads) if "device" not in error.option else ring_plan(
                    [shard_task], host, memory - 1, threads
                )
            continue
        assert plan.host_bytes <= host
        assert plan.device_bytes <= memory
        assert min(plan.up_slots, plan.down_slots) >= 2
        return
    pytest.fail("two errors, then none")


@settings(max_examples=150, deadline=None)
@given(shard_tasks(), st.integers(0, 8 << 20), st.integers(0, 12 << 20), st.sampled_from(list(Phase)))
def test_a_schedule_moves_every_byte_where_it_has_room(
    shard_task: ShardTask, host: int, memory: int, phase: Phase
) -> None:
    ring = smallest(shard_task, host, memory)
    order = schedule(shard_task.tensor_tasks, shard_task, ring, phase)
    amaxed: dict[str, int] = {}
    emitted: dict[str, int] = {}
    admitted: dict[str, int] = {}
    complete: dict[str, int] = {}
    held = {name: region.chunks for name, region in order.regions.items()}
    for number, load in enumerate(order.loads):
        spans, device_spans, out_spans = [], [], []
        for group in load.admits:
            region = order.regions[group]
            assert region.at + region.nbytes <= load.block_bytes
            admitted[group] = number
        assert load.block_bytes <= ring.slab_bytes
        earlier = {p.group for p in load.pieces if p.use in (Use.HOLD, Use.AMAX, Use.CAST)} - set(load.admits)
        assert not (earlier and load.admits)  # it would wait for itself
        for piece in load.pieces:
            size, name, item = piece.end - piece.begin, piece.view.name, piece.view.itemsize
            assert size > 0
            spans.append((piece.at, piece.at + size))
            if piece.use in (Use.HOLD, Use.AMAX, Use.WHOLE) or (piece.use is Use.ROWS and phase is Phase.BOTH):
                assert amaxed.get(name, 0) == piece.begin  # in order, nothing twice
                amaxed[name] = piece.end
            if piece.use in (Use.COPY, Use.CAST, Use.WHOLE, Use.ROWS):
                assert emitted.get(name, 0) == piece.begin
                emitted[name] = piece.end
            if piece.use in (Use.AMAX, Use.CAST, Use.WHOLE, Use.ROWS):
                assert piece.device_at % ALIGN == 0
                device_spans.append((piece.device_at, piece.device_at + size))
            if piece.use in (Use.CAST, Use.WHOLE, Use.ROWS):
                out_spans.append((piece.out_at, piece.out_at + size // item))
            if piece.use in (Use.WHOLE, Use.ROWS):
                rows = (
                    piece.view.shape
                    if size == piece.view.nbytes
                    else (size // piece.view.row_bytes, *piece.view.shape[1:])
                )
                scales = 4 * prod(shard_task.numbers.coverage.scale_shape(rows))
                assert piece.scale_at % ALIGN == 0
                out_spans.append((piece.scale_at, piece.scale_at + scales))
            if piece.use is Use.ROWS:  # whole rows, since a scale belongs to one
                assert piece.begin % piece.view.row_bytes == 0
                assert shard_task.numbers.coverage.fine
            if piece.use is Use.CAST and phase is Phase.BOTH:
                assert complete.get(str(piece.group), number) <= number
            if piece.use in (Use.HOLD, Use.AMAX, Use.CAST):
                assert admitted[str(piece.group)] <= number
        complete.update(dict.fromkeys(load.completes, number))
        assert apart(spans, ring.up_bytes)
        assert apart(device_spans, ring.up_bytes)
        assert apart(out_spans, ring.down_bytes)
        assert load.out_bytes <= ring.down_bytes
        # Whole pages around every read belong to it alone, since O_DIRECT fills them.
        pages = [(r.at // PAGE, -(-(r.at + r.length) // PAGE)) for r in load.reads]
        pages += [
            (load.pieces[i].at // PAGE, -(-(load.pieces[i].end - load.pieces[i].begin + load.pieces[i].at) // PAGE))
            for i in load.gathered
        ]
        assert apart([p for p in pages if p[0] < p[1]], ring.up_bytes // PAGE)
        assert all(r.at % PAGE == r.offset % PAGE for r in load.reads)
        covered = [(r.at, r.at + r.length) for r in load.reads] + [spans[i] for i in load.gathered]
        assert sum(e - b for b, e in covered) == sum(e - b for b, e in spans)
    for chunks in held.values():
        for view, begin, end, _ in chunks:
            assert emitted.get(view.name, 0) == begin
            assert 0 < (end - begin) // view.itemsize <= ring.down_bytes
            emitted[view.name] = end
    tensor_tasks = () if phase is Phase.AMAX else shard_task.tensor_tasks
    members = {m.name: m.nbytes for group in shard_task.groups for m in group.members if m.nbytes}
    assert emitted == {w.view.name: w.view.nbytes for w in tensor_tasks if w.view.nbytes}
    assert amaxed == ({} if phase is Phase.CAST else members)


def smallest(shard_task: ShardTask, host: int, memory: int) -> RingPlan:
    """A plan within these budgets, or within the least that will do."""
    while True:
        try:
            return ring_plan([shard_task], host, memory, 1)
        except BudgetError as error:
            host, memory = (host, error.needed) if "device" in error.option else (error.needed, memory)


def apart(spans: list[tuple[int, int]], size: int) -> bool:
    """Return True if all spans lie within ``size`` and no two overlap."""
    ends = [0, *itertools.chain(*sorted(spans)), size]
    return ends == sorted(ends)


# Reading


@contextmanager
def cold(path: Path) -> Iterator[None]:
    """A file whose pages are not in the page cache, or a skipped test."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        share = cached_share(file.fileno(), 0, path.stat().st_size)
        if share is None or share > 0.1:
            pytest.skip("this file system keeps its pages, or this system does not tell")
        yield


def test_cold_files_are_read_past_the_page_cache_and_warm_ones_through_it(tmp_path: Path) -> None:
    size = 3_000_001
    path = tmp_path / "a"
    path.write_bytes(bytes(i * 7 % 251 for i in range(size)))
    data = path.read_bytes()
    # Reads that begin and end anywhere, the last at the end of the file.
    spans = [(0, 10), (4095, 2), (8192, 4096), (100_003, 1_000_000), (size - 5000, 5000)]
    for warm in (False, True):
        for offset, length in spans:
            view = contiguous("a", "t", "U8", (length,), offset)
            layout = layout_of([TensorTask(view)], None, PUBLISHED.weight_format)
            shard_task = ShardTask(
                "u", None, (TensorTask(view),), (), layout, PUBLISHED, Slicing(1, 1), PUBLISHED.weight_format
            )
            (load,) = schedule(
                shard_task.tensor_tasks, shard_task, ring_plan([shard_task], 12 << 20, 32 << 20, 1), Phase.BOTH
            ).loads
            slot = torch.zeros(5 << 20, dtype=torch.uint8)
            start = -slot.data_ptr() % PAGE
            area = memoryview(slot.numpy())[start : start + (4 << 20)]
            with cold(path), Reader(FolderOpener(tmp_path)) as reader:
                if warm:
                    path.read_bytes()
                files = SlotReader(reader)
                files.fill(load, area)
                files.close()
                at = load.pieces[0].at
                assert area[at : at + length] == data[offset : offset + length]
                with path.open("rb") as file:
                    share = cached_share(file.fileno(), 0, size)
                assert share == 1.0 if warm else share < 0.1
