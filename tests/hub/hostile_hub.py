"""Serve hostile answers, and run the operations that meet them, in this process or in one whose memory is measured."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import resource
import sys
import time
import traceback
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from nemotron_fp8 import plan_repo, verify_repo
from nemotron_fp8._retry import RetryPolicy
from nemotron_fp8.destinations.hub.job import JobOptions
from nemotron_fp8.destinations.hub.staging import HubStaging
from nemotron_fp8.errors import NemotronFp8Error
from nemotron_fp8.hub import transport
from nemotron_fp8.hub.client import HubClient
from tests.hub.conversion import Options, convert
from tests.hub_server.hub import Hub
from tests.hub_server.messages import Call, Response, Wire

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    Honest = Callable[[], Response]
    """Makes the answer of an honest server, with all its effects."""
    Answer = Callable[["HostileHub", Call, Honest], Response]

PATIENCE = 2.0
"""Seconds after which a server of an endless answer gives up: the client should have stopped long before."""
LONGEST_WAIT = 60.0
"""Seconds without progress after which a client of these tests gives up; its clock is not a real one."""
NOT_VERIFIED = "not verified"
SHARD = bytes(range(256)) * 300
SHARD_NAME = "model-00001-of-00001.safetensors"
SMALL = {
    "nemotron_fp8.json": b"{}",
    "config.json": b'{"quantization_config": {}}',
    "README.md": b"---\nbase_model: nv/source\n---\n",
    "tokenizer.model": b"an object, and small",
}
STAGED = {SHARD_NAME: SHARD, **SMALL}
"""Content that the operation ``stage`` publishes."""


# -- the server -------------------------------------------------------------------------------------------------


@dataclass
class Rule:
    """Replaces the answers to matching requests: after the first ``skip``, at most ``times`` (None: always)."""

    method: str
    path: str
    answer: Answer
    times: int | None = None
    skip: int = 0
    seen: int = 0

    def takes(self, call: Call) -> bool:
        if call.method != self.method or re.search(self.path, call.path) is None:
            return False
        self.seen += 1
        return self.seen > self.skip and (self.times is None or self.seen <= self.skip + self.times)


class HostileHub(Hub):
    """A Hub whose ``rules`` replace answers.

    Attributes:
        rules: the first that matches a request decides its answer.
        secret: the token, for which requests to the other host are searched.
        leaked: requests to the other host that hold the token in any place.
        unstopped: endless answers whose client did not stop.
        sent: bytes of the longest endless answer.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.rules: list[Rule] = []
        self.secret = ""
        self.leaked: list[str] = []
        self.unstopped: list[str] = []
        self.sent = 0

    def handle(self, call: Call) -> Response:
        if call.host != "127.0.0.1":
            texts = (call.path, call.query, call.token or "", *call.headers.values())
            if any(self.secret in form for text in texts for form in (text, unquote(text))):
                self.leaked.append(f"{call.method} {call.path}")
        for rule in self.rules:
            if rule.takes(call):
                if self.unstopped:  # the test has failed; end it
                    return Response.of_json({}, 403)
                return rule.answer(self, call, lambda: super(HostileHub, self).handle(call))
        return super().handle(call)

    def other_host(self, path: str) -> str:
        """Return an address of this server under another name, to which no token may be sent."""
        return f"http://localhost:{self.port}{path}"


