"""Render the small files of a result from its plan and receipts."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.checkpoint.local_files import FileDigest
from nemotron_fp8.documents.manifest import NO_DIGEST, render_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import Receipt


def with_manifest(
    plan: Plan,
    receipts: Mapping[str, Receipt],
    copies: Mapping[str, Callable[[], Iterator[bytes]]],
    digests: bool,
) -> dict[str, bytes]:
    """The small files that are written anew, with the manifest over all files."""
    documents = plan.documents(receipts)
    files = digests_of(receipts, documents, copies, digests)
    return {**documents, MANIFEST: render_manifest(plan, files, digests)}


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
