"""Instructions with effects beyond registers: memory, barriers, exchanges within a warp, dependent launches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from .errors import UnsupportedError
from .operands import SHARED_BASE, UNSIGNED, Operands, width_of

if TYPE_CHECKING:
    import numpy as np

    from .parse import Instruction

Source: TypeAlias = "tuple[int | None, np.unsignedinteger | None]"
"""A register, or a constant."""

SCOPES = ("cta", "gpu", "sys")
HINTS = (
    *("L1::evict_first", "L1::evict_last", "L1::no_allocate", "L1::evict_normal", "L1::evict_unchanged"),
    *("L2::64B", "L2::128B", "L2::256B", "ca", "cg", "cs", "wb", "wt"),
)
"""Hints to caches, which change no value."""
FENCES = {
    ("acq_rel", "gpu"): "gpu",
    ("acq_rel", "sys"): "gpu",
    ("sc", "gpu"): "gpu",
    ("sc", "sys"): "gpu",
    ("gl",): "gpu",
    ("sys",): "gpu",
    ("cta",): "cta",
    ("acq_rel", "cta"): "cta",
}
"""Scope of each fence; the emulator has one device."""


@dataclass(frozen=True)
class Effect:
    """One instruction.

    Attributes:
        kind: name of the method that executes it.
        text: the statement.
        predicate: register and True if negated, or None.
        targets: registers of results; None for an ignored one.
        sources: operands.
        base: register of the address; None for an address in shared memory that is constant.
        offset: constant part of the address.
        width: bytes of an element.
        count: elements of a vector.
        order: memory order, ``weak`` or ``volatile``.
        scope: ``cta``, ``gpu`` or ``sys``.
        signed: a narrower result is sign-extended.
        detail: operation of an atomic, a reduction or a shuffle.
        dead: no instruction reads the result.
    """

    kind: str
    text: str
    predicate: tuple[int, bool] | None
    targets: tuple[int | None, ...] = ()
    sources: tuple[Source, ...] = ()
    base: int | None = None
    offset: int = 0
    width: int = 0
    count: int = 1
    order: str = "weak"
    scope: str = "gpu"
    signed: bool = False
    detail: tuple[str, ...] = ()
    dead: bool = False


class Effects(Operands):
    """Translation of instructions with effects."""

    def effect(self, instruction: Instruction, predicate: tuple[int, bool] | None, read: set[int]) -> Effect | None:
        """Return the effect of an instruction, or None if it is pure.

        Args:
            instruction: the instruction.
            predicate: its predicate.
            read: registers that some instruction of the kernel reads.
        """
        head, *mods = instruction.parts
        ops = instruction.operands
        if head in ("ld", "st") and "param" not in mods:
            return self._access(instruction, predicate)
        if head in ("atom", "red"):
            return self._atomic(instruction, predicate, read)
        found: Effect | None = None
        if head in ("bar", "barrier"):
            if mods in (["sync"], ["cta", "sync", "aligned"]) and ops == ["0"] and predicate is None:
                found = Effect("barrier", instruction.text, predicate)
            elif mods == ["warp", "sync"]:
                found = Effect("warp_barrier", instruction.text, predicate, sources=(self._source(ops[0], 32),))
        elif head == "shfl":
            if (
                mods[0] == "sync"
                and mods[1] in ("bfly", "idx", "up", "down")
                and mods[2] == "b32"
                and "|" not in ops[0]
            ):
                sources = tuple(self._source(op, 32) for op in ops[1:5])
                found = Effect(
                    "shuffle", instruction.text, predicate, (self.index[ops[0]],), sources, detail=(mods[1],)
                )
        elif head == "redux":
            if mods[0] == "sync" and mods[1] in ("max", "min", "add", "and", "or", "xor"):
                sources = tuple(self._source(op, 32) for op in ops[1:3])
                found = Effect(
                    "reduce", instruction.text, predicate, (self.index[ops[0]],), sources, detail=(mods[1], mods[2])
                )
        elif head in ("ldmatrix", "stmatrix"):
            found = self._matrix(instruction, predicate)
        elif head in ("fence", "membar"):
            if tuple(mods) in FENCES:
                found = Effect("fence", instruction.text, predicate, scope=FENCES[tuple(mods)])
        elif head == "griddepcontrol":
            kinds = {"wait": "grid_wait", "launch_dependents": "dependents"}
            found = Effect(kinds[mods[0]], instruction.text, predicate)
        elif head == "nanosleep":
            found = Effect("sleep", instruction.text, predicate)
        else:
            return None
        if found is None:
            raise UnsupportedError(instruction.text)
        return found

    def _source(self, text: str, bits: int) -> Source:
        if not self.is_register(text):
            return None, UNSIGNED[bits](self.number(text, bits))
        if self.bits[self.index[text]] < bits:
            raise UnsupportedError(f"{text} is narrower than {bits} bits")
        return self.index[text], None

    def _address(self, text: str) -> tuple[int | None, int]:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if match and self.is_register(match[1]):
            return self.index[match[1]], int(match[2] or 0)
        if match and match[1] in self.kernel.shared:
            return None, SHARED_BASE + int(match[2] or 0)
        raise UnsupportedError(f"address {text}")

    @staticmethod
    def _vector(text: str) -> list[str]:
        return [name.strip() for name in text[1:-1].split(",")] if text.startswith("{") else [text]

    def _access(self, instruction: Instruction, predicate: tuple[int, bool] | None) -> Effect:
        head, *mods, kind = instruction.parts
        ops = instruction.operands
        order, scope, count, space = "weak", "gpu", 1, ""
        for mod in mods:
            if mod in ("relaxed", "acquire", "release", "volatile", "weak"):
                order = mod
            elif mod in SCOPES:
                scope = mod
            elif mod in ("global", "shared"):
                space = mod
            elif mod in ("v2", "v4"):
                count = int(mod[1])
            elif mod != "L2::cache_hint" and mod not in HINTS:
                raise UnsupportedError(instruction.text)
        value, address = (ops[0], ops[1]) if head == "ld" else (ops[1], ops[0])
        names = self._vector(value)
        wanted = 3 if "L2::cache_hint" in mods else 2
        width = width_of(kind)
        wrong_order = "release" if head == "ld" else "acquire"
        if not (space and re.fullmatch(r"[busf](8|16|32|64)", kind) and len(ops) == wanted and len(names) == count):
            raise UnsupportedError(instruction.text)
        if order == wrong_order or (order != "weak" and count > 1):
            raise UnsupportedError(instruction.text)
        base, offset = self._address(address)
        targets: tuple[int | None, ...] = ()
        sources: tuple[Source, ...] = ()
        if head == "ld":
            targets = tuple(None if name == "_" else self.index[name] for name in names)
            if any(target is not None and self.bits[target] < width for target in targets):
                raise UnsupportedError(instruction.text)
        else:
            sources = tuple(self._source(name, width) for name in names)
        return Effect(
            f"{'load' if head == 'ld' else 'store'}_{space}",
            instruction.text,
            predicate,
            targets,
            sources,
            base,
            offset,
            width // 8,
            count,
            order,
            scope,
            kind[0] == "s",
        )

    def _atomic(self, instruction: Instruction, predicate: tuple[int, bool] | None, read: set[int]) -> Effect:
        head, *mods, kind = instruction.parts
        ops = instruction.operands
        order, scope, operation = "relaxed", "gpu", ""
        for mod in mods:
            if mod in ("relaxed", "acquire", "release", "acq_rel"):
                order = mod
            elif mod in SCOPES:
                scope = mod
            elif mod in ("add", "max", "min", "and", "or", "xor", "exch", "cas"):
                operation = mod
            elif mod != "global":
                raise UnsupportedError(instruction.text)
        if not operation or kind not in ("u32", "s32", "b32", "u64", "s64", "b64"):
            raise UnsupportedError(instruction.text)
        target = None
        if head == "atom":
            target = None if ops[0] == "_" else self.index[ops[0]]
            ops = ops[1:]
        bits = width_of(kind)
        base, offset = self._address(ops[0])
        return Effect(
            "atomic",
            instruction.text,
            predicate,
            (target,),
            tuple(self._source(op, bits) for op in ops[1:]),
            base,
            offset,
            bits // 8,
            1,
            order,
            scope,
            detail=(operation, kind),
            dead=target is None or target not in read,
        )

    def _matrix(self, instruction: Instruction, predicate: tuple[int, bool] | None) -> Effect:
        head, *mods = instruction.parts
        loads = head == "ldmatrix"
        values, address = instruction.operands if loads else reversed(instruction.operands)
        names = self._vector(values)
        forms = (["shared", "b16"], ["trans", "shared", "b16"])
        if mods[:3] != ["sync", "aligned", "m8n8"] or mods[3] != f"x{len(names)}" or mods[4:] not in forms:
            raise UnsupportedError(instruction.text)
        base, offset = self._address(address)
        return Effect(
            "load_matrix" if loads else "store_matrix",
            instruction.text,
            predicate,
            tuple(self.index[name] for name in names) if loads else (),
            () if loads else tuple(self._source(name, 32) for name in names),
            base,
            offset,
            count=len(names),
            detail=("transposed",) if "trans" in mods else (),
        )