def body(content: bytes, status: int = 200, **headers: str) -> Answer:
    """Answer with a body whose length is told."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _hub, _call, _honest: Response(status, content, {"Content-Type": "application/json", **named})


def status(code: int, **headers: str) -> Answer:
    """Answer with a status, and a body that an honest server could send with it."""
    return body(b"" if code in (204, 205, 304) or code < 200 else b'{"error": "no"}', code, **headers)


def head(first: str, *lines: str) -> bytes:
    """Return a status line and headers."""
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {first}", *lines, "Connection: close", "")).encode("latin-1")


def raw(first: str, *lines: str, content: bytes = b"") -> Answer:
    """Answer with literal headers and content."""
    return lambda _hub, _call, _honest: Wire(pieces=[head(first, *lines), content])


def literal(content: bytes) -> Answer:
    """Answer with literal bytes instead of HTTP."""
    return lambda _hub, _call, _honest: Wire(pieces=[content])


def json_of(response: Response) -> Any:
    return json.loads(b"".join(response.chunks()))


def edited(change: Callable[[Any], Any]) -> Answer:
    """Answer with the honest JSON after a change; None for a change in place."""

    def answer(_hub: HostileHub, _call: Call, honest: Honest) -> Response:
        response = honest()
        if response.status != 200:
            return response
        value = json_of(response)
        changed = change(value)
        response.body = json.dumps(value if changed is None else changed).encode()
        return response

    return answer


def replaced(path: tuple[str | int, ...], text: str | None) -> Answer:
    """Answer with the honest JSON in which literal text replaces a value; None removes the value."""

    def answer(_hub: HostileHub, _call: Call, honest: Honest) -> Response:
        response = honest()
        if response.status != 200:
            return response
        place = value = json_of(response)
        for key in path[:-1]:
            place = place[key]
        if text is None:
            del place[path[-1]]
        else:
            place[path[-1]] = "@here@"
        response.body = json.dumps(value).replace('"@here@"', text or "").encode()
        return response

    return answer


def with_headers(**headers: str | Callable[[HostileHub], str]) -> Answer:
    """Answer honestly but for some headers, any bytes of which are sent as they are; an empty text removes one."""

    def answer(hub: HostileHub, _call: Call, honest: Honest) -> Response:
        response = honest()
        content = b"".join(response.chunks())
        found = {**response.headers, "Content-Length": str(len(content))}
        for name, value in headers.items():
            found[name.replace("_", "-")] = value if isinstance(value, str) else value(hub)
        lines = [f"{name}: {value}" for name, value in found.items()]
        return Wire(response.status, pieces=[head(f"{response.status} OK", *lines), content])

    return answer


def content_of(change: Callable[[bytes], bytes]) -> Answer:
    """Answer honestly but for the content of a file, whose length is told as it is."""

    def answer(_hub: HostileHub, _call: Call, honest: Honest) -> Response:
        response = honest()
        response.body = change(b"".join(response.chunks()))
        return response

    return answer


def after(effect: Answer) -> Answer:
    """Act on the request like an honest server, then answer otherwise."""

    def answer(hub: HostileHub, call: Call, honest: Honest) -> Response:
        honest()
        return effect(hub, call, honest)

    return answer


def alternating(*answers: Answer | None) -> Answer:
    """Answer each time differently; None stands for the honest answer."""
    turns = list(answers)

    def answer(hub: HostileHub, call: Call, honest: Honest) -> Response:
        turns.append(turn := turns.pop(0))
        return honest() if turn is None else turn(hub, call, honest)

    return answer


def endless(
    piece: bytes, *lines: str, first: str = "200 OK", begin: bytes | None = None, pause: float = 0.0, name: str = ""
) -> Answer:
    """Answer without an end, until the client stops."""

    def pieces(hub: HostileHub, what: str) -> Iterator[bytes]:
        yield head(first, *lines) if begin is None else begin
        end, sent = time.monotonic() + PATIENCE, 0
        while time.monotonic() < end:
            yield piece
            sent += len(piece)
            hub.sent = max(hub.sent, sent)
            time.sleep(pause)
        hub.unstopped.append(what)

    return lambda hub, call, _honest: Wire(pieces=pieces(hub, name or f"{call.method} {call.path}"))


def chunk(content: bytes, extension: bytes = b"") -> bytes:
    """Return a chunk of a chunked body."""
    return b"%x%s\r\n%s\r\n" % (len(content), extension, content)


def bomb(kind: str, megabytes: int) -> bytes:
    """Return a compressed text of zeros, of which one MB takes one kB."""
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    megabyte = block.compress(b"0" * (1 << 20)) + block.flush(zlib.Z_FULL_FLUSH)  # complete, and thus repeatable
    start = {"gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "deflate": b"\x78\x9c"}.get(kind, b"")
    return start + megabyte * megabytes + block.flush()


# -- the operations -------------------------------------------------------------------------------------------


@dataclass
class InstantClock:
    """Clock whose time passes with every wait, of which none is real."""

    time: float = 0.0
    longest: float = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float, cancel: threading.Event | None) -> None:
        del cancel
        self.time += seconds
        self.longest = max(self.longest, seconds)


@dataclass
class Run:
    """One operation of one client.

    Attributes:
        operation: key of `OPERATIONS`.
        endpoint: address of the server.
        token: the token, which the environment of the process gets.
        folder: a folder that holds ``source``, ``wanted`` and nothing else; the operation may add ``result``.
    """

    operation: str
    endpoint: str
    token: str
    folder: Path

    def client(self) -> HubClient:
        policy = RetryPolicy(seconds=LONGEST_WAIT, clock=InstantClock())
        return HubClient("TEST_HUB_TOKEN", self.endpoint, policy, timeout=0.5)

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def wanted(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / "wanted").iterdir()}


def plan(run: Run, client: HubClient) -> str:
    """Plan a conversion: the plan is that of the folder."""
    found = plan_repo("hf://nv/source", hub=Options(client, run.work))
    expected = plan_repo(str(run.folder / "source"))
    return "" if outline(found) == outline(expected) else "another plan"


def outline(found: Any) -> list[str]:
    """Return what two plans of the same weights have in common."""
    return [str(tensor) for tensor in found.tensors]


def quantize(run: Run, client: HubClient) -> str:
    """Convert into a folder: the weights are those of a conversion from a folder."""
    target = run.folder / "result"
    convert(client, run.work, target=str(target))
    same = SHARD_NAME, "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"
    files = {path.name: path.read_bytes() for path in target.iterdir()}
    wanted = run.wanted
    if files.keys() != wanted.keys():
        return f"other files: {sorted(files)}"
    return ", ".join(name for name in same if files[name] != wanted[name])


def publish(run: Run, client: HubClient, target: str = "hf://me/target", **options: Any) -> str:
    """Convert a folder to a repository; the caller compares what the server holds."""
    convert(client, run.work, str(run.folder / "source"), target, **options)
    return ""


def stage(run: Run, client: HubClient, **options: Any) -> str:
    """Publish a shard and small files without a conversion; the caller compares what the server holds."""
    work = run.work
    work.mkdir()
    job = HubStaging(client, JobOptions("me/target", "d" * 64, "nv/source@feedc0ffee12", **options))
    digest = hashlib.sha256(SHARD).hexdigest()
    shard = work / SHARD_NAME
    shard.write_bytes(SHARD)
    try:
        if SHARD_NAME not in job.begin() and not job.published:
            job.stage(SHARD_NAME, shard, digest, len(SHARD))
        if not job.published:
            job.publish({SHARD_NAME: (digest, len(SHARD))}, SMALL)
    finally:
        shard.unlink()
    return ""


def download(run: Run, client: HubClient) -> str:
    """Download every file of a listing: the bytes are those of the source."""
    work = run.work
    work.mkdir()
    listing = client.listing("nv/source")
    wrong = []
    try:
        for name in ("config.json", "tokenizer.model", SHARD_NAME):
            client.download(listing, name, work / "file")
            if (work / "file").read_bytes() != (run.folder / "source" / name).read_bytes():
                wrong.append(name)
    finally:
        (work / "file").unlink(missing_ok=True)
    return ", ".join(wrong)


def verify(run: Run, client: HubClient) -> str:
    """Verify a result: it is right."""
    report = verify_repo(None, "hf://me/result", hub=Options(client, run.work))
    return "" if report.ok else NOT_VERIFIED


OPERATIONS: dict[str, Callable[[Run, HubClient], str]] = {
    "plan": plan,
    "quantize": quantize,
    "download": download,
    "verify": verify,
    "publish": publish,
    "publish over": lambda run, client: publish(run, client, "hf://me/result", overwrite=True),
    "stage": stage,
    "stage branch": lambda run, client: stage(run, client, revision="fp8"),
    "stage pull request": lambda run, client: stage(run, client, pull_request=True),
}


@dataclass
class Outcome:
    """End of an operation.

    Attributes:
        error: class and message of the error; empty for none.
        kinds: names of the error's classes.
        wrong: what is wrong with a result.
        leaks: places that hold the token.
        seconds: how long it took.
        slept: the longest wait, in seconds, real or not.
        grown: bytes by which the memory of the process grew at most.
    """

    error: str = ""
    kinds: list[str] = field(default_factory=list)
    wrong: str = ""
    leaks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slept: float = 0.0
    grown: int = 0


def perform(run: Run) -> Outcome:
    """Run an operation and describe how it ended."""
    os.environ["TEST_HUB_TOKEN"] = run.token
    outcome, began, client = Outcome(), time.monotonic(), run.client()
    before, logged = reset_peak(), Logged()
    longest, transport.MAX_SECONDS = transport.MAX_SECONDS, 0.2
    with quick_sleeps() as slept, logged:
        try:
            outcome.wrong = OPERATIONS[run.operation](run, client)
        except BaseException as error:
            outcome.kinds = [kind.__name__ for kind in type(error).__mro__]
            outcome.error = f"{type(error).__name__}: {error}"
            if not isinstance(error, NemotronFp8Error):
                outcome.error = traceback.format_exc()
            outcome.leaks = leaks_of(error, run.token)
        finally:
            transport.MAX_SECONDS = longest
    outcome.leaks += [f"the log: {text}" for text in logged.lines if holds(text, run.token)]
    outcome.seconds = time.monotonic() - began
    outcome.slept = max([client.policy.clock.longest, *slept])  # type: ignore[attr-defined]  # the clock above
    outcome.grown = max(0, peak() - before)
    return outcome


class Logged(logging.Handler):
    """The lines that the libraries log meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        logging.getLogger("huggingface_hub").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("huggingface_hub").removeHandler(self)


