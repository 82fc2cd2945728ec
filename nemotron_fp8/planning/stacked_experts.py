"""Stacked experts: one 3-D tensor for all routed experts of a layer, taken apart into the 2-D names engines load.

Every engine quantizes experts one by one, under names like ``experts.7.down_proj.weight``, each with its scale. A
stack is a matter of views only: no tensor is copied or transposed before it is read.

Sources: the ``Experts`` modules of transformers' model files for the stacks, the expert mappings of vLLM's model
files for the names (``qwen3_moe.py``, ``qwen2_moe.py``, ``glm4_moe.py``, ``deepseek_v2.py``, ``llama4.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.dtypes import QUANTIZABLE, nbytes
from nemotron_fp8.checkpoint.tensor_view import Extent, TensorView
from nemotron_fp8.errors import StackedExpertsError

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from nemotron_fp8.checkpoint.inventory import Inventory


STACK = re.compile(r"(^|\.)experts\.(?P<part>[^.]+?)(\.weight)?$")
"""A tensor of all experts of a layer."""


@dataclass(frozen=True, slots=True)
class Naming:
    """How a family stacks its experts.

    Attributes:
        model_types: ``model_type`` of config.json.
        transposed: whether an expert's matrix is stored ``[in, out]``, not ``[out, in]`` as a Linear has it.
        parts: for the last name of a stack, the projections that lie one after another along the output.
    """

    model_types: tuple[str, ...]
    transposed: bool
    parts: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("gate_up_proj", ("gate_proj", "up_proj")),
        ("down_proj", ("down_proj",)),
    )


NAMINGS: tuple[Naming, ...] = (
    Naming(("qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v2", "deepseek_v3"), transposed=False),
    Naming(("llama4", "llama4_text"), transposed=True),
)


def split_stacks(inventory: Inventory, keep: Callable[[str], bool]) -> Inventory:
    """Return an inventory whose stacks of experts are taken apart into views of single experts.

    All stacks of a layer are taken apart or none: engines have one quantization for all routed experts of a layer.

    Args:
        inventory: what the source holds.
        keep: whether a stack stays in one piece, by its name.

    Raises:
        StackedExpertsError: a stack is to be taken apart, and no engine's names for its experts are known.
    """
    naming = _naming(inventory)
    whole = {experts_of(view.name) for view in inventory.views if is_stack(view) and keep(view.name)}
    shards = tuple(
        replace(shard, views=tuple(part for v in shard.views for part in _parts(v, naming, whole)))
        for shard in inventory.shards
    )
    return inventory if shards == inventory.shards else replace(inventory, shards=shards)


def is_stack(view: TensorView) -> bool:
    """Whether a tensor holds the matrices of all experts of a layer."""
    return len(view.shape) == 3 and view.dtype in QUANTIZABLE and bool(STACK.search(view.name))


def experts_of(stack: str) -> str:
    """Return the module that holds the experts of a stack, ``...mlp.experts``, by the stack's name."""
    found = STACK.search(stack)
    return stack[: found.start("part") - 1] if found else stack


def _naming(inventory: Inventory) -> Naming | None:
    kind = (inventory.config or {}).get("model_type")
    return next((naming for naming in NAMINGS if kind in naming.model_types), None)


def _parts(view: TensorView, naming: Naming | None, whole: Container[str]) -> tuple[TensorView, ...]:
    """The single experts of a stack; anything else as it is."""
    if not is_stack(view) or experts_of(view.name) in whole:
        return (view,)
    found = STACK.search(view.name)
    projections = dict(naming.parts).get(found.group("part")) if naming and found else None
    if naming is None or found is None or projections is None:
        raise StackedExpertsError(view.name, view.shape)
    experts, rows, columns = view.shape if not naming.transposed else (view.shape[0], view.shape[2], view.shape[1])
    if rows % len(projections):
        raise StackedExpertsError(view.name, view.shape)
    stem = view.name[: found.start("part")]
    height = rows // len(projections)
    return tuple(
        _matrix(view, naming.transposed, expert, i * height, height, columns, f"{stem}{expert}.{projection}.weight")
        for expert in range(experts)
        for i, projection in enumerate(projections)
    )


def _matrix(
    view: TensorView, transposed: bool, expert: int, first: int, height: int, columns: int, name: str
) -> TensorView:
    """Output rows ``[first, first + height)`` of one expert of a contiguous stack, as a matrix of its own."""
    stack = view.extents[0]
    item = view.itemsize
    base = stack.offset + expert * nbytes(view.dtype, view.shape[1:])
    if transposed:
        step = view.shape[2] * item
        extent = Extent(stack.file, base + first * item, item, height, columns * item, item=item, step=step)
    else:
        extent = Extent(stack.file, base + first * columns * item, columns * item, height, columns * item)
    return TensorView(name, view.dtype, (height, columns), (extent,))
