"""Stored scales of a checkpoint as engines take them: of merged weights, of experts, and of an FP8 cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.errors import ScaleError
from nemotron_fp8.inference import activations as casts
from nemotron_fp8.inference.activations import Scheme, cast, schemes_of
from nemotron_fp8.inference.fp8_cache import Cache, cache_of, has_cache, states_cache
from nemotron_fp8.planning.encoded_source import encoded_source
from nemotron_fp8.sources.open import open_source
from nemotron_fp8.sources.reader import Reader
from tests.inference.vllm_plugins.nearest_in_cache import nudged
from tests.support.checkpoints import ONE, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Values = "Mapping[str, float | torch.Tensor]"
LAYER = "model.layers.0."
DENSE = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
EXPERTS = [f"mlp.experts.{number}.{name}_proj" for number in range(3) for name in ("gate", "up", "down")]
MIXTRAL = [f"block_sparse_moe.experts.{number}.{name}" for number in range(3) for name in ("w1", "w2", "w3")]
NEMOTRON_H = [f"mixer.experts.{number}.{name}_proj" for number in range(3) for name in ("up", "down")]
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
CT_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def checkpoint(folder: Path, modules: list[str], scales: Values, config: Mapping[str, Any]) -> Path:
    """Write FP8 weights of a layer with a scale each, and further scales by the ends of their names."""
    tensors = {}
    for module in modules:
        tensors[f"{LAYER}{module}.weight"] = torch.ones(16, 16).to(torch.float8_e4m3fn)
        tensors[f"{LAYER}{module}.weight_scale"] = scalar(0.5)
    for name, value in scales.items():
        tensors[f"{LAYER}{name}"] = value if isinstance(value, torch.Tensor) else scalar(value)
    return write_checkpoint(folder, {ONE: tensors}, config=config)


def schemes(
    folder: Path, modules: list[str], scales: Values, activations: str | None = "static", model: str = "llama"
) -> dict[str, Scheme]:
    """Return the treatment of the inputs of modules."""
    inputs = {f"{name}.input_scale": value for name, value in scales.items()}
    config = {"model_type": model, "quantization_config": FP8}
    source = open_source(checkpoint(folder, modules, inputs, config))
    views = {view.name: view for view in encoded_source(source.inventory).inventory.views}
    weights = [view for view in views.values() if view.encoding is not None]
    with Reader(source.opener) as reader:
        found = schemes_of(weights, views, activations, config, reader)
    return {name.removeprefix(LAYER).removesuffix(".weight"): each for name, each in found.items()}


def test_merged_weights_have_the_largest_scale(tmp_path: Path) -> None:
    scales = dict(zip(DENSE, (0.25, 0.5, 0.125, 1.0, 2.0, 3.0, 4.0), strict=True))
    found = schemes(tmp_path / "a", DENSE, scales)
    assert [found[name].static for name in DENSE] == [0.5, 0.5, 0.5, 1.0, 3.0, 3.0, 4.0]
    assert found[DENSE[0]].module == f"{LAYER}self_attn.qkv_proj"
    assert found[DENSE[-1]].module == f"{LAYER}mlp.down_proj"


@pytest.mark.parametrize(
    ("modules", "model", "down"),
    [(EXPERTS, "qwen3_moe", "down_proj"), (MIXTRAL, "mixtral", "w2"), (NEMOTRON_H, "nemotron_h", "down_proj")],
)
def test_experts_of_a_layer_have_the_largest_scale_by_role(
    modules: list[str], model: str, down: str, tmp_path: Path
) -> None:
    scales = {name: 1 + number / 8 for number, name in enumerate(modules)}
    found = schemes(tmp_path / "a", modules, scales, model=model)
    for is_down in (True, False):
        role = [name for name in modules if name.endswith(down) == is_down]
        assert {found[name].static for name in role} == {max(scales[name] for name in role)}


def test_an_expert_without_a_scale_counts_as_one(tmp_path: Path) -> None:
    """That is larger than all scales of its layer, usually."""
    scales = dict.fromkeys(EXPERTS, 0.01)
    del scales[EXPERTS[-1]]  # a down projection
    found = schemes(tmp_path / "a", EXPERTS, scales, model="qwen3_moe")
    assert {found[name].static for name in EXPERTS if name.endswith("down_proj")} == {1.0}
    assert {found[name].static for name in EXPERTS if not name.endswith("down_proj")} == {scalar(0.01).item()}


def test_a_weight_without_a_scale_takes_that_of_those_it_is_merged_with(tmp_path: Path) -> None:
    scales = dict.fromkeys(DENSE, 0.5)
    del scales[DENSE[1]]
    assert schemes(tmp_path / "a", DENSE, scales)[DENSE[1]].static == 0.5


@pytest.mark.parametrize("missing", [DENSE[:3], DENSE[3:4], DENSE[6:]], ids=["q, k and v", "o", "down"])
def test_a_missing_scale_is_an_error(missing: list[str], tmp_path: Path) -> None:
    with pytest.raises(ScaleError, match="missing") as caught:
        schemes(tmp_path / "a", DENSE, {name: 0.5 for name in DENSE if name not in missing})
    assert caught.value.tensor == f"{LAYER}{missing[0]}.input_scale"


@pytest.mark.parametrize(
    "value",
    [
        *(-1.0, 0.0, float("nan"), float("inf")),
        *(torch.ones(2), torch.ones(0), torch.ones((), dtype=torch.int64)),
    ],
    ids=str,
)
def test_a_wrong_scale_is_an_error(value: float | torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ScaleError) as caught:
        schemes(tmp_path / "a", DENSE, dict.fromkeys(DENSE, 0.5) | {DENSE[3]: value})
    assert caught.value.tensor == f"{LAYER}{DENSE[3]}.input_scale"
    with pytest.raises(ScaleError) as caught:
        cache(tmp_path / "b", {"self_attn.k_scale": value})
    assert caught.value.tensor == f"{LAYER}self_attn.k_scale"


@pytest.mark.parametrize(("activations", "scheme"), [("dynamic", Scheme()), ("none", None), (None, None)])
def test_without_stored_scales_the_config_decides(
    activations: str | None, scheme: Scheme | None, tmp_path: Path
) -> None:
    found = schemes(tmp_path / "a", DENSE, {}, activations)
    assert [found.get(name) for name in DENSE] == [scheme] * len(DENSE)


@given(st.integers(0, 1 << 20), st.floats(1e-6, 1e3), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_a_cast_rounds_to_nearest_and_counts_what_clips(seed: int, scale: float, dtype: torch.dtype) -> None:
    scale = float(scalar(scale))
    draw = torch.Generator().manual_seed(seed)
    values = (torch.randn(4, 64, generator=draw) * 300 * min(scale, 100)).to(dtype)
    found = cast(values, scale)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = codes[codes.isfinite()]
    quotients = (values.float() / scale).double()
    nearest = (quotients.clamp(-448, 448)[..., None] - grid).abs().min(-1).values
    own = found.values.double() / scale
    # The result is rounded to the dtype of the values.
    slack = 2.0 ** {torch.bfloat16: -8, torch.float16: -10, torch.float32: -22}[dtype] * own.abs() + 2.0**-24 / scale
    assert ((own - quotients.clamp(-448, 448)).abs() <= nearest + slack).all()
    assert found.clipped == int((quotients.abs() > 448.001).sum())
    assert found.values.dtype == dtype


def test_many_values_are_cast_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices, also of values whose order in memory is another one, and of none."""
    values = (torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)) * 300).bfloat16().transpose(0, 2)
    whole = cast(values, 0.5)
    monkeypatch.setattr(casts, "SLICE", 4)
    sliced = cast(values, 0.5)
    assert torch.equal(sliced.values, whole.values)
    assert sliced.values.shape == values.shape
    assert sliced.clipped == whole.clipped > 0
    assert cast(values[:0], 0.5).values.shape == (0, 5, 3)


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_amax_of_a_scale_is_in_its_range(amax: float) -> None:
    """A scale is rounded to float32, up or down: that alone clips nothing."""
    scale = float(scalar(amax) / 448)
    assert cast(torch.tensor([amax, -amax]), scale).clipped == 0
    assert cast(torch.tensor([amax * 1.001, -amax * 1.001]), scale).clipped == 2


