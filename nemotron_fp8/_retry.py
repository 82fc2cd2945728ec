"""Retry policy of requests to the Hub and to object stores.

Their clients retry some calls a few times and others never. Every call therefore goes through `RetryPolicy`:
transport errors, 408, 429 and 5xx are retried until there was no progress for half an hour. Every other
failure is raised at once as an error of this package.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from nemotron_fp8.events import emit

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Event


T = TypeVar("T")
NO_PROGRESS_SECONDS = 1800.0
"""Time without any progress after which a request fails."""
MAX_UNEXPECTED_RESPONSES = 5
"""Consecutive unexpected responses after which a request fails."""
MAX_MALFORMED_ANSWERS = 2
"""The same for answers of another form, of which the first may have been damaged on its way."""


class CanceledError(Exception):
    """The run was canceled, and this request with it."""


@dataclass(frozen=True, slots=True)
class Retry:
    """A temporary failure.

    Attributes:
        reason: description for messages.
        after: seconds that the server asks to wait; None if it does not ask.
        unexpected: counts against `MAX_UNEXPECTED_RESPONSES`.
        limited: the rate limit.
        unreached: the connection failed before any request was sent.
        certain: unexpected, and a repetition will hardly help.
    """

    reason: str
    after: float | None = None
    unexpected: bool = False
    certain: bool = False
    limited: bool = False
    unreached: bool = False


class Subject(Protocol):
    """Subject of a request: the meaning of its failures, and the errors that end its attempts."""

    @property
    def name(self) -> str:
        """Name of the repository or the store in messages."""

    def classify(self, error: Exception) -> Retry | Exception:
        """Map a failure to `Retry` or to the error to raise; raise it again if it is not the server's."""

    def unusable(self, reason: str) -> Exception:
        """Return the error of too many unexpected answers."""

    def unreachable(self, reason: str) -> Exception:
        """Return the error of too many failed connections."""

    def no_progress(self, seconds: float, reason: str) -> Exception:
        """Return the error of a request without progress for some seconds."""

    def rate_limited(self, seconds: float, reason: str, wait: float | None) -> Exception:
        """Return the error of a rate limit after some seconds; ``wait`` is the wait that the server asks for."""


class Clock(Protocol):
    """Source of time, replaceable in tests."""

    def now(self) -> float:
        """Return seconds since a fixed moment."""

    def wait(self, seconds: float, cancel: Event | None) -> None:
        """Wait for ``seconds``, or until ``cancel`` is set."""


class SystemClock:
    """Clock of the system."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float, cancel: Event | None) -> None:
        if cancel is None:
            time.sleep(seconds)
        else:
            cancel.wait(seconds)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits and waits of retries.

    Attributes:
        seconds: time without any progress after which a request fails.
        first, longest: shortest and longest wait in seconds. Each wait is twice the one before, less up to half of it
            at random.
        clock: source of time.
        max_connects: consecutive failed connections that are retried; None for no limit but ``seconds``.
    """

    seconds: float = NO_PROGRESS_SECONDS
    first: float = 1.0
    longest: float = 60.0
    clock: Clock = field(default_factory=SystemClock)
    max_connects: int | None = None

    def run(
        self,
        subject: Subject,
        attempt: Callable[[Callable[[], None]], T],
        on_wait: Callable[[str, float], None] | None = None,
        cancel: Event | None = None,
    ) -> T:
        """Call ``attempt`` until it succeeds and return its result.

        Args:
            subject: the request, for its failures and messages.
            attempt: makes the request. Its argument is a function to call whenever bytes were transferred.
            on_wait: called before each wait with the reason and the seconds.
            cancel: aborts the request when set.

        Raises:
            CanceledError: ``cancel`` is set.
            Exception: the error that ``subject`` returns: a permanent failure, no progress for `seconds`, or more
                than `max_connects` failed connections in a row.
        """
        attempts = _Attempts(self, subject)
        while True:
            failure: Exception
            check_canceled(cancel)
            try:
                return attempt(attempts.progressed)
            except Exception as error:  # classify re-raises what is not the server's
                verdict = subject.classify(error)
                failure = attempts.judge(verdict) if isinstance(verdict, Retry) else verdict
                if not isinstance(failure, _Wait):
                    # An error of the HTTP client holds the request and its token: drop it from our error.
                    failure.__cause__ = failure.__context__ = None
            if not isinstance(failure, _Wait):
                raise failure
            reason = f"{subject.name}: {failure.reason}"
            text = f"{reason}; retrying in {failure.seconds:.0f} s"
            emit("request.retried", text, reason=reason, seconds=round(failure.seconds, 1))
            if on_wait is not None:
                on_wait(reason, failure.seconds)
            self.clock.wait(failure.seconds, cancel)


def check_canceled(cancel: Event | None) -> None:
    """Raise CanceledError if ``cancel`` is set."""
    if cancel is not None and cancel.is_set():
        raise CanceledError


class _Wait(Exception):  # noqa: N818  (a verdict, never raised)
    """Verdict: wait, then retry."""

    def __init__(self, seconds: float, reason: str) -> None:
        self.seconds, self.reason = seconds, reason


class _Attempts:
    """Failures of one request since the last progress."""

    def __init__(self, policy: RetryPolicy, subject: Subject) -> None:
        self.policy, self.subject = policy, subject
        self.progressed()

    def progressed(self) -> None:
        """Reset all counts after a transfer of bytes."""
        self.since = self.policy.clock.now()
        self.failures = self.unexpected = self.unreached = 0

    def judge(self, retry: Retry) -> Exception:
        """Decide between another attempt and an error."""
        policy, subject = self.policy, self.subject
        quiet = policy.clock.now() - self.since
        self.unexpected = self.unexpected + 1 if retry.unexpected else 0
        if self.unexpected >= (MAX_MALFORMED_ANSWERS if retry.certain else MAX_UNEXPECTED_RESPONSES):
            return subject.unusable(retry.reason)
        self.unreached = self.unreached + 1 if retry.unreached else 0
        if policy.max_connects is not None and self.unreached > policy.max_connects:
            return subject.unreachable(retry.reason)
        backoff = min(policy.longest, policy.first * 2**self.failures)
        self.failures += 1
        # One second more than the server asks for: its clock and ours count whole seconds.
        wait = retry.after + 1.0 if retry.after is not None else backoff * random.uniform(0.5, 1.0)
        if quiet + wait > policy.seconds:
            if retry.limited:
                return subject.rate_limited(quiet, retry.reason, retry.after)
            return subject.no_progress(quiet, retry.reason)
        return _Wait(wait, retry.reason)
