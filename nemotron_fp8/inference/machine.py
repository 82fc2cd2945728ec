"""Speed of this machine for an evaluation, from a short measurement: a product of matrices, a read of the source."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from nemotron_fp8.engines.base import torch_threads
from nemotron_fp8.inference.needs import Rates
from nemotron_fp8.sources.reader import Reader

if TYPE_CHECKING:
    from nemotron_fp8.sources.base import Source


NAME = "this machine"
TOKENS, SIDE = 512, 2048
"""Shape of the product: a short sequence, and a matrix larger than the cache of a core."""
SECONDS = 0.2
"""Seconds of the products: the fastest of those that fit counts."""
SAMPLE_BYTES = 64 << 20
"""Bytes that are read, from the largest tensors."""
STEP = 4 << 20
"""Bytes read at a time."""


def measure_machine(source: Source, itemsize: int, threads: int) -> Rates:
    """Return the speed of the CPU, and that of reading the source.

    A source in the page cache is read faster than one on the disk. A remote source is not read: its transfer depends on
    the network.

    Args:
        source: the source of the evaluation.
        itemsize: bytes of a number of the model: 4 for float32, else bfloat16 is measured.
        threads: threads of the arithmetic.

    Raises:
        SourceReadError, SourceChangedError: the source cannot be read.
    """
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    read = _read_rate(source) if source.is_local else None
    return Rates(NAME, _flops(dtype, threads), read, measured=True)


def _flops(dtype: torch.dtype, threads: int) -> float:
    """Return the floating-point operations per second of a product of matrices."""
    states = torch.ones(TOKENS, SIDE, dtype=dtype)
    weight = torch.ones(SIDE, SIDE, dtype=dtype)
    with torch_threads(threads), torch.inference_mode():
        torch.nn.functional.linear(states, weight)  # the first call chooses a kernel and starts the threads
        best, begin = float("inf"), time.perf_counter()
        while True:
            started = time.perf_counter()
            torch.nn.functional.linear(states, weight)
            ended = time.perf_counter()
            best = min(best, ended - started)
            if ended - begin >= SECONDS:
                return 2 * TOKENS * SIDE * SIDE / best


def _read_rate(source: Source) -> float | None:
    """Return the bytes per second of reading the largest tensors; None if there is nothing to read."""
    left, taken = SAMPLE_BYTES, 0
    started = time.perf_counter()
    with Reader(source.opener) as reader:
        for view in sorted(source.inventory.views, key=lambda view: -view.nbytes):
            end = min(view.nbytes, left)
            for begin in range(0, end, STEP):
                with reader.raw(view, begin, min(begin + STEP, end)) as data:
                    taken += len(bytes(data))  # a copy: a mapped page is read when it is touched
            left -= end
            if not left:
                break
    return taken / (time.perf_counter() - started) if taken else None
