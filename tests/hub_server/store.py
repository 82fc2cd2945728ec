"""State of the test Hub in a folder: repositories, commits, refs and LFS objects.

Nothing is kept in memory but locks, so that a server may be stopped and started again over the same folder,
and so that a repository far larger than memory can be served.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

CHUNK = 1 << 20
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".model", ".npz")
LFS_THRESHOLD = 10 * 1024 * 1024
COMMIT_ID = re.compile(r"[0-9a-f]{40}")


class HubStateError(Exception):
    """A request that cannot be served, with status, code and message of the response."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        self.status, self.code, self.message = status, code, message
        super().__init__(f"{status} {code}: {message}")


@dataclass(frozen=True)
class Entry:
    """A file of a tree: ``blob`` is its git id; ``sha256`` is set for an LFS object."""

    blob: str
    size: int
    sha256: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"blob": self.blob, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class Commit:
    """A commit: id, first parent, date, author and whole tree."""

    id: str
    parent: str | None
    title: str
    message: str
    date: str
    author: str
    tree: dict[str, Entry] = field(hash=False)


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    temporary.replace(path)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Repo:
    """A model repository below ``folder``. Callers hold the store's lock for every change."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    @property
    def meta(self) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads((self.folder / "meta.json").read_text()))

    def set_meta(self, **changes: object) -> None:
        write_atomically(self.folder / "meta.json", json.dumps({**self.meta, **changes}).encode())

    # -- content ------------------------------------------------------------------------------------------

    def object_path(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256

    def blob_path(self, blob: str) -> Path:
        return self.folder / "blobs" / blob

    def content_path(self, entry: Entry) -> Path:
        return self.object_path(entry.sha256) if entry.sha256 else self.blob_path(entry.blob)

    def add_blob(self, content: bytes) -> Entry:
        blob = git_blob_id(content)
        if not self.blob_path(blob).exists():
            write_atomically(self.blob_path(blob), content)
        return Entry(blob, len(content))

    def add_object(self, temporary: Path, sha256: str | None = None) -> str:
        """Move a complete file into the store; refuse a digest other than announced."""
        actual = sha256_of(temporary)
        if sha256 is not None and actual != sha256:
            temporary.unlink()
            raise HubStateError(400, None, f"content hash is {actual}, announced was {sha256}")
        self.object_path(actual).parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(self.object_path(actual))
        return actual

    def lfs_entry(self, sha256: str) -> Entry:
        path = self.object_path(sha256)
        if not path.exists():
            raise HubStateError(400, None, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = path.stat().st_size
        return Entry(git_blob_id(lfs_pointer(sha256, size)), size, sha256)

    # -- history ------------------------------------------------------------------------------------------

    @property
    def refs(self) -> dict[str, str]:
        return cast("dict[str, str]", self.meta["refs"])

    def set_ref(self, ref: str, commit: str | None) -> None:
        refs = {name: target for name, target in self.refs.items() if name != ref}
        if commit is not None:
            refs[ref] = commit
        self.set_meta(refs=refs)

    def resolve(self, revision: str) -> Commit:
        refs = self.refs  # read once: whoever only reads holds no lock
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in refs:
                return self.commit(refs[ref])
        if COMMIT_ID.fullmatch(revision) and (self.folder / "commits" / f"{revision}.json").exists():
            return self.commit(revision)
        raise HubStateError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def commit(self, commit_id: str) -> Commit:
        data = json.loads((self.folder / "commits" / f"{commit_id}.json").read_text())
        tree = {path: Entry(**entry) for path, entry in data.pop("tree").items()}
        return Commit(id=commit_id, tree=tree, **data)

    def history(self, revision: str) -> Iterator[Commit]:
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = self.commit(commit.parent) if commit.parent else None

    def add_commit(self, parent: str | None, tree: Mapping[str, Entry], title: str, message: str, author: str) -> str:
        """Write a commit without moving a ref; its id covers content, parent and time, as in git."""
        data = {
            "parent": parent,
            "title": title,
            "message": message,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
            "author": author,
            "tree": {path: entry.as_json() for path, entry in sorted(tree.items())},
        }
        encoded = json.dumps(data, sort_keys=True).encode()
        commit_id = hashlib.sha1(encoded + uuid.uuid4().bytes).hexdigest()
        write_atomically(self.folder / "commits" / f"{commit_id}.json", encoded)
        return commit_id


class Store:
    """All repositories and tokens of the test Hub, below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        (root / "tmp").mkdir(parents=True, exist_ok=True)
        if not self._tokens_path.exists():
            write_atomically(self._tokens_path, b"{}")

    @property
    def _tokens_path(self) -> Path:
        return self.root / "tokens.json"

    def temporary(self) -> Path:
        return self.root / "tmp" / uuid.uuid4().hex

    # -- tokens -------------------------------------------------------------------------------------------

    def add_token(self, token: str, user: str, write: bool = True) -> None:
        """Accept ``token`` for ``user``, who owns the repositories ``user/*`` and reads all public ones."""
        with self.lock:
            tokens = json.loads(self._tokens_path.read_text())
            tokens[token] = {"user": user, "write": write}
            write_atomically(self._tokens_path, json.dumps(tokens).encode())

    def revoke(self, token: str) -> None:
        with self.lock:
            tokens = json.loads(self._tokens_path.read_text())
            tokens.pop(token, None)
            write_atomically(self._tokens_path, json.dumps(tokens).encode())

    def token(self, token: str) -> dict[str, Any] | None:
        return cast("dict[str, Any] | None", json.loads(self._tokens_path.read_text()).get(token))

    # -- repositories -------------------------------------------------------------------------------------

    def find(self, name: str) -> Repo | None:
        folder = self.root / "repos" / name.replace("/", "--")
        return Repo(folder, name) if (folder / "meta.json").exists() else None

    def repo(self, name: str) -> Repo:
        found = self.find(name)
        if found is None:
            raise HubStateError(404, "RepoNotFound", "Repository not found")
        return found

    def create(self, name: str, private: bool = False, gated: bool = False) -> Repo:
        """Create a repository whose main holds ``.gitattributes``, as the Hub does."""
        with self.lock:
            folder = self.root / "repos" / name.replace("/", "--")
            folder.mkdir(parents=True)
            repo = Repo(folder, name)
            meta: dict[str, Any] = {
                "private": private,
                "gated": "manual" if gated else False,
                "disabled": False,
                "allowed": [],
            }
            write_atomically(folder / "meta.json", json.dumps({**meta, "refs": {}, "pulls": 0}).encode())
            attributes = repo.add_blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            first = repo.add_commit(None, {".gitattributes": attributes}, "initial commit", "", "hub")
            repo.set_ref("refs/heads/main", first)
            return repo

    def seed(self, name: str, files: Mapping[str, bytes | Path], revision: str = "main") -> str:
        """Commit files to a repository without HTTP; return the id of the commit.

        A ``Path`` is linked or copied, not read into memory. A file is an LFS object by ``is_lfs``.
        """
        with self.lock:
            repo = self.find(name) or self.create(name)
            head = repo.resolve(revision)
            tree = dict(head.tree)
            for path, content in files.items():
                size = len(content) if isinstance(content, bytes) else content.stat().st_size
                if not is_lfs(path, size):
                    tree[path] = repo.add_blob(content if isinstance(content, bytes) else content.read_bytes())
                    continue
                temporary = self.temporary()
                if isinstance(content, bytes):
                    temporary.write_bytes(content)
                else:
                    link_or_copy(content, temporary)
                tree[path] = repo.lfs_entry(repo.add_object(temporary))
            commit = repo.add_commit(head.id, tree, "seed", "", "hub")
            repo.set_ref(f"refs/heads/{revision}", commit)
            return commit


def is_lfs(path: str, size: int) -> bool:
    """Return True if the Hub stores a file as an LFS object; it never does so for an empty file."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_THRESHOLD)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
