"""Selection of the tensors to quantize, from names, dtypes, shapes and the model family."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import listed
from nemotron_fp8.checkpoint.dtypes import QUANTIZABLE
from nemotron_fp8.planning.families import DEFAULT_FAMILY
from nemotron_fp8.planning.stacked_experts import experts_of, is_stack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.recipe import Recipe


class Decision(NamedTuple):
    """Decision about a tensor: quantized or not, with the reason."""

    quantize: bool
    reason: str


def decide(
    views: Sequence[TensorView], recipe: Recipe, family: Family = DEFAULT_FAMILY
) -> tuple[dict[str, Decision], tuple[str, ...]]:
    """Decide which tensors are quantized.

    If a rule leaves one tensor of a fused module unquantized, the whole module is left unquantized: engines reject a
    fused module of which only a part is FP8.

    Args:
        views: all tensors of a source.
        recipe: settings of the quantization.
        family: model family of the source.

    Returns:
        The decision for every tensor, by name, and notices for the user.
    """
    judge = _Selector(recipe, family)
    decisions = {view.name: judge(view) for view in views}
    notices: list[str] = []
    for fused_module, members in _fused_modules(views, family).items():
        chosen = [name for name in members if decisions[name].quantize]
        left = [name for name in members if not decisions[name].quantize]
        if not chosen or not left:
            continue
        why = decisions[left[0]].reason
        for name in chosen:
            decisions[name] = Decision(False, f"fused with {left[0]}, which is unquantized: {why}")
        notices.append(
            f"{fused_module}: engines fuse {listed(members)}; unquantized: {listed(left)} ({why}); therefore also"
            f" unquantized: {listed(chosen)}"
        )
    return decisions, tuple(notices)


class _Selector:
    """Decides about one tensor, from its name, dtype and shape."""

    def __init__(self, recipe: Recipe, family: Family) -> None:
        self._select = [re.compile(pattern) for pattern in recipe.select]
        self._ignore = [re.compile(pattern) for pattern in recipe.ignore]
        self._linears, self._unquantized = family.linears, family.unquantized
        self._never = (*family.heads, *family.embeddings)
        self._coverage = recipe.weight_format.numbers.coverage
        self._linear, self._other = Decision(True, "a linear projection"), Decision(False, "not a linear projection")

    def __call__(self, view: TensorView) -> Decision:
        asked = self._asked_for(view.name)
        if not asked.quantize:
            return asked
        for rule in self._never:
            if rule.matches(view.name):
                return Decision(False, rule.reason)
        if not view.name.endswith(".weight"):
            return Decision(False, "not a weight: its name does not end in .weight")
        if len(view.shape) != 2:
            return Decision(False, f"not a matrix: {len(view.shape)} dimensions")
        if view.dtype not in QUANTIZABLE:
            return Decision(False, f"{view.dtype} is not one of {', '.join(sorted(QUANTIZABLE))}")
        if not self._coverage.divides(view.shape):
            size, block = ("x".join(map(str, sides)) for sides in (view.shape, self._coverage.block))
            return Decision(False, f"{size} does not divide into blocks of {block}")
        return asked

    def _asked_for(self, name: str) -> Decision:
        chosen = self._linear
        if self._select:
            selected = next((p for p in self._select if p.search(name)), None)
            if selected is None:
                return Decision(False, "matches no --select pattern")
            chosen = Decision(True, f"matches --select {selected.pattern}")
        elif not name.endswith(self._linears):
            return self._other
        else:
            for rule in self._unquantized:
                if rule.matches(name):
                    return Decision(False, rule.reason)
        for pattern in self._ignore:
            if pattern.search(name):
                return Decision(False, f"matches --ignore {pattern.pattern}")
        return chosen


def _fused_modules(views: Iterable[TensorView], family: Family) -> dict[str, list[str]]:
    """Return the names of matrices by the module that an engine fuses them into; only modules of several matrices."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for view in views:
        if len(view.shape) == 2 and view.name.endswith(".weight"):
            found[family.fused_module_of(view.name)].append(view.name)
    return {fused_module: names for fused_module, names in found.items() if len(names) > 1}


def unquantized_modules(
    views: Iterable[TensorView], quantized: frozenset[str], recipe: Recipe, family: Family
) -> list[str]:
    """Return exact names of the unquantized modules that an engine treats as linear, in the source's order.

    The list contains the 2-D ``.weight`` tensors outside ``quantized`` except embeddings, and the ``experts`` module of
    each stack of experts: vLLM and transformers look for the module instead of its stacks. For transformers it also
    contains an lm_head without a tensor (tied to the embedding): the list replaces a default that contains lm_head.

    Args:
        views: tensors of a source, or of a result without its scales.
        quantized: names of the quantized tensors.
        recipe: settings of the quantization.
        family: model family.
    """
    modules = (_module(view, family) for view in views if view.name not in quantized)
    unquantized = list(dict.fromkeys(module for module in modules if module is not None))
    tied = not any(name == "lm_head" or name.endswith(".lm_head") for name in unquantized)
    in_transformers = recipe.layout.readers[recipe.scheme].transformers
    return [*unquantized, "lm_head"] if tied and in_transformers else unquantized


def _is_embedding(name: str, family: Family) -> bool:
    return any(rule.matches(name) for rule in family.embeddings)


def _module(view: TensorView, family: Family) -> str | None:
    """Return the linear module of a tensor; None for any other tensor."""
    if is_stack(view, family):
        return experts_of(view.name, family)
    if len(view.shape) == 2 and view.name.endswith(".weight") and not _is_embedding(view.name, family):
        return view.name.removesuffix(".weight")
    return None
