"""Render the small files of a result from its plan and receipts."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import AMAXES, CARD, CONFIG, INDEX, MANIFEST, STATS
from nemotron_fp8.checkpoint.local_files import FileDigest
from nemotron_fp8.documents.config_json import render_beside, render_config, render_index
from nemotron_fp8.documents.manifest import NO_DIGEST, render_manifest
from nemotron_fp8.documents.model_card import render_card
from nemotron_fp8.documents.stats_json import figures_of, render_figures
from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.receipt import TensorStats
from nemotron_fp8.planning.selection import linear_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.planning.receipt import ShardReceipt


def render_documents(plan: Plan, receipts: Mapping[str, ShardReceipt]) -> dict[str, bytes]:
    """Render the small files of a result, except the manifest.

    Args:
        plan: plan of the conversion.
        receipts: receipts of the shards, by name; a shard without a receipt counts as planned.

    Returns:
        The content of each file, by name.
    """
    unquantized = frozenset().union(*(receipt.unquantized for receipt in receipts.values()))
    headers = {shard_task.name: shard_task.header_without(unquantized) for shard_task in plan.shard_tasks}
    files = dict(plan.inventory.made)
    if plan.inventory.index_metadata is not None:
        files[INDEX] = render_index(headers, plan.inventory.index_metadata)
    if plan.inventory.config is not None:
        quantized = plan.quantized(unquantized)
        family = family_of(plan.inventory.config)
        modules = linear_modules(plan.inventory.views, quantized, family)
        recipe = plan.recipe
        quantization = recipe.layout.config(recipe.scheme, modules, recipe.choices) if quantized else None
        files[CONFIG] = render_config(plan.inventory.config, quantization)
        files |= render_beside(recipe.layout, quantization or {})
    if plan.recipe.stats and not plan.task:
        figures = figures_of(receipts)
        files[STATS] = render_figures(figures.tensors or _placeholder_stats(plan), figures.nonfinite)
    if plan.amaxes is not None:
        files[AMAXES] = plan.amaxes.render()
    files[CARD] = render_card(plan, receipts, sum(header.data_size for header in headers.values()))
    return files


def _placeholder_stats(plan: Plan) -> list[TensorStats]:
    """Return placeholder statistics, whose rendered size is about the final one, for a plan."""
    quantized = plan.quantized()
    return [TensorStats(t.name, 1 / 3 + 32, 1e-3 / 3, 0, 0) for t in plan.tensors if t.name in quantized]


def with_manifest(
    plan: Plan,
    receipts: Mapping[str, ShardReceipt],
    copies: Mapping[str, Callable[[], Iterator[bytes]]],
    digests: bool,
) -> dict[str, bytes]:
    """Return the rendered files, with the manifest of all files, by name.

    Args:
        plan: plan of the conversion.
        receipts: receipts of the shards, by name.
        copies: for each file copied from the source, a function that reads its bytes in pieces.
        digests: True to record the SHA-256 of every file.
    """
    documents = render_documents(plan, receipts)
    files = digests_of(receipts, documents, copies, digests)
    return {**documents, MANIFEST: render_manifest(plan, files, digests)}


def planned_sizes(plan: Plan) -> dict[str, int]:
    """Return the planned bytes of every file of the result, including the manifest."""
    sizes = {shard_task.name: shard_task.layout.file_size for shard_task in plan.shard_tasks}
    sizes |= {side.name: side.size for side in plan.inventory.side_files}
    sizes |= {name: len(data) for name, data in render_documents(plan, {}).items()}
    files = {name: FileDigest(size, NO_DIGEST) for name, size in sizes.items()}
    return {**sizes, MANIFEST: len(render_manifest(plan, files, placeholders=True))}


def digests_of(
    receipts: Mapping[str, ShardReceipt],
    documents: Mapping[str, bytes],
    copies: Mapping[str, Callable[[], Iterator[bytes]]],
    digests: bool,
) -> dict[str, FileDigest]:
    """Return size and digest of every file of a result; files copied from the source are read for their digests."""
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
