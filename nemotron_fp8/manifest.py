"""The manifest of a result: what it was made of, and how to tell years later that it is still what was made.

``nemotron_fp8.json`` stands beside the shards. It holds nothing that differs between two runs on the same
source with the same recipe: no times, paths, host names, threads or budget.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8 import __version__, jsonguard
from nemotron_fp8._utils import share_out
from nemotron_fp8.errors import MalformedManifestError
from nemotron_fp8.progress import unseen
from nemotron_fp8.source import MANIFEST, is_plain_name, links_outside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from nemotron_fp8.plan import Plan
    from nemotron_fp8.progress import Advance
    from nemotron_fp8.source import Shard
    from nemotron_fp8.unit import Receipt


SCHEMA = 1
HASH_BYTES = 1 << 20
"""Bytes that are hashed at a time."""
OWN_DIGEST = "manifest_sha256"
"""Key of the digest of the manifest itself, without this key."""
NO_DIGEST = "0" * 64
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file is.

    Attributes:
        size: its bytes.
        sha256: hexadecimal digest of them; None where none was taken.
    """

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that was read.

    Attributes:
        version: of the library that made the result.
        recipe: what was asked for.
        files: every other file of the result, by name.
        source_bytes: bytes of the shards that it was made from; None where it does not tell.
    """

    version: str
    recipe: Mapping[str, Any]
    files: Mapping[str, FileDigest]
    source_bytes: int | None = None

    @property
    def has_digests(self) -> bool:
        """Whether every file has its digest."""
        return all(file.sha256 is not None for file in self.files.values())


def render_manifest(plan: Plan, files: Mapping[str, FileDigest], digests: bool = True) -> bytes:
    """Return the manifest of a result.

    Args:
        plan: what was carried out.
        files: every other file of the result, by name.
        digests: whether to leave their digests in.
    """
    listed = {
        name: {"size": file.size, **({"sha256": file.sha256} if digests else {})}
        for name, file in sorted(files.items())
    }
    value = {
        "schema": SCHEMA,
        "made_by": {"name": "nemotron_fp8", "version": __version__},
        "source": {"shards": [_shard(shard) for shard in plan.inventory.shards]},
        "recipe": plan.asked,
        "files": listed,
    }
    return _render({**value, OWN_DIGEST: hashlib.sha256(_render(value)).hexdigest()})


def _render(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _shard(shard: Shard) -> dict[str, Any]:
    """A shard of the source: its size, and a digest of which tensors lie where in it."""
    hasher = hashlib.sha256(json.dumps(shard.metadata).encode("ascii"))
    for view in shard.views:
        extents = [(e.offset, e.stride, e.count, e.length, e.row, e.column, e.item, e.step) for e in view.extents]
        hasher.update(json.dumps([view.name, view.dtype, view.shape, extents]).encode("ascii"))
    return {"name": shard.name, "size": shard.size, "tensors_sha256": hasher.hexdigest()}


def planned_sizes(plan: Plan) -> dict[str, int]:
    """Bytes of every file of the result as planned, the manifest among them."""
    sizes = {unit.name: unit.layout.file_size for unit in plan.units}
    sizes |= {side.name: side.size for side in plan.inventory.side_files}
    sizes |= {name: len(data) for name, data in plan.documents({}).items()}
    files = {name: FileDigest(size, NO_DIGEST) for name, size in sizes.items()}
    return {**sizes, MANIFEST: len(render_manifest(plan, files))}


def digests_of(
    receipts: Mapping[str, Receipt],
    documents: Mapping[str, bytes],
    copies: Mapping[str, Callable[[], Iterator[bytes]]],
    digests: bool,
) -> dict[str, FileDigest]:
    """What every file of a result is; files that are taken over from the source are read for it."""
    files = {name: FileDigest(receipt.size, receipt.sha256) for name, receipt in receipts.items()}
    for name, data in documents.items():
        files[name] = FileDigest(len(data), hashlib.sha256(data).hexdigest())
    for name, pieces in copies.items():
        hasher, size = hashlib.sha256(), 0
        for piece in pieces():
            size += len(piece)
            if digests:
                hasher.update(piece)
        files[name] = FileDigest(size, hasher.hexdigest() if digests else None)
    return files


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest; every name in it is a plain file name.

    Raises:
        MalformedManifestError: it is none.
    """
    value = jsonguard.load_object(data, MANIFEST, MalformedManifestError)
    own = value.pop(OWN_DIGEST, None)
    if own != hashlib.sha256(_render(value)).hexdigest() or data != _render({**value, OWN_DIGEST: own}):
        raise MalformedManifestError(MANIFEST, f"it was changed: its {OWN_DIGEST} is not that of the rest")
    made_by, recipe, files = value.get("made_by"), value.get("recipe"), value.get("files")
    if value.get("schema") != SCHEMA:
        raise MalformedManifestError(MANIFEST, f"schema {value.get('schema')!r}, this version reads {SCHEMA}")
    if type(made_by) is not dict or type(recipe) is not dict or type(files) is not dict:
        raise MalformedManifestError(MANIFEST, "made_by, recipe or files is missing or not an object")
    found: dict[str, FileDigest] = {}
    for name, entry in files.items():
        if not is_plain_name(name) or type(entry) is not dict:
            raise MalformedManifestError(MANIFEST, f"{name!a} is no plain file name or has no object")
        size, sha256 = entry.get("size"), entry.get("sha256")
        if type(size) is not int or size < 0:
            raise MalformedManifestError(MANIFEST, f"the size of {name} is {size!r}")
        if sha256 is not None and (type(sha256) is not str or not _SHA256.fullmatch(sha256)):
            raise MalformedManifestError(MANIFEST, f"the sha256 of {name} is not 64 hexadecimal digits")
        found[name] = FileDigest(size, sha256)
    return Manifest(str(made_by.get("version")), recipe, found, _source_bytes(value.get("source")))


