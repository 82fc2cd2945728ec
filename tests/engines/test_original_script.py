"""numerics "original": byte for byte what the script on the model card wrote, run here as it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_fp8 import Recipe, quantize_repo, verify_repo
from nemotron_fp8.errors import UnrepresentableError
from tests.support.checkpoints import ONE, Tensors, contents, read_tensors, same_bits, saved, weight, write_checkpoint
from tests.support.recipes import PUBLISHED
from tests.support.strategies import FLOATS, PATTERNS, values

if TYPE_CHECKING:
    from pathlib import Path

ORIGINAL = Recipe(numerics="original")


def per_tensor_quantize(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of the original script, in the tensor's own dtype, as torch executes it."""
    if tensor.numel() == 0:
        low = torch.tensor(-16.0, dtype=tensor.dtype)
        high = torch.tensor(16.0, dtype=tensor.dtype)
    else:
        low, high = tensor.aminmax()
    amax = torch.maximum(low.abs(), high.abs())
    mult = 448.0 / amax.clamp(min=1e-12)
    q = (tensor * mult).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q, mult.float().reciprocal()


def original_shard(tensors: Tensors) -> Tensors:
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            result[name], result[f"{name}_scale"] = per_tensor_quantize(tensor)
        else:
            result[name] = tensor
    return result


def special(dtype: torch.dtype) -> Tensors:
    """Every kind of tensor that has gone wrong somewhere; none that fp16 cannot do."""
    smallest = 0.00685  # 448 / this is still finite in fp16
    found = {
        "usual": weight(70, 1000, dtype=dtype),
        "empty": torch.empty(0, 8, dtype=dtype),
        "empty_rows": torch.empty(8, 0, dtype=dtype),
        "one": torch.tensor([[-0.75]], dtype=dtype),
        "huge": values((33, 65), dtype, "huge", 1),
        "any": values((64, 2048), dtype, "any bits", 2),
        "negative": -weight(9, 9, dtype=dtype).abs() - smallest,
        "mixed": torch.cat([values((4, 8), dtype, "subnormal", 3), torch.full((1, 8), smallest, dtype=dtype)]),
    }
    if dtype != torch.float16:
        found |= {
            "zero": torch.zeros(5, 7, dtype=dtype),
            "negative_zero": torch.zeros(5, 7, dtype=dtype).neg(),
            "subnormal": values((40, 50), dtype, "subnormal", 4),
            "tiny": torch.full((3, 3), 1e-13, dtype=dtype),
            "one_large": values((40, 50), dtype, "one large", 5),
        }
    return {f"model.layers.{i}.{name}.o_proj.weight": t for i, (name, t) in enumerate(found.items())} | {
        "model.norm.weight": weight(8, dtype=dtype)
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_shard_is_the_scripts(tmp_path: Path, dtype: torch.dtype) -> None:
    """Empty, 1-element, zero, subnormal and huge-range tensors: the whole file is what the script gives."""
    tensors = special(dtype)
    source = write_checkpoint(tmp_path / "s", {ONE: tensors}, metadata={ONE: {"format": "pt"}}, lead=1)
    quantize_repo(source, tmp_path / "d", ORIGINAL, threads=2)
    wanted = original_shard(tensors)
    found = read_tensors(tmp_path / "d" / ONE)
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not same_bits(found[name], wanted[name])]
    assert not different
    assert (tmp_path / "d" / ONE).read_bytes() == saved(wanted, {"format": "pt"}, tmp_path)
    assert verify_repo(source, tmp_path / "d").ok


@given(
    st.sampled_from(FLOATS),
    st.sampled_from(PATTERNS),
    st.tuples(st.integers(0, 9), st.integers(0, 70)),
    st.integers(0, 1 << 16),
)
@settings(max_examples=40)
def test_any_tensor_is_the_scripts_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    pattern: str,
    shape: tuple[int, int],
    seed: int,
) -> None:
    """The script's bytes, or, where its multiplier is infinite, an error and nothing written."""
    folder = tmp_path_factory.mktemp("any")
    tensor = values(shape, dtype, pattern, seed)
    source = write_checkpoint(folder / "s", {ONE: {"a.o_proj.weight": tensor}})
    q, scale = per_tensor_quantize(tensor)
    if scale == 0:  # the multiplier was infinite
        with pytest.raises(UnrepresentableError):
            quantize_repo(source, folder / "d", ORIGINAL, threads=1, digests=False)
        assert dtype == torch.float16
        assert [path.name for path in folder.iterdir()] == ["s"]
        return
    quantize_repo(source, folder / "d", ORIGINAL, threads=1, digests=False)
    found = read_tensors(folder / "d" / ONE)
    assert same_bits(found["a.o_proj.weight"], q)
    assert same_bits(found["a.o_proj.weight_scale"], scale)


def boundary() -> tuple[torch.Tensor, torch.Tensor]:
    """The largest fp16 amax whose multiplier is infinite, and the next."""
    bits = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    infinite = (448.0 / bits).isinf()
    last = int(infinite.nonzero().max())
    assert bool(infinite[: last + 1].all())
    return bits[last], bits[last + 1]


def test_fp16_is_refused_by_name_up_to_the_boundary(tmp_path: Path) -> None:
    """0.0068398 and all below, zero among them; one step above is done as the script does it."""
    below, above = boundary()
    assert f"{float(below):.7f}" == "0.0068398"
    for i, amax in enumerate([below, torch.tensor(0.0, dtype=torch.float16), -below]):
        tensors = {"fine.o_proj.weight": weight(8, 8, dtype=torch.float16), "bad.o_proj.weight": amax.view(1, 1)}
        source = write_checkpoint(tmp_path / f"s{i}", {ONE: tensors})
        with pytest.raises(UnrepresentableError, match="numerics 'float32'") as caught:
            quantize_repo(source, tmp_path / "d", ORIGINAL)
        assert caught.value.tensor == "bad.o_proj.weight"
        assert caught.value.amax == abs(float(amax))
        assert not (tmp_path / "d").exists()
        quantize_repo(source, tmp_path / f"f{i}", PUBLISHED)  # float32 numerics have no such limit
    source = write_checkpoint(tmp_path / "s", {ONE: {"a.o_proj.weight": above.view(1, 1)}})
    quantize_repo(source, tmp_path / "d", ORIGINAL)
    q, scale = per_tensor_quantize(above.view(1, 1))
    found = read_tensors(tmp_path / "d" / ONE)
    assert same_bits(found["a.o_proj.weight"], q)
    assert same_bits(found["a.o_proj.weight_scale"], scale)
    assert bool(scale.isfinite())
    assert float(scale) > 0


def test_the_two_numerics_differ(tmp_path: Path) -> None:
    """Else the tests above would prove nothing about which one ran."""
    source = write_checkpoint(tmp_path / "s", {ONE: special(torch.bfloat16)})
    quantize_repo(source, tmp_path / "a", ORIGINAL)
    quantize_repo(source, tmp_path / "b", PUBLISHED)
    assert contents(tmp_path / "a")[ONE] != contents(tmp_path / "b")[ONE]
