"""Derive the model's dimensions and config.json from ``model_config.yaml``.

Source of the keys: NeMo's ``megatron_gpt_config.yaml`` and the ``NemotronConfig`` of transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8.errors import excerpt
from nemotron_fp8.errors.nemo import HeadsError, NemoConfigError, UnsupportedModelError
from nemotron_fp8.untrusted.guard import guarded
from nemotron_fp8.untrusted.yaml_text import as_flag, as_integer, as_number, load_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.untrusted.yaml_text import Tree

MAX_REFERENCE = 200
"""Longest text of a reference to another key, in characters."""
MAX_COUNT = 1 << 32
"""Cap on every count in the config, so that a product of three counts is a small integer."""
_REFERENCE = re.compile(r"\$\{(?:\.|model\.)?(\w+)\}", re.ASCII)

TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Model:
    """Dimensions and settings of a Nemotron-4.

    Attributes:
        layers: decoder layers.
        hidden: hidden size.
        inner: inner size of the MLP.
        heads, groups: attention heads, and query groups (key/value heads) that divide them.
        head_dim: elements of a head.
        norm_eps: epsilon of the layer norms.
        rotary_factor: rotated part of a head.
        rotary_base: base of the rotation's frequencies.
        positions: longest context, in tokens.
        tied: True if the output layer is the embedding.
        init_std: standard deviation of the initialization.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    head_dim: int
    norm_eps: float
    rotary_factor: float
    rotary_base: float
    positions: int
    tied: bool
    init_std: float


def load_yaml(data: bytes, file: str) -> dict[str, Tree]:
    """Parse the text of a model config: texts, lists and mappings, without aliases.

    Raises:
        NemoConfigError: the text breaks a rule or a limit of `nemotron_fp8.untrusted.yaml_text`, or is empty.
    """
    tree = load_mapping(data, lambda problem: NemoConfigError(file, problem))
    if not tree:
        raise NemoConfigError(file, "not a mapping of keys to values")
    return tree


def read_model(config: Mapping[str, Tree], file: str) -> Model:
    """Check a model config and return its dimensions and settings.

    Raises:
        NemoConfigError: a value is missing or malformed.
        HeadsError: heads do not divide.
        UnsupportedModelError: the model is not a Nemotron-4.
    """
    with guarded(lambda problem: NemoConfigError(file, problem)):
        return _checked(_Getter(config, file), file)


