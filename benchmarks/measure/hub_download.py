"""Downloads of whole shards: our HTTP stream beside ``hf_hub_download``: ``python -m benchmarks.measure.hub_download``.

The Hub of the tests serves all of them on this machine. ``hf_xet`` reads its offline store from the disk, without any
network, so its figures are an upper bound. Every download runs in its own process, without any cache of another.
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
from importlib import metadata
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, Recorder, machine

TOKEN, REPO = "hf_benchmark", "me/shards"
WAYS = {"stream": "1", "hf_hub_download, HTTP": "1", "hf_hub_download, hf_xet": "0"}
"""Ways to download, with their value of HF_HUB_DISABLE_XET."""
SEED = """
import sys, torch
from pathlib import Path
from huggingface_hub import HfApi
api, folder = HfApi(), Path(sys.argv[2])
api.create_repo(sys.argv[1])
for i in range(int(sys.argv[3])):
    shard = folder / f"{i}.safetensors"
    torch.manual_seed(i)
    shard.write_bytes((torch.randn(int(sys.argv[4]) // 2) * 0.02).bfloat16().view(torch.uint8).numpy())
    api.upload_file(path_or_fileobj=shard, path_in_repo=shard.name, repo_id=sys.argv[1])
    shard.unlink()
"""
DOWNLOAD = """
import hashlib, json, os, sys, time
from pathlib import Path
from huggingface_hub import hf_hub_download
from nemotron_fp8.hub.client import HubClient
way, repo, name, folder = *sys.argv[1:4], Path(sys.argv[4])
client = HubClient()
listing = client.listing(repo)
client.read_small(listing, ".gitattributes")
cpu, wall = time.process_time(), time.perf_counter()
if way == "stream":
    client.download(listing, name, folder / name)
else:
    hf_hub_download(repo, name, revision=listing.sha, local_dir=folder)
figures = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - cpu}
if way != "stream":  # the stream has digest and fsync in its time
    with (folder / name).open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        assert digest.hexdigest() == listing.file(name).sha256
        os.fsync(file.fileno())
figures["verified_seconds"] = time.perf_counter() - wall
figures["peak_resident_bytes"] = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps(figures | {"bytes": listing.file(name).size}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=200_000_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "hub-download.jsonl")
    options = parser.parse_args()
    versions = {name: metadata.version(name) for name in ("huggingface_hub", "hf_xet")}
    record = Recorder(options.out, machine("cpu") | versions)
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-m", "tests.hub_server.server", str(Path(made, "hub")), "--token", f"{TOKEN}=me"]
        with subprocess.Popen([*command, "--xet"], stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
            assert server.stdout is not None
            environment = {**os.environ, "HF_ENDPOINT": server.stdout.readline().strip(), "HF_TOKEN": TOKEN}
            environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(Path(made, "home"))}
            try:
                sizes = (str(options.shards), str(options.bytes))
                seed = [sys.executable, "-c", SEED, REPO, made, *sizes]
                subprocess.run(seed, check=True, env=environment | {"HF_HUB_DISABLE_XET": "0"})
                measure(record, environment, options.shards)
            finally:
                server.terminate()


def measure(record: Recorder, environment: dict[str, str], shards: int) -> None:
    """Download every shard in every way, in random order, and record single and median figures."""
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for shard in range(shards):
        for way in random.Random(shard).sample(list(WAYS), len(WAYS)):
            with tempfile.TemporaryDirectory() as folder:
                own = {"HF_HUB_DISABLE_XET": WAYS[way], "HF_HOME": str(Path(folder, "home"))}
                download = [sys.executable, "-c", DOWNLOAD, way, REPO, f"{shard}.safetensors", folder]
                ran = subprocess.run(download, check=True, env=environment | own, capture_output=True, text=True)
            samples[way].append(json.loads(ran.stdout))
    for way, found in samples.items():
        rates = [sample["bytes"] / sample["verified_seconds"] / 1e6 for sample in found]
        plain = [sample["bytes"] / sample["seconds"] / 1e6 for sample in found]
        record.write(
            way=way,
            samples=len(found),
            bytes=found[0]["bytes"],
            verified_mb_per_second=statistics.median(rates),
            verified_mb_per_second_low=min(rates),
            verified_mb_per_second_high=max(rates),
            mb_per_second=statistics.median(plain),
            processor_seconds=statistics.median(sample["processor_seconds"] for sample in found),
            peak_resident_bytes=max(sample["peak_resident_bytes"] for sample in found),
        )


if __name__ == "__main__":
    main()
