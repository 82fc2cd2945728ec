"""The manifest of a result: its source, its recipe, and the SHA-256 of its files, which reveal any later change.

``nemotron_fp8.json`` is beside the shards. Two runs on the same source with the same recipe write the same manifest: it
contains no times, paths, host names, threads or budget.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8._version import __version__
from nemotron_fp8.checkpoint.inventory import MANIFEST, STACKS, TRANSPOSED, UPRIGHT, is_plain_name
from nemotron_fp8.checkpoint.json_text import pretty_json
from nemotron_fp8.checkpoint.local_files import FileDigest, within
from nemotron_fp8.errors import MalformedManifestError, excerpt, printable
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded
from nemotron_fp8.untrusted.regular_files import descriptor_of, read_descriptor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nemotron_fp8.checkpoint.inventory import Shard
    from nemotron_fp8.planning.plan import Plan


SCHEMA = 1
OWN_DIGEST = "manifest_sha256"
"""Key of the digest of the manifest itself, without this key."""
NO_DIGEST = "0" * 64
"""Placeholder for a digest that is not known yet, of the same length."""
MAX_SIZE = 1 << 60
"""Least size of a file, in bytes, that no file system has."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9A-Za-z.+!-]{1,40}")
_KEY = re.compile(r"[a-z_]{1,40}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest.

    Attributes:
        version: version of the library that made the result.
        recipe: fields of the recipe, or name and options of another task.
        files: size and digest of every other file of the result, by name.
        source_bytes: bytes of the source's shards; None if the manifest does not record them.
    """

    version: str
    recipe: Mapping[str, Any]
    files: Mapping[str, FileDigest]
    source_bytes: int | None = None

    @property
    def has_digests(self) -> bool:
        """True if every file has its digest."""
        return all(file.sha256 is not None for file in self.files.values())


def render_manifest(
    plan: Plan, files: Mapping[str, FileDigest], digests: bool = True, *, placeholders: bool = False
) -> bytes:
    """Return the manifest of a result.

    Args:
        plan: plan of the conversion.
        files: every other file of the result, by name.
        digests: True to record the digests of the files.
        placeholders: True to write `NO_DIGEST` instead of the digests of the source's shards, for the size alone.
    """
    listed = {
        name: {"size": file.size, **({"sha256": file.sha256} if digests else {})}
        for name, file in sorted(files.items())
    }
    value = {
        "schema": SCHEMA,
        "made_by": {"name": "nemotron_fp8", "version": __version__},
        "source": {"shards": [_shard(shard, placeholders) for shard in plan.inventory.shards], **_stacks(plan)},
        "recipe": plan.asked,
        "files": listed,
    }
    return _sealed(value)


def _sealed(value: Mapping[str, Any]) -> bytes:
    """Return a manifest with the digest of itself."""
    return pretty_json({**value, OWN_DIGEST: hashlib.sha256(pretty_json(value)).hexdigest()})


def with_file(data: bytes, name: str, file: FileDigest) -> bytes:
    """Return a manifest with another size of one of its files and, if it records digests, another digest.

    Raises:
        MalformedManifestError: the bytes are not a manifest, or it does not list the file.
    """
    recorded = parse_manifest(data).files.get(name)
    if recorded is None:
        raise _malformed(f"files: {name} is missing")
    value = strict_json.load_object(data, MANIFEST, MalformedManifestError)
    value.pop(OWN_DIGEST)
    value["files"][name] = {"size": file.size, **({"sha256": file.sha256} if recorded.sha256 is not None else {})}
    return _sealed(value)


def _stacks(plan: Plan) -> dict[str, Any]:
    """Return the stacks of experts that the plan splits, for `dequantize`; empty without stacks."""
    stacks = [] if plan.task else [stack for stack in plan.inventory.stacks if not stack.packed]
    if not stacks:
        return {}
    return {STACKS: {stack.name: TRANSPOSED if stack.transposed else UPRIGHT for stack in stacks}}


def _shard(shard: Shard, placeholder: bool) -> dict[str, Any]:
    """Return name and size of a source shard, and a digest of its metadata and of the views of its tensors."""
    if placeholder:
        return {"name": shard.name, "size": shard.size, "tensors_sha256": NO_DIGEST}
    hasher = hashlib.sha256(json.dumps(shard.metadata).encode("ascii"))
    for view in shard.views:
        extents = [
            (e.offset, e.stride, e.runs, e.length, e.row, e.column, e.item, e.step)
            for stored in view.stored
            for e in stored.extents
        ]
        hasher.update(json.dumps([view.name, view.dtype, view.shape, extents]).encode("ascii"))
    return {"name": shard.name, "size": shard.size, "tensors_sha256": hasher.hexdigest()}


def parse_manifest(data: bytes) -> Manifest:
    """Parse a manifest; every name in it is a plain file name.

    Raises:
        MalformedManifestError: the bytes are not a manifest, or were changed.
    """
    value = strict_json.load_object(data, MANIFEST, MalformedManifestError)
    with guarded(_malformed):
        own = value.pop(OWN_DIGEST, None)
        if own != hashlib.sha256(pretty_json(value)).hexdigest() or data != pretty_json({**value, OWN_DIGEST: own}):
            raise _malformed(f"changed after the conversion: {OWN_DIGEST} does not match the other keys")
        return _checked(value)


def _malformed(problem: str) -> MalformedManifestError:
    return MalformedManifestError(MANIFEST, problem)


def _checked(value: Mapping[str, Any]) -> Manifest:
    """Check the type of every value of a manifest."""
    if type(value.get("schema")) is not int or value["schema"] != SCHEMA:
        raise _malformed(f"schema {excerpt(value.get('schema'))}, but this version reads schema {SCHEMA}")
    made_by, recipe, files = value.get("made_by"), value.get("recipe"), value.get("files")
    if type(made_by) is not dict or type(recipe) is not dict or type(files) is not dict:
        raise _malformed("made_by, recipe or files is missing, or is not an object")
    version = made_by.get("version")
    if type(version) is not str or not _VERSION.fullmatch(version):
        raise _malformed(f"made_by: the version is {excerpt(version)}, not a version")
    for key, setting in recipe.items():
        if not _KEY.fullmatch(key) or not _is_setting(setting):
            raise _malformed(f"recipe: {excerpt(key)} is {excerpt(setting)}, not a text, a flag or a list of texts")
    found: dict[str, FileDigest] = {}
    for name, entry in files.items():
        if not is_plain_name(name) or type(entry) is not dict:
            raise _malformed(f"files: {printable(name)} is not a plain file name, or its entry is not an object")
        size, sha256 = entry.get("size"), entry.get("sha256")
        if type(size) is not int or not 0 <= size < MAX_SIZE:
            raise _malformed(f"files: the size of {name} is {excerpt(size)}, not a number of bytes")
        if sha256 is not None and (type(sha256) is not str or not _SHA256.fullmatch(sha256)):
            raise _malformed(f"files: the sha256 of {name} is not 64 hexadecimal digits")
        found[name] = FileDigest(size, sha256)
    return Manifest(version, recipe, found, _source_bytes(value.get("source")))


def _is_setting(value: object) -> bool:
    """Return True if a value may be a setting of a recipe."""
    texts = value if type(value) is list else [value]
    return type(value) is bool or all(type(text) is str for text in texts)


def _source_bytes(source: object) -> int | None:
    """Return the bytes of all source shards; None if a size is missing."""
    shards = source.get("shards") if type(source) is dict else None
    if type(shards) is not list:
        return None
    sizes = [shard.get("size") for shard in shards if type(shard) is dict]
    known = [size for size in sizes if type(size) is int and 0 <= size < MAX_SIZE]
    return sum(known) if len(known) == len(shards) else None


def read_manifest(root: Path) -> Manifest | None:
    """Read the manifest of a folder; return None if the folder has none.

    Raises:
        MalformedManifestError: the file is not a manifest, or cannot be read.
    """
    data = manifest_bytes(root)
    return None if data is None else parse_manifest(data)


def shards_digest(root: Path) -> str:
    """Return a digest of the shards that the manifest of a folder records; empty without their digests.

    The model card may change, and the result is the same.
    """
    try:
        manifest = read_manifest(root)
    except MalformedManifestError:
        return ""
    shards = {n: file.sha256 for n, file in (manifest.files if manifest else {}).items() if n.endswith(".safetensors")}
    if not shards or None in shards.values():
        return ""
    return hashlib.sha256(json.dumps(sorted(shards.items())).encode("ascii", "replace")).hexdigest()


def has_digests(root: Path) -> bool:
    """Return True if the manifest of a folder has the digest of every file."""
    try:
        manifest = read_manifest(root)
    except MalformedManifestError:
        return False
    return manifest is not None and manifest.has_digests


def manifest_bytes(root: Path) -> bytes | None:
    """Return the bytes of a folder's manifest; None if the folder has none.

    Raises:
        MalformedManifestError: the file cannot be read.
    """
    try:
        fd = descriptor_of(within(root / MANIFEST), follow=False)
    except FileNotFoundError:
        if (root / MANIFEST).is_symlink():
            raise _malformed("a link to a file that is missing") from None
        return None
    except OSError as error:
        raise _malformed(error.strerror or str(error)) from error
    try:
        return read_descriptor(fd, strict_json.MAX_BYTES + 1)
    except OSError as error:
        raise _malformed(error.strerror or str(error)) from error
    finally:
        os.close(fd)
