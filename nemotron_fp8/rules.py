"""Which tensors become FP8 and which stay, and what an engine fuses: decided from names, dtypes and shapes.

Source of the names: the weight loaders of vLLM's model files (``packed_modules_mapping``, ``stacked_params_mapping``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.dtypes import QUANTISABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nemotron_fp8.recipe import Recipe
    from nemotron_fp8.view import TensorView

DEFAULT = re.compile(r"_proj\.weight$")
"""What the original script quantised: every linear projection of a decoder is called so."""

EXCEPTIONS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(^|\.)mtp\."), "multi-token-prediction layers stay in their own precision"),
    (re.compile(r"(^|\.)fc[12]_latent_proj\.weight$"), "latent projections stay in their own precision"),
)
"""Names that end in ``_proj.weight`` and must stay all the same."""

NEVER: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(^|\.)lm_head\.weight$"), "engines have no FP8 lm_head in this layout"),
    (
        re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)\.weight$"),
        "an embedding is looked up, not multiplied",
    ),
)
"""2-D weights that no engine loads as FP8, whatever was selected."""

FUSED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(^|\.)experts\.\d+\..+\.weight$"), "experts"),
    (re.compile(r"(^|\.)[qkv]_proj\.weight$"), "qkv_proj"),
    (re.compile(r"(^|\.)(gate|up)_proj\.weight$"), "gate_up_proj"),
    (re.compile(r"(^|\.)w[13]\.weight$"), "w13"),
    (re.compile(r"(^|\.)(q_a_proj|kv_a_proj_with_mqa)\.weight$"), "fused_qkv_a_proj"),
)
"""What engines load as one module, by the end of the name; the module stands where its members stand."""


class Decision(NamedTuple):
    """What becomes of a tensor, and why."""

    quantise: bool
    reason: str


def bundle_of(name: str) -> str:
    """Return the module that an engine fuses the weight ``name`` into; its own name where it stands alone."""
    for pattern, module in FUSED:
        if found := pattern.search(name):
            return name[: found.start()] + found.group(1) + module
    return name


def is_embedding(name: str) -> bool:
    """Whether a 2-D weight of this name is a table to look up, not a matrix to multiply with."""
    return bool(NEVER[1][0].search(name))


def decide(views: Sequence[TensorView], recipe: Recipe) -> tuple[dict[str, Decision], tuple[str, ...]]:
    """Return the decision for every tensor, by name, and notices for the person who asked.

    What one rule leaves alone takes the rest of its bundle with it: engines refuse a fused module of which a part
    is FP8.
    """
    select = [re.compile(pattern) for pattern in recipe.select]
    ignore = [re.compile(pattern) for pattern in recipe.ignore]
    decisions = {view.name: _alone(view, select, ignore) for view in views}
    notices: list[str] = []
    for bundle, members in _bundles(views).items():
        chosen = [name for name in members if decisions[name].quantise]
        left = [name for name in members if not decisions[name].quantise]
        if not chosen or not left:
            continue
        why = f"fused with {left[0]}, which stays: {decisions[left[0]].reason}"
        for name in chosen:
            decisions[name] = Decision(False, why)
        notices.append(
            f"{bundle}: engines fuse {_listed(members)}; {_listed(left)} stays"
            f" ({decisions[left[0]].reason}), so {_listed(chosen)} stays with it"
        )
    return decisions, tuple(notices)


def _alone(view: TensorView, select: list[re.Pattern[str]], ignore: list[re.Pattern[str]]) -> Decision:
    """Decide one tensor by its own name, dtype and shape."""
    if select:
        pattern = next((p for p in select if p.search(view.name)), None)
        if pattern is None:
            return Decision(False, "matches no --select pattern")
        why = f"matches --select {pattern.pattern}"
    elif DEFAULT.search(view.name):
        why = "a linear projection"
        for exception, reason in EXCEPTIONS:
            if exception.search(view.name):
                return Decision(False, reason)
    else:
        return Decision(False, "not a linear projection")
    for pattern in ignore:
        if pattern.search(view.name):
            return Decision(False, f"matches --ignore {pattern.pattern}")
    for pattern, reason in NEVER:
        if pattern.search(view.name):
            return Decision(False, reason)
    if not view.name.endswith(".weight"):
        return Decision(False, "not a weight: its name does not end in .weight")
    if len(view.shape) != 2:
        return Decision(False, f"not a matrix: {len(view.shape)} dimensions")
    if view.dtype not in QUANTISABLE:
        return Decision(False, f"{view.dtype} is not one of {', '.join(sorted(QUANTISABLE))}")
    return Decision(True, why)


def _bundles(views: Iterable[TensorView]) -> dict[str, list[str]]:
    """Matrices by the module that an engine fuses them into; only modules of two or more."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for view in views:
        if len(view.shape) == 2 and view.name.endswith(".weight"):
            found[bundle_of(view.name)].append(view.name)
    return {bundle: names for bundle, names in found.items() if len(names) > 1}


def _listed(names: list[str], limit: int = 4) -> str:
    """A few names, and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
