"""Weights for property tests of the kernels: every supported dtype, layout and range of values."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPECIALS = (0.0, -0.0, 1e-45, -6e-8, 1e-12, 448.0, -464.0, 65504.0, 3.3e38)

dtypes = st.sampled_from(DTYPES)
granularities = st.sampled_from(("tensor", "channel", "block"))
blocks = st.sampled_from(((128, 128), (16, 32), (5, 48), (24, 70)))


@st.composite
def weights(draw: st.DrawFn, max_rows: int = 30, max_columns: int = 300) -> torch.Tensor:
    """Draw a 2-D weight, dense or with a row stride: values around a power of ten, and some special values."""
    dtype = draw(dtypes)
    rows, columns = draw(st.integers(0, max_rows)), draw(st.integers(0, max_columns))
    padding = draw(st.sampled_from((0, 0, 1, 16)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    exponent = draw(st.integers(-42, 37))
    spread = draw(st.sampled_from((0.0, 1.0, 3.0)))
    magnitudes = torch.randn(rows, columns + padding, generator=generator, dtype=torch.float64)
    magnitudes *= 10.0 ** (
        exponent + spread * torch.randn(rows, columns + padding, generator=generator, dtype=torch.float64)
    )
    limit = torch.finfo(dtype).max
    w = magnitudes.clamp(-limit, limit).to(dtype)
    if w.numel():
        for special in draw(st.lists(st.sampled_from(SPECIALS), max_size=3)):
            place = int(torch.randint(w.numel(), (), generator=generator))
            w.view(-1)[place] = max(-limit, min(limit, special))
    return w[:, :columns]
