"""Writing a result into an object store beside a folder: ``python -m benchmarks.measure.store_writing``.

A server on this machine takes the uploads by the protocol of S3 and forgets their bytes, so that neither its disk nor
its memory counts. It answers at once, after a delay, or no faster than a slow line. Memory and disk of each run are
watched from outside: the resident memory of its process, and the bytes in its folders and in its files without a name.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from multiprocessing import Pipe, Process
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, ROOT, Recorder, machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

DELAY = 0.03
"""Seconds before an answer, as of a store in the same region."""
SLOW = 25_000_000
"""Bytes a second of a slow line, all requests together."""
KEPT = 1 << 20
"""Largest object whose bytes the server keeps."""
CONVERT = """
import sys
from nemotron_fp8 import Recipe, quantize_repo
source, target, granularity = sys.argv[1:4]
quantize_repo(source, target, Recipe(granularity=granularity), "cpu", max_memory="256MiB")
"""


class Objects:
    """Objects of the server; of large ones, only their size and tag."""

    def __init__(self, delay: float, rate: float) -> None:
        self.delay, self.rate = delay, rate
        self.lock = threading.Lock()
        self.found: dict[str, tuple[int, str, bytes]] = {}
        self.parts: dict[str, dict[int, tuple[int, str]]] = {}
        self.free = 0.0

    def receive(self, count: int) -> None:
        """Wait as long as bytes need on the line."""
        if self.rate:
            with self.lock:
                self.free = max(self.free, time.monotonic()) + count / self.rate
                until = self.free
            time.sleep(max(0.0, until - time.monotonic()))


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    objects: Objects

    def log_message(self, *_args: object) -> None:
        """Do nothing."""

    def do_GET(self) -> None:
        path, query = self._begin()
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            items = "".join(
                f'<Contents><Key>{key}</Key><ETag>"{tag}"</ETag><Size>{size}</Size>'
                "<LastModified>1970-01-01T00:00:00Z</LastModified></Contents>"
                for key, (size, tag, _) in sorted(self.objects.found.items())
                if key.startswith(prefix)
            )
            self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode())
            return
        if path not in self.objects.found:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        size, tag, content = self.objects.found[path]
        if self.headers.get("Range") and size:
            self._answer(206, content, tag, **{"Content-Range": f"bytes 0-{size - 1}/{size}"})
        else:
            self._answer(200, content, tag, size)

    do_HEAD = do_GET  # noqa: N815  (the name of the protocol)

    def do_PUT(self) -> None:
        path, query = self._begin()
        length, hasher, content = int(self.headers["Content-Length"]), hashlib.md5(usedforsecurity=False), b""
        left = length
        while left:
            piece = self.rfile.read(min(left, 1 << 18))
            left -= len(piece)
            self.objects.receive(len(piece))
            hasher.update(piece)
            if length <= KEPT:
                content += piece
        tag = hasher.hexdigest()
        if "partNumber" in query:
            self.objects.parts[query["uploadId"][0]][int(query["partNumber"][0])] = length, tag
        else:
            with self.objects.lock:
                if self.headers.get("If-None-Match") and path in self.objects.found:
                    self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                    return
                self.objects.found[path] = length, tag, content
        self._answer(200, b"", tag)

    def do_POST(self) -> None:
        path, query = self._begin()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "uploads" in query:
            upload = f"upload{len(self.objects.parts)}"
            self.objects.parts[upload] = {}
            result = f"<Bucket>b</Bucket><Key>{path}</Key><UploadId>{upload}</UploadId>"
            self._answer(200, f"<InitiateMultipartUploadResult>{result}</InitiateMultipartUploadResult>".encode())
        elif "uploadId" in query:
            parts = self.objects.parts[query["uploadId"][0]]
            tag = hashlib.md5("".join(each for _, each in parts.values()).encode(), usedforsecurity=False).hexdigest()
            self.objects.found[path] = sum(size for size, _ in parts.values()), f"{tag}-{len(parts)}", b""
            result = f'<Bucket>b</Bucket><Key>{path}</Key><ETag>"{tag}-{len(parts)}"</ETag>'
            self._answer(200, f"<CompleteMultipartUploadResult>{result}</CompleteMultipartUploadResult>".encode())
        else:  # deletions
            self._answer(200, b"<DeleteResult></DeleteResult>")

    def _begin(self) -> tuple[str, dict[str, list[str]]]:
        time.sleep(self.objects.delay)
        path, _, query = self.path.partition("?")
        return unquote(path).strip("/").partition("/")[2], parse_qs(query, keep_blank_values=True)

    def _answer(self, status: int, body: bytes, tag: str = "", size: int | None = None, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body) if size is None else size), **headers}
        for name, value in {**headers, "Last-Modified": formatdate(0, usegmt=True)}.items():
            self.send_header(name, value)
        if tag:
            self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def serve(delay: float, rate: float, port: Connection) -> None:
    """Serve until the process is terminated; send the port first."""
    handler = type("WithObjects", (Handler,), {"objects": Objects(delay, rate)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    port.send(server.server_port)
    server.serve_forever()


@contextmanager
def served(delay: float, rate: float) -> Iterator[dict[str, str]]:
    """Serve from another process; yield the variables of a client."""
    receiver, sender = Pipe()
    process = Process(target=serve, args=(delay, rate, sender), daemon=True)
    process.start()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{receiver.recv()}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
        }
    finally:
        process.terminate()


def disk_bytes(process: int, folder: Path) -> int:
    """Return the bytes that a process has on the disk: in a folder, and in open files without a name."""
    found = {}
    for path in [*folder.rglob("*"), *Path(f"/proc/{process}/fd").glob("*")]:
        with suppress(OSError):
            info = path.stat() if path.parts[1] == "proc" else path.lstat()
            if path.parts[1] != "proc" or (info.st_nlink == 0 and os.path.realpath(path).startswith(str(folder))):
                found[info.st_ino] = info.st_blocks * 512  # once for all its names
    return sum(found.values())


def run(source: Path, target: str, granularity: str, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Convert in a process of its own, and return its figures; ``folder`` is its home and has its temporary files."""
    folder.mkdir()
    command = [sys.executable, "-c", CONVERT, str(source), target, granularity]
    homes = dict.fromkeys(("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME"), str(folder))
    python = os.environ.get("PYTHONPATH", str(ROOT))
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **homes, "PYTHONPATH": python, **environment}, cwd=folder)
    disk, memory = 0, 0
    while process.poll() is None:
        disk = max(disk, disk_bytes(process.pid, folder))
        with suppress(OSError, IndexError):
            memory = max(memory, int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0]))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the conversion into {target} failed")
    return {"seconds": time.perf_counter() - began, "peak_resident_bytes": memory * 1024, "peak_disk_bytes": disk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the source, in two shards")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None, help="folder for checkpoints, instead of the temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS / "store-writing-cpu.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as made:
        work = Path(made)
        size = write_checkpoint(work / "source", nemotron(options.gigabytes, 2, hidden=2048))
        record = Recorder(options.out, machine("cpu") | {"obstore": metadata.version("obstore")})
        places = {
            "folder": None,
            "store": (0.0, 0.0),
            f"store, {DELAY * 1000:.0f} ms later": (DELAY, 0.0),
            f"store, {SLOW // 10**6} MB/s": (DELAY, float(SLOW)),
        }
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for sample in range(options.samples):
            cases = [(granularity, place) for granularity in ("channel", "tensor") for place in places]
            for granularity, place in random.Random(sample).sample(cases, len(cases)):
                with tempfile.TemporaryDirectory(dir=work) as each:
                    folder, line = Path(each, "home"), places[place]
                    if line is None:
                        figures = run(work / "source", str(folder / "out"), granularity, folder, {})
                    else:
                        with served(*line) as environment:
                            figures = run(work / "source", "s3://bucket/out", granularity, folder, environment)
                found.setdefault((granularity, place), []).append(figures)
        for (granularity, place), measured in sorted(found.items()):
            seconds = [figure["seconds"] for figure in measured]
            record.write(
                granularity=granularity,
                place=place,
                samples=options.samples,
                checkpoint_bytes=size,
                seconds=statistics.median(seconds),
                seconds_low=min(seconds),
                seconds_high=max(seconds),
                peak_resident_bytes=max(figure["peak_resident_bytes"] for figure in measured),
                peak_disk_bytes=max(figure["peak_disk_bytes"] for figure in measured),
            )


if __name__ == "__main__":
    main()