def _checked(get: _Getter, file: str) -> Model:
    """Check the values of a model config."""
    _refuse_others(get)
    hidden, heads = get.count("hidden_size"), get.count("num_attention_heads")
    groups = get.count("num_query_groups", heads)
    if heads % groups:
        problem = f"{heads} attention heads do not divide into {groups} query groups"
        raise HeadsError(file, heads, groups, hidden, problem)
    if get("kv_channels") is None and hidden % heads:
        problem = f"hidden_size {hidden} does not divide into {heads} heads, and kv_channels is not set"
        raise HeadsError(file, heads, groups, hidden, problem)
    return Model(
        layers=get.count("num_layers"),
        hidden=hidden,
        inner=get.count("ffn_hidden_size", 4 * hidden),
        heads=heads,
        groups=groups,
        head_dim=get.count("kv_channels", hidden // heads),
        norm_eps=get.number("layernorm_epsilon", 1e-5),
        rotary_factor=get.number("rotary_percentage", 1.0),
        rotary_base=get.number("rotary_base", 10000.0),
        positions=get.count("max_position_embeddings", get.count("encoder_seq_length", 4096)),
        tied=get.flag("share_embeddings_and_output_weights", True),
        init_std=get.number("init_method_std", 0.02),
    )


def hf_config(model: Model, vocabulary: int, dtype: str, bos: int | None = 2, eos: int | None = 3) -> dict[str, Any]:
    """Return config.json of a NemotronForCausalLM.

    Args:
        model: dimensions and settings of the model.
        vocabulary: rows of the embedding, padding included, because engines read the shape from this key.
        dtype: safetensors name of the dtype of the weights.
        bos, eos: ids of the tokenizer's tokens for the beginning and the end of a text.
    """
    return {
        "architectures": ["NemotronForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "head_dim": model.head_dim,
        "hidden_act": "relu2",
        "hidden_size": model.hidden,
        "initializer_range": model.init_std,
        "intermediate_size": model.inner,
        "max_position_embeddings": model.positions,
        "mlp_bias": False,
        "model_type": "nemotron",
        "norm_eps": model.norm_eps,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.groups,
        "partial_rotary_factor": model.rotary_factor,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": model.tied,
        "torch_dtype": TORCH_DTYPES.get(dtype, "bfloat16"),
        "use_cache": True,
        "vocab_size": vocabulary,
    }


class _Getter:
    """Values of a config, with ``${key}`` references resolved and texts converted to the type of the field."""

    def __init__(self, config: Mapping[str, Tree], file: str) -> None:
        self._config, self.file = config, file

    def __call__(self, key: str) -> Tree:
        """Return the text, list or mapping under a key; None if it is missing or null."""
        value = self._config.get(key)
        for _ in range(8):
            found = _REFERENCE.fullmatch(value) if isinstance(value, str) and len(value) <= MAX_REFERENCE else None
            if not found:
                return value
            value = self._config.get(found.group(1))
        raise NemoConfigError(self.file, "its ${...} references are circular or nested too deeply", key)

    def count(self, key: str, default: int | None = None) -> int:
        """Return an integer of at least 1."""
        value = self(key)
        if value is None:
            if default is None:
                raise NemoConfigError(self.file, "missing", key)
            return default
        count = as_integer(value)
        if count is None or not 1 <= count <= MAX_COUNT:
            raise NemoConfigError(self.file, f"{excerpt(value)} is not an integer from 1 to {MAX_COUNT:,}", key)
        return count

    def number(self, key: str, default: float) -> float:
        """Return a positive number."""
        value = self(key)
        number = default if value is None else as_number(value)
        if number is None or not 0 < number < 1e30:
            raise NemoConfigError(self.file, f"{excerpt(value)} is not a positive number", key)
        return number

    def flag(self, key: str, default: bool) -> bool:
        """Return a truth value."""
        value = self(key)
        flag = default if value is None else as_flag(value)
        if flag is None:
            raise NemoConfigError(self.file, f"{excerpt(value)} is neither true nor false", key)
        return flag


def _refuse_others(get: _Getter) -> None:
    """Reject settings with which a model would compute something other than NemotronForCausalLM."""
    norm, experts, scaled = get("normalization"), get("num_moe_experts"), get("seq_len_interpolation_factor")
    name = norm.lower() if isinstance(norm, str) else "layernorm1p" if norm is None else ""
    zero_centered = get.flag("layernorm_zero_centered_gamma", False) or get.flag("apply_layernorm_1p", False)
    rules: tuple[tuple[str, bool, str], ...] = (
        ("normalization", name == "layernorm1p" or (name == "layernorm" and zero_centered), "must be layernorm1p"),
        ("activation", get("activation") in (None, "squared-relu"), "must be squared-relu"),
        ("position_embedding_type", get("position_embedding_type") in (None, "rope"), "must be rope"),
        ("bias", not get.flag("bias", False), "linear layers with biases"),
        ("transformer_block_type", get("transformer_block_type") in (None, "pre_ln"), "must be pre_ln"),
        ("num_moe_experts", experts is None or as_integer(experts) in (0, 1), "experts"),
        ("qk_layernorm", not get.flag("qk_layernorm", False), "layer norms of queries and keys"),
        ("seq_len_interpolation_factor", scaled is None or as_number(scaled) == 1, "scaled positions"),
        ("window_size", get("window_size") is None, "a sliding window"),
    )
    for key, supported, problem in rules:
        if not supported:
            raise UnsupportedModelError(key, f"{excerpt(get(key))} is not supported ({problem})")
