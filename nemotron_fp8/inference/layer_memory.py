"""Memory of the layers: which buffer holds which layer of which checkpoint, filled ahead of use where that pays.

On a CPU, one buffer is filled, used, and filled again. With a device, or with a source on the Hub, a thread fills the
next buffer during the computation with the current one; a device copies it to memory of its own.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from nemotron_fp8._process import stopping
from nemotron_fp8._utils import LONGEST_WAIT, shut_down

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from nemotron_fp8.engines.cuda.device import Device, Event, Stream


def file_buffer(folder: Path, nbytes: int) -> torch.Tensor:
    """Return a buffer in a file without a name: its pages are written to disk when memory is short.

    Args:
        folder: folder on the file system of the file.
        nbytes: bytes of the buffer.

    Raises:
        OSError: the file cannot be created, or the disk is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))  # a full disk is an error here, not a signal later
        area = mmap.mmap(file.fileno(), max(nbytes, 1))
    return torch.frombuffer(area, dtype=torch.uint8)[:nbytes]


class LayerMemory:
    """Buffers for the layers of all checkpoints, in the order of their use. A context manager.

    Args:
        nbytes: bytes of the largest layer.
        ahead: True to fill the next buffer during the computation.
        device: the accelerator; None for the CPU.
        folder: folder for buffers in files; None for buffers in memory.
    """

    def __init__(self, nbytes: int, ahead: bool, device: Device | None = None, folder: Path | None = None) -> None:
        self._ahead, self._device = ahead, device
        count = 2 if ahead else 1
        self._targets: list[torch.Tensor] = []
        self._stream: Stream | None = None
        if device is not None:
            self._buffers = [device.host_buffer(max(nbytes, 1)).tensor for _ in range(count)]
            self._targets = [device.memory(max(nbytes, 1)) for _ in range(count)]
            self._stream = device.stream()
        elif folder is not None:
            self._buffers = [file_buffer(folder, nbytes) for _ in range(count)]
        else:
            self._buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(count)]
        self._pool = ThreadPoolExecutor(1, "layer-ahead") if ahead else None

    def __enter__(self) -> LayerMemory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            shut_down(self._pool)
        if self._device is not None:
            self._device.synchronize()
            self._targets.clear()
            self._buffers.clear()
            self._device.release()

    def _fill(self, number: int, nbytes: int, fill: Callable[[torch.Tensor], None]) -> Event | None:
        """Fill a buffer, and begin its copy to the device."""
        buffer = self._buffers[number % len(self._buffers)]
        fill(buffer)
        if self._stream is None or not nbytes:
            return None
        self._stream.copy(self._targets[number % len(self._targets)][:nbytes], buffer[:nbytes])
        return self._stream.record()

    @contextmanager
    def layers(self, jobs: Sequence[tuple[int, Callable[[torch.Tensor], None]]]) -> Iterator[Iterator[torch.Tensor]]:
        """Yield an iterator over filled buffers, one for each job.

        A buffer is valid until the next one is taken.

        Args:
            jobs: bytes of each layer, and the function that writes it into a buffer on the CPU.
        """
        running: list[Future[Event | None]] = []

        def filled() -> Iterator[torch.Tensor]:
            for number, (nbytes, fill) in enumerate(jobs):
                if self._pool is None:
                    event = self._fill(number, nbytes, fill)
                else:
                    if not running:
                        running.append(self._pool.submit(self._fill, number, nbytes, fill))
                    event = running.pop().result()
                if event is not None:
                    event.wait()
                if self._pool is not None and number + 1 < len(jobs):
                    running.append(self._pool.submit(self._fill, number + 1, *jobs[number + 1]))
                chosen = self._targets or self._buffers
                yield chosen[number % len(chosen)]

        try:
            yield filled()
        finally:
            for future in running:
                future.cancel()
                if not future.cancelled():
                    with suppress(TimeoutError):
                        future.exception(LONGEST_WAIT if stopping.is_set() else None)
