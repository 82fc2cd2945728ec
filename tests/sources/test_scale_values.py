"""Scales as stored and as values."""

import math

import pytest
import torch

from nemotron_fp8.planning.number_format import E8M0, E8M0_BYTES, FLOAT32, SCALE_VALUES, ScaleType
from nemotron_fp8.sources.scale_values import STORED, pack_scales, unpack_scales

EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("scale_type", [E8M0, E8M0_BYTES])
def test_each_of_the_256_exponents_is_a_power_of_two_and_back(scale_type: ScaleType) -> None:
    values = unpack_scales(EVERY_BYTE, scale_type.dtype)
    assert values.dtype == torch.float32
    assert values[:255].tolist() == [math.ldexp(1.0, exponent - 127) for exponent in range(255)]
    assert math.isnan(values[255].item())
    assert torch.equal(pack_scales(values, scale_type), EVERY_BYTE)


def test_infinity_becomes_the_exponent_of_nan() -> None:
    assert pack_scales(torch.tensor([math.inf, -math.inf, math.nan]), E8M0).tolist() == [255, 255, 255]


def test_exponents_in_a_strided_tensor_keep_their_shape() -> None:
    square = EVERY_BYTE.view(16, 16)
    values = unpack_scales(square.t(), "F8_E8M0")
    assert values.shape == (16, 16)
    assert torch.equal(pack_scales(values, E8M0), square.t())


@pytest.mark.parametrize("dtype", sorted(STORED))
def test_values_equal_those_of_the_readers_of_bytes(dtype: str) -> None:
    if STORED[dtype] is torch.uint8:
        raw = EVERY_BYTE[:255]
    else:
        raw = torch.tensor([2.0**-126, 1.0, 0.1, 448.0, 65504.0], dtype=torch.float32).to(STORED[dtype])
    expected = list(SCALE_VALUES[dtype](raw.view(torch.uint8).numpy().tobytes()))
    assert unpack_scales(raw, dtype).tolist() == expected


def test_float32_is_stored_as_it_is() -> None:
    scale = torch.tensor([[0.1], [3.0]])
    assert torch.equal(pack_scales(scale, FLOAT32), scale)
    assert torch.equal(pack_scales(scale, ScaleType("BF16", "bfloat16")), scale.to(torch.bfloat16))


def test_scales_of_other_dtypes_are_unknown() -> None:
    with pytest.raises(KeyError):
        unpack_scales(EVERY_BYTE, "F8_E4M3")
