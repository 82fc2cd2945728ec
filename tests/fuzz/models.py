"""Inputs of other models: families, names and shapes of tensors put together at random, and the code beside them."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any

from tests.fuzz.commands import reading
from tests.fuzz.json_mutations import mutate_json
from tests.fuzz.shards import BYTES, shard_of
from tests.fuzz.values import is_big, mutate_bytes, pick, text

if TYPE_CHECKING:
    from random import Random

    from tests.fuzz.seeds import Seeds
    from tests.fuzz.shards import Tensor
    from tests.fuzz.tree import Input

STEMS = (
    "model.", "", "transformer.", "language_model.model.", "model.language_model.", "model.text_model.",
    "thinker.model.", "backbone.", "decoder.", "encoder.", "vision_tower.", "mtp.", "model.model.",
    "base_model.model.model.", "model..", ".",
)  # fmt: skip
LAYERS = ("layers", "h", "blocks", "block", "decoder.layers", "encoder.layers", "layers.layers", "mtp.layers", "Layers")
MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.qkv_proj", "attn.c_attn",
    "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.indexer.wq_b",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_up_proj", "mlp.fc1", "mlp.experts.{n}.gate_proj",
    "mlp.experts.{n}.up_proj", "mlp.experts.{n}.down_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    "mlp.experts.{n}.w1", "mlp.gate", "mlp.router", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate",
    "block_sparse_moe.experts.{n}.w2", "mixer.in_proj", "block_sparse_moe.input_linear", "mixer.out_proj",
    "mixer.conv1d", "mixer.A_log", "mixer.experts.{n}.up_proj", "input_layernorm", "self_attn.rotary_emb.inv_freq",
    "mlp.experts", "mixer", "self_attn", "experts.{n}", "lora_A.default", "mlp.experts.w13_weight",
    "feed_forward.experts.gate_up_proj", "feed_forward.router", "linear_attn.in_proj_qkvz",
)  # fmt: skip
ENDS = (
    ".weight",
    ".weight",
    ".weight",
    "",
    ".bias",
    ".weight_scale",
    ".weight_scale_inv",
    ".qweight",
    ".weight.",
    ".Weight",
)
OTHERS = (
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "score.weight", "score.0.weight", "wte.weight",
    "vision_tower.blocks.0.attn.qkv.weight", "multi_modal_projector.linear_1.weight", "embed_out.weight",
    "output.weight", "model.layers.0", "0", "weight", ".weight", "layers", "a.0.weight", "0.0.0",
    "model.layers.0.0.weight", "x" * 512,
)  # fmt: skip
NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "10",
    "00",
    "01",
    "-1",
    "9" * 20,
    "9" * 300,
    "\u0663",
    "\uff11",
    "1.5",
    "0x1",
    "",
    "\xb2",
)
TYPES = (
    "nemotron", "nemotron_h", "nemotron-nas", "llama", "mixtral", "qwen2_moe", "qwen3_moe", "gemma3", "gemma3n", "phi3",
    "gpt2", "deepseek_v3", "deepseek_v4", "granitemoe", "llama4", "llama4_text", "minicpm3", "falcon", "bloom",
    "zamba2", "whisper", "t5gemma", "llava", "qwen3_vl_moe", "step3p5", "mistral3", "modernbert-decoder", "gpt_oss",
    "qwen3_next", "blip-2", "x", "",
)  # fmt: skip
PARTS = (
    "text_config",
    "vision_config",
    "llm_config",
    "audio_config",
    "encoder",
    "decoder",
    "thinker_config",
    "language_config",
)
CODE = (
    "from .other_x import y", "from .other_x import (y,\n z)", "from . import other_x",
    "from . import other_x as o, modeling_x", "from .a.b import c", "from .. import x", "from ..x import y",
    "from .missing import y", "from . import *", "import os", "from .other_x import y  # (",
    "    from .other_x import y", "from .é import y", "from .other_x import (", "from . import (",
    "from .other_x import \\\n    y", "from . other_x import y", '"""\nfrom .other_x import y\n"""',
    "from .other_x import " + "y, " * 500, "from . import " + "(" * 200, "from . import (" + "a, " * 5000 + ")",
    "from .other_x import y; from . import z", "\0", "\f", "from . import a\0b", "from .con import x",
    "from ." + "x" * 300 + " import y", "from .modeling_x import y", "\ufeff", "from .__init__ import y",
    "from .other_x import y\r\n", "# -*- coding: utf-7 -*-", "from . import " + "a." * 3000 + "b",
    "from . import (" + "[" * 5000, "from . import (" + "-" * 50_000 + "1)", "from . import (" + "not " * 20_000 + "1)",
)  # fmt: skip
REFERENCES = (
    "modeling_x.XModel", "modeling_x", "modeling_x.", ".XModel", "", "a.b.c", "owner/name--modeling_x.XModel", "--",
    "../x.Y", "/etc/passwd.X", "é.X", "con.X", "other_x.y", "x" * 300 + ".X", "modeling_x.XModel\n", "a/b.C", "a\\b.C",
    "~.x", "missing.X",
)  # fmt: skip


def name(chance: Random, *, odd: bool) -> str:
    """Return the name of a tensor; an odd one may look like a part of a quantized weight."""
    if chance.random() < 0.12:
        return pick(chance, OTHERS)
    number = str(chance.randrange(3)) if chance.random() < 0.8 else pick(chance, NUMBERS)
    expert = str(chance.randrange(4)) if chance.random() < 0.8 else pick(chance, NUMBERS)
    stem = pick(chance, STEMS) if chance.random() < 0.3 else "model."
    layers = pick(chance, LAYERS) if chance.random() < 0.2 else "layers"
    end = pick(chance, ENDS) if odd and chance.random() < 0.3 else ".weight"
    return f"{stem}{layers}.{number}.{pick(chance, MODULES).replace('{n}', expert)}{end}"


def tensor(chance: Random, *, odd: bool) -> Tensor:
    """Return a small tensor of a shape that weights have, or nearly so; an odd one may have any dtype."""
    side = (1, 2, 4, 8, 16, 16, 32)
    shape = [pick(chance, side) for _ in range(pick(chance, (0, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4)))]
    if chance.random() < 0.08 and shape:
        shape[chance.randrange(len(shape))] = 0
        if chance.random() < 0.3:
            shape[chance.randrange(len(shape))] = pick(chance, (1 << 20, 1 << 31, 1 << 40))
            shape = shape if 0 in shape else [*shape, 0]
    dtype = pick(
        chance, ("BF16",) * 5 + (("F16", "F32", "F64", "F8_E4M3", "I64", "U8", "BOOL") if odd else ("F16", "F32"))
    )
    fill = pick(chance, (b"\x3c", b"\x3f\x3c", b"\0", b"\x01\x3d") + ((b"\xff", b"\x80\x7f") if odd else ()))
    size = prod(shape) * BYTES[dtype]
    return dtype, shape, (fill * size)[:size]


def family(chance: Random, seeds: Seeds) -> Input:
    """Write a model of tensors with random names, under a config of a known or unknown family."""
    count = pick(chance, (1, 3, 10, 30, 100)) if not is_big(chance) else 4000
    tensors: dict[str, Tensor] = {}
    odd = chance.random() < 0.15
    same = ("BF16", [16, 16], b"\x01\x3d" * 256) if chance.random() < 0.5 else tensor(chance, odd=odd)
    for _ in range(count):
        tensors[name(chance, odd=odd)] = same if chance.random() < 0.6 else tensor(chance, odd=odd)
    if chance.random() < 0.3:  # every module of a layer, so that what engines fuse is complete
        for module in MODULES:
            for expert in "0123":
                tensors[f"model.layers.0.{module.replace('{n}', expert)}.weight"] = same
    config: dict[str, Any] = {
        "model_type": pick(chance, TYPES),
        "architectures": ["XForCausalLM"],
        "num_hidden_layers": 2,
    }
    for key in ("num_experts", "n_routed_experts", "num_local_experts", "hidden_size", "num_nextn_predict_layers"):
        if chance.random() < 0.3:
            config[key] = chance.randrange(5)
    if chance.random() < 0.3:
        config[pick(chance, PARTS)] = {"model_type": pick(chance, TYPES), "num_experts": 4}
    if chance.random() < 0.1:
        config["tie_word_embeddings"] = True
    data = json.dumps(config).encode()
    source = {"config.json": mutate_json(chance, data) if chance.random() < 0.2 else data}
    if chance.random() < 0.7 or count < 3:
        return reading(chance, {**source, "model.safetensors": shard_of(tensors, None)}, seeds)
    names = list(tensors)
    files = {f"model-{i + 1:05d}-of-00003.safetensors": {n: tensors[n] for n in names[i::3]} for i in range(3)}
    shards = {file: shard_of(found, {"format": "pt"}) for file, found in files.items()}
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, found in files.items() for n in found}}
    if chance.random() < 0.8:
        shards["model.safetensors.index.json"] = json.dumps(index).encode()
    return reading(chance, {**source, **shards}, seeds)


def code(chance: Random, seeds: Seeds) -> Input:
    """Change the code beside a checkpoint, and what its configs name of it."""
    source = dict(seeds.source)
    for _ in range(pick(chance, (1, 1, 2, 3))):
        file = pick(chance, [found for found in source if found.endswith(".py")])
        old = source[file]
        assert isinstance(old, bytes)
        lines = [pick(chance, CODE) for _ in range(pick(chance, (1, 2, 5)))]
        made = "\n".join(lines) * (pick(chance, (1, 1, 1, 100)) if not is_big(chance) else 20)
        source[file] = made.encode("utf-8", "surrogatepass") if chance.random() < 0.8 else mutate_bytes(chance, old)
        if chance.random() < 0.1:
            source[f"{pick(chance, ('x', 'é', '__init__', 'con', 'a b', 'setup'))}.py"] = source.pop(file)
    for file, keys in (("config.json", ("AutoConfig", "AutoModel")), ("tokenizer_config.json", ("AutoTokenizer", "x"))):
        if chance.random() < 0.5:
            old = source[file]
            assert isinstance(old, bytes)
            value = json.loads(old)
            values = [pick(chance, REFERENCES) if chance.random() < 0.9 else text(chance) for _ in range(3)]
            value["auto_map"] = pick(
                chance, ({keys[0]: values[0], keys[1]: values[1:]}, values, values[0], {values[0]: values[1]})
            )
            source[file] = json.dumps(value).encode()
    if is_big(chance):
        source["modeling_x.py"] = (pick(chance, CODE) + "\n").encode("utf-8", "surrogatepass") * 20_000
    return reading(chance, source, seeds)
