"""Compare a dequantized result with codes times scales of its source, byte by byte."""

from __future__ import annotations

from collections import Counter
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch

from nemotron_fp8.engines.devices import EngineSpec, open_engine
from nemotron_fp8.sources.reader import TORCH_DTYPES, Reader
from nemotron_fp8.verification.problems import Problem
from nemotron_fp8.verification.quantized_values import differing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.header import Entry
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.progress import StageProgress
    from nemotron_fp8.sources.files import Opener


class DequantizedCheck(NamedTuple):
    """Outcome of a comparison.

    Attributes:
        plain: number of former FP8 tensors that equal codes times scales.
        unquantized: number of other tensors that equal the source's.
        problems: differences of the rest.
    """

    plain: int
    unquantized: int
    problems: list[Problem]


def dtype_of_result(quantized: Iterable[str], views: Mapping[str, TensorView]) -> str:
    """Return the dtype of dequantized tensors that no manifest records: that of the first one, else bfloat16.

    Args:
        quantized: names of the quantized tensors of the source.
        views: tensors of the result, by name.
    """
    from nemotron_fp8.planning.dequantize import DTYPES

    names = {name: dtype for dtype, name in DTYPES.items()}
    found = (views[name].dtype for name in quantized if name in views)
    return names.get(next(found, "BF16"), "bfloat16")


def check_dequantized_values(
    source: Opener,
    destination: Opener,
    plan: Plan,
    views: Mapping[str, TensorView],
    budget: int,
    threads: int,
    gauge: StageProgress,
) -> DequantizedCheck:
    """Run a dequantization plan and compare every tensor with the result.

    Args:
        source: opens the files of the source.
        destination: opens the files of the result.
        plan: plan of `nemotron_fp8.planning.dequantize.plan_dequantize` for the source.
        views: tensors of the result, by name.
        budget: bytes that the working buffers may take.
        threads: wanted workers.
        gauge: tracks the progress.

    Raises:
        SourceReadError, SourceChangedError: a file ends early, cannot be read, or changes meanwhile.
    """
    problems: list[Problem] = []
    entries = [entry for shard_task in plan.shard_tasks for entry in shard_task.layout.entries]
    sound = {entry.name for entry in entries if _fits(entry, views.get(entry.name), problems)}
    problems += [
        Problem(name, "not expected: neither a dequantized nor an unquantized tensor of the source")
        for name in views.keys() - {entry.name for entry in entries}
    ]
    decoded = {
        tensor_task.view.name
        for shard_task in plan.shard_tasks
        for tensor_task in shard_task.tensor_tasks
        if tensor_task.decode
    }
    wrong: Counter[str] = Counter()
    lock = Lock()
    advance = gauge.stage("values", sum(entry.end - entry.start for entry in entries if entry.name in sound))
    with (
        open_engine(EngineSpec("cpu", budget, threads=threads), lambda _: None) as engine,
        Reader(source) as before,
        Reader(destination) as after,
    ):

        def emit(name: str, begin: int, data: memoryview) -> None:
            with after.raw(views[name], begin, begin + len(data)) as there:
                count = differing(data, there)
                if count and name in decoded:
                    count = differing_values(data, there, TORCH_DTYPES[views[name].dtype])
            if count:
                with lock:
                    wrong[name] += count
            advance(len(data))

        for shard_task in plan.shard_tasks:
            engine.cast(
                [tensor_task for tensor_task in shard_task.tensor_tasks if tensor_task.view.name in sound],
                shard_task,
                before,
                {},
                emit,
            )
    for name, count in wrong.items():
        whose = "code times scale" if name in decoded else "the source's"
        problems.append(Problem(name, f"{count:,} bytes differ from {whose}"))
    right = sound - wrong.keys()
    return DequantizedCheck(len(right & decoded), len(right - decoded), problems)


def differing_values(a: memoryview, b: memoryview, dtype: torch.dtype) -> int:
    """Count the bytes at which two spans of values differ, except in NaN: processors choose its bits."""
    left, right = (torch.frombuffer(bytearray(span), dtype=dtype) for span in (a, b))  # a span may be unaligned
    either = ~(left.isnan() & right.isnan())
    return int((left.view(torch.uint8) != right.view(torch.uint8)).view(-1, dtype.itemsize)[either].sum())


def _fits(entry: Entry, view: TensorView | None, problems: list[Problem]) -> bool:
    """Return True if a tensor has its expected dtype and shape; otherwise add a problem."""
    if view is None:
        problems.append(Problem(entry.name, "missing"))
    elif (view.dtype, view.shape) != (entry.dtype, entry.shape):
        must = f"{entry.dtype} {list(entry.shape)}"
        problems.append(Problem(entry.name, f"{view.dtype} {list(view.shape)}, must be {must}"))
    else:
        return True
    return False
