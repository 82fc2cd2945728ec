"""Dtypes of safetensors: names on disk, sizes, order in a file.

Source: ``enum Dtype`` in huggingface/safetensors ``tensor.rs`` (0.8). A writer orders tensors by descending
variant, then by name.
"""

from __future__ import annotations

BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, by safetensors name, in ascending order of the format's enum."""

RANK: dict[str, int] = {name: rank for rank, name in enumerate(reversed(BITS))}
"""Position of a dtype in a written file: ``U64`` first, ``BOOL`` last."""

QUANTIZABLE = frozenset({"BF16", "F16", "F32"})
"""Floating-point dtypes that can be cast to FP8."""

FLOAT8 = frozenset({"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"})
"""Dtypes of 8-bit floating-point elements; ``F8_E8M0`` holds scales."""


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a dense tensor; sub-byte dtypes round down (headers whose bits fill no byte are rejected)."""
    bits = BITS[dtype]
    for dimension in shape:
        bits *= dimension
    return bits // 8
