"""One allocation: its bytes, those that a launch may touch, and the last accesses to each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .errors import EmulatorError

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}

LARGE = 1 << 28
"""Bytes above which an allocation is sparse: its spans are listed, and no race is looked for."""

NOBODY, SEVERAL = -1, -2
"""In place of the number of a CTA."""


class Span(NamedTuple):
    """Rows of a large allocation that a launch may touch; all numbers in bytes."""

    start: int
    rows: int
    stride: int
    size: int
    writable: bool


class Accesses:
    """CTA, lane and clock of the last access to each byte."""

    def __init__(self, size: int) -> None:
        self.cta = np.full(size, NOBODY, np.int32)
        self.lane = np.zeros(size, np.int32)
        self.clock = np.zeros(size, np.int32)


class Storage:
    """One allocation.

    Attributes:
        base: address of the first byte, a multiple of 16.
        data: the bytes, those of the tensor itself.
        valid: 0xFF for each byte that some registered tensor covers.
        writable: 0xFF for each byte that may be stored to.
        spans: instead of both, if the allocation is large.
        written: last stores; None before the first.
        read: last loads, of bytes that may be stored to; None before the first.
    """

    def __init__(self, base: int, data: np.ndarray, name: str) -> None:
        if base % 16:
            raise EmulatorError(f"allocation {name} at {base:#x} is not aligned to 16")
        self.base, self.data, self.name, self.size = base, data, name, data.size
        self.large = data.size > LARGE
        size = 0 if self.large else data.size
        self.valid, self.writable = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.any_writable = False
        self._words: dict[int, np.ndarray] = {}
        self.spans: list[Span] = []
        self.written: Accesses | None = None
        self.read: Accesses | None = None

    def words(self, width: int) -> np.ndarray:
        """Return the bytes as words of ``width`` bytes."""
        if width not in self._words:
            self._words[width] = self.data[: self.size // width * width].view(WORDS[width])
        return self._words[width]

    def allow(self, start: int, rows: int, stride: int, size: int, writable: bool) -> None:
        """Allow accesses to ``rows`` rows of ``size`` bytes, ``stride`` bytes apart."""
        self.any_writable |= writable
        if self.large:
            self.spans.append(Span(start, rows, stride, size, writable))
            return
        for mask in (self.valid, self.writable) if writable else (self.valid,):
            np.lib.stride_tricks.as_strided(mask[start:], (rows, size), (stride, 1))[...] = 0xFF

    def allowed(self, offsets: np.ndarray, width: int, count: int, store: bool) -> np.ndarray:
        """Return for each access of ``count`` words of ``width`` bytes: all its bytes may be touched."""
        if not self.large:
            mask = self.writable if store else self.valid
            words = mask[: self.size // width * width].view(WORDS[width])
            index = (offsets >> SHIFT[width])[:, None] + np.arange(count)
            return (words[index] == np.iinfo(WORDS[width]).max).all(axis=1)
        good = np.zeros(len(offsets), bool)
        for span in self.spans:
            if span.writable or not store:
                at = offsets - span.start
                row = at // span.stride
                good |= (at >= 0) & (row < span.rows) & (at - row * span.stride + width * count <= span.size)
        return good

    def note_read(self, places: np.ndarray, ctas: np.ndarray, lanes: np.ndarray, clocks: np.ndarray) -> None:
        """Note loads of ``places`` [lanes, bytes]; of several CTAs only that they are several."""
        if self.read is None:
            self.read = Accesses(self.size)
        before = self.read.cta[places]
        others = (before != NOBODY) & (before != ctas[:, None])
        self.read.cta[places] = np.where(others, SEVERAL, ctas[:, None])
        self.read.lane[places] = lanes[:, None]
        self.read.clock[places] = clocks[:, None]
