"""Preview of a destination for ``quantize --dry-run``: read, and nothing locked or written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import JOURNAL
from nemotron_fp8.checkpoint.inventory import MANIFEST
from nemotron_fp8.destinations.differences import contents_of, recipe_difference
from nemotron_fp8.destinations.folder import is_occupied, partial_path
from nemotron_fp8.destinations.journal import read_journal
from nemotron_fp8.destinations.run_identity import run_identity
from nemotron_fp8.documents.manifest import read_manifest
from nemotron_fp8.documents.render import planned_sizes
from nemotron_fp8.errors import DestinationExistsError, HubError, MalformedManifestError
from nemotron_fp8.errors.destination import OtherRunError
from nemotron_fp8.errors.stores import StoreError
from nemotron_fp8.status import status_of
from nemotron_fp8.stores.address import local_path

if TYPE_CHECKING:
    from nemotron_fp8.destinations.run_identity import RunIdentity
    from nemotron_fp8.destinations.status import Status
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.planning.plan import Plan
    from nemotron_fp8.sources.base import Source

UNFINISHED = ("running", "stopped", "unknown")
"""States of a conversion that is not complete."""


def findings_at(
    destination: str, source: Source, plan: Plan, hub: HubOptions, *, overwrite: bool, restart: bool
) -> list[str]:
    """Return what a conversion would find at its destination, in sentences; empty if nothing is there.

    Args:
        destination: the destination as it was named.
        source: source of the conversion.
        plan: plan of the conversion.
        hub: options for the Hub.
        overwrite, restart: options of the conversion.

    Raises:
        DestinationExistsError: a folder holds other files, which the conversion would refuse.
        DamagedJournalError, MalformedManifestError: the records of another conversion are damaged.
    """
    try:
        found = status_of(destination, hub)
    except (HubError, StoreError) as error:
        return [f"what is at {destination} cannot be read: {error}"]
    identity = run_identity(plan, source.stamps, found.kind or "folder")
    if found.state in UNFINISHED:
        return [f"{destination}: {_unfinished(found, destination, identity, restart)}"]
    if found.kind in ("hub", "store"):
        return [f"{destination}: {_published(found, identity, overwrite)}"] if found.state == "complete" else []
    path = Path(os.path.realpath(local_path(destination) or destination))
    if not is_occupied(path):
        return []
    if _may_be_equal(path, plan, identity):
        return [
            f"{destination} already holds a result of the same recipe with files of the same sizes: a run compares"
            " every byte, and changes nothing if all are equal"
        ]
    if not overwrite:
        raise DestinationExistsError(str(path), contents_of(path, identity.recipe))
    return [f"{destination} {contents_of(path, identity.recipe)}; a run replaces them (--overwrite)"]


def _may_be_equal(path: Path, plan: Plan, identity: RunIdentity) -> bool:
    """Return True if a folder is a result of the same version and recipe, whose files have the planned sizes."""
    try:
        manifest = read_manifest(path)
    except MalformedManifestError:
        return False
    if manifest is None or manifest.version != identity.version or dict(manifest.recipe) != dict(plan.asked):
        return False
    # Tensors that turn out not finite may change the sizes of shards, and an evaluation that of the model card.
    return manifest.files.keys() | {MANIFEST} == planned_sizes(plan).keys()


def _unfinished(found: Status, destination: str, identity: RunIdentity, restart: bool) -> str:
    """Return what a run would do with an unfinished one."""
    if found.state == "running" and found.process is not None:
        return f"process {found.process.pid} on {found.process.host} writes it now; a run would be refused"
    done = f"{found.shards_done:,}" + ("" if found.shards_total is None else f" of {found.shards_total:,}") + " shards"
    if restart:
        return f"an unfinished conversion with {done} is here; a run discards it (--restart)"
    if problem := _other_run(found, destination, identity):
        return f"an unfinished conversion with {done} is here, but {problem}; a run would be refused without --restart"
    return f"an unfinished conversion is here; a run resumes it, with {done} finished"


def _other_run(found: Status, destination: str, identity: RunIdentity) -> str:
    """Return why an unfinished run is another conversion; empty if a run would resume it."""
    if found.kind == "folder":
        path = Path(os.path.realpath(local_path(destination) or destination))
        journal = partial_path(path) / JOURNAL
        entries = read_journal(journal)
        try:
            if entries:
                identity.check(entries[0], str(journal))
        except OtherRunError as error:
            return error.problem
        return ""
    if found.version and found.version != identity.version:
        return f"its version is {found.version}, not {identity.version}"
    if found.recipe and (difference := recipe_difference(found.recipe, identity.recipe)):
        return difference
    return "its source differs" if found.plan and found.plan != identity.plan else ""


def _published(found: Status, identity: RunIdentity, overwrite: bool) -> str:
    """Return what a run would do with a complete result on the Hub or in a store."""
    difference = recipe_difference(found.recipe, identity.recipe) if found.recipe else ""
    if not difference:
        return "a result of the same recipe is here; a run compares it, and changes nothing if it is equal"
    if overwrite and found.kind == "hub":
        return f"another result is here: {difference}; a run replaces it (--overwrite)"
    return f"another result is here: {difference}; a run would be refused"
