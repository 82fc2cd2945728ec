"""model_config.yaml: what is taken from it and what is refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from nemotron_fp8.errors.nemo import HeadsError, NemoConfigError, UnsupportedModelError
from nemotron_fp8.sources.nemo.model_config import load_yaml, read_model
from tests.support.nemo_writer import Sizes

if TYPE_CHECKING:
    from nemotron_fp8.sources.nemo.model_config import Model


def read(**changes: Any) -> Model:
    """The model of the tests' config with some values changed; None takes a key away."""
    config = yaml.safe_load(Sizes().yaml()) | changes
    text = yaml.safe_dump({key: value for key, value in config.items() if value is not None})
    return read_model(load_yaml(text.encode(), "model_config.yaml"), "model_config.yaml")


def test_values_of_the_published_models() -> None:
    """The sizes of Nemotron-4-340B, with references as NeMo writes them."""
    model = read(
        num_layers=96,
        hidden_size=18432,
        ffn_hidden_size=73728,
        num_attention_heads=96,
        num_query_groups=8,
        encoder_seq_length=4096,
        max_position_embeddings="${.encoder_seq_length}",
    )
    assert (model.layers, model.hidden, model.inner) == (96, 18432, 73728)
    assert (model.heads, model.groups, model.head_dim, model.positions) == (96, 8, 192, 4096)


def test_defaults_are_those_of_nemo() -> None:
    model = read(
        num_query_groups=None,
        ffn_hidden_size=None,
        rotary_percentage=None,
        share_embeddings_and_output_weights=None,
    )
    assert (model.groups, model.inner, model.rotary_factor, model.tied) == (6, 192, 1.0, True)


@pytest.mark.parametrize("written", ["1e-5", "1.0e-05", "0.00001", "1E-5"])
def test_numbers_that_yaml_takes_for_text(written: str) -> None:
    text = re.sub(r"layernorm_epsilon: .*", f"layernorm_epsilon: {written}", Sizes().yaml())
    assert read_model(load_yaml(text.encode(), "x"), "x").norm_eps == 1e-5


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_query_groups": 4}, "6 attention heads do not divide into 4 query groups"),
        ({"hidden_size": 50}, "hidden_size 50 does not divide into 6 heads"),
    ],
)
def test_heads_that_do_not_divide(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(HeadsError, match=what) as caught:
        read(**changes)
    assert caught.value.heads == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization": "rmsnorm"},
        {"normalization": "layernorm"},
        {"activation": "fast-swiglu"},
        {"position_embedding_type": "learned_absolute"},
        {"bias": True},
        {"transformer_block_type": "post_ln"},
        {"num_moe_experts": 8},
        {"qk_layernorm": True},
        {"seq_len_interpolation_factor": 2.0},
        {"window_size": [4096, 0]},
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(**changes)
    assert caught.value.key == next(iter(changes))


@pytest.mark.parametrize(
    "changes", [{"normalization": "layernorm", "layernorm_zero_centered_gamma": True}, {"bias": False}]
)
def test_other_spellings_of_the_same(changes: dict[str, Any]) -> None:
    assert read(**changes) == read()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", None),
        ("num_layers", 0),
        ("num_layers", -1),
        ("num_layers", True),
        ("num_layers", 2.0),
        ("num_layers", "3"),
        ("num_layers", 1 << 40),
        ("hidden_size", [1]),
        ("layernorm_epsilon", "tiny"),
        ("layernorm_epsilon", float("nan")),
        ("rotary_base", float("inf")),
        ("rotary_base", -1),
        ("num_layers", "${.num_layers}"),
        ("num_layers", "${.a}"),
    ],
)
def test_values_that_cannot_be(key: str, value: object) -> None:
    with pytest.raises(NemoConfigError) as caught:
        read(**{key: value, "a": "${.b}", "b": "${.a}"})
    assert caught.value.key == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b",
        "a: [",
        "a: &x [1]\nb: *x",
        "a: !!python/object/apply:os.system [ls]",
        "a: !thing 1",
        "\x00",
        "[" * 5000,
        "a: 1\na: 2",
        "{[1]: 2}",
        "a: 1\n---\nb: 2",
        "a: b: c",
    ],
)
def test_hostile_yaml(text: str) -> None:
    """Aliases (by which nine lines can become a billion values), tags, depth, broken text."""
    with pytest.raises(NemoConfigError):
        load_yaml(text.encode(), "model_config.yaml")


def test_yaml_that_is_too_long() -> None:
    with pytest.raises(NemoConfigError, match="limit"):
        load_yaml(b"#" * 4_000_001, "model_config.yaml")
