"""Engines that read the result of a plan, and what they need: from the records of its layout and family."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8.planning.layouts import ENGINES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.recipe import Recipe


LARGEST_TP = 64
"""Largest tensor-parallel size that is looked for."""


class EngineSupport(NamedTuple):
    """Whether an engine reads a result.

    Attributes:
        engine: name of the engine, of `ENGINES`.
        reads: True if the engine loads the result as it should.
        note: reason why not, or a caveat; a text that follows the name in a sentence, or empty.
    """

    engine: str
    reads: bool
    note: str = ""


def engine_support(
    recipe: Recipe, family: Family, shapes: Mapping[str, tuple[int, ...]], heads: int | None
) -> tuple[EngineSupport, ...]:
    """Return which engines read a result.

    Args:
        recipe: settings of the quantization.
        family: model family.
        shapes: shapes of the quantized weights, by name.
        heads: attention heads of the decoder; None if unknown.
    """
    readers = recipe.layout.readers[recipe.scheme]
    found = {engine: EngineSupport(engine, readers.by(engine)) for engine in ENGINES}
    if recipe.granularity == "block" and readers.vllm:
        size = largest_tensor_parallel(recipe, family, shapes, heads)
        found["vLLM"] = EngineSupport("vLLM", True, f"with a tensor-parallel size of at most {size}")
    if not readers.transformers:
        found["transformers"] = EngineSupport("transformers", False, readers.transformers_note)
    for engine, reason in family.unread.items():
        if found[engine].reads:
            found[engine] = EngineSupport(engine, False, reason)
    stacked = family.stacked
    if stacked is not None and stacked.always and found["transformers"].reads and any(map(family.is_routed, shapes)):
        note = (
            "does not put the experts of this family together from the single experts of this result, and would"
            " initialize them at random; dequantize the result for it, or leave the experts out (--ignore experts)"
        )
        found["transformers"] = EngineSupport("transformers", False, note)
    return tuple(found.values())


def support_text(support: Iterable[EngineSupport]) -> str:
    """Return a sentence about the engines that read a result and those that do not."""
    found = list(support)
    reading = [f"{each.engine} {each.note}".rstrip() for each in found if each.reads]
    text = f"read by {', '.join(reading)}" if reading else "read by no engine"
    others = "; ".join(f"{each.engine} {each.note or 'does not load this layout'}" for each in found if not each.reads)
    return f"{text}; {others}" if others else text


def largest_tensor_parallel(
    recipe: Recipe, family: Family, shapes: Mapping[str, tuple[int, ...]], heads: int | None
) -> int:
    """Return the largest tensor-parallel size at which every part of a block-quantized weight has whole blocks.

    vLLM splits a weight by its output rows, or by its input columns if `Family.row_parallel` names it, and rejects a
    part that does not divide by the block. Sources: ``validate_fp8_block_shape`` and ``Fp8MoEMethod`` of vLLM.

    Args:
        recipe: settings of the quantization, of granularity ``block``.
        family: model family.
        shapes: shapes of the quantized weights, by name.
        heads: attention heads, which the size divides; None if unknown.
    """
    block = recipe.weight_format.numbers.coverage.block
    sides = set()
    for name, shape in shapes.items():
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module in family.row_parallel:
            sides.add(shape[1] // block[1])
        # Keys and values are replicated where there are fewer of their heads than parts.
        elif module not in family.replicated and module not in ("k_proj", "v_proj"):
            sides.add(shape[0] // block[0])
    for size in range(LARGEST_TP, 1, -1):
        if all(side % size == 0 for side in sides) and (heads is None or heads % size == 0):
            return size
    return 1
