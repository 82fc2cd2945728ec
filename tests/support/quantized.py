"""Quantized weights as other tools publish them, with the values that they stand for.

The values are computed here element by element from the definition of each format, without code of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from tests.support.checkpoints import Tensors

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Values of the elements of MXFP4, by their lower three bits."""
Cell = tuple[int | None, int | None]
"""Rows and columns under one scale; None for all of them."""


class Weight(NamedTuple):
    """A quantized weight: its tensors by the ends of their names, its values, and one number for each cell."""

    tensors: Tensors
    values: torch.Tensor
    cells: torch.Tensor


@dataclass(frozen=True)
class Kind:
    """A format of quantized weights.

    Attributes:
        cell: rows and columns under one scale.
        suffix: end of the name of the scale, after the name of the module.
        scale: dtype of the scales: float32, bfloat16, float8_e8m0fnu, or uint8 for E8M0.
        codes: end of the name of the codes.
        packed: dtype of packed E2M1 codes; None for E4M3.
        ones: True for scales of blocks ``[rows, 1, columns, 1]``, and of rows ``[rows]``.
        others: further tensors, by the ends of their names.
    """

    cell: Cell
    suffix: str = "weight_scale"
    scale: torch.dtype = torch.float32
    codes: str = "weight"
    packed: torch.dtype | None = None
    ones: bool = False
    others: tuple[str, ...] = ()

    @property
    def has_exponents(self) -> bool:
        """True if every scale is a power of two by its type."""
        return self.scale.itemsize == 1

    def make(self, rows: int, columns: int, seed: int, powers: bool = False) -> Weight:
        """A weight of these sides; ``powers`` makes every scale a power of two, which may differ by 2^9."""
        generator = torch.Generator().manual_seed(seed)
        tall, wide = self.cell[0] or rows, self.cell[1] or columns
        shape = -(-rows // tall), -(-columns // wide)
        exponents = torch.randint(118, 128, shape, generator=generator, dtype=torch.uint8)
        scale = torch.exp2(exponents.float() - 127)
        if not (powers or self.has_exponents):
            scale = (scale * (1 + torch.rand(shape, generator=generator))).to(self.scale).float()
        full = spread(scale, (tall, wide), (rows, columns))
        cells = spread(torch.arange(scale.numel()).view(shape), (tall, wide), (rows, columns))
        if self.packed is None:
            codes = torch.randn(rows, columns, generator=generator).mul(60).clamp(-448, 448).to(torch.float8_e4m3fn)
            values = codes.float() * full
        else:
            pairs = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
            values = unpacked(pairs) * full
            codes = pairs.view(self.packed)
        stored = exponents if self.has_exponents else scale
        stored = stored.view(self.scale) if self.has_exponents else stored.to(self.scale)
        if self.cell == (None, None):
            stored = stored.reshape(())
        elif self.ones:
            stored = stored.reshape(-1) if self.cell[1] is None else stored[:, None, :, None].contiguous()
        others = {name: torch.tensor(0.5) for name in self.others}
        return Weight({self.codes: codes, self.suffix: stored, **others}, values, cells)


def unpacked(pairs: torch.Tensor) -> torch.Tensor:
    """The values of packed E2M1 codes ``[..., K / 2]``: the lower half of a byte comes first."""
    halves = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
    return torch.where(halves > 7, -1.0, 1.0) * E2M1[(halves & 7).long()]


def spread(values: torch.Tensor, cell: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """One value for each element of a matrix, from one for each cell; cells at the edges may be smaller."""
    by_row = values.repeat_interleave(cell[0], 0)[: shape[0]]
    return by_row.repeat_interleave(cell[1], 1)[:, : shape[1]]


KINDS = {
    "tensor": Kind((None, None)),
    "modelopt tensor, static": Kind((None, None), others=("input_scale",)),
    "channel": Kind((1, None)),
    "channel, bf16 scales": Kind((1, None), scale=torch.bfloat16),
    "modelopt channel": Kind((1, None), ones=True),
    "DeepSeek V3": Kind((128, 128), "weight_scale_inv"),
    "DeepSeek V4": Kind((128, 128), "scale", torch.float8_e8m0fnu),
    "DeepSeek V4, float32": Kind((128, 128), "scale"),
    "modelopt blocks": Kind((128, 128), ones=True),
    "MXFP8": Kind((1, 32), "weight_scale", torch.uint8),
    "MXFP8 of SGLang": Kind((1, 32), "weight_scale_inv", torch.uint8),
    "MXFP4 of DeepSeek V4": Kind((1, 32), "scale", torch.float8_e8m0fnu, packed=torch.int8),
    "MXFP4 of compressed-tensors": Kind((1, 32), "weight_scale", torch.uint8, "weight_packed", torch.uint8),
}
"""Formats of published checkpoints."""


def checkpoint_of(weights: dict[str, Weight]) -> Tensors:
    """The tensors of a checkpoint of quantized weights, by the names of their modules."""
    return {f"{module}.{end}": tensor for module, weight in weights.items() for end, tensor in weight.tensors.items()}


def decoded(tensors: Tensors, name: str, cell: Cell) -> torch.Tensor:
    """The values of an FP8 weight of a result, in float32, from its codes and the scale beside it."""
    codes = tensors[name]
    scale = next(tensors[name + end] for end in ("_scale_inv", "_scale") if name + end in tensors)
    if scale.itemsize == 1:
        scale = torch.exp2(scale.view(torch.uint8).float() - 127)
    rows, columns = codes.shape
    tall, wide = cell[0] or rows, cell[1] or columns
    scale = scale.reshape(-(-rows // tall), -(-columns // wide))
    return codes.float() * spread(scale, (tall, wide), (rows, columns))


def step_of(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The distance of neighboring FP8 numbers at each value, in float64."""
    exponent = (values.double() / scale.double()).abs().clamp_min(2.0**-6).log2().floor()
    return torch.exp2(exponent - 3) * scale.double()
