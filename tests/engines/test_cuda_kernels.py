"""The kernels of the CUDA engine through the public operations, here on CPU tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8.engines.cuda.device import CudaKernels
from nemotron_fp8.planning.number_format import Coverage, NumberFormat
from nemotron_fp8_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_codes_of_a_batch_are_written_in_place(granularity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels write to the slot of the pipeline; only the scales are copied."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 30), (130, 140))]
    slab = torch.zeros(2 * 140 * 140, dtype=torch.uint8)
    outs = [
        slab[at : at + w.numel()].view(torch.float8_e4m3fn).view(w.shape)
        for at, w in zip((0, 256), weights, strict=True)
    ]
    coverage = Coverage(granularity)
    scales = [torch.empty(coverage.scale_shape(w.shape)) for w in weights]
    copied: list[torch.dtype] = []
    copy = torch._foreach_copy_

    def noted(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> object:
        copied.extend(target.dtype for target in targets)
        return copy(targets, sources)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    CudaKernels().quantize_many(weights, outs, scales, NumberFormat(coverage))
    for w, out, scale in zip(weights, outs, scales, strict=True):
        q, expected = reference.quantize(w, granularity)
        assert torch.equal(out.view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(scale, expected)
    assert copied == [torch.float32] * 2
