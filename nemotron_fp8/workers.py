"""Threads that share a list of jobs and stop together."""

from __future__ import annotations

from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")


def share_out(workers: int, jobs: Iterable[T], work: Callable[[T], None]) -> None:
    """Call ``work`` on every job, in order of the jobs, on ``workers`` threads, the caller's own among them.

    Jobs are drawn when a thread is free, so an endless supply costs no memory. The first exception stops the
    others after the job that they are at and is raised here; so is one that interrupts the caller (Ctrl-C).
    """
    supply, lock, stop = iter(jobs), Lock(), Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                with lock:
                    job = next(supply, stop)
                if job is stop:
                    return
                work(job)  # type: ignore[arg-type]  # what is not the sentinel is a job
        except BaseException as error:
            errors.append(error)
            stop.set()

    helpers = [Thread(target=run, name=f"slices-{i}", daemon=True) for i in range(1, workers)]
    for helper in helpers:
        helper.start()
    try:
        run()
        for helper in helpers:
            helper.join()
    except BaseException:
        stop.set()
        for helper in helpers:
            helper.join()
        raise
    if errors:
        raise errors[0]
