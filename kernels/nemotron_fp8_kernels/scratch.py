"""Buffers that a thread keeps between calls, so that no step pays for fresh pages."""

from __future__ import annotations

import threading

import torch


class Scratch(threading.local):
    """One thread's buffers."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    def buffer(self, dtype: torch.dtype, size: int, which: int = 0) -> torch.Tensor:
        """Uninitialized 1-D scratch of ``size`` elements; valid until the next request for ``dtype`` and ``which``."""
        held = self._buffers.get((dtype, which))
        if held is None or held.numel() < size:
            held = self._buffers[dtype, which] = torch.empty(size, dtype=dtype)
        return held[:size]
