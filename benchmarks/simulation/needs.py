"""Calculated, not measured: the tables of docs/evaluate.md, ``python -m benchmarks.simulation.needs [--check]``.

Names and shapes of the tensors are those of the published checkpoints. With ``--check`` nothing is written, and a page
that differs from the calculation is an error.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

from benchmarks.common import ROOT
from benchmarks.drawing import table
from benchmarks.simulation.model import nemotron_340b_tensors
from nemotron_fp8.checkpoint.dtypes import nbytes
from nemotron_fp8.checkpoint.inventory import SINGLE, Inventory, Shard
from nemotron_fp8.checkpoint.tensor_view import contiguous
from nemotron_fp8.inference.needs import ASSUMED, DEFAULT_LENGTH, DEFAULT_SEQUENCES, evaluation_needs, predict
from tools.pages import fill_page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import TypeAlias

    from nemotron_fp8.inference.needs import EvaluationNeeds

    Tensors: TypeAlias = Iterator[tuple[str, str, tuple[int, ...]]]  # name, dtype and shape of each

DOCUMENT = ROOT / "docs" / "evaluate.md"
BEGIN, END = "<!-- calculated: benchmarks/simulation/needs.py -->", "<!-- end of calculated figures -->"
SAMPLES = ((16, 512), (64, 512), (128, 2048))
"""Sequences and tokens of the samples whose arithmetic is listed."""


def inventory(name: str, config: Mapping[str, Any], tensors: Tensors) -> Inventory:
    """Return the contents of a checkpoint without its files."""
    listed = list(tensors)
    offsets = accumulate((nbytes(dtype, shape) for _, dtype, shape in listed), initial=0)
    views = tuple(
        contiguous(SINGLE, tensor, dtype, shape, offset)
        for (tensor, dtype, shape), offset in zip(listed, offsets, strict=False)
    )
    return Inventory(name, (Shard(SINGLE, sum(view.nbytes for view in views), None, views),), None, config, (), ())


def nemotron() -> Inventory:
    """Return nvidia/Nemotron-4-340B-Instruct, as this library converts it."""
    config = {
        "model_type": "nemotron",
        "architectures": ["NemotronForCausalLM"],
        "vocab_size": 256000,
        "hidden_size": 18432,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 192,
        "intermediate_size": 73728,
        "torch_dtype": "bfloat16",
    }
    return inventory("Nemotron-4-340B", config, ((name, "BF16", shape) for name, shape in nemotron_340b_tensors()))


def llama(name: str, config: dict[str, Any]) -> Inventory:
    """Return a model with the tensors of Llama."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]

    def tensors() -> Tensors:
        yield from _ends(config)
        for layer in range(config["num_hidden_layers"]):
            stem = f"model.layers.{layer}."
            yield from _attention(stem, config)
            yield from _mlp(f"{stem}mlp.", hidden, inner)

    return inventory(name, {"model_type": "llama", "torch_dtype": "bfloat16", **config}, tensors())


def llama_405b() -> Inventory:
    """Return meta-llama/Llama-3.1-405B."""
    config = {
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "intermediate_size": 53248,
    }
    return llama("Llama 3.1 405B", config)


def smollm2() -> Inventory:
    """Return HuggingFaceTB/SmolLM2-135M."""
    config = {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
    }
    return llama("SmolLM2-135M", config)


def qwen3_moe() -> Inventory:
    """Return Qwen/Qwen3-30B-A3B."""
    config = {
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }

    def tensors() -> Tensors:
        yield from _ends(config)
        for layer in range(48):
            stem = f"model.layers.{layer}."
            yield from _attention(stem, config)
            yield from ((f"{stem}self_attn.{part}_norm.weight", "BF16", (128,)) for part in "qk")
            yield f"{stem}mlp.gate.weight", "BF16", (128, 2048)
            for expert in range(128):
                yield from _mlp(f"{stem}mlp.experts.{expert}.", 2048, 768)

    return inventory("Qwen3-30B-A3B", config, tensors())


