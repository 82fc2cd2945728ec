"""Test Hub without sockets: settings, hooks for tests, and routing of requests."""

from __future__ import annotations

import re
import shutil
import threading
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tests.hub_server import routes_api, routes_files
from tests.hub_server.access import RateLimiter, UrlSigner
from tests.hub_server.faults import STATUS_FAULTS, FaultPlan
from tests.hub_server.messages import Response
from tests.hub_server.store import HubStateError, Repo, Store
from tests.hub_server.xet import XetStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.hub_server.faults import Fault, Request
    from tests.hub_server.messages import Call

NAME = r"(?P<name>[^/]+/[^/]+?)"
MODEL = re.compile(rf"/api/models/{NAME}(?:/(?P<rest>.*))?")
RESOLVE = re.compile(rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
BATCH = re.compile(rf"/{NAME}\.git/info/lfs/objects/batch")
STORED = re.compile(rf"/_(?P<verb>cdn|upload|complete|verify|part)/{NAME}(?:/(?P<rest>[^/].*))?")


class Hub:
    """A Hub that stores its state in the folder ``root``. Attributes may be changed while it serves.

    Attributes:
        page_size: entries of a tree or history page.
        part_size: bytes above which objects are uploaded in parts of this size; None uploads every object whole.
        xet_enabled: offer files over Xet and accept uploads over Xet.
        quota: maximal number of stored bytes; None for no limit.
        faults: rules of planned faults.
        before: called with each request before it is handled; a returned fault hits the request.
        after: called with each request after it was handled and before the response is sent.
        log: every request in the order of arrival.
        cards: every card or front matter that was sent for validation.
        cards_refused: reject every card.
    """

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.xet = XetStore(root / "xet-store")
        self.signer = UrlSigner(self.store)
        self.rate_limit = RateLimiter()
        self.page_size = 1000
        self.part_size: int | None = None
        self.xet_enabled = False
        self.quota: int | None = None
        self.faults = FaultPlan()
        self.before: Callable[[Request], Fault | None] | None = None
        self.after: Callable[[Request], None] | None = None
        self.log: list[Request] = []
        self.cards: list[str] = []
        self.cards_refused = False
        self.log_lock = threading.Lock()
        self.port = 0

    @property
    def endpoint(self) -> str:
        """Address for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.port}"

    def store_url(self, path: str) -> str:
        """Return a signed address of stored bytes, on another host name than the endpoint."""
        return f"http://localhost:{self.port}{self.signer.sign(path)}"

    # -- what a test does behind the client's back --------------------------------------------------------

    def collect(self, name: str, sha256: str) -> None:
        """Delete an LFS object, as the Hub does with objects that no commit refers to."""
        self.store.repo(name).object_path(sha256).unlink(missing_ok=True)
        shutil.rmtree(self.xet.folder / "xet", ignore_errors=True)

    def delete_branch(self, name: str, branch: str) -> None:
        with self.store.lock:
            self.store.repo(name).set_ref(f"refs/heads/{branch}", None)

    def set_gated(self, name: str, gated: bool = True) -> None:
        with self.store.lock:
            self.store.repo(name).set_meta(gated="manual" if gated else False)

    def set_private(self, name: str, private: bool = True) -> None:
        with self.store.lock:
            self.store.repo(name).set_meta(private=private)

    def set_disabled(self, name: str) -> None:
        with self.store.lock:
            self.store.repo(name).set_meta(disabled=True)

    def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.store.root.glob("repos/*/objects/*"))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return every file of a revision with its content."""
        repo = self.store.repo(name)
        tree = repo.resolve(revision).tree
        return {path: repo.content_path(entry).read_bytes() for path, entry in tree.items()}

    def leaks(self) -> list[Request]:
        """Return requests that carried a token to another host than the endpoint."""
        return [request for request in self.log if request.has_authorization and request.host != "127.0.0.1"]

    # -- helpers of the routes ----------------------------------------------------------------------------

    def part_path(self, name: str, oid: str, number: int) -> Path:
        return self.store.root / "parts" / name.replace("/", "--") / oid / str(number)

    def drop_parts(self, name: str, oid: str) -> None:
        shutil.rmtree(self.part_path(name, oid, 1).parent, ignore_errors=True)

    def check_quota(self, size: int) -> None:
        if self.quota is not None and self.stored_bytes() + size > self.quota:
            raise HubStateError(403, None, "Private repository storage limit reached, please upgrade your plan")

    def save_body(self, call: Call, target: Path) -> int:
        size = 0
        with target.open("wb") as file:
            for chunk in call.chunks():
                size += file.write(chunk)
        return size

    def receive_from_xet(self, repo: Repo, sha256: str) -> None:
        """Copy an object that was uploaded over Xet to the store that redirects lead to."""
        if not self.xet_enabled or repo.object_path(sha256).exists():
            return
        stored = self.xet.find(sha256)
        if stored is not None:
            self.check_quota(stored.size)
            temporary = self.store.temporary()
            self.xet.rebuild(stored, temporary)
            repo.add_object(temporary, sha256)

    # -- serving ------------------------------------------------------------------------------------------

    def fault_for(self, request: Request) -> Fault | None:
        if self.before is not None and (fault := self.before(request)) is not None:
            return fault
        return self.faults.take(request)

    def error(self, error: HubStateError, headers: dict[str, str] | None = None) -> Response:
        answer = Response.of_json({"error": error.message}, error.status)
        answer.headers |= {**(headers or {}), "X-Error-Message": error.message}
        if error.code is not None:
            answer.headers["X-Error-Code"] = error.code
        return answer

    def fault_answer(self, fault: Fault) -> Response:
        """Return the response of a fault that replaces the server."""
        messages = {
            "401": "Invalid credentials in Authorization header",
            "403": "You don't have the required permissions to perform this action",
            "413": "Payload Too Large",
            "expired_url": "Request has expired",
        }
        text = messages.get(fault.kind, f"injected {fault.kind}")
        answer = self.error(HubStateError(STATUS_FAULTS[fault.kind], None, text))
        if fault.kind == "429_ratelimit":
            answer.headers |= self.rate_limit.headers(0, fault.seconds)
        if fault.kind == "429_retry_after":
            answer.headers["Retry-After"] = str(int(fault.seconds))
        return answer

    def handle(self, call: Call) -> Response:
        """Handle a request; a refusal becomes an error response."""
        limits: dict[str, str] = {}
        try:
            if not call.path.startswith("/_"):
                passed, limits = self.rate_limit.take(call.token)
                if not passed:
                    raise HubStateError(429, None, "Too many requests")
            answer = self.route(call)
        except HubStateError as error:
            answer = self.error(error)
        except (ValueError, KeyError, TypeError) as error:
            answer = self.error(HubStateError(400, None, f"malformed request: {type(error).__name__}"))
        answer.headers |= limits
        return answer

    def route(self, call: Call) -> Response:
        fixed = {
            ("POST", "/api/repos/create"): routes_api.create_repo,
            ("POST", "/api/validate-yaml"): routes_api.validate_yaml,
            ("GET", "/api/whoami-v2"): routes_api.whoami,
        }
        if (handler := fixed.get((call.method, call.path))) is not None:
            return handler(self, call)
        if match := MODEL.fullmatch(call.path):
            return routes_api.model(self, call, match["name"], match["rest"] or "")
        if (match := BATCH.fullmatch(call.path)) and call.method == "POST":
            return routes_files.lfs_batch(self, call, match["name"])
        if (match := RESOLVE.fullmatch(call.path)) and call.method in ("GET", "HEAD"):
            return routes_files.resolve(self, call, match["name"], match["revision"], match["path"])
        if match := STORED.fullmatch(call.path):
            rest = [unquote(part) for part in (match["rest"] or "").split("/") if part]
            return self.stored(call, match["verb"], match["name"], rest)
        raise HubStateError(404, None, f"no route for {call.method} {call.path}")

    def stored(self, call: Call, verb: str, name: str, rest: list[str]) -> Response:
        if verb == "cdn" and call.method in ("GET", "HEAD"):
            return routes_files.cdn(self, call, name, *rest)
        if verb == "upload" and call.method == "PUT":
            return routes_files.upload(self, call, name, *rest)
        if verb == "part" and call.method == "PUT":
            return routes_files.upload_part(self, call, name, *rest)
        if verb == "complete" and call.method == "POST":
            return routes_files.complete(self, call, name, *rest)
        if verb == "verify" and call.method == "POST":
            return routes_files.verify(self, call, name)
        raise HubStateError(404, None, f"no route for {call.method} {call.path}")
