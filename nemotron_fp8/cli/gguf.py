"""Read the one GGUF file of ``demo --real``, whose digest is known: metadata, and tensors as bf16.

Source of the format: ``gguf-py`` of llama.cpp (``gguf_reader.py``, ``quants.py``), GGUF version 3.
"""

from __future__ import annotations

import struct
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mmap import mmap

    import torch

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Formats of the scalar types, by number."""
TEXT, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK = 32
"""Values of a quantized block."""
BLOCK_BYTES = {Q4_1: 20, Q8_0: 34}
ALIGNMENT = 32


class Stored(NamedTuple):
    """A tensor of the file.

    Attributes:
        kind: number of its type.
        shape: its shape, outermost dimension first.
        offset: first byte in the file.
        nbytes: bytes in the file.
    """

    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Gguf:
    """A GGUF file.

    Args:
        data: its bytes.

    Attributes:
        metadata: values by name.
        tensors: tensors by name, in the order of the file.
    """

    def __init__(self, data: mmap) -> None:
        self._data, self._at = data, 4
        assert data[:4] == b"GGUF"
        version, tensors, values = self._scalar("<I"), self._scalar("<Q"), self._scalar("<Q")
        assert version == 3
        self.metadata: dict[str, Any] = {self._text(): self._value(self._scalar("<I")) for _ in range(values)}
        found = [self._entry() for _ in range(tensors)]
        start = -(-self._at // ALIGNMENT) * ALIGNMENT
        self.tensors = {name: stored._replace(offset=start + stored.offset) for name, stored in found}

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _text(self) -> str:
        length = self._scalar("<Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind == ARRAY:
            item, count = self._scalar("<I"), self._scalar("<Q")
            return [self._value(item) for _ in range(count)]
        return self._scalar(SCALARS[kind])

    def _entry(self) -> tuple[str, Stored]:
        name, dimensions = self._text(), self._scalar("<I")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self._scalar("<I"), self._scalar("<Q")
        count = prod(shape)
        nbytes = 4 * count if kind == F32 else count // BLOCK * BLOCK_BYTES[kind]
        return name, Stored(kind, shape, offset, nbytes)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, computed in float32 and rounded to bf16."""
        import torch

        stored = self.tensors[name]
        raw = torch.frombuffer(bytearray(self._data[stored.offset : stored.offset + stored.nbytes]), dtype=torch.uint8)
        if stored.kind == F32:
            return raw.view(torch.float32).reshape(stored.shape).bfloat16()
        blocks = raw.reshape(-1, BLOCK_BYTES[stored.kind])
        scale = blocks[:, :2].contiguous().view(torch.float16).float()
        if stored.kind == Q8_0:
            values = scale * blocks[:, 2:].contiguous().view(torch.int8).float()
        else:
            least = blocks[:, 2:4].contiguous().view(torch.float16).float()
            codes = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1).float()
            values = scale * codes + least
        return values.reshape(stored.shape).bfloat16()


def unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the weight of queries or keys in the order of Hugging Face checkpoints.

    llama.cpp puts the two numbers that a rotary embedding turns beside each other. Source: ``permute`` of its
    ``convert_hf_to_gguf.py``, whose inverse this is.

    Args:
        weight: rows of all heads.
        heads: number of heads.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
