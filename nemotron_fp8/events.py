"""Events of runs, through the standard ``logging`` of Python: logger ``nemotron_fp8``.

Every record has a text for people, and two attributes for programs: ``event``, a name of `EVENTS`, and ``fields``, a
dictionary of JSON values. Names and fields are stable: later versions add some, and change none.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from typing import TYPE_CHECKING, TypeVar

from nemotron_fp8._secrets import masked

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import ParamSpec

    P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("nemotron_fp8")
"""Logger of the library, which prints nothing itself."""
logger.addHandler(logging.NullHandler())  # without a handler, Python prints warnings to stderr

EVENTS = {
    "run.started": "a function of the library was called: `task`, `source`, `destination`",
    "run.planned": "the plan is made: `shards`, `tensors`, `bytes_in`, `bytes_out`",
    "shard.resumed": "an earlier run has finished this shard: `shard`",
    "shard.measured": "the amaxes of a shard are saved, in place: `shard`",
    "shard.finished": "a shard is finished: `shard`, `bytes`, `seconds` since its first slice, `bytes_per_second`",
    "worker.lost": "a worker of the cluster was lost, and the shard starts again: `shard`, `error`",
    "request.retried": "a request failed and is repeated after a wait: `reason`, `seconds`",
    "run.notice": "a remark for the user, as a conversion reports it at its end: `text`",
    "run.finished": "the function returns: `task`, `seconds`, and for a conversion `bytes_read`, `bytes_written`,"
    " `resumed`, `unchanged`, `peak_resident_bytes`; for a verification `ok`",
    "run.failed": "it raises an error: `task`, `seconds`, `error` (the class), `text`",
    "run.interrupted": "Ctrl-C or a signal ends it: `task`, `seconds`",
}
"""Names of the events, each with its meaning and its fields."""
_OF_RESULT = ("bytes_read", "bytes_written", "resumed", "unchanged", "peak_resident_bytes", "ok")


def emit(event: str, text: str, level: int = logging.INFO, /, **fields: object) -> None:
    """Log an event.

    Args:
        event: a name of `EVENTS`.
        text: the message for people.
        level: level of the record.
        **fields: JSON values.
    """
    logger.log(level, "%s", text, extra={"event": event, "fields": fields})


def logged(task: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a public function log its start and its end.

    Args:
        task: name of the task, in the field ``task``.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            begun = time.monotonic()
            named = [*args, *(kwargs[key] for key in ("source", "destination", "results") if key in kwargs)]
            places = {key: _place(value) for key, value in zip(("source", "destination"), named, strict=False)}
            emit("run.started", f"{task} begins", logging.INFO, task=task, **places)
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                text = " ".join(str(error).split())
                seconds = _since(begun)
                emit(
                    "run.failed",
                    f"{task} failed: {text}",
                    logging.ERROR,
                    task=task,
                    seconds=seconds,
                    error=type(error).__name__,
                    text=text,
                )
                raise
            except BaseException:
                emit("run.interrupted", f"{task} is interrupted", logging.WARNING, task=task, seconds=_since(begun))
                raise
            for notice in getattr(result, "notices", ()):
                emit("run.notice", notice, text=notice)
            found = {name: getattr(result, name) for name in _OF_RESULT if hasattr(result, name)}
            emit("run.finished", f"{task} is finished", logging.INFO, task=task, seconds=_since(begun), **found)
            return result

        return wrapper

    return decorate


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 3)


def _place(value: object) -> str | list[str] | None:
    """Return a path or an address, or several, as JSON; None for anything else."""
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        return masked(path if isinstance(path, str) else os.fsdecode(path))
    if isinstance(value, (list, tuple)):
        return [each for each in map(_place, value) if isinstance(each, str)]
    return None
