"""A repository of many shards: disk as the plan says, memory that does not follow the number of shards.

With several threads the allocator takes up to 400 shards to settle, and single readings differ by some MB; that is not
growth, and a run of 800 shards tells the two apart (one of 1,600 ends where it was after 400). In a short run memory is
judged with one thread only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from math import prod
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from tests.faults import fixture
from tests.faults.disk import small_disk
from tests.faults.row import Outcome, Row, Share
from tests.faults.tools import TMPFS

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator

    from nemotron_fp8 import Plan
    from tests.faults.world import Mode

SHAPE = (512, 512)
OVER = 1.05
FLAT = 2 << 20
"""Bytes by which the resident memory may grow from the third quarter of the shards to the last; with 800 shards 10 KB
a shard. Of each the 95th percentile: how many threads are at work when a reading is taken is chance, that some of many
readings find all of them is not."""
TRIES = 3
"""Runs of which one must show no growth: a leak grows in each, an allocator takes a step of some MB now and then."""
MANY = 800
BLOCK, LINE = 4096, 800
"""Bytes of a block of the file system, and of a shard's receipt and the digest of its amaxes in the journal."""


class ManyShards(Row):
    """Many shards on a file system of their own."""

    name, title = "many-shards", "a repository of 800 shards, into a folder and in place"
    target = "200 shards: disk within the formula + 5%; resident memory flat"
    needs = (TMPFS,)
    alone = True

    def cases(self, share: Share) -> Iterator[object]:
        """Both modes, with and without threads."""
        for mode in ("folder", "in-place"):
            for threads in (1, 4):
                yield mode, threads, share.of(MANY, ci=60)

    def run(self, case: tuple[Mode, int, int]) -> Outcome:
        """Convert in a process of its own that notes disk and memory at every step."""
        mode, threads, shards = case
        for _ in range(TRIES):
            with small_disk(4 << 30) as disk:
                fixture.write_source(disk / "src", *SHAPE, shards=shards)
                seen = measured(lambda: _convert(disk, mode, threads))
            growth = _growth(seen["resident"], shards)
            if growth <= FLAT:
                break
        wrong = list(seen["wrong"])
        if seen["disk"] > seen["formula"] * OVER:
            wrong.append(f"{seen['disk']:,} bytes of disk, the formula gives {seen['formula']:,}")
        if growth > FLAT and (threads == 1 or shards >= MANY):
            wrong.append(f"resident memory grew by {growth:,} bytes from shard {shards // 2} to {shards}")
        key = f"{mode}, {threads} threads"
        counts = {
            "cases": shards,
            f"{key}: disk, % of the formula": round(100 * seen["disk"] / seen["formula"]),
            f"{key}: KiB of growth": max(growth, 0) >> 10,
        }
        return Outcome(wrong, counts)

    def note(self, counts: Counter[str]) -> str:
        """The figures of each mode."""
        modes = sorted({name.split(": ")[0] for name in counts})
        share, grown = "disk, % of the formula", "KiB of growth"
        return "; ".join(
            f"{mode}: disk {counts[f'{mode}: {share}']}% of the formula, memory {counts[f'{mode}: {grown}']} KiB more"
            for mode in modes
        )


def _convert(disk: Path, mode: Mode, threads: int) -> dict[str, Any]:
    from nemotron_fp8 import plan_repo, quantize_repo
    from nemotron_fp8.documents.render import render_documents

    plan = plan_repo(disk / "src", threads=threads)
    largest = max(shard_task.layout.file_size for shard_task in plan.shard_tasks)
    before = shutil.disk_usage(disk).used
    most, resident, shard = 0, [], ""

    def watch(progress: Any) -> None:
        nonlocal most, shard
        most = max(most, shutil.disk_usage(disk).used - before)
        if progress.shard != shard:
            shard = progress.shard
            resident.append(resident_bytes())

    if mode == "in-place":
        quantize_repo(disk / "src", in_place=True, threads=threads, progress=watch)
        # Beside one output shard: the small files, and a block for each header and each file of amaxes.
        small = sum(map(len, render_documents(plan, {}).values())) + len(plan.shard_tasks) * (2 * BLOCK + LINE)
        return {"disk": most, "formula": largest + small + _amaxes(plan), "resident": resident, "wrong": []}
    quantize_repo(disk / "src", disk / "dst", threads=threads, progress=watch)
    most = max(most, shutil.disk_usage(disk).used - before)
    return {"disk": most, "formula": plan.disk_bytes, "resident": resident, "wrong": []}


def _amaxes(plan: Plan) -> int:
    """Bytes of the amaxes of all shards: four for each scale."""
    coverage = plan.recipe.weight_format.numbers.coverage
    groups = [group for shard_task in plan.shard_tasks for group in shard_task.groups]
    return sum(4 * prod(coverage.scale_shape(group.members[0].shape)) for group in groups)


def _growth(resident: list[int], shards: int) -> int:
    """Bytes by which the memory has grown from the third quarter of the shards to the last."""
    # In place, all shards are measured first and made then, in other buffers: two runs over all of them.
    runs = [resident[at : at + shards] for at in range(0, len(resident), shards)]
    half, last = shards // 2, shards * 3 // 4
    return max((int(_high(run[last:]) - _high(run[half:last])) for run in runs if run[last + 1 :]), default=FLAT + 1)


def _high(readings: list[int]) -> float:
    """The 95th percentile."""
    return quantiles(readings, n=20)[-1]


def resident_bytes() -> int:
    """Resident memory of this process."""
    found = re.search(r"^VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do something in a process of its own; what it returns, through a pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        answer: dict[str, Any] = {"wrong": ["it died"]}
        try:
            answer = work()
        except BaseException as error:
            answer = {"wrong": [f"{type(error).__name__}: {error}"], "disk": 0, "formula": 1, "resident": [0] * 20}
        finally:
            with os.fdopen(writing, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    found: dict[str, Any] = json.loads(text) if text else {"wrong": ["it was killed"]}
    return found
