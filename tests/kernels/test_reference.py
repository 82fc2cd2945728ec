"""The specification against independent definitions: values of the format, IEEE division, the original script."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from nemotron_fp8_kernels import reference
from nemotron_fp8_kernels.errors import MultiplierOverflowError

BF16_CODES = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FP16_CODES = BF16_CODES.view(torch.float16)


def e4m3_values() -> list[float]:
    """Return the values of the codes 0x00 to 0x7E by definition (4 exponent bits of bias 7, 3 mantissa bits)."""
    return [
        (code & 7) * 2.0**-9 if code < 8 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 7) for code in range(0x7F)
    ]


def codes_of(values: torch.Tensor) -> list[int]:
    """Quantize with amax 448, which gives the multiplier 1."""
    return reference.quantize_with_amax(values, torch.tensor(448.0))[0].view(torch.uint8).tolist()


def test_every_code_midpoint_and_neighbor_rounds_to_nearest_even() -> None:
    """Both signs of every value, of every midpoint (to the even code) and of its float32 neighbors."""
    values = e4m3_values()
    cases = [(value, code) for code, value in enumerate(values)]
    for code, (low, high) in enumerate(pairwise(values)):
        middle = np.float32((low + high) / 2)
        cases += [
            (float(middle), code + (code & 1)),
            (float(np.nextafter(middle, np.float32(0))), code),
            (float(np.nextafter(middle, np.float32(1e9))), code + 1),
        ]
    inputs = torch.tensor([value for value, _ in cases])
    expected = [code for _, code in cases]
    assert codes_of(inputs) == expected
    assert codes_of(-inputs) == [code | 0x80 for code in expected]


def test_beyond_the_largest_value_saturates_and_nan_has_one_code() -> None:
    above = float(np.nextafter(np.float32(448), np.float32(1e9)))
    assert codes_of(torch.tensor([above, 464.0, 480.0, 1e30, math.inf])) == [0x7E] * 5
    assert codes_of(torch.tensor([-above, -464.0, -1e30, -math.inf])) == [0xFE] * 4
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert codes_of(nans) == [0x7F] * 4


def test_products_an_ulp_above_448_saturate_at_448() -> None:
    """amax * (448 / amax) exceeds 448 for some amaxes; the largest element codes to 448 for all of them."""
    amaxes = BF16_CODES[(BF16_CODES.float() >= 1e-12) & BF16_CODES.isfinite()].float()
    mult, _ = reference.scale_from_amax(amaxes)
    assert int((amaxes * mult > 448).sum()) > 0
    codes = reference.quantize(amaxes[:, None], "channel")[0].view(torch.uint8)
    assert codes.unique().tolist() == [0x7E]


def test_scale_is_ieee_division_and_not_a_reciprocal_multiplied() -> None:
    """Against numpy's division over all bf16 amaxes; torch's `448 / tensor` gives other bits for some."""
    amaxes = BF16_CODES[BF16_CODES.isfinite() & (BF16_CODES >= 0)].float()
    mult, scale = reference.scale_from_amax(amaxes)
    expected = np.float32(448) / np.maximum(amaxes.numpy(), np.float32(1e-12))
    assert np.array_equal(mult.numpy(), expected)
    assert np.array_equal(scale.numpy(), np.float32(1) / expected)
    assert bool(((448.0 / amaxes.clamp(min=1e-12)) != mult).any())


@pytest.mark.parametrize("numerics", ["float32", "original"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_zero_and_subnormal_tensors_use_the_floor(dtype: torch.dtype, numerics: str) -> None:
    for value in (0.0, 1e-40, 9e-13):
        w = torch.full((3, 4), value).to(dtype)
        q, scale = reference.quantize(w, numerics=numerics)  # type: ignore[arg-type]
        floor = torch.tensor(1e-12) if numerics == "float32" else torch.tensor(1e-12).to(dtype).float()
        assert math.isclose(float(scale), float(floor) / 448, rel_tol=0.01)
        assert torch.isfinite(q.float()).all()
    assert float(reference.quantize(torch.zeros(2), numerics="float32")[1]) == float(
        np.float32(1) / (np.float32(448) / np.float32(1e-12))
    )


def test_negative_zero_keeps_its_sign() -> None:
    q, _ = reference.quantize(torch.tensor([-0.0, 0.0, 1.0]))
    assert q.view(torch.uint8).tolist() == [0x80, 0x00, 0x7E]


def test_empty_tensors_rows_and_blocks_have_amax_16() -> None:
    assert float(reference.amax(torch.empty(0, 5))) == 16.0
    assert reference.amax(torch.empty(3, 0), "channel").tolist() == [[16.0]] * 3
    assert reference.amax(torch.empty(0, 5), "block").shape == (0, 1)
    assert float(reference.quantize(torch.empty(0))[1]) == float(np.float32(1) / np.float32(28))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [0.05, 1.0, 60.0])
def test_original_is_the_original_script(dtype: torch.dtype, spread: float) -> None:
    """The operations of the script, in order: aminmax, 448 / clamp, multiply, clamp, cast, reciprocal."""
    w = (torch.randn(64, 96, generator=torch.Generator().manual_seed(7)) * spread).to(dtype)
    low, high = w.aminmax()
    mult = 448.0 / torch.maximum(low.abs(), high.abs()).clamp(min=1e-12)
    expected = (w * mult).clamp(min=-448.0, max=448.0).to(torch.float8_e4m3fn)
    q, scale = reference.quantize(w, numerics="original")
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, mult.float().reciprocal())


def test_original_rejects_the_fp16_amaxes_whose_multiplier_overflows() -> None:
    """Of all non-negative fp16 amaxes, exactly those up to 0.0068398 are rejected."""
    finite = FP16_CODES[(FP16_CODES >= 0) & FP16_CODES.isfinite()].float()
    refused = []
    for amax in finite[finite < 0.008]:
        try:
            reference.scale_from_amax(amax, "original", torch.float16)
        except MultiplierOverflowError as error:
            assert error.amax == float(amax)
            refused.append(float(amax))
    assert math.isclose(max(refused), 0.0068398, rel_tol=1e-4)
    assert len(refused) == int((finite <= max(refused)).sum())


def test_amax_carries_nan_over_inf_over_numbers() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = torch.tensor([[1.0, -2.0], [3.0, -math.inf], [math.nan, math.inf]]).to(dtype)
        bits = reference.amax_bits(w, "channel").flatten().tolist()
        assert bits == [0x40000000, 0x7F800000, 0x7FC00000]
        assert int(reference.amax_bits(-w)) == 0x7FC00000


def test_rounding_has_no_bias() -> None:
    """Evenly distributed values round up as often as down: a binomial test with z below 4.5."""
    generator = torch.Generator().manual_seed(1)
    w = torch.rand(1 << 20, generator=generator) * 440 + 8
    q = reference.quantize_with_amax(w, torch.tensor(448.0))[0].float()
    inexact = q != w
    ups, count = int((q > w)[inexact].sum()), int(inexact.sum())
    assert abs(ups - count / 2) / math.sqrt(count / 4) < 4.5


def test_dequantize_multiplies_in_float32_and_rounds_once() -> None:
    w = torch.randn(130, 260, generator=torch.Generator().manual_seed(2))
    for granularity in ("tensor", "channel", "block"):
        q, scale = reference.quantize(w, granularity)  # type: ignore[arg-type]
        full = np.empty(w.shape, dtype=np.float32)
        for i in range(w.shape[0]):
            for j in range(0, w.shape[1], 130):
                at = {"tensor": (), "channel": (i, 0)}.get(granularity, (i // 128, slice(None)))
                columns = np.arange(j, min(j + 130, w.shape[1]))
                row = scale[at].numpy() if granularity != "block" else scale[at].numpy()[columns // 128]
                full[i, columns] = q[i, columns].float().numpy() * row
        expected = torch.from_numpy(full).bfloat16()
        assert torch.equal(reference.dequantize(q, scale, granularity), expected)  # type: ignore[arg-type]
