"""Lists of unquantized modules: what must be found is found under every name, and nothing quantized is."""

from __future__ import annotations

import fnmatch
import re
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8.planning.layouts import COMPRESSED_TENSORS, FP8, MODELOPT, MXFP8, Scheme
from nemotron_fp8.planning.module_lists import (
    MOST_SHORT,
    ModuleList,
    Modules,
    exact_names,
    matches_anywhere,
    matches_exactly,
    matches_part,
    matches_pattern,
    matches_suffix,
    patterns,
    suffixes,
    wildcards,
)
from tests.support.decoders import in_list

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS = (
    "model",
    "language_model",
    "layers",
    "mlp",
    "gate",
    "gate_proj",
    "experts",
    "lm_head",
    "visual",
    "x",
    "projector",
)
names = st.lists(st.sampled_from(WORDS) | st.integers(0, 12).map(str), min_size=1, max_size=5).map(".".join)
"""Names as in checkpoints, with numbers and with parts that begin like others."""
trees = st.lists(names, min_size=2, max_size=30, unique=True)
PREFIXES = ("", "model.", "language_model.model.", "thinker.model.")


def semantics(entry: str) -> dict[str, Callable[[str], bool]]:
    """The four ways in which an engine might match an entry, written without this library."""
    pattern = entry.removeprefix("re:")
    return {
        "exact": lambda name: entry == name,
        "prefix": lambda name: name.startswith(entry),
        "fnmatch": lambda name: fnmatch.fnmatchcase(name, entry),
        "re.match": lambda name: entry.startswith("re:") and re.match(pattern, name) is not None,
    }


@given(trees, st.data())
@settings(max_examples=300)
def test_no_entry_meets_a_quantized_module_under_any_semantics(tree: list[str], data: st.DataObject) -> None:
    """compressed-tensors: all four; and the engine's own finds every unquantized module, the others none."""
    quantized = frozenset(data.draw(st.sets(st.sampled_from(tree))))
    plain = tuple(name for name in tree if name not in quantized)
    modules = Modules(plain, quantized, data.draw(st.sampled_from([(), ("visual", "projector")])))
    entries = patterns(modules)
    for entry in entries:
        for kind, matches in semantics(entry).items():
            assert not any(map(matches, quantized)), (kind, entry)
    for name in plain:
        assert any(semantics(entry)["re.match"](name) for entry in entries), name


@given(trees, st.data())
@settings(max_examples=300)
def test_the_lists_of_fp8_are_right_as_each_engine_reads_them(tree: list[str], data: st.DataObject) -> None:
    """vLLM by whole names; transformers 5 by suffix, or from the start up to the end of a part."""
    quantized = frozenset(data.draw(st.sets(st.sampled_from(tree))))
    plain = tuple(name for name in tree if name not in quantized)
    config = FP8.render_config(Scheme("block", "dynamic"), Modules(plain, quantized))
    assert set(config["ignored_layers"]) == set(plain)

    def skipped(name: str) -> bool:
        keys = config["modules_to_not_convert"]
        return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(key) for key in keys)

    # A quantized module inside an unquantized one, or one whose name ends in the other's, cannot be told apart there.
    for name in plain:
        assert skipped(name)
        inside = any(q.startswith(f"{name}.") or q.endswith(name) for q in quantized)
        if not inside:
            assert not any(
                ModuleList([entry], matches_suffix).matching(quantized)
                for entry in suffixes(Modules((name,), quantized))
            )


@given(trees, st.data())
@settings(max_examples=300)
def test_the_fast_answers_are_those_of_asking_every_entry(tree: list[str], data: st.DataObject) -> None:
    """`ModuleList` looks names up by their ends; matching every entry with every name is the specification."""
    quantized = frozenset(data.draw(st.sets(st.sampled_from(tree))))
    plain = tuple(name for name in tree if name not in quantized)
    foreign = data.draw(st.lists(st.sampled_from(["re:.*gate.*", "re:visual.*", "re:[", "lm_head", "re:.*\\.mlp$"])))
    for write, matches in (
        (patterns, matches_pattern),
        (exact_names, matches_exactly),
        (suffixes, matches_suffix),
        (exact_names, matches_part),
        (wildcards, matches_anywhere),
    ):
        if matches is matches_suffix and foreign:
            continue
        entries = [*write(Modules(plain, quantized)), *foreign]
        listed = ModuleList(entries, matches)
        for name in tree:
            if listed.covers(name):
                assert any(matches(entry, name) for entry in entries)
        assert all(map(listed.covers, plain))
        assert listed.matching(quantized) == [e for e in entries if any(matches(e, name) for name in quantized)]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_an_engine_adds_or_drops_changes_nothing(prefix: str) -> None:
    modules = Modules(
        ("model.layers.0.mlp.gate", "language_model.lm_head", "visual.blocks.0.attn.qkv"),
        frozenset({"model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"}),
    )
    listed = ModuleList(patterns(modules), matches_pattern)
    for name in ("layers.0.mlp.gate", "lm_head", "visual.blocks.0.attn.qkv"):
        assert listed.covers(prefix + name)
    assert not listed.covers(f"{prefix}layers.0.mlp.gate_proj")


