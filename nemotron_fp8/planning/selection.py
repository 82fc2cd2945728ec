"""Which tensors become FP8 and which stay, and what an engine fuses: decided from names, dtypes and shapes.

Source of the names: the weight loaders of vLLM's model files (``packed_modules_mapping``, ``stacked_params_mapping``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import listed
from nemotron_fp8.checkpoint.dtypes import QUANTIZABLE
from nemotron_fp8.planning.families import EVERYWHERE
from nemotron_fp8.planning.layouts import BLOCK
from nemotron_fp8.planning.stacked_experts import experts_of, is_stack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.recipe import Recipe


DEFAULT = "_proj.weight"
"""What the original script quantized: every linear projection of a decoder is called so."""

EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)\.weight$")
LM_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
ROUTED = re.compile(r"(^|\.)experts\.\d+\.")
"""A projection of one of many routed experts."""


MERGED: dict[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w1", "w3"), "w13"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
}
"""What engines merge into one matrix, and one scale: module names, and what the whole is called in their place."""


class Decision(NamedTuple):
    """What becomes of a tensor, and why."""

    quantize: bool
    reason: str


def fused_module_of(name: str) -> str:
    """Return the module whose weights are FP8 together or not at all; the weight's own name where it is alone.

    Engines quantize all routed experts of a layer or none, and a merged matrix as a whole.
    """
    if ".experts." in name or name.startswith("experts."):
        found = ROUTED.search(name)
        if found and name.endswith(".weight"):
            return name[: found.start()] + found.group(1) + "experts"
    return fused_matrix_of(name)


def fused_matrix_of(name: str) -> str:
    """Return the matrix that an engine merges the weight into; the weight's own name where it is alone."""
    stem, _, last = name.rpartition(".")
    above, dot, module = stem.rpartition(".")
    whole = MERGED.get(module) if last == "weight" else None
    return name if whole is None else above + dot + whole


def is_embedding(name: str) -> bool:
    """Whether a 2-D weight of this name is a table to look up, not a matrix to multiply with."""
    return ("embed" in name or "wte" in name or "wpe" in name) and bool(EMBEDDING.search(name))


def decide(
    views: Sequence[TensorView], recipe: Recipe, family: Family | None = None
) -> tuple[dict[str, Decision], tuple[str, ...]]:
    """Return the decision for every tensor, by name, and notices for the person who asked.

    What one rule leaves alone takes the rest of its bundle with it: engines refuse a fused module of which a part
    is FP8.
    """
    judge = _Selector(recipe, family)
    decisions = {view.name: judge(view) for view in views}
    notices: list[str] = []
    for fused_module, members in _bundles(views).items():
        chosen = [name for name in members if decisions[name].quantize]
        left = [name for name in members if not decisions[name].quantize]
        if not chosen or not left:
            continue
        why = decisions[left[0]].reason
        for name in chosen:
            decisions[name] = Decision(False, f"fused with {left[0]}, which stays: {why}")
        notices.append(
            f"{fused_module}: engines load {listed(members)} as one; {listed(left)} stays ({why}),"
            f" so {listed(chosen)} stays with it"
        )
    return decisions, tuple(notices)


class _Selector:
    """Decides one tensor by its own name, dtype and shape."""

    def __init__(self, recipe: Recipe, family: Family | None) -> None:
        self._select = [re.compile(pattern) for pattern in recipe.select]
        self._ignore = [re.compile(pattern) for pattern in recipe.ignore]
        self._keep = (*EVERYWHERE, *(family.keep if family else ()))
        self._any = re.compile("|".join(f"(?:{pattern.pattern})" for pattern, _ in self._keep))
        self._block = recipe.granularity == "block"

    def __call__(self, view: TensorView) -> Decision:
        asked = self._asked_for(view.name)
        if not asked.quantize:
            return asked
        if "lm_head" in view.name and LM_HEAD.search(view.name):
            return Decision(False, "engines load lm_head unquantized")
        if is_embedding(view.name):
            return Decision(False, "an embedding is looked up, not multiplied")
        if not view.name.endswith(".weight"):
            return Decision(False, "not a weight: its name does not end in .weight")
        if len(view.shape) != 2:
            return Decision(False, f"not a matrix: {len(view.shape)} dimensions")
        if view.dtype not in QUANTIZABLE:
            return Decision(False, f"{view.dtype} is not one of {', '.join(sorted(QUANTIZABLE))}")
        if self._block and any(size % step for size, step in zip(view.shape, BLOCK, strict=True)):
            return Decision(False, f"{view.shape[0]}x{view.shape[1]} does not divide into blocks of 128x128")
        return asked

    def _asked_for(self, name: str) -> Decision:
        if self._select:
            pattern = next((p for p in self._select if p.search(name)), None)
            if pattern is None:
                return Decision(False, "matches no --select pattern")
            why = f"matches --select {pattern.pattern}"
        elif not name.endswith(DEFAULT):
            return Decision(False, "not a linear projection")
        else:
            why = "a linear projection"
            if self._any.search(name):
                return Decision(False, next(reason for pattern, reason in self._keep if pattern.search(name)))
        for pattern in self._ignore:
            if pattern.search(name):
                return Decision(False, f"matches --ignore {pattern.pattern}")
        return Decision(True, why)


def _bundles(views: Iterable[TensorView]) -> dict[str, list[str]]:
    """Matrices by the module that an engine fuses them into; only modules of two or more."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for view in views:
        if len(view.shape) == 2 and view.name.endswith(".weight"):
            found[fused_module_of(view.name)].append(view.name)
    return {fused_module: names for fused_module, names in found.items() if len(names) > 1}


def unquantized_modules(views: Iterable[TensorView], quantized: frozenset[str], recipe: Recipe) -> list[str]:
    """Return exact names of the modules that an engine treats as linear and that stay, in the source's order.

    Those are the 2-D ``.weight`` tensors outside ``quantized`` that are no embedding, and the ``experts`` module of
    each stack of experts: vLLM and transformers look for the module, not for the stacks in it. Where transformers
    reads the list, lm_head is in it even if it has no tensor of its own (tied to the embedding): the list replaces a
    default that has it.
    """
    modules = (_module(view) for view in views if view.name not in quantized)
    unquantized = list(dict.fromkeys(module for module in modules if module is not None))
    tied = not any(name == "lm_head" or name.endswith(".lm_head") for name in unquantized)
    plain = recipe.format == "fp8" and recipe.granularity == "tensor"
    return unquantized if plain or not tied else [*unquantized, "lm_head"]


def _module(view: TensorView) -> str | None:
    """The module that multiplies with this tensor; None for a tensor of any other use."""
    if is_stack(view):
        return experts_of(view.name)
    if len(view.shape) == 2 and view.name.endswith(".weight") and not is_embedding(view.name):
        return view.name.removesuffix(".weight")
    return None
