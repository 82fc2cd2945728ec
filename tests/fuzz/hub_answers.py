"""Inputs of the Hub: answers of the tests' own server, changed on their way to the client."""

from __future__ import annotations

import gzip
import shutil
import threading
import zlib
from collections import Counter
from random import Random
from typing import TYPE_CHECKING

from tests.fuzz.commands import ONE
from tests.fuzz.json_mutations import mutate_json
from tests.fuzz.shards import mutate_shard
from tests.fuzz.tree import Input, under
from tests.fuzz.values import is_big, mutate_bytes, pick, text
from tests.hub_server.hub import Hub
from tests.hub_server.messages import FilePart, Response
from tests.hub_server.server import HubServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuzz.seeds import Seeds
    from tests.hub_server.messages import Call

KEYS = (
    "sha", "siblings", "rfilename", "size", "blobId", "lfs", "sha256", "pointerSize", "private", "gated", "disabled",
    "id", "modelId", "_id", "tags", "config", "cardData", "lastModified", "createdAt", "usedStorage", "error",
    "downloads", "likes", "safetensors",
)  # fmt: skip
STATUSES = (
    200,
    201,
    204,
    206,
    301,
    302,
    304,
    307,
    308,
    400,
    401,
    402,
    403,
    404,
    409,
    410,
    412,
    413,
    416,
    418,
    429,
    500,
    503,
    507,
    599,
    999,
)
HEADERS: dict[str, tuple[str, ...]] = {
    "Retry-After": ("0", "1", "-1", "9" * 400, "x", "nan", "Fri, 31 Dec 9999 23:59:59 GMT",
        "Mon, 99 Foo 0000 99:99:99 X", "1.5", "\xb2", ","),
    "RateLimit": ('"api";r=0;t=300', '"api";r=0;t=' + "9" * 400, '"api";r=x;t=y', ";;;;"),
    "X-Error-Code": ("RepoNotFound", "GatedRepo", "EntryNotFound", "RevisionNotFound", "x", "", "\x1b[2J"),
    "X-Error-Message": ("x" * 50_000, "\x1b[2J", "hf_" + "a" * 34, "", "\xff", "a\tb", "error: x", "storage limit",
        "Traceback"),
    "X-Request-Id": ("x" * 1000, "\x1b"),
    "X-Repo-Commit": ("", "x", "0" * 40, "\x1b[2J"),
    "X-Linked-Etag": ("", '"x"', 'W/"x"', '"', "0" * 64),
    "X-Linked-Size": ("", "-1", "x", "9" * 400),
    "ETag": ("", '"x"', "\xff"),
    "Location": ("", "/", "//", "x", "http://", "http://[", "http://127.0.0.1:1/x", "http://127.0.0.1:99999/",
        "file:///etc/passwd", "ftp://a/b", "http://127.0.0.1:x/", "?" * 50_000, "http://user:pw@127.0.0.1:1/",
        "\x1b[2J", "//127.0.0.1:1/x", "../" * 50, "data:,x", "\xff", ),
    "Content-Range": ("bytes 0-0/1", "bytes */*", "x", "bytes 0-" + "9" * 400 + "/1", "",
        "bytes " + "9" * 5000 + "-1/2"),
    "Content-Type": ("text/html", "application/json; charset=x", "", "application/json; charset=utf-16"),
    "Content-Encoding": ("gzip", "deflate", "br", "zstd", "identity", "x", "gzip, gzip", "compress", ""),
    "Transfer-Encoding": ("chunked", "gzip", "x"),
    "Link": ('<http://127.0.0.1:1/>; rel="next"', "<", '<x>; rel="next"', "x" * 20_000),
    "Set-Cookie": ("a=b; path=/", "x" * 5000, "\xff"),
    "X-Xet-Hash": ("x", "0" * 64),
    "Connection": ("close", "upgrade"),
    "": ("x", ),
    "X": ("x" * 100_000, "a\r\n b", "\xff", "\0"),
}  # fmt: skip


