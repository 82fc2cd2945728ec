"""Operands of PTX instructions as Python expressions over numpy arrays.

Registers hold raw bits: ``b16``, ``b32`` and ``b64`` as unsigned integers, ``pred`` as bool. The expressions refer to
registers as ``R[number]``, to constants as ``C[number]``, and to the lanes that run as ``u``.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import numpy as np

from .errors import UnsupportedError

if TYPE_CHECKING:
    from .parse import Kernel

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}

SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid") for axis in "xyz"} | {
    "%ntid.x",
    "%laneid",
    "%warpid",
}
"""Special registers."""

SHARED_BASE = 1024
"""Start of the shared window, so that no variable has the address 0."""

INTEGER = re.compile(r"([+-]?)(0[xX][0-9A-Fa-f]+|0[bB][01]+|0[0-7]*|[1-9]\d*)U?")


def unsigned(bits: int) -> str:
    return f"np.uint{bits}"


def signed(bits: int) -> str:
    return f"np.int{bits}"


def width_of(kind: str) -> int:
    """Return the bits of a type such as ``u32`` or ``f16x2``."""
    return int(re.sub(r"\D", "", kind))


class Operands:
    """Operands of one kernel.

    Attributes:
        kernel: the parsed kernel.
        index: number of each register.
        classes: class of each register, by number.
        bits: bits of each register, by number.
        constants: values of ``C``.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.index = {name: number for number, name in enumerate(kernel.registers)}
        self.classes = list(kernel.registers.values())
        self.bits = [1 if kind == "pred" else width_of(kind) for kind in self.classes]
        self.constants: list[object] = []

    def constant(self, value: object) -> str:
        self.constants.append(value)
        return f"C[{len(self.constants) - 1}]"

    def u32(self, value: int) -> str:
        return self.constant(np.uint32(value))

    def number(self, text: str, bits: int) -> int:
        """Return an immediate as unsigned bits."""
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            return int(match[1], 16)
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
            value = int(match[1], 16)
            narrow = np.float32(struct.unpack("<d", struct.pack("<Q", value))[0])
            return value if bits == 64 else int(narrow.view(np.uint32))
        if match := INTEGER.fullmatch(text):
            body = match[2].lower()
            octal = len(body) > 1 and body.isdigit() and body.startswith("0")
            return int(match[1] + body, 8 if octal else 0) % (1 << bits)
        raise UnsupportedError(f"immediate {text}")

    def is_register(self, text: str) -> bool:
        return text in self.index

    def read(self, text: str, bits: int) -> str:
        """Return an expression of ``bits`` unsigned bits; a wider register is truncated."""
        if self.is_register(text):
            have = self.bits[self.index[text]]
            if have < bits:
                raise UnsupportedError(f"{text} is narrower than {bits} bits")
            expression = f"R[{self.index[text]}]"
            return expression if have == bits else f"{expression}.astype({unsigned(bits)})"
        if text in self.kernel.shared:
            return self.constant(UNSIGNED[bits](SHARED_BASE))
        if text in SPECIAL:
            return f"u.special[{text!r}]"
        return self.constant(UNSIGNED[bits](self.number(text, bits)))

    def typed(self, text: str, kind: str) -> str:
        """Return an expression of a PTX type: signed for ``s32``, bits for all others."""
        bits = width_of(kind)
        return f"{self.read(text, bits)}.view({signed(bits)})" if kind[0] == "s" else self.read(text, bits)

    def read_predicate(self, text: str) -> str:
        if text.startswith("!"):
            return f"~{self.read_predicate(text[1:])}"
        if self.is_register(text):
            return f"R[{self.index[text]}]"
        return self.constant(np.bool_(self.number(text, 32) != 0))

    def write(self, text: str, expression: str, bits: int, extend_sign: bool = False) -> list[tuple[int, str]]:
        """Return the assignment to a register, widened to its class; none for ``_``."""
        if text == "_":
            return []
        have = self.bits[self.index[text]]
        if have < bits:
            raise UnsupportedError(f"{bits} bits into {text}")
        if have > bits and extend_sign:
            expression = f"({expression}).view({signed(bits)}).astype({signed(have)}).view({unsigned(have)})"
        elif have > bits:
            expression = f"({expression}).astype({unsigned(have)})"
        return [(self.index[text], expression)]
