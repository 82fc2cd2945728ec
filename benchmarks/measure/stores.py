"""Reading from an object store beside reading from a disk: ``python -m benchmarks.measure.stores``.

A server on this machine sends the files of a folder by the protocol of S3, from the page cache and after a delay.
Without one, the figures are what the client costs; with one, what reading ahead leaves of it. Every case runs in its
own process, in random order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from multiprocessing import Pipe, Process
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from benchmarks.checkpoints import nemotron, write_checkpoint
from benchmarks.common import RESULTS, ROOT, Recorder, machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

BUCKET, FOLDER = "bucket", "model"
DELAY = 0.03
"""Seconds before an answer, as of a store in the same region."""
READ = """
import json, sys, time
from nemotron_fp8.sources.open import open_source
source, step = sys.argv[1], int(sys.argv[2])
cpu, wall, total = time.process_time(), time.perf_counter(), 0
opened = open_source(source)
buffer = memoryview(bytearray(step))
for shard in opened.inventory.shards:
    file = opened.opener.open(shard.name)
    for begin in range(0, shard.size, step):
        part = buffer[: min(step, shard.size - begin)]
        file.read_into(begin, part)
        total += len(part)
    file.close()
figures = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - cpu, "bytes": total}
"""
CONVERT = """
import json, sys, time
from nemotron_fp8 import Recipe, quantize_repo
source, target, granularity, memory = sys.argv[1:5]
cpu, wall = time.process_time(), time.perf_counter()
report = quantize_repo(source, target, Recipe(granularity=granularity), "cpu", max_memory=memory)
figures = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - cpu}
figures["bytes"] = report.bytes_read
"""
PRINT = """
figures["peak_resident_bytes"] = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps(figures))
"""


class Handler(BaseHTTPRequestHandler):
    """Answers listings, and reads of ranges; ``root`` holds a folder for each bucket, and ``delay`` is in seconds."""

    protocol_version = "HTTP/1.1"
    root: Path
    delay: float

    def log_message(self, *_args: object) -> None:
        """Do nothing."""

    def do_GET(self) -> None:
        time.sleep(self.delay)
        path, _, query = self.path.partition("?")
        if "list-type" in query:
            self._list(path.strip("/"))
            return
        file = self.root / unquote(path).strip("/")
        size = file.stat().st_size
        start, stop = 0, size
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(size, int(last) + 1)
        self.send_response(206 if wanted else 200)
        self._head(stop - start, ETag=f'"{size}-1"')
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        with file.open("rb") as content:
            while self.command == "GET" and start < stop:
                start += os.sendfile(self.connection.fileno(), content.fileno(), start, stop - start)

    do_HEAD = do_GET  # noqa: N815  (the name of the protocol)

    def _head(self, length: int, **headers: str) -> None:
        for name, value in {
            **headers,
            "Content-Length": str(length),
            "Last-Modified": formatdate(0, usegmt=True),
        }.items():
            self.send_header(name, value)

    def _list(self, bucket: str) -> None:
        items = ""
        for path in sorted((self.root / bucket).rglob("*")):
            if path.is_file():
                key, size = path.relative_to(self.root / bucket).as_posix(), path.stat().st_size
                about = f'<ETag>"{size}-1"</ETag><LastModified>1970-01-01T00:00:00Z</LastModified><Size>{size}</Size>'
                items += f"<Contents><Key>{key}</Key>{about}</Contents>"
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode()
        self.send_response(200)
        self._head(len(body))
        self.end_headers()
        self.wfile.write(body)


def serve(root: Path, delay: float, port: Connection) -> None:
    """Serve a folder until the process is terminated; send the port first."""
    handler = type("OfFolder", (Handler,), {"root": root, "delay": delay})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    port.send(server.server_port)
    server.serve_forever()


@contextmanager
def served(root: Path, delay: float) -> Iterator[dict[str, str]]:
    """Serve a folder from another process; yield the variables of a client."""
    receiver, sender = Pipe()
    process = Process(target=serve, args=(root, delay, sender), daemon=True)
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


def run(code: str, *arguments: str, environment: dict[str, str]) -> dict[str, float]:
    """Run a case in its own process and return its figures."""
    command = [sys.executable, "-c", code + PRINT, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None, help="folder for checkpoints, instead of the temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS / "stores-cpu.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as made:
        root = Path(made, "root")
        size = write_checkpoint(root / BUCKET / FOLDER, nemotron(options.gigabytes, 2, hidden=2048))
        record = Recorder(options.out, machine("cpu") | {"obstore": metadata.version("obstore")})
        with served(root, 0.0) as near, served(root, DELAY) as far:
            own = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
            address = f"s3://{BUCKET}/{FOLDER}"
            places = {
                "folder": (str(root / BUCKET / FOLDER), own),
                "store": (address, own | near),
                f"store, {DELAY * 1000:.0f} ms later": (address, own | far),
            }
            measure(record, places, options.samples, Path(made), size)


def measure(
    record: Recorder, places: dict[str, tuple[str, dict[str, str]]], samples: int, work: Path, size: int
) -> None:
    """Run every case from each place, in random order, and record the medians."""
    cases = {
        "read, 8 MiB at a time": lambda place, _: (READ, place, str(8 << 20)),
        "read, 1 MiB at a time": lambda place, _: (READ, place, str(1 << 20)),
        "quantize, a scale for each row": lambda place, out: (CONVERT, place, out, "channel", "256MiB"),
        "quantize, a scale for each tensor": lambda place, out: (CONVERT, place, out, "tensor", "256MiB"),
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for sample in range(samples):
        for case, place in random.Random(sample).sample(
            [(c, p) for c in cases for p in places], len(places) * len(cases)
        ):
            with tempfile.TemporaryDirectory(dir=work) as target:
                address, environment = places[place]
                arguments = cases[case](address, str(Path(target, "out")))
                found.setdefault((case, place), []).append(run(*arguments, environment=environment))
    for (case, place), figures in sorted(found.items()):
        seconds = [figure["seconds"] for figure in figures]
        record.write(
            case=case,
            place=place,
            samples=samples,
            checkpoint_bytes=size,
            bytes=figures[0]["bytes"],
            seconds=statistics.median(seconds),
            seconds_low=min(seconds),
            seconds_high=max(seconds),
            processor_seconds=statistics.median(figure["processor_seconds"] for figure in figures),
            peak_resident_bytes=max(figure["peak_resident_bytes"] for figure in figures),
        )


if __name__ == "__main__":
    main()