class ChangingHub(Hub):
    """A Hub whose answers `change` may replace."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.change: Callable[[Call, Response], Response] | None = None

    def handle(self, call: Call) -> Response:
        answer = super().handle(call)
        return self.change(call, answer) if self.change else answer


TOKEN, TARGET = "hf_canary0123456789", "me/target"


class HubSeeds:
    """A served Hub with a checkpoint and a result. It serves for as long as this process runs."""

    def __init__(self, seeds: Seeds, folder: Path) -> None:
        self.hub = ChangingHub(folder)
        self.hub.store.add_token(TOKEN, "me")
        for name, tree in (("nv/source", seeds.source), ("nv/result", seeds.result), ("nv/nemo", seeds.dist)):
            self.hub.store.seed(name, {path: node for path, node in tree.items() if isinstance(node, bytes)})
        self._server = HubServer(self.hub)
        self._server.__enter__()

    def reset(self) -> None:
        """Serve true answers again, and remove what a command has uploaded."""
        self.hub.change = None
        shutil.rmtree(self.hub.store.root / "repos" / TARGET.replace("/", "--"), ignore_errors=True)

    @property
    def endpoint(self) -> str:
        """Its address."""
        return self._server.endpoint


class Changes:
    """Changes of the answers to one command.

    An answer depends on the address and on how often it was asked for, not on the order of parallel requests.

    Args:
        name: text that decides everything.
        share: share of the requests whose answers change.
        only: change only answers whose address holds this text.
    """

    def __init__(self, name: str, share: float, only: str) -> None:
        self._name, self._share, self._only = name, share, only
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, call: Call, answer: Response) -> Response:
        address = f"{call.method} {call.path}"
        with self._lock:
            number = self._seen[address]
            self._seen[address] += 1
        if self._only not in address:
            return answer
        # Most often the same change for each try: another try would hide it.
        chance = Random(f"{self._name}:{address}")
        if chance.random() > self._share:
            return answer
        if chance.random() < 0.2:
            chance = Random(f"{self._name}:{address}:{number}")
        return changed(chance, answer)


def changed(chance: Random, answer: Response) -> Response:
    """Return another answer."""
    body = b"".join(answer.chunks())
    made = Response(answer.status, body, dict(answer.headers))
    for _ in range(pick(chance, (1, 1, 1, 2, 3))):
        kind = chance.random()
        is_json = "json" in made.headers.get("Content-Type", "")
        assert not isinstance(made.body, FilePart)
        if kind < 0.45 and is_json and made.body:
            made.body = mutate_json(chance, made.body, KEYS)
        elif kind < 0.5 and len(made.body) > 100 and not is_json:
            made.body = mutate_shard(chance, made.body) if made.body[8:9] == b"{" else mutate_bytes(chance, made.body)
        elif kind < 0.6:
            made.body = mutate_bytes(chance, made.body)
        elif kind < 0.75:
            name = pick(chance, tuple(HEADERS))
            made.headers[name] = (
                pick(chance, HEADERS[name]) if chance.random() < 0.9 else text(chance).encode()[:5000].decode("latin-1")
            )
        elif kind < 0.85:
            made.status = pick(chance, STATUSES)
            if made.status // 100 == 3:
                made.headers["Location"] = pick(chance, HEADERS["Location"])
        else:
            _encoded(chance, made)
    # Otherwise a client that was told of more bytes waits for them until its own limit, of two minutes.
    made.headers.setdefault("Connection", "close")
    # The server writes headers in latin-1.
    made.headers = {name: value.encode("latin-1", "ignore").decode("latin-1") for name, value in made.headers.items()}
    return made


def _encoded(chance: Random, answer: Response) -> None:
    """Compress a body, or send one that expands to much."""
    body = b"".join(answer.chunks())
    size = 1 << (30 if is_big(chance) else pick(chance, (20, 24, 26)))
    kind = pick(chance, ("good", "good", "bomb", "twice", "broken", "long"))
    if kind == "long":
        answer.body = body + pick(chance, (b" ", b"\n", b"\0")) * min(size, 1 << 22)
        return
    answer.headers["Content-Encoding"] = pick(chance, ("gzip", "gzip", "deflate"))
    squeeze = gzip.compress if answer.headers["Content-Encoding"] == "gzip" else zlib.compress
    if kind == "good":
        answer.body = squeeze(body)
    elif kind == "bomb":
        answer.body = gzip.compress(pick(chance, (b" ", b"[", b"0")) * (1 << 20), 1) * (size >> 20)
    elif kind == "twice":
        answer.headers["Content-Encoding"] = "gzip, gzip"
        answer.body = gzip.compress(gzip.compress(bytes(min(size, 1 << 26)), 1), 1)
    else:
        answer.body = mutate_bytes(chance, squeeze(body))


def answers(chance: Random, seeds: Seeds) -> Input:
    """Change answers of the Hub to a command."""
    served = seeds.hub
    command = pick(
        chance,
        (
            lambda: ["plan", "hf://nv/source", "--no-estimate", *ONE],
            lambda: ["quantize", "hf://nv/source", "dst", *ONE],
            lambda: ["quantize", "hf://nv/source", "dst", *ONE, "--stats", "--quiet"],
            lambda: ["inspect", "hf://nv/source"],
            lambda: ["verify", "hf://nv/result", *ONE],
            lambda: ["verify", "hf://nv/source", "src", *ONE],
            lambda: ["verify", "hf://nv/source", "hf://nv/result", *ONE],
            lambda: ["dequantize", "hf://nv/result", "dst", *ONE],
            lambda: ["convert", "hf://nv/nemo", "dst", *ONE],
            lambda: ["plan", "nv/source@main", "--no-estimate", "--json", *ONE],
            lambda: ["plan", "hf://nv/missing", "--no-estimate"],
            lambda: ["quantize", "src", f"hf://{TARGET}", "--token-env", "HF_TOKEN", *ONE],
            lambda: ["quantize", "src", f"hf://{TARGET}", "--token-env", "HF_TOKEN", "--private", *ONE],
            lambda: ["dequantize", "hf://nv/result", f"hf://{TARGET}", "--token-env", "HF_TOKEN", *ONE],
        ),
    )()
    only = pick(
        chance,
        ("", "/api/", "/api/", "/api/", "resolve", "_cdn", "safetensors", ".json", "HEAD", "README", "POST", "PUT"),
    )
    changes = Changes(f"{chance.getrandbits(64)}", pick(chance, (1.0, 1.0, 0.3)), only)

    def serve() -> Callable[[], object]:
        served.hub.change = changes
        served.hub.log.clear()
        return served.reset

    tree = under("src", seeds.result if command[0] == "verify" else seeds.source) if "src" in command else {}
    return Input(dict(tree), command, {"HF_ENDPOINT": served.endpoint, "HF_TOKEN": TOKEN}, result="dst", serve=serve)
