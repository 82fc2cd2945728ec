"""Identity of a run: a later run resumes it only if these fields agree."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nemotron_fp8._version import __version__
from nemotron_fp8.checkpoint.json_text import compact_json
from nemotron_fp8.destinations.differences import recipe_difference
from nemotron_fp8.destinations.journal import Terms
from nemotron_fp8.documents.render import render_documents
from nemotron_fp8.errors import excerpt
from nemotron_fp8.errors.destination import OtherRunError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.tensor_view import Encoding, TensorView
    from nemotron_fp8.planning.plan import Plan


SCHEMA = 2
"""Version of the journal's lines."""


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Identity of a conversion: a run resumes another run only if all fields agree.

    Attributes:
        plan: digest of every decision of the conversion (`plan_digest`).
        recipe: recipe that the caller passed.
        stamps: fingerprint of each source file, by name.
        mode: ``folder``, ``hub``, ``store`` or ``in-place``.
        version: version of this library; another version may decide or round differently.
    """

    plan: str
    recipe: Mapping[str, Any]
    stamps: Mapping[str, str]
    mode: str = "folder"
    version: str = __version__

    def entry(self) -> dict[str, Any]:
        """Return the first entry of a journal."""
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
        """Raise OtherRunError if the first entry of a journal belongs to another conversion.

        Args:
            entry: the first entry.
            path: path of the journal, for the message.
            changed: stamps to compare, if others are known to differ; None for all stamps.
        """
        terms = Terms.of(entry, path)
        for what, theirs, ours in (
            ("schema", terms.schema, SCHEMA),
            ("version", terms.version, self.version),
            ("mode", terms.mode, self.mode),
        ):
            if theirs != ours:
                raise OtherRunError(path, what, f"its {what} is {excerpt(theirs)}, not {ours!r}")
        if terms.recipe != dict(self.recipe):
            raise OtherRunError(path, "recipe", recipe_difference(terms.recipe, self.recipe) or "its recipe differs")
        then, now = terms.source, self.stamps if changed is None else changed
        for name, stamp in now.items():
            if then.get(name) != stamp:
                raise OtherRunError(path, "source", f"{name} of the source has changed since then")
        if changed is None and then.keys() != now.keys():
            raise OtherRunError(path, "source", "files were added to the source or removed from it since then")
        if terms.plan != self.plan:
            raise OtherRunError(path, "plan", "the tensors of the source have changed since then")


def run_identity(plan: Plan, stamps: Mapping[str, str], mode: str) -> RunIdentity:
    """Return the identity of a conversion.

    Args:
        plan: plan of the conversion.
        stamps: fingerprint of each source file, by name.
        mode: ``folder``, ``hub``, ``store`` or ``in-place``.
    """
    # A later commit of the source with the same files is the same conversion.
    plan = replace(plan, inventory=replace(plan.inventory, commit=None))
    asked = plan.asked if plan.amaxes is None else {**plan.asked, "amaxes": plan.amaxes.sha256}
    return RunIdentity(plan_digest(plan), asked, stamps, mode)


def plan_digest(plan: Plan) -> str:
    """Return the SHA-256 digest of every decision of a plan that affects the bytes of the result.

    Budget, threads, slices, paths and times are left out: a run may resume with another budget.
    """
    hasher = hashlib.sha256()

    def add(*values: object) -> None:
        hasher.update(compact_json(values) + b"\n")

    add("recipe", plan.asked)
    for shard_task in plan.shard_tasks:
        add("unit", shard_task.name, shard_task.metadata)
        for tensor_task in shard_task.tensor_tasks:
            add("work", *_view(tensor_task.view), tensor_task.group)
            if tensor_task.view.encoding:
                add("decode", *_encoding(tensor_task.view.encoding), tensor_task.decode, tensor_task.carry)
        for group in shard_task.groups:
            add("group", group.id, group.fused_module, [member.name for member in group.members])
        for entry in shard_task.layout.entries:
            add("entry", entry.name, entry.dtype, entry.shape, entry.start, entry.end)
    for name, data in sorted(render_documents(plan, {}).items()):
        add("document", name, hashlib.sha256(data).hexdigest())
    for side in plan.inventory.side_files:
        add("copy", side.name, side.size)
    return hasher.hexdigest()


def _encoding(encoding: Encoding) -> tuple[object, ...]:
    """Return an encoding as builtin values."""
    return encoding.elements, encoding.cell, _view(encoding.codes), _view(encoding.scales)


def _view(view: TensorView) -> tuple[object, ...]:
    """Return a view as builtin values."""
    return view.name, view.dtype, view.shape, [tuple(extent) for extent in view.extents]
