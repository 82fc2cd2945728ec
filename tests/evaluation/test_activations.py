"""Emulated activations: the formula of each scheme, and every product with a registered weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_fp8.inference.activations import Products, Requantized, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def activations(seed: int, tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.rand((1, tokens, 1), generator=draw) * 10
    return (torch.randn((1, tokens, width), generator=draw) * spread).to(dtype)


@given(
    st.integers(0, 1 << 20),
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from([Scheme(), Scheme(group=128), Scheme(group=32, powers=True), Scheme(static=0.05)]),
)
def test_values_are_codes_times_scales(seed: int, tokens: int, width: int, dtype: torch.dtype, scheme: Scheme) -> None:
    x = activations(seed, tokens, width, dtype)
    found = scheme.apply(x)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    size = scheme.group or width
    for first in range(0, width, size):
        part, own = x[..., first : first + size].double(), found[..., first : first + size].double()
        amax = part.abs().amax(-1, keepdim=True)
        if scheme.static is not None:
            scale = torch.full_like(amax, scheme.static)
        elif scheme.powers:
            scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
        else:
            scale = amax / 448
        scale = torch.where(amax == 0, 1.0, scale)
        exact = (part / scale).clamp(-448, 448)
        # Half of the distance of neighboring codes, and the rounding to the dtype.
        step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-6))) - 3)
        assert ((own - exact * scale).abs() <= (step / 2 * 1.001 + exact.abs() * 2.0**-8) * scale).all()


def test_zeros_stay() -> None:
    for scheme in (Scheme(), Scheme(group=128), Scheme(group=32, powers=True), Scheme(static=1.0)):
        assert not scheme.apply(torch.zeros((1, 3, 256), dtype=torch.bfloat16)).any()


PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": torch.nn.functional.linear,
    "linear, by name": lambda x, w: torch.nn.functional.linear(x, weight=w),
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "operator": lambda x, w: x @ w.T,
    "method": lambda x, w: x.matmul(w.T),
    "mm": lambda x, w: torch.mm(x[0], w.T)[None],
    "bmm": lambda x, w: torch.bmm(x, w.T[None]),
    "addmm": lambda x, w: torch.addmm(torch.zeros(w.shape[0]), x[0], w.T)[None],
}
"""Products of activations ``[1, tokens, in]`` with a weight ``[out, in]``."""


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_is_seen(name: str) -> None:
    x, w, other = torch.randn(1, 4, 8), torch.randn(6, 8), torch.randn(6, 8)
    plain, doubled = PRODUCTS[name](x, w), PRODUCTS[name](x * 2, w)
    with Products({w.data_ptr(): lambda given: given * 2}) as products:
        assert torch.equal(PRODUCTS[name](x, w), doubled)
        assert torch.equal(PRODUCTS[name](x, other), PRODUCTS[name](x, other))
    assert products.seen == {w.data_ptr()}
    assert torch.equal(PRODUCTS[name](x, w), plain)


def test_matrices_of_a_stack_are_weights_of_their_own() -> None:
    stack = torch.randn(3, 6, 8)
    x = torch.randn(2, 8)
    handlers = {stack[number].data_ptr(): lambda given, n=number: given * n for number in (1, 2)}
    with Products(handlers) as products:
        found = [torch.nn.functional.linear(x, stack[number]) for number in range(3)]
    for number, factor in ((0, 1), (1, 1), (2, 2)):
        assert torch.equal(found[number], torch.nn.functional.linear(x * factor, stack[number]))
    assert products.seen == {stack[1].data_ptr(), stack[2].data_ptr()}


@pytest.mark.parametrize("cast", [torch.Tensor.float, lambda w: w.to(torch.float32), lambda w: w.type(torch.float32)])
def test_a_cast_of_a_weight_is_that_weight(cast: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As routers do it; memory of a cast that is gone, and taken by another tensor, is not."""
    w, x, other = torch.randn(6, 8).bfloat16(), torch.randn(4, 8), torch.randn(6, 8)
    doubled, plain = torch.nn.functional.linear(x * 2, w.float()), torch.nn.functional.linear(x, other)
    with Products({w.data_ptr(): lambda given: given * 2}) as products:
        for _ in range(20):
            assert torch.equal(torch.nn.functional.linear(x, cast(w)), doubled)
            assert torch.equal(torch.nn.functional.linear(x, other.clone()), plain)
    assert products.seen == {w.data_ptr()}


@given(st.integers(0, 1 << 20), st.floats(1e-4, 10.0))
def test_requantized_weights_are_codes_of_the_second_scale(seed: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 0x7F, (64,), generator=draw, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    found = Requantized(scale).values(codes * scale)
    torch.testing.assert_close(found, codes * scale, rtol=1e-6, atol=0)  # codes of this scale already