def _source_bytes(source: object) -> int | None:
    """Bytes of the shards of the source together."""
    shards = source.get("shards") if isinstance(source, dict) else None
    if not isinstance(shards, list):
        return None
    sizes = [shard.get("size") for shard in shards if isinstance(shard, dict)]
    known = [size for size in sizes if type(size) is int and size >= 0]
    return sum(known) if len(known) == len(shards) else None


def read_manifest(root: Path) -> Manifest | None:
    """Read the manifest of a folder; None where there is none.

    Raises:
        MalformedManifestError: it is none, or cannot be read.
    """
    data = manifest_bytes(root)
    return None if data is None else parse_manifest(data)


def has_digests(root: Path) -> bool:
    """Whether the files of a folder have their digests in its manifest."""
    try:
        manifest = read_manifest(root)
    except MalformedManifestError:
        return False
    return manifest is not None and manifest.has_digests


def manifest_bytes(root: Path) -> bytes | None:
    """The manifest of a folder as it is; None where there is none.

    Raises:
        MalformedManifestError: it cannot be read.
    """
    try:
        fd = os.open(within(root / MANIFEST), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MalformedManifestError(MANIFEST, error.strerror or str(error)) from error
    with os.fdopen(fd, "rb") as file:
        return file.read(jsonguard.MAX_BYTES + 1)


def within(path: Path) -> Path:
    """What a link leads to if that lies in its folder or among the blobs of its Hub cache; any other path as it is."""
    inside = path.is_symlink() and not links_outside(path.parent, [path.name])
    return Path(os.path.realpath(path)) if inside else path


def what_differs(path: Path, expected: FileDigest, *, links: bool = False, advance: Advance = unseen) -> str | None:
    """Say how a file is not what is expected; None where it is.

    Args:
        path: the file.
        expected: what it must be.
        links: whether to follow a link that leads into its folder or among the blobs of its Hub cache; others never.
        advance: takes the bytes that were hashed.
    """
    try:
        opened = within(path) if links else path
        fd = os.open(opened, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads elsewhere; put the file itself there"
        return f"cannot be read: {error.strerror}"
    with os.fdopen(fd, "rb", buffering=0):
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return "not a file"
        if info.st_size != expected.size:
            return f"{info.st_size:,} bytes, must be {expected.size:,}"
        if expected.sha256 is None:
            return None
        try:
            found = digest_of_file(fd, advance)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
    return None if found == expected.sha256 else f"its SHA-256 is {found}, must be {expected.sha256}"


def digest_of_file(fd: int, advance: Advance = unseen) -> str:
    """SHA-256 of an open file, hexadecimal; its position is neither used nor moved."""
    hasher, buffer, done = hashlib.sha256(), memoryview(bytearray(HASH_BYTES)), 0
    while got := os.preadv(fd, [buffer], done):
        hasher.update(buffer[:got])
        done += got
        advance(got)
    return hasher.hexdigest()


def check_files(
    root: Path,
    files: Mapping[str, FileDigest],
    threads: int,
    names: Iterable[str] | None = None,
    *,
    links: bool = False,
    advance: Advance = unseen,
) -> dict[str, str]:
    """Compare files of a folder with what they must be, several at a time; say how the others differ.

    ``links`` and ``advance`` are those of `what_differs`.
    """
    wrong: dict[str, str] = {}

    def one(name: str) -> None:
        if problem := what_differs(root / name, files[name], links=links, advance=advance):
            wrong[name] = problem

    chosen = sorted(files if names is None else names)
    share_out(max(1, min(threads, len(chosen))), chosen, one)
    return dict(sorted(wrong.items()))
