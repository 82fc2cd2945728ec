"""A whole session of the unmodified client, as a program, because HF_ENDPOINT is read at import.

Prints one JSON object with what the client saw. Runs with every supported ``huggingface_hub``, so it imports
nothing of this repository.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import huggingface_hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    get_session,
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    api = HfApi()
    seen: dict[str, object] = {"version": huggingface_hub.__version__}
    info = api.model_info("nv/source", files_metadata=True)
    seen["listing"] = {
        file.rfilename: [file.size, file.lfs.sha256 if file.lfs else file.blob_id] for file in info.siblings or []
    }
    tree = api.list_repo_tree("nv/source", recursive=True, revision=info.sha)
    seen["tree"] = sorted(item.path for item in tree)
    downloads = {}
    for name in ("model.safetensors", "config.json"):
        path = huggingface_hub.hf_hub_download("nv/source", name, revision=info.sha)
        downloads[name] = sha256(Path(path).read_bytes())
    seen["downloads"] = downloads
    url = huggingface_hub.hf_hub_url("nv/source", "model.safetensors", revision=info.sha)
    headers = {"Authorization": f"Bearer {huggingface_hub.get_token()}", "Range": "bytes=1000-1999"}
    answer = get_session().get(url, headers=headers)
    seen["range"] = [answer.status_code, answer.headers["Content-Range"], sha256(answer.content)]

    api.create_repo("me/target", exist_ok=True)
    api.create_repo("me/target", exist_ok=True)
    base = api.model_info("me/target").sha
    api.create_branch("me/target", branch="staging", revision=base)
    shard = random.Random(7).randbytes(350_001)
    staged = base
    for name, content in (("one.safetensors", shard), ("two.safetensors", shard[::-1]), ("job.json", b"{}")):
        commit = api.create_commit(
            "me/target",
            [CommitOperationAdd(name, content)],
            commit_message=f"Stage {name}",
            revision="staging",
            parent_commit=staged,
        )
        staged = commit.oid
    found = api.get_paths_info("me/target", ["one.safetensors", "two.safetensors", "no.safetensors"], revision=staged)
    seen["staged"] = {item.path: item.lfs.sha256 for item in found if isinstance(item, RepoFile) and item.lfs}
    api.create_commit(
        "me/target",
        [
            CommitOperationCopy("one.safetensors", "one.safetensors", src_revision="staging"),
            CommitOperationCopy("two.safetensors", "two.safetensors", src_revision="staging"),
            CommitOperationAdd("README.md", b"# model\n"),
            CommitOperationDelete(".gitattributes"),
        ],
        commit_message="Publish",
        parent_commit=base,
    )
    api.delete_branch("me/target", branch="staging")
    seen["branches"] = [ref.name for ref in api.list_repo_refs("me/target").branches]
    seen["history"] = [commit.title for commit in api.list_repo_commits("me/target")]
    path = huggingface_hub.hf_hub_download("me/target", "two.safetensors")
    seen["read_back"] = sha256(Path(path).read_bytes()) == sha256(shard[::-1])
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
