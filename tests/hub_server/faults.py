"""Faults of a request, and rules that select the requests they hit."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Literal, get_args

FaultKind = Literal[
    "refused",  # the connection is reset and the port refuses new ones for `seconds`
    "reset_before",  # the connection is reset before the request was acted on
    "reset_body",  # the connection is reset in the middle of the response's body
    "early_end",  # the connection is closed in the middle of the response's body
    "hang",  # no response for `seconds`, then the connection is closed
    "hang_body",  # half of the body, then nothing for `seconds`
    "408",
    "429",
    "429_ratelimit",  # with RateLimit headers that ask for `seconds`
    "429_retry_after",
    "500",
    "503",
    "401",  # the token is not accepted
    "403",
    "413",  # the storage quota is used up
    "expired_url",  # 403 as a store answers for an expired signed URL
    "ignore_range",  # 200 with the whole file instead of 206
    "wrong_range",  # 206 with another range than requested, correctly labeled
    "corrupt",  # the body has the right size, and one bit differs
    "answer_lost",  # the request is acted on, then the connection is reset
    "answer_lost_504",  # the request is acted on, then a gateway answers 504
]
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

STATUS_FAULTS: dict[str, int] = {
    "408": 408,
    "429": 429,
    "429_ratelimit": 429,
    "429_retry_after": 429,
    "500": 500,
    "503": 503,
    "401": 401,
    "403": 403,
    "413": 413,
    "expired_url": 403,
}
"""Faults that replace the response, with their status."""


@dataclass(frozen=True)
class Fault:
    """A fault; ``seconds`` is its duration, or the wait that a 429 asks for."""

    kind: FaultKind
    seconds: float = 0.2


@dataclass
class Request:
    """Entry of the request log; ``host`` is the name that the client used, without the port."""

    number: int
    method: str
    path: str
    query: str
    host: str
    has_authorization: bool
    range: str | None
    user_agent: str
    status: int | None = None
    fault: str | None = None


@dataclass
class Rule:
    """Rule that applies ``fault`` to matching requests, after the first ``skip``, at most ``times`` (None: always)."""

    fault: Fault
    method: str = ""
    path: str = ""
    skip: int = 0
    times: int | None = 1
    seen: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)

    def matches(self, request: Request) -> bool:
        if self.method and request.method != self.method:
            return False
        return re.search(self.path, request.path) is not None

    def take(self, request: Request) -> Fault | None:
        if not self.matches(request):
            return None
        self.seen += 1
        if self.seen <= self.skip or (self.times is not None and self.hits >= self.times):
            return None
        self.hits += 1
        return self.fault


class FaultPlan:
    """Rules of a run; the first matching rule decides."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []

    def add(
        self,
        kind: FaultKind,
        method: str = "",
        path: str = "",
        *,
        seconds: float = 0.2,
        skip: int = 0,
        times: int | None = 1,
    ) -> Rule:
        """Add a fault for requests of ``method`` (any if empty) whose path matches ``path``."""
        rule = Rule(Fault(kind, seconds), method, path, skip, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def take(self, request: Request) -> Fault | None:
        with self._lock:
            for rule in self._rules:
                if (fault := rule.take(request)) is not None:
                    return fault
        return None
