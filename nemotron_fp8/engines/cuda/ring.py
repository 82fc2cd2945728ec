"""What holds the pipeline together: threads that stop together, slots that are taken in turn, a slab shared out.

One lock guards all of it. There are some hundred hand-overs a second, and one lock has no order to get wrong.
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
SIGNAL_SECONDS = 1.0  # how late a signal is heeded at worst


class StoppedError(Exception):
    """Another thread failed, or the run was interrupted. Never leaves the crew."""


class ThreadGroup:
    """Threads that work on one thing: the first failure stops all, and is what is told."""

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
        """Let every wait of every thread end with StoppedError."""
        with self.changed:
            if not self._stopped:
                self._stopped, self._error = True, error
            self.changed.notify_all()

    def until(self, ready: Callable[[], bool]) -> None:
        """Wait, holding the lock, until ``ready()``; the lock must be held.

        Raises:
            StoppedError: everything is being stopped.
        """
        while not self._stopped:
            if ready():
                return
            self.changed.wait()
        raise StoppedError

    def check(self) -> None:
        """Raise StoppedError if everything is being stopped."""
        if self._stopped:
            raise StoppedError

    def join(self) -> None:
        """Wait for all threads; raise the first failure. An exception that interrupts the wait stops them."""
        try:
            with self.changed:
                while self._running:
                    # Not for ever: a signal that lands just before a lock's wait begins does not end that wait.
                    self.changed.wait(SIGNAL_SECONDS)
        except BaseException:
            self.stop()
            raise
        finally:
            for thread in self._threads:
                thread.join()
        if self._error is not None:
            # The error knows the frames of its thread, they know this crew: no circle, or buffers outlive the run.
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error


class Channel(Generic[T]):
    """A queue between threads of a crew, closed when nothing more will come."""

    def __init__(self, crew: ThreadGroup) -> None:
        self._crew = crew
        self._items: deque[T] = deque()
        self._closed = False

    def put(self, item: T) -> None:
        """Add an item."""
        with self._crew.changed:
            self._crew.check()
            self._items.append(item)
            self._crew.changed.notify_all()

    def get(self) -> T | None:
        """Take the oldest item; None at the end."""
        with self._crew.changed:
            self._crew.until(lambda: bool(self._items) or self._closed)
            return self._items.popleft() if self._items else None

    def close(self) -> None:
        """Say that nothing more will come."""
        with self._crew.changed:
            self._closed = True
            self._crew.changed.notify_all()


class Slot:
    """A pinned buffer and its counterpart on the device.

    Attributes:
        host: the pinned buffer.
        device: as large, on the device; None where there is none.
        busy: what the device must have passed before the slot is anyone's again.
    """

    def __init__(self, host: HostBuffer, device: torch.Tensor | None) -> None:
        self.host, self.device = host, device
        self.busy: Event | None = None


class Ring:
    """Slots of one kind. Whoever takes one finds that the device is done with it."""

    def __init__(self, crew: ThreadGroup, slots: Iterable[Slot]) -> None:
        self._crew = crew
        self._free = deque(slots)

    def take(self) -> Slot:
        """Take the slot that has been free the longest, and wait until its last copy is done."""
        with self._crew.changed:
            self._crew.until(lambda: bool(self._free))
            slot = self._free.popleft()
        if slot.busy is not None:
            slot.busy.wait()
            slot.busy = None
        return slot

    def give(self, slot: Slot, busy: Event | None = None) -> None:
        """Give a slot back; it is in use until ``busy``."""
        slot.busy = busy
        with self._crew.changed:
            self._free.append(slot)
            self._crew.changed.notify_all()


class DeviceArena:
    """Blocks of one piece of device memory, first fit."""

    def __init__(self, crew: ThreadGroup, nbytes: int) -> None:
        self._crew = crew
        self._free: list[tuple[int, int]] = [(0, nbytes)] if nbytes else []

    def take(self, nbytes: int) -> int:
        """Wait for ``nbytes`` in one piece and return where they begin."""
        found: list[int] = []

        def fit() -> bool:
            for i, (begin, end) in enumerate(self._free):
                if end - begin >= nbytes:
                    found.append(begin)
                    self._free[i : i + 1] = [(begin + nbytes, end)] if end - begin > nbytes else []
                    return True
            return False

        with self._crew.changed:
            self._crew.until(fit)
        return found[0]

    def give(self, begin: int, nbytes: int) -> None:
        """Give a block back."""
        with self._crew.changed:
            merged: list[tuple[int, int]] = []
            for span in sorted([*self._free, (begin, begin + nbytes)]):
                if merged and merged[-1][1] == span[0]:
                    merged[-1] = (merged[-1][0], span[1])
                else:
                    merged.append(span)
            self._free = merged
            self._crew.changed.notify_all()
