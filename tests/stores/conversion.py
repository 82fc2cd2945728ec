"""Checkpoints in a bucket, and conversions of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.hub.conversion import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from tests.store_server.server import StoreServer

SOURCE = "s3://bucket/nv/source"


def seed(store: StoreServer, folder: Path, prefix: str = "nv/source") -> None:
    """Copy the files of a folder, and of the folders in it, into the bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put("bucket", f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


__all__ = ["SOURCE", "checkpoint", "contents", "seed"]
