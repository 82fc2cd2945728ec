"""What a failure of the Hub means, and when to try again.

The client retries some calls five times and others never, so every call goes through `RetryPolicy` instead:
transport errors, 408, 429 and 5xx are tried again until nothing got through for half an hour; everything else
is an error of ours at once.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from nemotron_fp8.errors.hub import HubError, NoProgressError, RateLimitedError, UnreachableError, UnusableAnswerError
from nemotron_fp8.hub.failures import Context, Retry, StoppedError, classify

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Event


T = TypeVar("T")
MAX_UNEXPECTED_RESPONSES = 5
"""How often in a row an answer may make no sense before it is taken for what this server does."""


class Clock(Protocol):
    """Time, replaceable in tests."""

    def now(self) -> float:
        """Seconds since some fixed moment."""

    def wait(self, seconds: float, stop: Event | None) -> None:
        """Wait, until ``stop`` is set at the longest."""


class SystemClock:
    """The real time."""

    def now(self) -> float:
        """See `Clock.now`."""
        return time.monotonic()

    def wait(self, seconds: float, stop: Event | None) -> None:
        """See `Clock.wait`."""
        if stop is None:
            time.sleep(seconds)
        else:
            stop.wait(seconds)


@dataclass(slots=True)
class RetryPolicy:
    """Tries again until nothing got through for a while.

    Attributes:
        seconds: how long nothing may get through.
        first, longest: the waits in seconds, doubled from first to longest, less up to half at random.
        clock: the time.
        told: called before each wait with the reason and the seconds, for whoever watches.
        stop: nothing is tried any more once it is set; None where nothing sets it.
        connects: how often in a row no connection may come about and another be tried; None for as often as there is
            time.
    """

    seconds: float = 1800.0
    first: float = 1.0
    longest: float = 60.0
    clock: Clock = field(default_factory=SystemClock)
    on_wait: Callable[[str, float], None] | None = None
    stop: Event | None = None
    connects: int | None = None

    def run(self, context: Context, attempt: Callable[[Callable[[], None]], T]) -> T:
        """Carry out ``attempt`` until it succeeds, and return its result.

        Args:
            context: what it is about.
            attempt: the call; it is given a function to call whenever something got through.

        Raises:
            NoProgressError, RateLimitedError: nothing got through for `seconds`.
            UnreachableError: no connection came about, more than `connects` times.
            HubError: trying again is of no use; the class says why.
            StoppedError: `stop` is set.
            ConflictError, RefusedError: the branch moved, or the request itself is refused.
        """
        state = _State(self, context)
        while True:
            failure: Exception
            self.check()
            try:
                return attempt(state.progressed)
            except Exception as error:  # classify re-raises what is not the Hub's
                verdict = classify(error, context)
                failure = state.judge(verdict) if isinstance(verdict, Retry) else verdict
                if not isinstance(failure, _Again):
                    # An error of the HTTP client holds the token in its request: it must not hang on ours.
                    failure.__cause__ = failure.__context__ = None
            if not isinstance(failure, _Again):
                raise failure
            if self.on_wait is not None:
                self.on_wait(f"{context.repo}: {failure.reason}", failure.wait)
            self.clock.wait(failure.wait, self.stop)

    def check(self) -> None:
        """Come to an end here, if `stop` is set.

        Raises:
            StoppedError: it is.
        """
        if self.stop is not None and self.stop.is_set():
            raise StoppedError


class _Again(Exception):  # noqa: N818  (a verdict, never raised)
    """Wait, then try again."""

    def __init__(self, wait: float, reason: str) -> None:
        self.wait, self.reason = wait, reason


class _State:
    """Where a series of attempts stands."""

    def __init__(self, patience: RetryPolicy, context: Context) -> None:
        self.patience, self.context = patience, context
        self.progressed()

    def progressed(self) -> None:
        """Something got through."""
        self.since = self.patience.clock.now()
        self.failures = self.odd = self.unreached = 0

    def judge(self, retry: Retry) -> HubError | _Again:
        """Decide between another attempt and giving up."""
        patience, context = self.patience, self.context
        quiet = patience.clock.now() - self.since
        self.odd = self.odd + 1 if retry.odd else 0
        if self.odd >= MAX_UNEXPECTED_RESPONSES:
            return UnusableAnswerError(context.repo, context.action, retry.reason)
        self.unreached = self.unreached + 1 if retry.unreached else 0
        if patience.connects is not None and self.unreached > patience.connects:
            return UnreachableError(context.repo, context.action, retry.reason)
        backoff = min(patience.longest, patience.first * 2**self.failures)
        self.failures += 1
        # A margin on what the server asks for: its clock and ours count whole seconds.
        wait = retry.after + 1.0 if retry.after is not None else backoff * random.uniform(0.5, 1.0)
        if quiet + wait > patience.seconds:
            if retry.limited:
                return RateLimitedError(context.repo, context.action, quiet, retry.reason, retry.after)
            return NoProgressError(context.repo, context.action, quiet, retry.reason)
        return _Again(wait, retry.reason)
