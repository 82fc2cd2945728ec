"""Back from FP8: scale times code, for every layout; and the way there again gives the same codes."""

from __future__ import annotations

import json
import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, dequantize_repo, quantize_repo
from nemotron_fp8.errors import AlreadyQuantizedError, LayoutError, NotQuantizedError
from nemotron_fp8_kernels import reference
from tests.support.checkpoints import INDEX, ONE, Tensors, model, same_bits, weight, write_checkpoint
from tests.support.fp8_sources import config_of, every_tensor
from tests.support.strategies import PATTERNS, values

if TYPE_CHECKING:
    from nemotron_fp8.planning.recipe import Activations, Granularity

LAYOUTS: list[tuple[str, Granularity, Activations]] = [
    ("fp8", "tensor", "dynamic"),
    ("fp8", "block", "dynamic"),
    *product(("compressed-tensors",), ("tensor", "channel", "block"), ("dynamic", "none")),  # type: ignore[list-item]  # product widens literals
]
"""Every layout that can be written."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
SECOND = "model.layers.0.mlp.down_proj.weight"
STAYS = "model.embed_tokens.weight"


def there_and_back(root: Path, shards: dict[str, Tensors], recipe: Recipe, dtype: str) -> tuple[Path, Path]:
    write_checkpoint(root / "source", shards)
    quantize_repo(root / "source", root / "fp8", recipe=recipe, device="cpu", threads=2)
    dequantize_repo(root / "fp8", root / "plain", dtype=dtype, threads=2)
    return root / "fp8", root / "plain"


def scale_shaped(scale: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """A scale in the kernels' shape: a tensor's is [] whatever the format writes."""
    return scale.reshape(()) if granularity == "tensor" else scale


@st.composite
def cases(draw: st.DrawFn) -> tuple[Recipe, dict[str, Tensors], str]:
    """A layout, a checkpoint of two weights that it takes and one that stays, in one or two shards."""
    layout = draw(st.sampled_from(LAYOUTS))
    side = st.sampled_from([128, 256]) if layout[1] == "block" else st.integers(1, 24)
    tensors: Tensors = {}
    for name in (WEIGHT, SECOND):
        shape = (draw(side), draw(side))
        dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
        tensors[name] = values(shape, dtype, draw(st.sampled_from(PATTERNS)), draw(st.integers(0, 1 << 16)))
    tensors[STAYS] = weight(4, 8, dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])))
    shards = {ONE: tensors}
    if draw(st.booleans()):
        shards = {
            "model-00001-of-00002.safetensors": {WEIGHT: tensors[WEIGHT]},
            "model-00002-of-00002.safetensors": {SECOND: tensors[SECOND], STAYS: tensors[STAYS]},
        }
    recipe = Recipe(format=layout[0], granularity=layout[1], activations=layout[2])
    return recipe, shards, draw(st.sampled_from(sorted(DTYPES)))


@given(cases())
@settings(max_examples=25)
def test_it_is_scale_times_code_and_the_way_back_gives_the_same_codes(
    case: tuple[Recipe, dict[str, Tensors], str],
) -> None:
    """For every layout: the values, the names, the config; and with the same multiplier, the codes again."""
    recipe, shards, dtype = case
    with tempfile.TemporaryDirectory() as scratch:
        fp8, plain = there_and_back(Path(scratch), shards, recipe, dtype)
        codes, found = every_tensor(fp8), every_tensor(plain)
        assert found.keys() == {name for tensors in shards.values() for name in tensors}
        assert "quantization_config" in config_of(fp8)
        assert config_of(plain) == config_of(Path(scratch) / "source")
        assert [path.name for path in sorted(plain.glob("*.safetensors"))] == sorted(shards)
    suffix = "_scale_inv" if (recipe.format, recipe.granularity) == ("fp8", "block") else "_scale"
    originals = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    assert same_bits(found[STAYS], originals[STAYS])
    for name in (WEIGHT, SECOND):
        scale = scale_shaped(codes[name + suffix], recipe.granularity)
        wanted = reference.dequantize(codes[name], scale, recipe.granularity, dtype=DTYPES[dtype])
        assert same_bits(found[name], wanted)
        if dtype == "float32":
            # The amax that the codes were made with: the multiplier is then the same, and so is the scale.
            amax = reference.amax_bits(originals[name], recipe.granularity)
            rounding = recipe.scale_rounding
            again, same = reference.quantize_with_amax(found[name], amax, recipe.granularity, rounding=rounding)
            assert same_bits(same, scale)
            # The largest float32 values round up to 2^128 under a power of two, which float32 does not hold.
            held = found[name].isfinite()
            assert same_bits(again[held], codes[name][held])
            assert bool((found[name][~held].isnan() | (originals[name].float()[~held].abs() > 2.0**127 * 1.9)).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_code_of_every_magnitude_survives_the_way_back(dtype: str) -> None:
    """All 254 finite codes at the amaxes of normal weights: dequantized, in bf16 too, each gives itself again.

    A bf16 value is off by up to 2^-9 of itself, two codes are 2^-3 of themselves apart or more.
    """
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    for amax in torch.rand(200, generator=torch.Generator().manual_seed(5)) * 2 + 1e-3:
        _, scale = reference.scale_from_amax(amax)
        plain = reference.dequantize(every, scale, dtype=DTYPES[dtype])
        again, same = reference.quantize_with_amax(plain, amax)
        assert same_bits(again, every)
        assert same_bits(same, scale)


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_a_sharded_model_comes_back_whole(tmp_path: Path, layout: tuple[str, Granularity, Activations]) -> None:
    """The index names every tensor and no scale, with the bytes of all; what stayed is as it was."""
    shards = model()
    if layout[1] == "block":  # something must divide
        shards["model-00001-of-00002.safetensors"][WEIGHT] = weight(128, 128)
    recipe = Recipe(format=layout[0], granularity=layout[1], activations=layout[2])
    fp8, plain = there_and_back(tmp_path, shards, recipe, "bfloat16")
    index = json.loads((plain / INDEX).read_text(encoding="utf-8"))
    assert index["weight_map"] == {n: shard for shard in sorted(shards) for n in sorted(shards[shard])}
    found = every_tensor(plain)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    codes = every_tensor(fp8)
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in codes.values())
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if codes[name].dtype != torch.float8_e4m3fn:
            assert same_bits(tensor, codes[name])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_blocks_with_ragged_edges_as_deepseek_publishes_them(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    """Dimensions that do not divide by 128: the last blocks are smaller. Worked out element by element here."""
    rows, columns = 200, 300
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = (torch.rand(2, 3, generator=generator) + 0.5).to(scale_dtype)
    config = {
        "model_type": "deepseek_v3",
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
        },
    }  # fmt: skip
    tensors = {WEIGHT: codes, WEIGHT + "_scale_inv": scale, STAYS: weight(4, 8)}
    write_checkpoint(tmp_path / "source", {ONE: tensors}, config=config)
    dequantize_repo(tmp_path / "source", tmp_path / "plain")
    wanted = torch.empty(rows, columns)
    for row in range(rows):
        for part in range(3):
            here = slice(part * 128, min(columns, part * 128 + 128))
            wanted[row, here] = codes[row, here].float() * scale[row // 128, part].float()
    found = every_tensor(tmp_path / "plain")
    assert found.keys() == {WEIGHT, STAYS}
    assert same_bits(found[WEIGHT], wanted.bfloat16())
    assert same_bits(found[STAYS], tensors[STAYS])
    assert config_of(tmp_path / "plain") == {"model_type": "deepseek_v3"}


def test_scales_of_activations_and_of_the_cache_go_too(tmp_path: Path) -> None:
    one = torch.ones(())
    stem = "model.layers.0.self_attn."
    tensors = {
        f"{stem}k_proj.weight": weight(8, 8).to(torch.float8_e4m3fn),
        f"{stem}k_proj.weight_scale": one,
        f"{stem}k_proj.input_scale": one,
        f"{stem}k_proj.k_scale": one,
        f"{stem}attn.v_scale": one,
        STAYS: weight(4, 8),
    }
    write_checkpoint(tmp_path / "source", {ONE: tensors}, config={"quantization_config": {"quant_method": "fp8"}})
    report = dequantize_repo(tmp_path / "source", tmp_path / "plain")
    assert every_tensor(tmp_path / "plain").keys() == {f"{stem}k_proj.weight", STAYS}
    assert any("3 scales" in notice for notice in report.notices)


def test_a_plain_source_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(NotQuantizedError) as caught:
        dequantize_repo(checkpoint, tmp_path / "plain")
    assert str(checkpoint) in str(caught.value)
    assert "nothing to dequantize" in str(caught.value)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("shape", [(2,), (8,), (1, 8), (3, 1), (2, 2)])
def test_a_scale_of_no_known_shape_is_refused_by_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """For a weight of 16 x 8: neither one value, nor one for each row, nor one for each block."""
    tensors = {WEIGHT: weight(16, 8).to(torch.float8_e4m3fn), WEIGHT + "_scale": torch.ones(shape)}
    write_checkpoint(tmp_path / "source", {ONE: tensors})
    with pytest.raises(LayoutError, match="fits no known layout") as caught:
        dequantize_repo(tmp_path / "source", tmp_path / "plain")
    assert caught.value.tensor == WEIGHT + "_scale"


def test_a_weight_without_a_scale_is_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", {ONE: {WEIGHT: weight(16, 8).to(torch.float8_e4m3fn)}})
    with pytest.raises(LayoutError) as caught:
        dequantize_repo(tmp_path / "source", tmp_path / "plain")
    assert caught.value.tensor == WEIGHT


def test_in_place_an_fp8_source_is_refused_and_the_way_out_named(tmp_path: Path, checkpoint: Path) -> None:
    """A source is rejected if its config states FP8, and if only its tensors show it."""
    quantize_repo(checkpoint, tmp_path / "fp8", device="cpu")
    bare = tmp_path / "bare"
    write_checkpoint(bare, {ONE: {WEIGHT: weight(16, 8).to(torch.float8_e4m3fn), WEIGHT + "_scale": torch.ones(())}})
    for source in (tmp_path / "fp8", bare):
        before = {path.name: path.read_bytes() for path in source.iterdir()}
        with pytest.raises(AlreadyQuantizedError, match="nemotron-fp8 dequantize"):
            quantize_repo(source, None, Recipe(ignore=("up_proj",)), device="cpu", in_place=True)
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