def cache(folder: Path, scales: Values, quantization: Mapping[str, Any] = FP8, attention: str = "self_attn") -> Cache:
    config = {"model_type": "llama", "quantization_config": quantization}
    source = open_source(checkpoint(folder, [f"{attention}.k_proj"], scales, config))
    views = {view.name: view for view in encoded_source(source.inventory).inventory.views}
    with Reader(source.opener) as reader:
        return cache_of(f"{LAYER}{attention}", views, config, reader)


@pytest.mark.parametrize(
    ("attention", "k", "v"),
    [
        ("self_attn", "self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        ("self_attn", "self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn", "self_attn.attn.k_scale", "self_attn.attn.v_scale"),
        ("self_attn", "self_attn.qkv_proj.k_scale", "self_attn.qkv_proj.v_scale"),
        ("mixer", "mixer.k_proj.k_scale", "mixer.v_proj.v_scale"),
        ("attn", "attn.attn.k_scale", "attn.attn.v_scale"),
    ],
)
def test_scales_of_a_cache_are_found_by_their_names(attention: str, k: str, v: str, tmp_path: Path) -> None:
    found = cache(tmp_path / "a", {k: 0.5, v: torch.full((1,), 0.25)}, attention=attention)
    assert found == Cache(f"{LAYER}{attention}", 0.5, 0.25)


def test_scales_of_a_cache_are_held_in_bfloat16_but_for_compressed_tensors(tmp_path: Path) -> None:
    scales = {"self_attn.k_scale": 0.0239955, "self_attn.v_scale": 0.00134}
    exact = cache(tmp_path / "a", scales, {"quant_method": "compressed-tensors"})
    assert (exact.k, exact.v) == (scalar(0.0239955).item(), scalar(0.00134).item())
    for number, method in enumerate(("fp8", "modelopt")):
        rounded = cache(tmp_path / str(number), scales, {"quant_method": method})
        assert (rounded.k, rounded.v) == (0.0240478515625, scalar(0.00134).bfloat16().item())


def test_missing_scales_of_a_cache(tmp_path: Path) -> None:
    """None of both is 1.0. Keys lend theirs to values, but for compressed-tensors."""
    assert cache(tmp_path / "a", {}) == Cache(f"{LAYER}self_attn", 1.0, 1.0)
    assert cache(tmp_path / "b", {"self_attn.k_scale": 0.5}) == Cache(f"{LAYER}self_attn", 0.5, 0.5)
    exact = cache(tmp_path / "c", {"self_attn.k_scale": 0.5}, {"quant_method": "compressed-tensors"})
    assert exact == Cache(f"{LAYER}self_attn", 0.5, 1.0)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": CT_CACHE}, True),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, False),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {**CT_CACHE, "type": "int"}}, False),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, True),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, False),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, True),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}, True),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}, False),
        ({"quant_method": "fp8"}, False),
        ({"quant_method": "fp8", "kv_cache_scheme": 8}, False),
        ("fp8", False),
    ],
)
def test_configs_that_state_an_fp8_cache(statement: object, expected: bool) -> None:
    assert states_cache({"quantization_config": statement}) == expected
    assert states_cache({"text_config": {"quantization_config": statement}}) == expected
    assert has_cache(["a.self_attn.q_proj.weight"], {"quantization_config": statement}) == expected


