"""Instructions that only change registers, as assignments of Python expressions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .errors import UnsupportedError
from .operands import UNSIGNED, Operands, signed, unsigned, width_of

if TYPE_CHECKING:
    from .parse import Instruction

Assignments: TypeAlias = "list[tuple[int, str]]"
"""Register and expression of each assignment."""

INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


class Pure(Operands):
    """Translation of pure instructions: method ``p_add`` for ``add``; None for an unknown form."""

    def pure(self, instruction: Instruction) -> Assignments:
        """Return the assignments of an instruction."""
        parts = instruction.parts
        method = getattr(self, f"p_{parts[0]}", None)
        found: Assignments | None = method(parts[1:-1], parts[-1], instruction.operands) if method else None
        if found is None:
            raise UnsupportedError(instruction.text)
        return found

    def p_mov(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if mods:
            return None
        if kind == "pred":
            return [(self.index[ops[0]], self.read_predicate(ops[1]))]
        bits = width_of(kind)
        if ops[0].startswith("{"):
            return self._unpack(bits, ops)
        if ops[1].startswith("{"):
            names = [name.strip() for name in ops[1][1:-1].split(",")]
            part = bits // len(names)
            pieces = [
                f"({self.read(name, part)}.astype({unsigned(bits)}) << {self.constant(UNSIGNED[bits](part * i))})"
                for i, name in enumerate(names)
            ]
            return self.write(ops[0], " | ".join(pieces), bits)
        if ops[1].startswith("%") and not self.is_register(ops[1]) and bits != 32:
            return None
        return self.write(ops[0], self.read(ops[1], bits), bits)

    def _unpack(self, bits: int, ops: list[str]) -> Assignments | None:
        names = [name.strip() for name in ops[0][1:-1].split(",")]
        if ops[1] in names:
            return None  # the first assignment would change the source of the others
        part = bits // len(names)
        out: Assignments = []
        for i, name in enumerate(names):
            source = f"({self.read(ops[1], bits)} >> {self.constant(UNSIGNED[bits](part * i))})"
            out += self.write(name, f"{source}.astype({unsigned(part)})", part)
        return out

    # Integers

    def _binary(self, ops: list[str], kind: str, operator: str) -> Assignments:
        bits = width_of(kind)
        a, b = (self.typed(op, kind) for op in ops[1:3])
        view = f".view({unsigned(bits)})" if kind[0] == "s" else ""
        return self.write(ops[0], f"({a} {operator} {b}){view}", bits)

    def _function(self, ops: list[str], kind: str, name: str) -> Assignments:
        bits = width_of(kind)
        a, b = (self.typed(op, kind) for op in ops[1:3])
        return self.write(ops[0], f"{name}({a}, {b}).view({unsigned(bits)})", bits)

    def _wide(self, ops: list[str], kind: str) -> str:
        bits = width_of(kind)
        cast = (signed if kind[0] == "s" else unsigned)(2 * bits)
        a, b = (f"{self.typed(op, kind)}.astype({cast})" for op in ops[1:3])
        return f"({a} * {b}).view({unsigned(2 * bits)})"

    def p_add(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if kind in INTEGERS and not mods:
            return self._binary(ops, f"b{kind[1:]}", "+")
        return self._float("add", mods, kind, ops)

    def p_sub(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if kind in INTEGERS and not mods:
            return self._binary(ops, f"b{kind[1:]}", "-")
        return self._float("sub", mods, kind, ops)

    def p_mul(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if kind[0] not in "su":
            return self._float("mul", mods, kind, ops)
        bits = width_of(kind)
        if mods == ["lo"]:
            return self._binary(ops, f"b{bits}", "*")
        if mods == ["wide"] and bits < 64:
            return self.write(ops[0], self._wide(ops, kind), 2 * bits)
        if mods == ["hi"] and bits < 64:
            shift = self.constant(UNSIGNED[2 * bits](bits))
            return self.write(ops[0], f"({self._wide(ops, kind)} >> {shift}).astype({unsigned(bits)})", bits)
        if mods == ["hi"]:
            a, b = (self.read(op, 64) for op in ops[1:3])
            return self.write(ops[0], f"integers.mul_high({a}, {b}, {kind[0] == 's'})", 64)
        return None

    def p_mad(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if kind[0] not in "su":
            return self.p_fma(mods, kind, ops)
        bits = width_of(kind)
        if mods == ["lo"]:
            a, b, c = (self.read(op, bits) for op in ops[1:4])
            return self.write(ops[0], f"({a} * {b} + {c})", bits)
        if mods == ["wide"] and bits < 64:
            return self.write(ops[0], f"({self._wide(ops, kind)} + {self.read(ops[3], 2 * bits)})", 2 * bits)
        return None

    def p_div(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if kind in INTEGERS and not mods:
            return self._function(ops, kind, "integers.div")
        # div.full and div.approx are not exact.
        return self._float("div", mods, kind, ops) if "rn" in mods else None

    def p_rem(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self._function(ops, kind, "integers.rem") if kind in INTEGERS and not mods else None

    def p_neg(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if mods:
            return None
        if kind == "f32":
            return self.write(ops[0], f"({self.read(ops[1], 32)} ^ {self.u32(1 << 31)})", 32)
        bits = width_of(kind)
        zero = self.constant(UNSIGNED[bits](0))
        return self.write(ops[0], f"({zero} - {self.read(ops[1], bits)})", bits) if kind[0] == "s" else None

    def p_abs(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if mods:
            return None
        if kind in ("f16x2", "bf16x2"):
            low, high = self._halves(ops[1])
            return self._pair(ops[0], *(f"formats.abs16({half}, {kind[:-2]!r})" for half in (low, high)))
        if kind in ("f16", "bf16"):
            expression = f"formats.abs16({self.read(ops[1], 16)}, {kind!r}).astype(np.uint16)"
            return self.write(ops[0], expression, 16)
        if kind == "s32":
            return self.write(ops[0], f"np.abs({self.typed(ops[1], kind)}).view(np.uint32)", 32)
        if kind == "f32":
            return self.write(ops[0], f"({self.read(ops[1], 32)} & {self.u32(0x7FFFFFFF)})", 32)
        return None

    def _halves(self, text: str) -> tuple[str, str]:
        source = self.read(text, 32)
        return f"({source}).astype(np.uint16)", f"({source} >> {self.u32(16)}).astype(np.uint16)"

    def _pair(self, target: str, low: str, high: str) -> Assignments:
        return self.write(target, f"(({low}).astype(np.uint32) | (({high}).astype(np.uint32) << {self.u32(16)}))", 32)

    # Bits

    def _logic(self, mods: list[str], kind: str, ops: list[str], operator: str) -> Assignments | None:
        if mods:
            return None
        if kind == "pred":
            a, b = (self.read_predicate(op) for op in ops[1:3])
            return [(self.index[ops[0]], f"({a} {operator} {b})")]
        return self._binary(ops, kind, operator) if kind[0] == "b" else None

    def p_and(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self._logic(mods, kind, ops, "&")

    def p_or(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self._logic(mods, kind, ops, "|")

    def p_xor(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self._logic(mods, kind, ops, "^")

    def p_not(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if mods:
            return None
        if kind == "pred":
            return [(self.index[ops[0]], f"~{self.read_predicate(ops[1])}")]
        bits = width_of(kind)
        return self.write(ops[0], f"~{self.read(ops[1], bits)}", bits)

    def _shift(self, name: str, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if mods:
            return None
        bits = width_of(kind)
        view = f".view({unsigned(bits)})" if kind[0] == "s" else ""
        value, amount = self.typed(ops[1], kind), self.read(ops[2], 32)
        return self.write(ops[0], f"integers.{name}({value}, {amount}, {bits}){view}", bits)

    def p_shl(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self._shift("shl", mods, kind, ops)

    def p_shr(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self._shift("shr", mods, kind, ops)

    def p_prmt(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if mods or kind != "b32":
            return None
        a, b, c = (self.read(op, 32) for op in ops[1:4])
        return self.write(ops[0], f"integers.prmt({a}, {b}, {c})", 32)

    def p_bfe(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if mods or kind not in ("u32", "s32") or self.is_register(ops[2]) or self.is_register(ops[3]):
            return None
        position, length = self.number(ops[2], 32) & 255, self.number(ops[3], 32) & 255
        if not (length and position + length <= 32):
            return None
        shifted = f"({self.read(ops[1], 32)} << {self.u32(32 - position - length)})"
        if kind == "s32":
            right = self.constant(np.int32(32 - length))
            return self.write(ops[0], f"({shifted}.view(np.int32) >> {right}).view(np.uint32)", 32)
        return self.write(ops[0], f"({shifted} >> {self.u32(32 - length)})", 32)

    def p_popc(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self.write(ops[0], f"integers.popc({self.read(ops[1], 32)})", 32) if kind == "b32" else None

    def p_clz(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self.write(ops[0], f"integers.clz({self.read(ops[1], 32)})", 32) if kind == "b32" else None

    # Comparisons and choices

    def _extreme(self, name: str, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if kind == "f32":
            if set(mods) - {"NaN", "ftz"} or len(ops) != 3:
                return None
            a, b = self._floats(mods, ops[1:3])
            return self.write(ops[0], f"integers.extreme({a}, {b}, {name!r}, {'NaN' in mods})", 32)
        if mods not in ([], ["relu"]) or (mods and kind not in ("s32", "s16x2")):
            return None
        function = f"integers.{name}_relu" if mods else f"np.{name}imum"
        if kind in ("u16x2", "s16x2"):
            half = signed(16) if kind[0] == "s" else unsigned(16)
            pairs = zip(self._halves(ops[1]), self._halves(ops[2]), strict=True)
            low, high = (f"{function}({a}.view({half}), {b}.view({half})).view(np.uint16)" for a, b in pairs)
            return self._pair(ops[0], low, high)
        return self._function(ops, kind, function) if kind in INTEGERS else None

    def p_max(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self._extreme("max", mods, kind, ops)

    def p_min(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self._extreme("min", mods, kind, ops)

    def p_selp(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if mods:
            return None
        bits = width_of(kind)
        condition, a, b = self.read_predicate(ops[3]), self.read(ops[1], bits), self.read(ops[2], bits)
        return self.write(ops[0], f"np.where({condition}, {a}, {b})", bits)

    def p_setp(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if len(ops) != 3 or "|" in ops[0]:
            return None
        if kind == "f32":
            if set(mods[1:]) - {"ftz"}:
                return None
            a, b = self._floats(mods, ops[1:3])
            return [(self.index[ops[0]], f"integers.compare({a}, {b}, {mods[0]!r})")]
        known = {"b": ("eq", "ne"), "s": COMPARISONS, "u": COMPARISONS | UNSIGNED_COMPARISONS}.get(kind[0], ())
        if len(mods) != 1 or mods[0] not in known:
            return None
        a, b = (self.typed(op, kind) for op in ops[1:3])
        return [(self.index[ops[0]], f"({a} {(COMPARISONS | UNSIGNED_COMPARISONS)[mods[0]]} {b})")]

    # Floats

    def _floats(self, mods: list[str], ops: list[str]) -> list[str]:
        values = [self.read(op, 32) for op in ops]
        return [f"formats.flush({value})" for value in values] if "ftz" in mods else values

    def _float(self, name: str, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if kind != "f32" or set(mods) - {"rn", "ftz"}:
            return None
        expression = f"formats.{name}({', '.join(self._floats(mods, ops[1:]))})"
        return self.write(ops[0], f"formats.flush({expression})" if "ftz" in mods else expression, 32)

    def p_fma(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        return self._float("fma", mods, kind, ops) if "rn" in mods else None

    def p_cvt(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        *flags, to = mods
        integer = re.compile(r"[us](8|16|32|64)")
        if integer.fullmatch(to) and integer.fullmatch(kind) and not flags:
            bits = width_of(to)
            cast = (signed if kind[0] == "s" else unsigned)(bits)
            expression = f"{self.typed(ops[1], kind)}.astype({cast}).view({unsigned(bits)})"
            return self.write(ops[0], expression, bits, extend_sign=to[0] == "s")
        if to == "f32" and kind in ("f16", "bf16") and not flags:
            return self.write(ops[0], f"formats.from_{kind}({self.read(ops[1], 16)})", 32)
        if flags == ["rn"] and kind == "f32" and to in ("f16", "bf16"):
            return self.write(ops[0], f"formats.to_{to}({self.read(ops[1], 32)}).astype(np.uint16)", 16)
        if flags == ["rn"] and kind == "f32" and to in ("f16x2", "bf16x2"):
            high, low = (f"formats.to_{to[:-2]}({self.read(op, 32)})" for op in ops[1:3])
            return self._pair(ops[0], low, high)
        if flags == ["rn", "satfinite"] and (to, kind) == ("e4m3x2", "f32"):
            high, low = (f"formats.to_e4m3({self.read(op, 32)})" for op in ops[1:3])
            return self.write(ops[0], f"(({high} << {self.u32(8)}) | {low}).astype(np.uint16)", 16)
        if flags == ["rn"] and (to, kind) == ("f16x2", "e4m3x2"):
            codes = self.read(ops[1], 16)
            parts = (f"({codes} & {self.constant(np.uint16(255))})", f"({codes} >> {self.constant(np.uint16(8))})")
            return self._pair(ops[0], *(f"formats.e4m3_to_f16({part})" for part in parts))
        if flags == ["rn"] and to == "f32" and kind in ("s32", "u32"):
            return self.write(ops[0], f"{self.typed(ops[1], kind)}.astype(np.float32).view(np.uint32)", 32)
        if flags == ["rzi"] and kind == "f32" and to in ("s32", "u32"):
            return self.write(ops[0], f"integers.to_integer({self.read(ops[1], 32)}, {to!r})", 32)
        return None

    # Parameters and cache policies

    def p_ld(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        """Translate ``ld.param``; loads from other spaces are effects."""
        match = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*0)?\s*\]", ops[1])
        if mods != ["param"] or not match or self.kernel.parameters[match[1]] * 8 != width_of(kind):
            return None
        return self.write(ops[0], f"u.parameters[{match[1]!r}]", width_of(kind))

    def p_createpolicy(self, mods: list[str], kind: str, ops: list[str]) -> Assignments | None:
        if kind != "b64" or mods not in (["fractional", "L2::evict_first"], ["fractional", "L2::evict_last"]):
            return None
        return self.write(ops[0], self.constant(np.uint64(0x12F0_0000_0000_0000)), 64)
