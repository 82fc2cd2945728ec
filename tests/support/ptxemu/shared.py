"""Shared memory of CTAs, with bounds, alignment, and races by the interval between two ``bar.sync``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import MisalignedError, OutOfBoundsError, RaceError
from .operands import SHARED_BASE

if TYPE_CHECKING:
    from .effects import Effect

NEVER, SEVERAL = -1, -2


class Shared:
    """Shared memory of some CTAs, side by side in one array, filled with noise.

    Lanes are numbered within their CTA. An interval is the number of ``bar.sync`` that a CTA has passed; within a warp,
    ``bar.warp.sync`` orders, too.

    Attributes:
        count: CTAs.
        limit: bytes of each.
        data: the bytes.
        interval: of each CTA.
        warp_interval: number of ``bar.warp.sync`` that each warp [CTA, warp] has passed.
    """

    def __init__(self, count: int, limit: int, warps: int, rng: np.random.Generator) -> None:
        self.count, self.limit = count, limit
        self.stride = max(16, -(-limit // 16) * 16)
        size = count * self.stride
        self.data = rng.integers(0, 256, size, dtype=np.uint8)
        self.interval = np.zeros(count, np.int32)
        self.warp_interval = np.zeros((count, warps), np.int32)
        self._writer = np.full(size, NEVER, np.int32)
        self._written = np.full(size, NEVER, np.int32)
        self._written_in_warp = np.full(size, NEVER, np.int32)
        self._reader = np.full(size, NEVER, np.int32)
        self._read = np.full(size, NEVER, np.int32)

    def places(self, effect: Effect, addresses: np.ndarray, ctas: np.ndarray, size: int) -> np.ndarray:
        """Return the places [lanes, size] of ``size`` bytes at each address."""
        offsets = addresses - SHARED_BASE
        if (offsets % size).any():
            raise MisalignedError(f"{size} bytes of shared memory: {effect.text}")
        if (offsets < 0).any() or (offsets + size > self.limit).any():
            text = f"offsets {int(offsets.min())} to {int(offsets.max())} of {self.limit} bytes of shared memory"
            raise OutOfBoundsError(f"{text}: {effect.text}")
        return (offsets + ctas * self.stride)[:, None] + np.arange(size)

    def read(self, effect: Effect, places: np.ndarray, ctas: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Return the bytes [lanes, size]."""
        now = self.interval[ctas][:, None]
        warps = lanes // 32
        writer, written = self._writer[places], self._written[places]
        if (written == NEVER).any():
            raise RaceError(f"shared memory read before any write: {effect.text}")
        beside = (written == now) & (writer != lanes[:, None])
        ordered = self._written_in_warp[places] < self.warp_interval[ctas, warps][:, None]
        ordered &= writer // 32 == warps[:, None]
        if (beside & ~ordered).any():
            raise RaceError(f"shared memory read beside another lane's write: {effect.text}")
        several = (self._read[places] == now) & (self._reader[places] != lanes[:, None])
        self._reader[places] = np.where(several, SEVERAL, lanes[:, None])
        self._read[places] = now
        return self.data[places]

    def write(
        self, effect: Effect, places: np.ndarray, values: np.ndarray, ctas: np.ndarray, lanes: np.ndarray
    ) -> None:
        """Store bytes [lanes, size]."""
        now = self.interval[ctas][:, None]
        warps = lanes // 32
        in_warp = self.warp_interval[ctas, warps][:, None]
        writer = self._writer[places]
        beside = (self._written[places] == now) & (writer != lanes[:, None]) & (self.data[places] != values)
        ordered = (writer // 32 == warps[:, None]) & (self._written_in_warp[places] < in_warp)
        # The warp of an earlier reader is not known: bar.warp.sync is taken to order it.
        after_read = (self._read[places] == now) & (self._reader[places] != lanes[:, None]) & (in_warp == 0)
        if (beside & ~ordered).any() or after_read.any():
            raise RaceError(f"shared memory written beside another lane's access: {effect.text}")
        self.data[places] = values
        if (self.data[places] != values).any():
            raise RaceError(f"lanes of one store to shared memory differ: {effect.text}")
        self._writer[places] = lanes[:, None]
        self._written[places] = now
        self._written_in_warp[places] = in_warp
