"""Engines that read the result of a plan, and what they need: from the records of its layout and family."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import listed
from nemotron_fp8.planning.families import DEFAULT_FAMILY
from nemotron_fp8.planning.layouts import ENGINES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.planning.families import Family
    from nemotron_fp8.planning.recipe import Recipe


LARGEST_TP = 64
"""Largest tensor-parallel size that is looked for."""

_NAMELESS_HEAD = re.compile(r"(^|\.)score\.\d+\.weight$")
"""Output layers of reward models, which vLLM builds without a name. Source: ``Qwen2RewardBaseModel`` of vLLM."""
GATE_UP = frozenset(("gate_up_proj", "up_gate_proj", "w13", "gate_up"))
QKV = frozenset(("qkv_proj", "query_key_value", "Wqkv", "wqkv", "c_attn", "qkv", "W_pack"))
"""Names of stored weights that hold gate and up, or queries, keys and values."""


class Heads(NamedTuple):
    """Attention heads of a decoder.

    Attributes:
        queries: number of heads of queries; None if unknown.
        keys: number of heads of keys and of values; None if unknown.
    """

    queries: int | None = None
    keys: int | None = None


class EngineSupport(NamedTuple):
    """An engine, and if it reads a result.

    Attributes:
        engine: name of the engine, of `ENGINES`.
        reads: True if the engine loads the result as it should.
        note: reason why not, or a caveat; a text that follows the name in a sentence, or empty.
        knows_family: False if no record states that the engine has models of this family.
    """

    engine: str
    reads: bool
    note: str = ""
    knows_family: bool = True


NO_HEADS = Heads()


class SupportedModel(NamedTuple):
    """Properties of a result that decide which engines read it.

    Attributes:
        family: model family.
        shapes: shapes of the quantized weights, by name.
        heads: attention heads of the decoder.
        has_config: False if the source has no config.json.
        forced: kinds of names of the weights that are FP8 although engines are not known to load them so.
        kept: names of the unquantized tensors.
        missing: folders that a side file names and the result lacks.
    """

    family: Family
    shapes: Mapping[str, tuple[int, ...]]
    heads: Heads
    has_config: bool = True
    forced: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def engine_support(recipe: Recipe, model: SupportedModel) -> tuple[EngineSupport, ...]:
    """Return which engines read a result.

    Args:
        recipe: settings of the quantization.
        model: what was quantized.
    """
    if not model.has_config:
        return tuple(EngineSupport(engine, False, "needs config.json, which the source lacks") for engine in ENGINES)
    family, shapes, heads = model.family, model.shapes, model.heads
    if model.forced:
        note = f"is not known to load {listed(list(model.forced))} in FP8"
        return tuple(EngineSupport(engine, False, note) for engine in ENGINES)
    if model.missing:
        folders = listed(list(model.missing))
        note = f"computes other embeddings without the folders {folders} of modules.json; copy them from the source"
        return tuple(EngineSupport(engine, False, note) for engine in ENGINES)
    readers = recipe.layout.readers[recipe.scheme]
    found = {engine: EngineSupport(engine, readers.by(engine), readers.unread.get(engine, "")) for engine in ENGINES}
    if recipe.weight_format.numbers.coverage.granularity == "block" and (readers.vllm or readers.sglang):
        sizes = tensor_parallel_sizes(recipe, family, shapes, heads)
        doubled = sizes == [1 << i for i in range(len(sizes))]  # those that people try
        others = "" if doubled else f" ({', '.join(map(str, sizes))})"
        engine = "vLLM" if readers.vllm else "SGLang"
        found[engine] = EngineSupport(engine, True, f"with a tensor-parallel size of at most {sizes[-1]}{others}")
    if not readers.transformers:
        found["transformers"] = EngineSupport("transformers", False, readers.transformers_note)
    for engine, reason in unread_choices(recipe, model.kept).items():
        if found[engine].reads:
            found[engine] = EngineSupport(engine, False, reason)
    for unread in family.unread:
        if found[unread.engine].reads and unread.concerns(recipe.format, recipe.granularity):
            found[unread.engine] = EngineSupport(unread.engine, False, unread.reason)
    if recipe.format == "fp8" and found["vLLM"].reads and any(map(_NAMELESS_HEAD.search, model.kept)):
        note = "looks up the output layer of this model under no name; use format 'compressed-tensors'"
        found["vLLM"] = EngineSupport("vLLM", False, note)
    note = _why_no_experts(recipe, model, readers.unread_experts.get("transformers", ""))
    if note and found["transformers"].reads:
        found["transformers"] = EngineSupport("transformers", False, note)
    if family.stacked is not None and family.stacked.unread and any(map(family.is_routed, shapes)):
        found = {engine: EngineSupport(engine, False, family.stacked.unread) for engine in ENGINES}
    known = family is not DEFAULT_FAMILY
    return tuple(support._replace(knows_family=known) for support in found.values())


def unread_choices(recipe: Recipe, names: Iterable[str]) -> dict[str, str]:
    """Return the engines that do not load a result with the choices of a recipe, each with the reason.

    Args:
        recipe: settings of the quantization.
        names: names of the tensors of the result, with which an engine may load it after all.
    """
    known = list(names)
    return {
        engine: reason
        for choice in recipe.choices
        if not any(name.endswith(choice.read_with) for name in known)
        for engine, reason in choice.unread.items()
    }


def _why_no_experts(recipe: Recipe, model: SupportedModel, unread: str) -> str:
    """Return why transformers does not load the experts of a result; empty if it does, or if there are none."""
    stacked, has_experts = model.family.stacked, any(map(model.family.is_routed, model.shapes))
    if stacked is None or not stacked.always:
        return unread * has_experts
    if recipe.format in stacked.singles_in:
        if not any(map(model.family.stack.search, map(model.family.canonical_stack, model.kept))):
            return ""
        return (
            "builds single experts of this family in this layout, and would initialize them at random where they are"
            " stacked; quantize the experts too, or use format 'fp8'"
        )
    return (
        "does not put the experts of this family together from the single experts of this result, and would"
        " initialize them at random; dequantize the result for it, or leave the experts out (--ignore experts)"
    ) * has_experts


def support_text(support: Iterable[EngineSupport]) -> str:
    """Return a sentence about the engines that read a result and those that do not."""
    found = list(support)
    reading = [each.engine + (f" ({each.note})" if each.note else "") for each in found if each.reads]
    text = f"read by {', '.join(reading)}" if reading else "read by no engine"
    if any(each.reads and not each.knows_family for each in found):
        text += ", as far as they have this model, whose family is not known here"
    reasons: dict[str, list[str]] = {}
    for each in found:
        if not each.reads:
            reasons.setdefault(each.note or "does not load this layout", []).append(each.engine)
    others = "; ".join(f"{', '.join(engines)}: {reason}" for reason, engines in reasons.items())
    return f"{text}; {others}" if others else text


def tensor_parallel_sizes(
    recipe: Recipe, family: Family, shapes: Mapping[str, tuple[int, ...]], heads: Heads = NO_HEADS
) -> list[int]:
    """Return the tensor-parallel sizes at which every part of a block-quantized weight has whole blocks.

    Engines split a weight by its output rows, or by its input columns if `Family.row_parallel` names it, and reject a
    part that does not divide by the block. Keys and values have a head on every device at least. Sources:
    ``validate_fp8_block_shape``, ``QKVParallelLinear``, ``Fp8MoEMethod`` and ``KMxfp8Static`` of vLLM.

    Args:
        recipe: settings of the quantization, of granularity ``block`` or ``mx``.
        family: model family.
        shapes: shapes of the quantized weights, by name.
        heads: attention heads, which a size divides.
    """
    block = recipe.weight_format.numbers.coverage.block
    sides, keys = set(), set()
    for name, shape in shapes.items():
        module = name.rpartition(".")[0].rpartition(".")[2]
        if module in family.row_parallel:
            sides.add(shape[1] // block[1])
        elif module in ("k_proj", "v_proj") and heads.keys:
            keys.add(shape[0])
        elif module not in family.replicated:
            first, *rest = stored_parts(name, shape[0], heads)
            sides.add(first // block[0])
            keys |= set(rest) if module in QKV else set()
    return [
        size
        for size in range(1, LARGEST_TP + 1)
        if all(side % size == 0 for side in sides)
        and (heads.queries is None or heads.queries % size == 0)
        and all(_keys_divide(rows, size, heads.keys or 1, block[0]) for rows in keys)
    ] or [1]


def stored_parts(name: str, rows: int, heads: Heads) -> tuple[int, ...]:
    """Return the rows of each part of a weight that holds several projections; of any other weight, all rows.

    vLLM checks each part for whole blocks, and splits each over the devices. Source: ``MergedColumnParallelLinear`` and
    ``QKVParallelLinear`` of vLLM.

    Args:
        name: name of the weight.
        rows: its rows.
        heads: attention heads of the decoder.
    """
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module in GATE_UP and rows % 2 == 0:
        return rows // 2, rows // 2
    if module in QKV and heads.queries and heads.keys and rows % (heads.queries + 2 * heads.keys) == 0:
        width = rows // (heads.queries + 2 * heads.keys)
        return heads.queries * width, heads.keys * width, heads.keys * width
    return (rows,)


def _keys_divide(rows: int, size: int, heads: int, block: int) -> bool:
    """Return True if the keys of each device have whole heads and whole blocks; few heads are replicated."""
    if max(size, heads) % min(size, heads):
        return False
    return rows // min(size, heads) % block == 0
