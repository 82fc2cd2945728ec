"""Identity of a run: a later run resumes it only if these fields agree."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8._version import __version__
from nemotron_fp8.checkpoint.strict_json import compact_json
from nemotron_fp8.documents.render import render_documents
from nemotron_fp8.errors.destination import DamagedJournalError, OtherRunError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.plan import Plan


SCHEMA = 1
"""Version of the journal's lines."""


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What must be the same for a run to carry on with the work of another.

    Attributes:
        plan: digest of every decision of the conversion (`plan_digest`).
        recipe: what was asked for.
        stamps: what shows that a file of the source is still the same, by file.
        mode: ``folder``, ``hub`` or ``in-place``.
        version: of this library; another one may decide or round differently.
    """

    plan: str
    recipe: Mapping[str, Any]
    stamps: Mapping[str, str]
    mode: str = "folder"
    version: str = __version__

    def entry(self) -> dict[str, Any]:
        """The first line of a journal."""
        return {
            "kind": "terms",
            "schema": SCHEMA,
            "version": self.version,
            "mode": self.mode,
            "plan": self.plan,
            "recipe": dict(self.recipe),
            "source": dict(self.stamps),
        }

    def check(self, entry: Mapping[str, Any], path: str, changed: Mapping[str, str] | None = None) -> None:
        """Raise OtherRunError where the first line of a journal is of another conversion.

        Args:
            entry: the first line.
            path: of the journal, for the message.
            changed: the stamps to compare, where some are known to differ by now; None for all.
        """
        for key, what in (("schema", "schema"), ("version", "version"), ("mode", "mode")):
            ours = self.entry()[key]
            if entry.get(key) != ours:
                raise OtherRunError(path, what, f"it is of {what} {entry.get(key)!r}, this is {ours!r}")
        if entry.get("recipe") != self.entry()["recipe"]:
            raise OtherRunError(path, "recipe", "it is of another recipe")
        then, now = entry.get("source"), self.stamps if changed is None else changed
        if type(then) is not dict:
            raise DamagedJournalError(path, 1)
        for name, stamp in now.items():
            if then.get(name) != stamp:
                raise OtherRunError(path, "source", f"the source's {name} has changed since")
        if changed is None and then.keys() != now.keys():
            raise OtherRunError(path, "source", "the source has other files now")
        if entry.get("plan") != self.plan:
            raise OtherRunError(path, "plan", "the source's tensors are others now")


def run_identity(plan: Plan, stamps: Mapping[str, str], mode: str) -> RunIdentity:
    """Return the identity of a conversion.

    Args:
        plan: plan of the conversion.
        stamps: fingerprint of each source file, by name.
        mode: ``folder``, ``hub`` or ``in-place``.
    """
    # A later commit of the source with the same files is the same conversion.
    plan = replace(plan, inventory=replace(plan.inventory, commit=None))
    return RunIdentity(plan_digest(plan), plan.asked, stamps, mode)


def plan_digest(plan: Plan) -> str:
    """SHA-256 over everything that the bytes of a result follow from, as far as a plan knows.

    Budget, threads, slices, paths and times are not in it: a run may carry on with another budget.
    """
    hasher = hashlib.sha256()

    def add(*values: object) -> None:
        hasher.update(compact_json(values) + b"\n")

    add("recipe", plan.asked)
    for shard_task in plan.shard_tasks:
        add("unit", shard_task.name, shard_task.metadata)
        for tensor_task in shard_task.tensor_tasks:
            add("work", *_view(tensor_task.view), tensor_task.group)
            if tensor_task.decode:
                add(
                    "decode",
                    *_view(tensor_task.decode.scale),
                    tensor_task.decode.coverage.granularity,
                    tensor_task.decode.coverage.block,
                    tensor_task.decode.dtype,
                )
        for group in shard_task.groups:
            add("group", group.id, group.fused_module, [member.name for member in group.members])
        for entry in shard_task.layout.entries:
            add("entry", entry.name, entry.dtype, entry.shape, entry.start, entry.end)
    for name, data in sorted(render_documents(plan, {}).items()):
        add("document", name, hashlib.sha256(data).hexdigest())
    for side in plan.inventory.side_files:
        add("copy", side.name, side.size)
    return hasher.hexdigest()


def _view(view: TensorView) -> tuple[object, ...]:
    """A view as plain values."""
    return view.name, view.dtype, view.shape, [tuple(extent) for extent in view.extents]
