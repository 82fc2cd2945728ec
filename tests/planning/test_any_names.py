"""Any checkpoint has a plan: a decision with a reason for every tensor, whatever names, shapes and config it has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe
from nemotron_fp8.checkpoint.inventory import Inventory, Shard
from nemotron_fp8.checkpoint.tensor_view import contiguous
from nemotron_fp8.errors import AlreadyQuantizedError, NothingSelectedError, RecipeError, StackedExpertsError
from nemotron_fp8.planning.families import families, family_of
from nemotron_fp8.planning.linear_share import linear_share
from nemotron_fp8.planning.plan import OPTIONS
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8.planning.selection import decide, linear_modules
from tests.support.checkpoints import ONE

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.tensor_view import TensorView

PARTS = (
    *("model", "language_model", "layers", "h", "blocks", "visual", "encoder", "mtp", "decoder", "backbone"),
    *("self_attn", "attn", "mlp", "mixer", "experts", "block_sparse_moe", "shared_experts", "feed_forward"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "gate", "router"),
    *("w1", "w2", "fc1", "dense", "c_attn", "in_proj", "x_proj", "eh_proj", "input_linear", "lm_head", "embed_tokens"),
    *("norm", "conv1d", "N", "", "-", "é", "a b", "'", "$(x)", "(", "weight"),
)
ENDINGS = (".weight", ".weight", ".weight", ".bias", "", ".scale", "_scale")
SIDES = (1, 4, 8, 64, 96, 128, 256)
DTYPES = ("BF16", "BF16", "BF16", "BF16", "F32", "F16", "F64", "I64", "BOOL")
Tree = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype by tensor name."""


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Names with and without layers, weights, biases and stacks, of shapes that are alike often."""
    stem = draw(st.sampled_from(["model.", "", "model.language_model."]))
    tree: Tree = {}
    if draw(st.booleans()):
        tree |= {f"{stem}embed_tokens.weight": ((256, 128), "BF16")}
        tree |= {f"{stem}layers.{i}.norm.weight": ((128,), "BF16") for i in range(3)}
        tree |= {f"{stem}layers.0.self_attn.o_proj.weight": ((128, 128), "BF16")}
    if draw(st.booleans()):
        inner = draw(st.sampled_from([96, 128]))
        tree |= {f"{stem}layers.1.mlp.experts.gate_up_proj": ((4, 2 * inner, 128), "BF16")}
        tree |= {f"{stem}layers.1.mlp.experts.down_proj": ((4, 128, inner), "BF16")}
    parts = st.lists(st.sampled_from(PARTS) | st.integers(0, 3).map(str), min_size=1, max_size=4)
    for _ in range(draw(st.integers(1, 16))):
        inside = draw(st.sampled_from(["", f"{stem}layers.0.", f"{stem}layers.1.mlp.experts.", f"{stem}layers.2."]))
        name = inside + ".".join(draw(parts)) + draw(st.sampled_from(ENDINGS))
        shape = draw(
            st.lists(st.sampled_from(SIDES), min_size=2, max_size=3) | st.lists(st.sampled_from(SIDES), max_size=4)
        )
        tree[name or "."] = (tuple(shape), draw(st.sampled_from(DTYPES)))
    return tree


scalars = st.none() | st.booleans() | st.sampled_from([0, 1, 2, 4, 64, 128, 256, -1]) | st.text(max_size=3)
KEYS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_experts", "num_local_experts", "text_config"),
    *("vision_config", "num_attention_heads", "num_key_value_heads", "is_encoder_decoder", "expert_dtype", "x"),
)
configs = st.recursive(
    st.dictionaries(st.sampled_from(KEYS), scalars, max_size=5),
    lambda inner: st.dictionaries(st.sampled_from(KEYS), scalars | inner | st.lists(inner, max_size=2), max_size=5),
    max_leaves=4,
)
KINDS = [kind for family in families() for kind in family.model_types]
kinds = st.sampled_from(["qwen3_moe", "granitemoe", "qwen3_vl_moe", "llama4"]) | st.sampled_from(KINDS) | st.none()


@st.composite
def recipes(draw: st.DrawFn, tree: Tree) -> Recipe:
    """Settings whose patterns mostly match something."""
    names = [re.escape(name) for name in tree] + [".*", "layers", r"\.experts\.", "nothing like it"]
    patterns = st.just(()) | st.just(()) | st.tuples(st.sampled_from(names))
    return Recipe(
        granularity=draw(st.sampled_from(["channel", "block"])),
        select=draw(patterns),
        also_select=draw(patterns),
        ignore=draw(patterns),
    )


def checkpoint(tree: Tree, config: dict[str, Any]) -> Inventory:
    views = tuple(contiguous("f", name, dtype, shape, 0) for name, (shape, dtype) in tree.items())
    return Inventory("any", (Shard(ONE, 1 << 20, None, views),), None, config, (), ())


def check(views: tuple[TensorView, ...], recipe: Recipe, config: dict[str, Any]) -> None:
    """Check the decisions, and the modules of the lists."""
    family = family_of(config)
    decisions, notices = decide(views, recipe, family, config)
    assert decisions.keys() == {view.name for view in views}
    assert all(decision.reason for decision in decisions.values())
    assert all(notices)
    quantized = frozenset(name for name, decision in decisions.items() if decision.quantize)
    modules = linear_modules(views, quantized, family)
    assert not modules.quantized & set(modules.unquantized)
    for view in views:
        if view.name in quantized:
            assert len(view.shape) == 2
            assert view.dtype in ("BF16", "F16", "F32")
            assert view.name.removesuffix(".weight") in modules.quantized


@given(trees(), configs, kinds, st.data())
@settings(max_examples=200)
def test_every_tensor_has_a_decision_and_a_reason(
    tree: Tree, config: dict[str, Any], kind: str | None, data: st.DataObject
) -> None:
    recipe = data.draw(recipes(tree))
    check(checkpoint(tree, {}).shards[0].views, recipe, {**config, "model_type": kind})


@given(trees(), configs, kinds, st.data())
@settings(max_examples=200)
def test_a_plan_is_made_or_refused_with_a_reason(
    tree: Tree, config: dict[str, Any], kind: str | None, data: st.DataObject
) -> None:
    """No other error than that of codes, of a pattern, of a stack that is named, or of nothing to quantize."""
    recipe = data.draw(recipes(tree))
    source = checkpoint(tree, {**config, "model_type": kind})
    try:
        plan = make_plan(source, recipe, 1 << 30, 1)
    except (AlreadyQuantizedError, NothingSelectedError, RecipeError, StackedExpertsError) as error:
        assert str(error)
        return
    assert all(t.reason for t in plan.tensors)
    share = plan.share
    assert share.share is None or 0 <= share.share <= 1
    assert share.text()
    assert [each.engine for each in plan.engines] == ["vLLM", "SGLang", "transformers"]
    names = {t.name for t in plan.tensors}
    stacks = {stack.name for stack in plan.inventory.stacks}
    assert {view.name for view in source.views} <= names | stacks
    for left in linear_share(plan.tensors, OPTIONS).left:
        if left.option:
            pattern = left.option.partition(" ")[2][1:-1].replace("'\"'\"'", "'")
            alike = [t for t in plan.tensors if (t.role == "linear") == left.in_decoder]
            kept = [t for t in alike if t.reason.startswith(left.reason)]
            assert kept
            assert all(re.search(pattern, t.name) for t in kept)
