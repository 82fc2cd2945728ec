"""Published checkpoints, by their configs' shapes and names: exactly the right tensors become FP8.

A plan reads no byte of a tensor, so the shapes are the real ones; of many equal layers and experts there are few.
Sources of the shapes: config.json of nvidia/Nemotron-4-340B, NVIDIA-Nemotron-Nano-9B-v2,
NVIDIA-Nemotron-3-Nano-30B-A3B, NVIDIA-Nemotron-3-Super-120B-A12B, Llama-3_3-Nemotron-Super-49B-v1,
Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1 and meta-llama/Llama-3.1-8B.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from nemotron_fp8 import Recipe, quantize_repo
from nemotron_fp8.checkpoint.inventory import Inventory, Shard
from nemotron_fp8.checkpoint.tensor_view import contiguous
from nemotron_fp8.documents.render import render_documents
from nemotron_fp8.errors import StackedExpertsError
from nemotron_fp8.planning.quantize import make_plan
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import ONE, Tensors, read_tensors, same_bits, weight, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.planning.plan import Plan

FP8, LISTED, STAYS = "FP8", "stays, and the config lists it as a linear module", "stays, no linear module"
Table = dict[str, tuple[tuple[int, ...], str]]
"""Shape, and what must become of it, by tensor name."""


def attention(stem: str, hidden: int, queries: int, keys: int) -> Table:
    return {
        f"{stem}q_proj.weight": ((queries, hidden), FP8),
        f"{stem}k_proj.weight": ((keys, hidden), FP8),
        f"{stem}v_proj.weight": ((keys, hidden), FP8),
        f"{stem}o_proj.weight": ((hidden, queries), FP8),
    }


def mlp(stem: str, hidden: int, inner: int, gated: bool = True) -> Table:
    gate: Table = {f"{stem}gate_proj.weight": ((inner, hidden), FP8)} if gated else {}
    return {
        **gate,
        f"{stem}up_proj.weight": ((inner, hidden), FP8),
        f"{stem}down_proj.weight": ((hidden, inner), FP8),
    }


def norms(hidden: int, *names: str) -> Table:
    return dict.fromkeys(names, ((hidden,), STAYS))


def ends(vocabulary: int, hidden: int, embedding: str = "model.embed_tokens", norm: str = "model.norm") -> Table:
    return {
        f"{embedding}.weight": ((vocabulary, hidden), STAYS),
        f"{norm}.weight": ((hidden,), STAYS),
        "lm_head.weight": ((vocabulary, hidden), LISTED),
    }


def mamba(layer: int, hidden: int, inner: int, projected: int, convolved: int, heads: int) -> Table:
    stem = f"backbone.layers.{layer}.mixer."
    return {
        f"{stem}in_proj.weight": ((projected, hidden), FP8),
        f"{stem}out_proj.weight": ((hidden, inner), FP8),
        f"{stem}conv1d.weight": ((convolved, 1, 4), STAYS),
        f"{stem}conv1d.bias": ((convolved,), STAYS),
        f"{stem}A_log": ((heads,), STAYS),
        f"{stem}D": ((heads,), STAYS),
        f"{stem}dt_bias": ((heads,), STAYS),
        f"{stem}norm.weight": ((inner,), STAYS),
        f"backbone.layers.{layer}.norm.weight": ((hidden,), STAYS),
    }


def router(stem: str, experts: int, hidden: int) -> Table:
    return {
        f"{stem}gate.weight": ((experts, hidden), LISTED),
        f"{stem}gate.e_score_correction_bias": ((experts,), STAYS),
    }


def all_of(table: Table, fate: str) -> Table:
    return {name: (shape, fate) for name, (shape, _) in table.items()}


LAYER = "model.layers.{}."
MIXER = "backbone.layers.{}.mixer."

NEMOTRON_4: Table = {
    **ends(256_000, 18432),
    **norms(18432, "model.norm.bias"),
    **attention("model.layers.0.self_attn.", 18432, 18432, 1536),
    **mlp("model.layers.0.mlp.", 18432, 73728, gated=False),
    **norms(
        18432, *(f"model.layers.0.{n}_layernorm.{p}" for n in ("input", "post_attention") for p in ("weight", "bias"))
    ),
}

NANO_V2: Table = {
    **ends(131_072, 4480, "backbone.embeddings", "backbone.norm_f"),
    **mamba(0, 4480, 10240, 22656, 12288, 128),
    **mlp(MIXER.format(1), 4480, 15680, gated=False),
    **attention(MIXER.format(14), 4480, 5120, 1024),
    **norms(4480, "backbone.layers.1.norm.weight", "backbone.layers.14.norm.weight"),
}

NEMOTRON_3_NANO: Table = {
    **ends(131_072, 2688, "backbone.embeddings", "backbone.norm_f"),
    **mamba(0, 2688, 4096, 10304, 6144, 64),
    **router(MIXER.format(1), 128, 2688),
    **mlp(MIXER.format(1) + "experts.0.", 2688, 1856, gated=False),
    **mlp(MIXER.format(1) + "experts.127.", 2688, 1856, gated=False),
    **mlp(MIXER.format(1) + "shared_experts.", 2688, 3712, gated=False),
    **attention(MIXER.format(5), 2688, 4096, 256),
}

NEMOTRON_3_SUPER: Table = {
    **ends(131_072, 4096, "backbone.embeddings", "backbone.norm_f"),
    **router(MIXER.format(1), 512, 4096),
    MIXER.format(1) + "fc1_latent_proj.weight": ((1024, 4096), LISTED),
    MIXER.format(1) + "fc2_latent_proj.weight": ((4096, 1024), LISTED),
    **mlp(MIXER.format(1) + "experts.0.", 1024, 2688, gated=False),
    **mlp(MIXER.format(1) + "experts.511.", 1024, 2688, gated=False),
    **mlp(MIXER.format(1) + "shared_experts.", 4096, 5376, gated=False),
    "mtp.layers.0.eh_proj.weight": ((4096, 8192), LISTED),
    **norms(4096, "mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight"),
    **all_of(attention("mtp.layers.0.mixer.", 4096, 4096, 256), LISTED),
    **all_of(mlp("mtp.layers.1.mixer.experts.0.", 1024, 2688, gated=False), LISTED),
    "mtp.layers.1.mixer.fc1_latent_proj.weight": ((1024, 4096), LISTED),
    "mtp.layers.1.mixer.gate.weight": ((512, 4096), LISTED),
}

NAS: Table = {
    **ends(128_256, 8192),
    **attention("model.layers.0.self_attn.", 8192, 8192, 1024),
    **mlp("model.layers.0.mlp.", 8192, 28672),
    # Layer 42 has no attention, layer 43 a narrower MLP, layer 44 no MLP; nothing at all stands for what is lacking.
    **mlp("model.layers.42.mlp.", 8192, 28672),
    **norms(8192, "model.layers.42.post_attention_layernorm.weight"),
    **mlp("model.layers.43.mlp.", 8192, 5632),
    **attention("model.layers.44.self_attn.", 8192, 8192, 1024),
    **norms(8192, "model.layers.44.input_layernorm.weight"),
}

QWEN3_MOE: Table = {
    **ends(151_936, 2048),
    **attention("model.layers.0.self_attn.", 2048, 4096, 512),
    **norms(128, "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"),
    "model.layers.0.mlp.gate.weight": ((128, 2048), LISTED),
    **mlp("model.layers.0.mlp.experts.0.", 2048, 768),
    **mlp("model.layers.0.mlp.experts.127.", 2048, 768),
}

MIXTRAL: Table = {
    **ends(32_000, 4096),
    **attention("model.layers.0.self_attn.", 4096, 4096, 1024),
    "model.layers.0.block_sparse_moe.gate.weight": ((8, 4096), LISTED),
    "model.layers.0.block_sparse_moe.experts.0.w1.weight": ((14336, 4096), FP8),
    "model.layers.0.block_sparse_moe.experts.0.w2.weight": ((4096, 14336), FP8),
    "model.layers.0.block_sparse_moe.experts.0.w3.weight": ((14336, 4096), FP8),
}

LLAMA: Table = {
    **ends(128_256, 4096),
    **attention("model.layers.0.self_attn.", 4096, 4096, 1024),
    **mlp("model.layers.0.mlp.", 4096, 14336),
    **norms(4096, "model.layers.0.input_layernorm.weight"),
}

CHECKPOINTS: dict[str, tuple[dict[str, Any], Table]] = {
    "Nemotron-4-340B": ({"model_type": "nemotron", "architectures": ["NemotronForCausalLM"]}, NEMOTRON_4),
    "Nemotron-Nano-9B-v2": ({"model_type": "nemotron_h"}, NANO_V2),
    "Nemotron-3-Nano-30B-A3B": ({"model_type": "nemotron_h"}, NEMOTRON_3_NANO),
    "Nemotron-3-Super-120B-A12B": ({"model_type": "nemotron_h"}, NEMOTRON_3_SUPER),
    "Llama-3_3-Nemotron-Super-49B": ({"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"]}, NAS),
    "Qwen3-30B-A3B": ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, QWEN3_MOE),
    "Mixtral-8x7B": ({"model_type": "mixtral"}, MIXTRAL),
    "Llama-3.1-8B": ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, LLAMA),
}

CHANNEL = Recipe(format="compressed-tensors", granularity="channel")
TENSOR = Recipe(format="fp8", granularity="tensor")


def inventory(config: dict[str, Any], table: Table) -> Inventory:
    views = tuple(contiguous("f", name, "BF16", shape, 0) for name, (shape, _) in table.items())
    return Inventory("published", (Shard(ONE, 1000, None, views),), {}, config, (), ())


def plan(config: dict[str, Any], table: Table, recipe: Recipe | None = None) -> Plan:
    return make_plan(inventory(config, table), recipe or Recipe(), 1 << 30, 1)


def written(made: Plan) -> dict[str, Any]:
    """The ``quantization_config`` of the result."""
    config: dict[str, Any] = json.loads(render_documents(made, {})["config.json"])["quantization_config"]
    return config


def modules(table: Table, fate: str) -> list[str]:
    return [name.removesuffix(".weight") for name, (_, becomes) in table.items() if becomes == fate]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("recipe", [TENSOR, CHANNEL], ids=lambda recipe: recipe.format)
def test_exactly_the_right_tensors_become_fp8(name: str, recipe: Recipe) -> None:
    """Each name has the fate of the table, the file has a scale for each FP8 weight, and no notice is given."""
    config, table = CHECKPOINTS[name]
    made = plan(config, table, recipe)
    assert {t.name: t.quantize for t in made.tensors} == {n: fate == FP8 for n, (_, fate) in table.items()}
    assert all(t.reason for t in made.tensors)
    assert made.notices == ()
    entries = {entry.name: entry for entry in made.shard_tasks[0].layout.entries}
    assert set(entries) == set(table) | {f"{n}_scale" for n, (_, fate) in table.items() if fate == FP8}
    for tensor, (shape, fate) in table.items():
        assert entries[tensor].shape == shape
        assert entries[tensor].dtype == ("F8_E4M3" if fate == FP8 else "BF16")
        if fate == FP8:
            assert entries[f"{tensor}_scale"].shape == (() if recipe.format == "fp8" else (shape[0], 1))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fp8_lists_the_exact_names_of_the_rest(name: str) -> None:
    config, table = CHECKPOINTS[name]
    listed = written(plan(config, table, TENSOR))["ignored_layers"]
    assert [name for name in listed if f"{name}.weight" in table] == modules(table, LISTED)
    # Routers are listed under their names in transformers too, and merged modules as a whole.
    others = ("mlp.gate", "mlp.router", "qkv_proj", "gate_up_proj")
    assert all(name.endswith(others) for name in listed if f"{name}.weight" not in table)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_compressed_tensors_lists_the_rest_so_that_an_engine_finds_it(name: str) -> None:
    """Under any name of the model around the layers; and no pattern meets a name that is FP8."""
    config, table = CHECKPOINTS[name]
    ignored = written(plan(config, table, CHANNEL))["ignore"]

    def matches(module: str) -> bool:
        return any(
            bool(re.match(entry.removeprefix("re:"), module)) if entry.startswith("re:") else entry == module
            for entry in ignored
        )

    for fate, ignore in ((LISTED, True), (FP8, False)):
        for module in modules(table, fate):
            assert matches(module) is ignore
            assert matches(re.sub(r"^(backbone|model)\.", "model.language_model.", module)) is ignore
            assert matches(re.sub(r"^(backbone|model)\.", "", module)) is ignore
    kinds = {re.sub(r"\.\d+(?=\.)", ".N", name) for name in modules(table, LISTED)}
    # Names in transformers of Mixtral's router; other projections of a first expert; a merged matrix.
    more = 2 * ("mixtral" in config.values())
    more += 5 * any(".experts.N." in kind for kind in kinds) + any(kind.endswith(".q_proj") for kind in kinds)
    assert len(ignored) == len(kinds) + more


def test_blocks_leave_the_shapes_that_do_not_divide() -> None:
    """Nemotron 3 Nano's in_proj has 10304 rows and its experts 1856: they stay, and the config lists them."""
    config, table = CHECKPOINTS["Nemotron-3-Nano-30B-A3B"]
    ragged = {name for name, (shape, fate) in table.items() if fate == FP8 and any(n % 128 for n in shape)}
    assert {name.split("mixer.")[1].split(".")[0] for name in ragged} == {"in_proj", "experts"}
    made = plan(config, table, Recipe(format="fp8", granularity="block"))
    assert {t.name for t in made.tensors if t.quantize} == {n for n, (_, f) in table.items() if f == FP8} - ragged
    left = [n.removesuffix(".weight") for n, (_, f) in table.items() if f == LISTED or n in ragged]
    assert sorted(written(made)["ignored_layers"]) == sorted({*left, "lm_head"})
    assert sorted(written(made)["modules_to_not_convert"]) == sorted(
        {n.removeprefix("backbone.") for n in (*left, "lm_head")}
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(("format", "suffix"), [("mxfp8", "_scale_inv"), ("compressed-tensors", "_scale")])
def test_blocks_of_32_take_every_linear_weight(name: str, format: str, suffix: str) -> None:
    """All sides of published models are multiples of 32, those of Nemotron 3 Nano's experts and in_proj too."""
    config, table = CHECKPOINTS[name]
    made = plan(config, table, Recipe(format=format, granularity="mx"))
    assert {t.name: t.quantize for t in made.tensors} == {n: fate == FP8 for n, (_, fate) in table.items()}
    entries = {entry.name: entry for entry in made.shard_tasks[0].layout.entries}
    for tensor, (shape, fate) in table.items():
        if fate == FP8:
            scale = entries[f"{tensor}{suffix}"]
            assert (scale.dtype, scale.shape) == ("U8", (shape[0], shape[1] // 32))


def test_tensor_parallel_sizes_of_blocks_of_32() -> None:
    """Nemotron 3 Nano: the 1856 inputs of an expert are 58 blocks, which two devices share, and four do not."""
    config, table = CHECKPOINTS["Nemotron-3-Nano-30B-A3B"]
    for recipe, engine in ((Recipe(granularity="mx"), "vLLM"), (Recipe(format="mxfp8"), "SGLang")):
        (found,) = [each for each in plan(config, table, recipe).engines if each.engine == engine]
        assert found.reads
        assert found.note == "with a tensor-parallel size of at most 2"


def test_an_unknown_family_has_the_general_rules() -> None:
    for table in (LLAMA, MIXTRAL, QWEN3_MOE):
        made = plan({"model_type": "unheard_of"}, table)
        assert {t.name: t.quantize for t in made.tensors} == {n: fate == FP8 for n, (_, fate) in table.items()}
        assert made.notices == ()


def test_a_family_is_known_by_its_architecture_alone() -> None:
    assert plan({"model_type": "renamed", "architectures": ["DeciLMForCausalLM"]}, NAS).notices == ()


def test_a_family_takes_encoders_away_from_the_default_rule() -> None:
    table: Table = {
        **{f"language_model.{n}": entry for n, entry in LLAMA.items()},
        **all_of(attention("vision_model.layers.0.self_attn.", 1408, 1408, 1408), LISTED),
        "multi_modal_projector.linear_proj.weight": ((4096, 1408), LISTED),
    }
    made = plan({"model_type": "llama4"}, table)
    assert {t.name: t.quantize for t in made.tensors} == {n: fate == FP8 for n, (_, fate) in table.items()}


# ---- stacks of experts ----

EXPERTS, HIDDEN, INNER = 3, 16, 24
GATE_UP, DOWN = "model.layers.0.{}.experts.gate_up_proj", "model.layers.0.{}.experts.down_proj"


def stacked(block: str, transposed: bool) -> tuple[Tensors, Tensors]:
    """A checkpoint with the experts of a layer in two stacks, and the same matrices one by one."""
    gate_up, down = weight(EXPERTS, 2 * INNER, HIDDEN, seed=1), weight(EXPERTS, HIDDEN, INNER, seed=2)
    rest = {"model.embed_tokens.weight": weight(8, HIDDEN), "model.layers.0.self_attn.o_proj.weight": weight(16, 16)}
    apart: Tensors = {}
    for expert in range(EXPERTS):
        stem = f"model.layers.0.{block}.experts.{expert}."
        apart[f"{stem}gate_proj.weight"] = gate_up[expert, :INNER]
        apart[f"{stem}up_proj.weight"] = gate_up[expert, INNER:]
        apart[f"{stem}down_proj.weight"] = down[expert]
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    return {GATE_UP.format(block): gate_up, DOWN.format(block): down, **rest}, {**apart, **rest}


@pytest.mark.parametrize(
    ("kind", "block", "transposed"), [("qwen3_moe", "mlp", False), ("llama4", "feed_forward", True)]
)
def test_stacked_experts_become_the_matrices_that_engines_load(
    tmp_path: Path, kind: str, block: str, transposed: bool
) -> None:
    """The result is what slicing the stacks in torch and quantizing each matrix gives; index and config match."""
    stacks, apart = stacked(block, transposed)
    shards = {
        "model-00001-of-00002.safetensors": {n: t for n, t in stacks.items() if "down" not in n},
        "model-00002-of-00002.safetensors": {n: t for n, t in stacks.items() if "down" in n},
    }
    write_checkpoint(tmp_path / "source", shards, config={"model_type": kind})
    quantize_repo(tmp_path / "source", tmp_path / "result", TENSOR, device="cpu", threads=2)
    found: Tensors = {}
    index = json.loads((tmp_path / "result" / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in shards:
        held = read_tensors(tmp_path / "result" / shard)
        assert all(index[name] == shard for name in held)
        found |= held
    assert index.keys() == found.keys()
    wanted: Tensors = {}
    for name, tensor in apart.items():
        if "_proj" in name:
            wanted[name], wanted[f"{name}_scale"] = reference.quantize(tensor.contiguous())
        else:
            wanted[name] = tensor
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in wanted.items())
    quantization = json.loads((tmp_path / "result" / "config.json").read_text())["quantization_config"]
    assert quantization["ignored_layers"] == ["lm_head"]


def test_a_stack_of_an_unknown_family_stays_unless_it_is_named() -> None:
    stacks, _ = stacked("mlp", transposed=False)
    table: Table = {name: (tuple(tensor.shape), "") for name, tensor in stacks.items()}
    made = plan({"model_type": "unheard_of"}, table)
    assert {t.name for t in made.tensors if t.quantize} == {"model.layers.0.self_attn.o_proj.weight"}
    (left,) = [left for left in made.share.left if "stack" in left.reason]
    assert set(left.names) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert made.share.is_low
    with pytest.raises(StackedExpertsError) as caught:
        plan({"model_type": "unheard_of"}, table, Recipe(also_select=("gate_up",)))
    assert GATE_UP.format("mlp") in str(caught.value)
    assert "--ignore" in str(caught.value)


def test_a_stack_that_is_ignored_stays_in_one_piece() -> None:
    """Of any family, and the layer's other stack with it; the config names the module that holds them."""
    stacks, _ = stacked("mlp", transposed=False)
    table: Table = {n: (tuple(t.shape), FP8 if "o_proj" in n else STAYS) for n, t in stacks.items()}
    for kind, pattern in (("unheard_of", r"\.experts\."), ("qwen3_moe", r"\.experts\."), ("qwen3_moe", "experts.down")):
        made = plan({"model_type": kind}, table, TENSOR.model_copy(update={"ignore": (pattern,)}))
        assert written(made)["ignored_layers"][:2] == ["model.layers.0.mlp.experts", "lm_head"]
        assert {t.name: t.quantize for t in made.tensors} == {n: fate == FP8 for n, (_, fate) in table.items()}
        assert {e.name for e in made.shard_tasks[0].layout.entries} >= set(table)


def test_a_stack_that_stays_is_found_by_the_name_of_its_first_expert() -> None:
    """compressed-tensors in vLLM asks whether ``experts.0.gate_proj`` is ignored, whatever the checkpoint calls it."""
    stacks, apart = stacked("mlp", transposed=False)
    table: Table = {n: (tuple(t.shape), FP8 if "o_proj" in n else STAYS) for n, t in stacks.items()}
    entries = written(plan({"model_type": "qwen3_moe"}, table, CHANNEL.model_copy(update={"ignore": ("experts",)})))
    patterns = [entry.removeprefix("re:") for entry in entries["ignore"] if entry.startswith("re:")]
    for name in apart:
        module = name.removesuffix(".weight")
        assert any(re.match(pattern, module) for pattern in patterns) == (".experts." in name)


def test_rows_that_do_not_halve_are_no_gate_and_up() -> None:
    stack = GATE_UP.format("mlp")
    table: Table = {stack: ((2, 37, 16), ""), "model.layers.0.self_attn.o_proj.weight": ((16, 16), FP8)}
    assert [t.name for t in plan({"model_type": "qwen3_moe"}, table).tensors if not t.quantize] == [stack]


def test_a_stack_of_integers_is_no_stack_of_experts() -> None:
    """A stack that cannot be quantized is not split. It keeps its name and its bytes."""
    name = GATE_UP.format("mlp")
    views = (contiguous("f", name, "I8", (2, 8, 4), 0), contiguous("f", "o_proj.weight", "BF16", (4, 4), 64))
    source = Inventory("ints", (Shard(ONE, 100, None, views),), {}, {"model_type": "unheard_of"}, (), ())
    made = make_plan(source, Recipe(), 1 << 30, 1)
    assert {t.name: t.quantize for t in made.tensors} == {name: False, "o_proj.weight": True}
