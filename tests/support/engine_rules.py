"""Requantization of block weights when engines load them: scales become powers of two (UE8M0).

The rules are those of two functions, written again from their description: ``requant_weight_ue8m0_inplace`` of vLLM
0.32, which dequantizes in float32, and ``requant_weight_ue8m0`` of SGLang 0.5, which dequantizes in bfloat16. Both then
cast with ``per_block_cast_to_fp8`` of DeepGEMM. tests/inference compares the first one with vLLM itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nemotron_fp8_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Mapping

LEAST_AMAX = 1e-4
"""Least amax of a block in DeepGEMM's cast."""

THROUGH: Mapping[str, torch.dtype] = {"vLLM": torch.float32, "SGLang": torch.bfloat16}
"""Dtype of the values between both casts, by engine."""


def requantized(
    codes: torch.Tensor, scales: torch.Tensor, engine: str, block: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales as an engine keeps them in memory.

    Args:
        codes: float8_e4m3fn ``[N, K]``.
        scales: float32 ``[ceil(N / block[0]), ceil(K / block[1])]``.
        engine: a key of `THROUGH`.
        block: rows and columns of a block.
    """
    values = reference.dequantize(codes, scales, "block", block, torch.float32).to(THROUGH[engine])
    down, across = scales.shape
    padded = torch.zeros(down * block[0], across * block[1], dtype=values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    cells = padded.view(down, block[0], across, block[1])
    amax = cells.abs().float().amax(dim=(1, 3), keepdim=True).clamp(LEAST_AMAX)
    scale = torch.pow(2.0, torch.ceil(torch.log2((amax / 448.0).abs())))
    cast = (cells * (1.0 / scale)).to(torch.float8_e4m3fn).view(torch.uint8)
    cast = cast.view(padded.shape)[: values.shape[0], : values.shape[1]].contiguous()
    return cast.view(torch.float8_e4m3fn), scale.view(down, across)


def changed(codes: torch.Tensor, scales: torch.Tensor, engine: str) -> torch.Tensor:
    """Return which values an engine's requantization changes: bool of the shape of the codes."""
    again, rounded = requantized(codes, scales, engine)
    before, after = (
        reference.dequantize(*pair, "block", dtype=torch.float32) for pair in ((codes, scales), (again, rounded))
    )
    return before != after