def test_one_entry_stands_for_a_module_of_all_layers_unless_a_layer_differs() -> None:
    """The layer for multi-token prediction has the names of the others and keeps its dtype."""
    plain = tuple(f"model.layers.{i}.mlp.gate" for i in range(40))
    extra = tuple(f"model.layers.40.mlp.experts.{e}.up_proj" for e in range(8))
    quantized = frozenset(f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(40) for e in range(8))
    assert patterns(Modules((*plain, *extra), quantized)) == [
        r"re:.*layers\.\d+\.mlp\.gate$",
        r"re:.*layers\.40\.mlp\.experts\.\d+\.up_proj$",
    ]


def test_a_hundred_thousand_modules_take_seconds() -> None:
    quantized = frozenset(f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(100) for e in range(1000))
    plain = tuple(f"model.layers.{i}.mlp.gate" for i in range(100))
    entries = patterns(Modules(plain, quantized))
    assert entries == [r"re:.*layers\.\d+\.mlp\.gate$"]
    listed = ModuleList(entries, matches_pattern)
    assert listed.matching(quantized) == []
    assert not any(map(listed.covers, quantized))


def test_what_stacked_experts_are_asked_for_is_listed() -> None:
    """vLLM asks for the projections of the first expert of a module of stacked experts."""
    config = COMPRESSED_TENSORS.render_config(Scheme("channel", "dynamic"), Modules(("model.layers.3.mlp.experts",)))
    listed = ModuleList(config["ignore"], matches_pattern)
    assert listed.covers("model.layers.3.mlp.experts.0.down_proj")
    assert listed.covers("language_model.model.layers.3.mlp.experts.0.w1")


@given(trees, st.data())
def test_the_list_of_modelopt_is_right_as_vllm_reads_it(tree: list[str], data: st.DataObject) -> None:
    """An entry counts wherever it is in a name: ``mlp.gate`` must not exclude ``mlp.gate_proj``."""
    quantized = frozenset(data.draw(st.sets(st.sampled_from(tree))))
    plain = tuple(name for name in tree if name not in quantized)
    config = MODELOPT.render_config(Scheme("channel", "dynamic"), Modules(plain, quantized))
    for name in plain:
        assert in_list(config, "vLLM", name)
    for name in quantized:
        # Experts are looked up as a whole, by any part of an entry.
        inside = "experts" in name and any(name in other for other in plain)
        assert in_list(config, "vLLM", name) is inside, (name, config["ignore"])


@given(trees, st.data())
def test_sglang_finds_what_is_unquantized_and_verify_knows_what_else_it_finds(
    tree: list[str], data: st.DataObject
) -> None:
    """SGLang compares whole parts anywhere in a name: the proof finds each entry that matches too much."""
    quantized = frozenset(data.draw(st.sets(st.sampled_from(tree))))
    plain = tuple(name for name in tree if name not in quantized)
    config = MXFP8.render_config(Scheme("mx", "dynamic"), Modules(plain, quantized))
    (reader,) = [reader for reader in MXFP8.list_readers if "SGLang" in reader.engines]
    listed = reader.read(config)
    for name in plain:
        assert listed.covers(name)
        assert in_list(config, "SGLang", name)
    assert bool(listed.matching(quantized)) is any(in_list(config, "SGLang", name) for name in quantized)


def test_a_stranger_s_list_takes_no_square_of_its_length() -> None:
    """Names of three parts and more are found by the parts inside; of the short ones a thousand are looked for."""
    quantized = frozenset(f"model.layers.{i}.mlp.up_proj" for i in range(20_000))
    entries = [f"model.layers.{i}.mlp.up" for i in range(20_000, 40_000)] + [f"x{i}" for i in range(20_000)]
    started = time.process_time()
    found = ModuleList(entries, matches_anywhere).matching(quantized)
    assert time.process_time() - started < 10  # a second; comparing every entry with every name takes minutes
    assert found == entries[20_000 + MOST_SHORT :]  # not looked for: they count as matching
    names = wildcards(Modules(tuple(entries), quantized))
    assert names[:20_000] == entries[:20_000]
    assert names[-1] == "x1999[9]"