def deepseek_v3() -> Inventory:
    """Return deepseek-ai/DeepSeek-V3: FP8 in blocks, with a layer for multi-token prediction."""
    hidden, heads, vocabulary = 7168, 128, 129280
    config = {
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": 61,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }

    def attention(stem: str) -> Tensors:
        yield from _in_blocks(f"{stem}q_a_proj", 1536, hidden)
        yield from _in_blocks(f"{stem}q_b_proj", heads * 192, 1536)
        yield from _in_blocks(f"{stem}kv_a_proj_with_mqa", 512 + 64, hidden)
        yield from _in_blocks(f"{stem}kv_b_proj", heads * 256, 512)
        yield from _in_blocks(f"{stem}o_proj", hidden, heads * 128)
        yield f"{stem}q_a_layernorm.weight", "BF16", (1536,)
        yield f"{stem}kv_a_layernorm.weight", "BF16", (512,)

    def mlp(stem: str, inner: int) -> Tensors:
        yield from _in_blocks(f"{stem}gate_proj", inner, hidden)
        yield from _in_blocks(f"{stem}up_proj", inner, hidden)
        yield from _in_blocks(f"{stem}down_proj", hidden, inner)

    def tensors() -> Tensors:
        yield from _ends(config)
        for layer in range(62):
            stem = f"model.layers.{layer}."
            yield from ((f"{stem}{norm}_layernorm.weight", "BF16", (hidden,)) for norm in ("input", "post_attention"))
            yield from attention(f"{stem}self_attn.")
            if layer < 3:
                yield from mlp(f"{stem}mlp.", 18432)
                continue
            yield f"{stem}mlp.gate.weight", "BF16", (256, hidden)
            yield f"{stem}mlp.gate.e_score_correction_bias", "F32", (256,)
            yield from mlp(f"{stem}mlp.shared_experts.", 2048)
            for expert in range(256):
                yield from mlp(f"{stem}mlp.experts.{expert}.", 2048)
        stem = "model.layers.61."
        yield from ((f"{stem}{name}.weight", "BF16", (hidden,)) for name in ("enorm", "hnorm", "shared_head.norm"))
        yield f"{stem}eh_proj.weight", "BF16", (hidden, 2 * hidden)
        yield from (
            (f"{stem}{name}.weight", "BF16", (vocabulary, hidden)) for name in ("embed_tokens", "shared_head.head")
        )

    return inventory("DeepSeek-V3 (FP8)", config, tensors())


MODELS: dict[str, Callable[[], Inventory]] = {
    "SmolLM2-135M": smollm2,
    "Qwen3-30B-A3B": qwen3_moe,
    "Nemotron-4-340B": nemotron,
    "Llama 3.1 405B": llama_405b,
    "DeepSeek-V3 (FP8)": deepseek_v3,
}


def _ends(config: Mapping[str, Any]) -> Tensors:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", "BF16", (vocabulary, hidden)
    yield "model.norm.weight", "BF16", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", "BF16", (vocabulary, hidden)


def _attention(stem: str, config: Mapping[str, Any]) -> Tensors:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    queries, keys = heads * size, config["num_key_value_heads"] * size
    for part, shape in (
        ("q", (queries, hidden)),
        ("k", (keys, hidden)),
        ("v", (keys, hidden)),
        ("o", (hidden, queries)),
    ):
        yield f"{stem}self_attn.{part}_proj.weight", "BF16", shape
    for norm in ("input", "post_attention"):
        yield f"{stem}{norm}_layernorm.weight", "BF16", (hidden,)


def _mlp(stem: str, hidden: int, inner: int) -> Tensors:
    for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield f"{stem}{part}_proj.weight", "BF16", shape


def _in_blocks(module: str, rows: int, columns: int) -> Tensors:
    yield f"{module}.weight", "F8_E4M3", (rows, columns)
    yield f"{module}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def memory_table(needs: Mapping[str, EvaluationNeeds]) -> str:
    """Return a row for each model: the parts of the memory."""
    rows = [["", "largest layer", "hidden states", "buffers of a sequence", "slice of the output layer", "memory"]]
    for name, found in needs.items():
        sizes = (
            *(found.layer_bytes, found.hidden_bytes, found.forward_bytes + found.score_bytes),
            *(found.head_bytes, found.memory_bytes),
        )
        rows.append([name, *map(gigabytes, sizes)])
    return table(rows)


def time_table(needs: Mapping[str, EvaluationNeeds]) -> str:
    """Return a row for each model: bytes to read, arithmetic, and the time on the reference devices."""
    rows = [["", "source", "result", "a checkpoint", *(rates.device for rates in ASSUMED)]]
    for name, found in needs.items():
        times = (predict(found, rates).seconds or 0.0 for rates in ASSUMED)
        sizes = (found.source_read, *found.result_reads)
        rows.append([name, *map(gigabytes, sizes), operations(found.stream_flops), *map(duration, times)])
    return table(rows)


def sample_table(source: Inventory) -> str:
    """Return a row for each sample: its arithmetic and the time of a run."""
    rows = [["sample of tokens", "a checkpoint", "memory", *(rates.device for rates in ASSUMED)]]
    for sequences, length in SAMPLES:
        found = evaluation_needs(source, 1, sequences, length)
        times = (predict(found, rates).seconds or 0.0 for rates in ASSUMED)
        figures = (operations(found.stream_flops), gigabytes(found.memory_bytes), *map(duration, times))
        rows.append([f"{sequences} x {length:,}", *figures])
    return table(rows)


def gigabytes(count: int) -> str:
    """Return a number of bytes in GB or MB, with three digits."""
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def operations(count: int) -> str:
    """Return a number of floating-point operations with two digits."""
    value, unit = (count / 1e15, "PFLOP") if count >= 1e15 else (count / 1e12, "TFLOP")
    return f"{value:.{1 if value < 100 else 0}f} {unit}"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.{1 if seconds < 10 else 0}f} s"


def figures() -> str:
    """Return the generated part of the page."""
    sources = {name: build() for name, build in MODELS.items()}
    needs = {name: evaluation_needs(source) for name, source in sources.items()}
    speeds = "; ".join(
        f"{rates.device}: {rates.flops / 1e12:g} TFLOP/s and a disk of {(rates.read or 0.0) / 1e9:g} GB/s"
        for rates in ASSUMED
    )
    return "\n\n".join(
        [
            f"A source and one result, {DEFAULT_SEQUENCES} sequences of {DEFAULT_LENGTH} tokens.",
            memory_table(needs),
            f"Predicted times, of both checkpoints together. Assumed speeds: {speeds}.",
            time_table(needs),
            "Nemotron-4-340B and one result, with other samples:",
            sample_table(sources["Nemotron-4-340B"]),
        ]
    )


def main() -> None:
    fill_page(DOCUMENT, BEGIN, END, figures, __doc__, "the calculation")


if __name__ == "__main__":
    main()
