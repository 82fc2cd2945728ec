"""Offline Xet store: finds objects by SHA-256 and rebuilds their bytes.

``hf_xet`` writes xorbs and shards below ``local:///<folder>`` itself. Of a shard only the file section is
read here (layout: ``mdb_shard`` of huggingface/xet-core): a 48-byte header; then per file a 48-byte head with
its hash, flags and number of segments; 48 bytes a segment, of which the second 4-byte word after the hash is
the unpacked length; as many verification entries where bit 31 of the flags is set; the SHA-256 in one more
entry where bit 30 is.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENTRY = 48
MAGIC = b"HFRepoMetaData\0"
BOOKEND = b"\xff" * 32
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30


@dataclass(frozen=True)
class XetFile:
    """A file that the store can rebuild."""

    hash: str
    sha256: str
    size: int


def read_shard(content: bytes) -> Iterator[XetFile]:
    """Yield the files of a shard that carry their SHA-256."""
    if not content.startswith(MAGIC):
        raise ValueError("not a Xet shard")
    position = ENTRY
    while (digest := content[position : position + 32]) != BOOKEND:
        flags, segments = struct.unpack_from("<II", content, position + 32)
        position += ENTRY
        size = sum(struct.unpack_from("<I", content, position + i * ENTRY + 36)[0] for i in range(segments))
        position += segments * ENTRY * (2 if flags & WITH_VERIFICATION else 1)
        if flags & WITH_METADATA:
            yield XetFile(hex_of(digest), hex_of(content[position : position + 32]), size)
            position += ENTRY


def hex_of(digest: bytes) -> str:
    """Return a hash in Xet's notation: four little-endian 64-bit words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))


class XetStore:
    """The ``local:///`` store in ``folder``, searched by SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"local://{self.folder}"

    def find(self, sha256: str) -> XetFile | None:
        shards = self.folder / "xet" / "xorbs" / "shards"
        for path in sorted(shards.glob("*.mdb")):
            for file in read_shard(path.read_bytes()):
                if file.sha256 == sha256:
                    return file
        return None

    def rebuild(self, file: XetFile, target: Path) -> None:
        """Write the file's bytes to ``target``.

        Works on a linked copy of the store, because the client under test has its index open and locked.
        """
        import hf_xet  # type: ignore[import-untyped]  # it ships no types

        copy = target.with_name(f"{target.name}.cas.{uuid.uuid4().hex}")
        for source in sorted((self.folder / "xet" / "xorbs").rglob("*")):
            place = copy / source.relative_to(self.folder)
            if source.is_dir():
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".redb":
                shutil.copyfile(source, place)
            else:
                os.link(source, place)
        try:
            session = hf_xet.XetSession()
            with session.new_file_download_group(
                endpoint=f"local://{copy}",
                token="local",
                token_expiry_unix_secs=int(time.time()) + 3600,
                token_refresh_url=None,
                token_refresh_headers={},
                custom_headers={},
                progress_callback=None,
            ) as group:
                group.start_download_file(hf_xet.XetFileInfo(file.hash, file.size), str(target))
        finally:
            shutil.rmtree(copy, ignore_errors=True)