@contextlib.contextmanager
def quick_sleeps() -> Iterator[list[float]]:
    """Record the waits of huggingface_hub instead of waiting."""
    from huggingface_hub.utils import _http

    slept, real = [], _http.time
    _http.time = SimpleNamespace(**{**vars(time), "sleep": slept.append})  # type: ignore[assignment]  # as far as used
    try:
        yield slept
    finally:
        _http.time = real


def leaks_of(error: BaseException | None, token: str) -> list[str]:
    """Return the places of an error and of its chain that hold the token, or a part of it."""
    found, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        texts = {"message": str(error), "repr": repr(error), "args": repr(error.args), "attributes": repr(vars(error))}
        if isinstance(error, NemotronFp8Error):
            texts["pickle"] = pickle.dumps(error).decode("latin-1")
        found += [f"{type(error).__name__}: {name}" for name, text in texts.items() if holds(text, token)]
        if hasattr(error, "request") or hasattr(error, "response"):
            found.append(f"{type(error).__name__}: holds the request")
        error = error.__cause__ or error.__context__
    return found


def holds(text: str, token: str) -> bool:
    """Return True if a text holds eight characters of the token in a row, also percent-encoded."""
    parts = [token[at : at + 8] for at in range(len(token) - 7)]
    return any(part in form for form in (text, unquote(text)) for part in parts)


# -- a process whose memory is measured -------------------------------------------------------------------------


def reset_peak() -> int:
    """Forget the peak of this process's memory, where the system can; return the memory in use."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the most memory that this process has used."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) << 10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def perform_all(connection: Connection) -> None:
    """Perform the runs that another process sends, until it sends None."""
    import torch
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_PROGRESS_BARS = True
    torch.set_num_threads(1)
    while (run := connection.recv()) is not None:
        connection.send(perform(run))
