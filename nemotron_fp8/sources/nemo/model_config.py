"""Derive the model's dimensions and config.json from ``model_config.yaml``.

Source of the keys: NeMo's ``megatron_gpt_config.yaml`` and the ``NemotronConfig`` of transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemotron_fp8.errors.nemo import HeadsError, NemoConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping


MAX_YAML_BYTES = 4_000_000
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


def load_yaml(data: bytes, file: str) -> dict[str, Any]:
    """Parse a YAML mapping of plain values; reject aliases, which can expand a short text into a huge one.

    Raises:
        NemoConfigError: the text is too long, not YAML, not a mapping, or has aliases or tags.
    """
    import yaml

    if len(data) > MAX_YAML_BYTES:
        raise NemoConfigError(file, f"the file has {len(data):,} bytes, the limit is {MAX_YAML_BYTES:,}")
    try:
        for event in yaml.parse(data, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise NemoConfigError(file, "YAML aliases are not supported; NeMo writes none")
        value = yaml.safe_load(data)
    except NemoConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise NemoConfigError(file, f"not YAML of plain values: {detail}") from None
    if type(value) is not dict:
        raise NemoConfigError(file, "not a mapping of keys to values")
    return value


def read_model(config: Mapping[str, Any], file: str) -> Model:
    """Check a model config and return its dimensions and settings.

    Raises:
        NemoConfigError: a value is missing or malformed.
        HeadsError: heads do not divide.
        UnsupportedModelError: the model is not a Nemotron-4.
    """
    get = _Getter(config, file)
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
        tied=get("share_embeddings_and_output_weights", True) is True,
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
    """Values of a config, with ``${key}`` references resolved and types checked."""

    def __init__(self, config: Mapping[str, Any], file: str) -> None:
        self._config, self.file = config, file

    def __call__(self, key: str, default: Any = None) -> Any:
        value = self._config.get(key)
        for _ in range(8):
            found = _REFERENCE.fullmatch(value) if type(value) is str else None
            if not found:
                return default if value is None else value
            value = self._config.get(found.group(1))
        raise NemoConfigError(self.file, "its ${...} references are circular or nested too deeply", key)

    def count(self, key: str, default: int | None = None) -> int:
        """Return an integer of at least 1."""
        value = self(key, default)
        if value is None:
            raise NemoConfigError(self.file, "missing", key)
        if type(value) is not int or not 1 <= value <= MAX_COUNT:
            raise NemoConfigError(self.file, f"{value!r:.60} is not an integer from 1 to {MAX_COUNT:,}", key)
        return value

    def number(self, key: str, default: float) -> float:
        """Return a positive number. YAML reads ``1e-5``, without a point, as text."""
        value = self(key, default)
        try:
            number = float(value) if type(value) in (int, float, str) else -1.0
        except (ValueError, OverflowError):
            number = -1.0
        if not 0 < number < 1e30:
            raise NemoConfigError(self.file, f"{value!r:.60} is not a positive number", key)
        return number


def _refuse_others(get: _Getter) -> None:
    """Reject settings with which a model would compute something other than NemotronForCausalLM."""
    norm = str(get("normalization", "layernorm1p")).lower()
    zero_centered = get("layernorm_zero_centered_gamma") or get("apply_layernorm_1p")
    rules: tuple[tuple[str, bool, str], ...] = (
        (
            "normalization",
            norm == "layernorm1p" or (norm == "layernorm" and bool(zero_centered)),
            "must be layernorm1p",
        ),
        ("activation", get("activation", "squared-relu") == "squared-relu", "must be squared-relu"),
        ("position_embedding_type", get("position_embedding_type", "rope") == "rope", "must be rope"),
        ("bias", not get("bias", False), "linear layers with biases"),
        ("transformer_block_type", get("transformer_block_type", "pre_ln") == "pre_ln", "must be pre_ln"),
        ("num_moe_experts", get("num_moe_experts", 0) in (0, 1), "experts"),
        ("qk_layernorm", not get("qk_layernorm", False), "layer norms of queries and keys"),
        ("seq_len_interpolation_factor", get("seq_len_interpolation_factor", 1) == 1, "scaled positions"),
        ("window_size", get("window_size") is None, "a sliding window"),
    )
    for key, supported, problem in rules:
        if not supported:
            raise UnsupportedModelError(key, f"{get(key)!r:.60} is not supported ({problem})")
