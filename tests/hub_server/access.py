"""Access rules: tokens, private and gated repositories, rate limits and signed URLs."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from tests.hub_server.store import HubStateError, Repo, Store, write_atomically

if TYPE_CHECKING:
    from tests.hub_server.messages import Call


@dataclass(frozen=True)
class Caller:
    """Sender of a request; ``user`` is None without a token."""

    user: str | None
    write: bool = False

    def owns(self, repo: str) -> bool:
        return self.user is not None and repo.partition("/")[0] == self.user


def identify(store: Store, token: str | None) -> Caller:
    """Return the caller of a token; refuse an unknown or revoked token, even for public repositories."""
    if token is None:
        return Caller(None)
    record = store.token(token)
    if record is None:
        raise HubStateError(401, None, "Invalid credentials in Authorization header")
    return Caller(record["user"], record["write"])


def readable(store: Store, name: str, caller: Caller, content: bool = False) -> Repo:
    """Return the repository if the caller may see it; with ``content``, if the caller may read its files.

    The Hub does not tell a stranger that a private repository exists, and answers 401 rather than 404 to one
    that shows no token.
    """
    repo = store.find(name)
    missing = HubStateError(404 if caller.user else 401, "RepoNotFound", "Repository not found")
    if repo is None:
        raise missing
    meta = repo.meta
    if meta["disabled"]:
        raise HubStateError(403, None, "Access to this resource is disabled.")
    member = caller.owns(name) or caller.user in meta["allowed"]
    if meta["private"] and not member:
        raise missing
    if content and meta["gated"] and not member:
        text = f"Access to model {name} is restricted and you are not in the authorized list."
        raise HubStateError(403 if caller.user else 401, "GatedRepo", text)
    return repo


def writable(store: Store, name: str, caller: Caller, pull_request: bool = False) -> Repo:
    """Return the repository if the caller may write to it; any user may open a pull request."""
    repo = readable(store, name, caller)
    if caller.user is None:
        raise HubStateError(401, None, "Invalid username or password.")
    if not caller.write or not (caller.owns(name) or pull_request):
        raise HubStateError(403, None, "You don't have the required permissions to perform this action")
    return repo


class UrlSigner:
    """Signs addresses of stored objects, which grant access until they expire."""

    def __init__(self, store: Store) -> None:
        path = store.root / "secret"
        if not path.exists():
            write_atomically(path, uuid.uuid4().bytes)
        self._secret = path.read_bytes()
        self.lifetime = 3600.0

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{path}?{expires}".encode(), hashlib.sha256).hexdigest()

    def sign(self, path: str) -> str:
        """Return ``path`` (unquoted) as a quoted address with its query."""
        expires = f"{time.time() + self.lifetime:.3f}"
        return f"{quote(path)}?expires={expires}&signature={self._signature(path, expires)}"

    def check(self, call: Call) -> None:
        if call.token is not None:
            raise HubStateError(400, None, "Only one auth mechanism allowed")
        expires, signature = call.parameter("expires"), call.parameter("signature")
        if expires is None or signature != self._signature(unquote(call.path), expires):
            raise HubStateError(403, None, "SignatureDoesNotMatch")
        if float(expires) < time.time():
            raise HubStateError(403, None, "Request has expired")


class RateLimiter:
    """Rate limit of ``quota`` requests per ``window`` seconds and token; None disables it."""

    def __init__(self) -> None:
        self.quota: int | None = None
        self.window = 300.0
        self._lock = threading.Lock()
        self._used: dict[tuple[str | None, int], int] = {}

    def headers(self, remaining: int, reset: float) -> dict[str, str]:
        return {
            "RateLimit": f'"api";r={remaining};t={max(0, int(reset))}',
            "RateLimit-Policy": f'"fixed window";"api";q={self.quota or 1000};w={int(self.window)}',
        }

    def take(self, token: str | None) -> tuple[bool, dict[str, str]]:
        """Count a request; return whether it may pass and the headers of its response."""
        if self.quota is None:
            return True, {}
        window, into = divmod(time.time(), self.window)
        with self._lock:
            used = self._used[token, int(window)] = self._used.get((token, int(window)), 0) + 1
        return used <= self.quota, self.headers(max(0, self.quota - used), self.window - into + 1)