def test_scales_of_a_cache_state_it_too() -> None:
    """In format ``fp8``, whose config has no entry for it."""
    assert has_cache(["a.weight", "a.self_attn.k_proj.k_scale"], {"quantization_config": FP8})
    assert not has_cache(["a.weight", "a.self_attn.k_proj.input_scale"], {"quantization_config": FP8})
    assert not has_cache(["a.weight"], None)


class Attention(torch.nn.Module):
    """An attention module without weights."""


class Latent(Attention):
    """Latent attention of two rotated columns."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_b_proj, self.qk_rope_head_dim = torch.nn.Linear(4, 4), 2


def test_keys_and_values_have_scales_of_their_own() -> None:
    counts: dict[str, tuple[int, int]] = {}
    key, value = torch.tensor([[[[1.3, 500.0], [0.1, -8.0]]]]), torch.tensor([[[[1.3, 500.0], [0.1, -8.0]]]])
    keys, values = Cache("a", 1.0, 0.01).apply(
        Attention(), key, value, lambda name, whole, clipped: counts.update({name: (int(clipped), whole)})
    )
    assert keys.flatten().tolist() == pytest.approx([1.25, 448.0, 0.1015625, -8.0])
    assert values.flatten().tolist() == pytest.approx([1.28, 4.48, 0.1, -4.48], rel=1e-5)
    assert counts == {"a (keys)": (1, 4), "a (values)": (2, 4)}


def test_of_latent_attention_the_rotated_part_and_the_latents_are_cached_with_1() -> None:
    """Whatever scale is stored."""
    counts: dict[str, tuple[int, int]] = {}

    def count(name: str, whole: int, clipped: Any) -> None:
        counts[name] = int(clipped), whole

    key, value = torch.tensor([[[[1.3, 500.0, 1.3, 500.0]]]]), torch.tensor([[[[1.3, 500.0]]]])
    stored = Cache("a", 0.01, 0.01)
    keys, values = stored.apply(Latent(), key, value, count)
    assert keys.flatten().tolist() == pytest.approx([1.3, 500.0, 1.25, 448.0])
    assert torch.equal(values, value)
    assert stored.apply_to_latents(torch.tensor([1.3, 500.0, 3.0]), count).tolist() == [1.25, 448.0, 3.0]
    assert counts == {"a (keys)": (1, 2), "a (latents)": (1, 3)}


@given(st.integers(0, 1 << 20), st.floats(2.0**-20, 2.0**10, width=32))
def test_truncation_of_nudged_values_gives_the_nearest_codes(seed: int, scale: float) -> None:
    """The plugin for vLLM's CPU kernels, which truncate."""
    draw = torch.Generator().manual_seed(seed)
    values = (torch.randn(1024, generator=draw) * 200 * scale).bfloat16()
    nearest = (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    for quotients in (nudged(values, scale).float() / scale, nudged(values, scale).float() * (1 / scalar(scale))):
        clamped = quotients.clamp(-448, 448)
        codes = clamped.to(torch.float8_e4m3fn)
        truncated = codes.view(torch.uint8) - (codes.float().abs() > clamped.abs()).to(torch.uint8)
        assert torch.equal(truncated.view(torch.float8_e4m3fn).float(), nearest.float())
