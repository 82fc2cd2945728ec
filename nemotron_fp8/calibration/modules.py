"""Names of what is measured, as a result names it: matrices of a layer, and its attention.

A result has the names of its source, but for stacks of experts: it holds single experts.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from nemotron_fp8.planning.families import family_of
from nemotron_fp8.planning.stacked_experts import split_stacks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.inference.weights import Part


Place: TypeAlias = "tuple[str, int | None]"
"""Name of a parameter in its layer, and the number of a matrix in a stack; None for all of the parameter."""


class Experts(NamedTuple):
    """Names of the experts of a stack.

    Attributes:
        stem: start of their names.
        projections: ends of the names of the matrices of an expert.
        number: number of experts.
    """

    stem: str
    projections: tuple[str, ...]
    number: int

    def modules(self, expert: int) -> tuple[str, ...]:
        """Return the names of the matrices of an expert."""
        return tuple(f"{self.stem}{expert}.{projection}" for projection in self.projections)


def module_of(tensor: str) -> str:
    """Return the name of the module of a weight."""
    return tensor.removesuffix(".weight")


def stacks_of(inventory: Inventory) -> dict[str, Experts]:
    """Return the experts of the stacks that a result splits, by name of the stack.

    Args:
        inventory: contents of the source, with weights as views of their values.

    Raises:
        StackedExpertsError: an expert of a stack is stored by itself, too.
    """
    family = family_of(inventory.config)
    split = {stack.name for stack in split_stacks(inventory, lambda _: False, lambda _: False).stacks}
    found = {}
    for view in inventory.views:
        if view.name in split and family.stacked is not None:
            name = family.canonical_stack(view.name)
            place = family.stack.search(name)
            assert place is not None  # it is split by this pattern
            projections = dict(family.stacked.parts)[place.group("part")]
            found[view.name] = Experts(name[: place.start("part")], projections, view.shape[0])
    return found


def matrices_of(part: Part, prefix: str, stacks: Mapping[str, Experts]) -> dict[Place, tuple[str, ...]]:
    """Return the names of the modules of each matrix of a layer.

    Args:
        part: tensors of the layer.
        prefix: start of the names of its parameters in the model.
        stacks: the stacks that a result splits.
    """
    found: defaultdict[Place, dict[str, None]] = defaultdict(dict)

    def add(target: str, expert: int | None, view: TensorView) -> None:
        experts = stacks.get(view.name) if expert is None else None
        if experts is None:
            found[target, expert][module_of(view.name)] = None
            return
        for number in range(experts.number):
            found[target, number].update(dict.fromkeys(experts.modules(number)))

    for piece in part.pieces:
        add(piece.target, piece.expert, piece.view)
    for target, views in part.converted.items():
        for view in views:
            add(target.removeprefix(prefix), None, view)
    return {place: tuple(names) for place, names in found.items()}
