"""Threads, slots and device memory of the pipeline.

One lock guards everything: a few hundred handovers a second need no finer locks, and one lock has no locking order.
"""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from nemotron_fp8.engines.cuda.device import Event, HostBuffer


T = TypeVar("T")
SIGNAL_SECONDS = 1.0  # longest delay before a signal is handled


class StoppedError(Exception):
    """Another thread failed, or the run was interrupted. Internal to a thread group."""


class ThreadGroup:
    """Threads of one pass: the first failure stops all of them and is raised by `join`."""

    def __init__(self) -> None:
        self.changed = Condition()
        self._threads: list[Thread] = []
        self._running = 0
        self._stopped = False
        self._error: BaseException | None = None

    def start(self, name: str, tensor_task: Callable[[], None]) -> None:
        """Start a thread."""

        def run() -> None:
            try:
                tensor_task()
            except StoppedError:
                pass
            except BaseException as error:
                self.stop(error)
            finally:
                with self.changed:
                    self._running -= 1
                    self.changed.notify_all()

        thread = Thread(target=run, name=name, daemon=True)
        with self.changed:
            self._running += 1
            self._threads.append(thread)
        thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """Abort every wait of every thread with StoppedError."""
        with self.changed:
            if not self._stopped:
                self._stopped, self._error = True, error
            self.changed.notify_all()

    def until(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready()``; the caller must hold the lock.

        Raises:
            StoppedError: the threads are being stopped.
        """
        while not self._stopped:
            if ready():
                return
            self.changed.wait()
        raise StoppedError

    def check(self) -> None:
        """Raise StoppedError if the threads are being stopped."""
        if self._stopped:
            raise StoppedError

    def join(self) -> None:
        """Wait for all threads; raise the first failure. An exception that interrupts the wait stops them."""
        try:
            with self.changed:
                while self._running:
                    # With a timeout: a signal just before the wait begins does not interrupt the wait.
                    self.changed.wait(SIGNAL_SECONDS)
        except BaseException:
            self.stop()
            raise
        finally:
            for thread in self._threads:
                thread.join()
        if self._error is not None:
            # The error refers to the frames of its thread, and they refer to this group. Break the reference cycle,
            # otherwise the buffers outlive the run.
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error


class Channel(Generic[T]):
    """A queue between threads of a group."""

    def __init__(self, group: ThreadGroup) -> None:
        self._group = group
        self._items: deque[T] = deque()
        self._closed = False

    def put(self, item: T) -> None:
        """Add an item."""
        with self._group.changed:
            self._group.check()
            self._items.append(item)
            self._group.changed.notify_all()

    def get(self) -> T | None:
        """Remove and return the oldest item; None at the end."""
        with self._group.changed:
            self._group.until(lambda: bool(self._items) or self._closed)
            return self._items.popleft() if self._items else None

    def close(self) -> None:
        """Mark the end: no more items follow."""
        with self._group.changed:
            self._closed = True
            self._group.changed.notify_all()


class Slot:
    """A pinned buffer and its counterpart on the device.

    Attributes:
        host: the pinned buffer.
        device: buffer of the same size on the device; None without a counterpart.
        busy: event that the device must pass before the slot is free.
    """

    def __init__(self, host: HostBuffer, device: torch.Tensor | None) -> None:
        self.host, self.device = host, device
        self.busy: Event | None = None


class Ring:
    """Slots of one kind; `take` waits for a free slot."""

    def __init__(self, group: ThreadGroup, slots: Iterable[Slot]) -> None:
        self._group = group
        self._free = deque(slots)

    def take(self) -> Slot:
        """Return the slot that has been free the longest, after its last copy has finished."""
        with self._group.changed:
            self._group.until(lambda: bool(self._free))
            slot = self._free.popleft()
        if slot.busy is not None:
            slot.busy.wait()
            slot.busy = None
        return slot

    def give(self, slot: Slot, busy: Event | None = None) -> None:
        """Return a slot to the ring; it is free after ``busy``."""
        slot.busy = busy
        with self._group.changed:
            self._free.append(slot)
            self._group.changed.notify_all()


class DeviceArena:
    """First-fit allocator of blocks in one piece of device memory."""

    def __init__(self, group: ThreadGroup, nbytes: int) -> None:
        self._group = group
        self._free: list[tuple[int, int]] = [(0, nbytes)] if nbytes else []

    def take(self, nbytes: int) -> int:
        """Wait for a free block of ``nbytes``, and return its offset."""
        found: list[int] = []

        def fit() -> bool:
            for i, (begin, end) in enumerate(self._free):
                if end - begin >= nbytes:
                    found.append(begin)
                    self._free[i : i + 1] = [(begin + nbytes, end)] if end - begin > nbytes else []
                    return True
            return False

        with self._group.changed:
            self._group.until(fit)
        return found[0]

    def give(self, begin: int, nbytes: int) -> None:
        """Free a block."""
        with self._group.changed:
            merged: list[tuple[int, int]] = []
            for span in sorted([*self._free, (begin, begin + nbytes)]):
                if merged and merged[-1][1] == span[0]:
                    merged[-1] = (merged[-1][0], span[1])
                else:
                    merged.append(span)
            self._free = merged
            self._group.changed.notify_all()
