"""Buffers of a thread, reused between calls to avoid page faults on new memory."""

from __future__ import annotations

import threading

import torch


class Scratch(threading.local):
    """Scratch buffers of a thread."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    def buffer(self, dtype: torch.dtype, size: int, which: int = 0) -> torch.Tensor:
        """Return an uninitialized 1-D buffer of ``size`` elements.

        The buffer is valid until the next request with the same ``dtype`` and ``which``.
        """
        held = self._buffers.get((dtype, which))
        if held is None or held.numel() < size:
            held = self._buffers[dtype, which] = torch.empty(size, dtype=dtype)
        return held[:size]

    def shaped(self, dtype: torch.dtype, shape: torch.Size, which: int = 0) -> torch.Tensor:
        """Return a buffer as a tensor of a shape, valid as that of `buffer`."""
        return self.buffer(dtype, shape.numel(), which).view(shape)
