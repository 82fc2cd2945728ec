"""Progress as a bar of tqdm: in a notebook a widget, elsewhere a line on stderr."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from nemotron_fp8._utils import visible
from nemotron_fp8.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.progress import Progress


LONGEST_WAIT = 60
"""Characters of the reason of a retry beside the bar."""


@contextmanager
def progress_callback(
    progress: Callable[[Progress], None] | bool | None, title: str
) -> Iterator[Callable[[Progress], None] | None]:
    """Return the callback of an argument ``progress``. A bar is closed when the context ends, also by an error.

    Args:
        progress: a callback, True for a bar, or None or False for neither.
        title: one word in front of the bar.

    Raises:
        MissingExtraError: a bar is asked for, and tqdm is not installed.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingExtraError("progress", "tqdm") from error
    bar = _Bar(tqdm(desc=title, total=0, unit="B", unit_scale=True, unit_divisor=1024), title)
    try:
        yield bar.update
    finally:
        bar.close()


class _Bar:
    """Bar that shows the stage, the bytes of the source and their rate.

    Args:
        bar: a new bar of tqdm.
        title: one word in front of the bar.
    """

    def __init__(self, bar: Any, title: str) -> None:
        self._bar, self._title = bar, title
        self._lock, self._stages, self._waiting = Lock(), [""], ""
        self._closed = False

    def update(self, progress: Progress) -> None:
        """Show a state; called from any thread. Threads call in any order: an older state is skipped."""
        # Work bytes count a byte that is read twice as two; the bar shows the bytes of the source.
        scale = progress.source_bytes / progress.total if progress.total and progress.source_bytes else 1.0
        done, total = round(progress.done * scale), round(progress.total * scale)
        with self._lock:
            bar = self._bar
            if self._closed:
                return
            if progress.stage != self._stages[-1]:
                if progress.stage in self._stages:
                    return
                self._stages.append(progress.stage)
                bar.set_description(f"{self._title}, {visible(progress.stage)}", refresh=False)
                if done < bar.n:  # the count restarts with the stage
                    bar.n = 0
                    bar.total = None
            if bar.total != total:
                self._restart(total, round(progress.skipped * scale))
            if progress.waiting != self._waiting:
                self._waiting = progress.waiting
                bar.set_postfix_str(self._wait, refresh=True)
            if done > bar.n:
                bar.update(done - bar.n)

    def _restart(self, total: int, skipped: int) -> None:
        """Set another total; a widget knows it by a reset alone. The rate counts the bytes of this run alone."""
        bar = self._bar
        shown = max(bar.n, skipped)
        bar.reset(total)
        bar.initial, bar.n, bar.last_print_n = skipped, shown, shown
        bar.refresh()

    @property
    def _wait(self) -> str:
        return f"retrying in {visible(self._waiting)}"[:LONGEST_WAIT] if self._waiting else ""

    def close(self) -> None:
        """Draw the last state, and leave it."""
        with self._lock:
            self._closed = True
            self._bar.close()
