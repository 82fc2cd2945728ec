"""Read machine code: the instructions of one program on the path of whole tiles.

The text comes from ``cuobjdump --dump-sass``. The path is found without running the code: of all ways through the
branches it is the one that moves most bytes by wide accesses, and of these the shortest. It therefore skips ragged
tiles, edges, and the slow case of a division.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)\b")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")

CLASSES = {
    "load": r"LDG",
    "store": r"STG",
    "cast": r"F2FP\.SATFINITE",
    "multiply": r"FMUL",
    "widen": r"HADD2\.F32|IMAD\.U32|(?:LOP3\.LUT(?=.*0xffff0000))|(?:SHL|SHF\.L)",
    "maximum": r"V?IMNMX|HMNMX|LOP3\.LUT(?=.*0x7fff)",
    "exchange": r"SHFL|STS|LDS|BAR|REDUX",
}
"""Classes of instructions, by the beginning of their text; all others are ``other``."""
_CLASSES = {name: re.compile(pattern) for name, pattern in CLASSES.items()}

_EXCHANGE = re.compile(r"REDUX|SHFL|VOTE|BAR")

_SERIAL = re.compile(r"BAR|LDS|SHFL|REDUX|MUFU")
"""Instructions whose result takes as long as about ten others, one after another: the chain of a reduction."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: offset in the code, in bytes.
        predicate: the predicate that guards it, such as ``!P3``; empty if it is always executed.
        opcode: the operation with its modifiers.
        operands: the text of the operands.
    """

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Return the address that a branch leads to."""
        found = _TARGET.search(self.operands) if self.opcode == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def bits(self) -> int:
        """Return the width of a load or store in bits."""
        return next((int(part.lstrip("USF")) for part in self.opcode.split(".") if _is_width(part)), 32)

    @property
    def wide(self) -> int:
        """Return the bytes of a thread that a wide access of global memory moves; 0 for other instructions."""
        name = self.opcode.partition(".")[0]
        return self.bits // 8 if name in ("LDG", "STG") and self.bits >= 64 and "STRONG" not in self.opcode else 0

    def written(self) -> set[int]:
        """Return the registers that a load writes."""
        first = _REGISTER.match(self.operands)
        return set(range(int(first[1]), int(first[1]) + max(1, self.bits // 32))) if first else set()

    def read(self) -> set[int]:
        """Return the registers that are named as sources."""
        name = self.opcode.partition(".")[0]
        sources = self.operands if name in ("STG", "STS", "RED") else self.operands.partition(",")[2]
        return {int(number) for number in _REGISTER.findall(sources)}

    def kind(self) -> str:
        """Return the class of the instruction."""
        text = f"{self.opcode} {self.operands}"
        return next((name for name, pattern in _CLASSES.items() if pattern.match(text)), "other")


def _is_width(part: str) -> bool:
    return part in ("64", "128", "U8", "S8", "U16", "S16")


def parse(dump: str) -> list[Instruction]:
    """Return the instructions of a dump in the order of their addresses."""
    return [
        Instruction(int(address, 16), predicate, opcode, operands.strip())
        for address, predicate, opcode, operands in _LINE.findall(dump)
    ]


@dataclass(frozen=True)
class Path:
    """Instructions of one program in the order of their execution.

    Attributes:
        instructions: the instructions, each of a loop once.
        times: how often each is executed; those in a loop more than once.
    """

    instructions: tuple[Instruction, ...]
    times: tuple[int, ...]

    @property
    def executed(self) -> int:
        """Return the number of instructions that a thread executes."""
        return sum(self.times)

    @property
    def classes(self) -> dict[str, int]:
        """Return the executed instructions of a thread by class."""
        found: Counter[str] = Counter(dict.fromkeys((*CLASSES, "other"), 0))
        for instruction, times in zip(self.instructions, self.times, strict=True):
            found[instruction.kind()] += times
        return dict(found)

    def _is_data(self, instruction: Instruction) -> bool:
        """Return True for the widest loads of the path: those of weights or codes."""
        widest = max((i.bits for i in self.instructions if i.opcode.startswith("LDG")), default=0)
        return instruction.opcode.startswith("LDG") and instruction.bits == widest

    def data_loads(self) -> int:
        """Return the loads of weights or codes that a thread executes."""
        return sum(times for i, times in zip(self.instructions, self.times, strict=True) if self._is_data(i))

    def narrow(self) -> int:
        """Return the loads and stores of global memory of fewer bits than the widest, without those of one lane.

        One of each class may be narrow: the amax, and the scale, which one lane stores.
        """
        found = 0
        for name in ("LDG", "STG"):
            bits = [i.bits for i in self.instructions if i.opcode.split(".")[0] == name and "STRONG" not in i.opcode]
            found += max(0, sum(1 for width in bits if width < max(bits)) - 1)
        return found

    def loads_before_use(self) -> int:
        """Return the loads of weights or codes that a thread issues before it uses the result of one."""
        waiting: set[int] = set()
        count = 0
        for instruction in self.instructions:
            if instruction.read() & waiting:
                break
            if self._is_data(instruction):
                waiting |= instruction.written()
                count += 1
        return count

    def after_loads(self) -> tuple[int, int]:
        """Return the instructions after the last load of weights or codes, and how many of them are serial.

        An instruction of a loop counts once.
        """
        last = max((n for n, i in enumerate(self.instructions) if self._is_data(i)), default=-1)
        rest = self.instructions[last + 1 :]
        return len(rest), sum(1 for i in rest if _SERIAL.match(i.opcode))


def guarded_exchanges(instructions: list[Instruction]) -> list[Instruction]:
    """Return the exchanges between threads that a predicate guards.

    ptxas 12.8 makes such an instruction from a branch that holds a reduction of one warp, and guards it by a predicate
    that it has overwritten meanwhile: the threads for which that is false take no part in the reduction.
    """
    return [each for each in instructions if each.predicate and _EXCHANGE.match(each.opcode)]


def main_path(instructions: list[Instruction], trips: int = 1, without: str = "") -> Path:
    """Return the path that moves most bytes by wide accesses, and of these the shortest.

    Args:
        instructions: the code.
        trips: iterations of each loop on the path.
        without: beginning of an opcode that the path must not contain, to select one of several paths.
    """
    where = {instruction.address: number for number, instruction in enumerate(instructions)}
    # Best score and next instruction of each place; branches on the path lead forward, so that one pass suffices.
    scores: list[tuple[int, int]] = [(0, 0)] * (len(instructions) + 1)
    following: list[int | None] = [None] * len(instructions)
    for number in reversed(range(len(instructions))):
        instruction = instructions[number]
        ways: list[int] = [number + 1]
        if instruction.opcode in ("EXIT", "RET") or instruction.opcode.startswith("RET."):
            ways = ways if instruction.predicate else []
        elif instruction.target is not None:
            onward = where.get(instruction.target, -1)
            ahead = [onward] if onward > number else []
            ways = [*ways, *ahead] if _conditional(instruction) else ahead
        best = max(ways, key=lambda way: scores[way], default=None)
        score, length = (0, 0) if best is None else scores[best]
        unwanted = bool(without) and instruction.opcode.startswith(without)
        scores[number] = (score + instruction.wide - unwanted * (1 << 30), length - 1)
        following[number] = best
    path: list[int] = []
    at: int | None = 0
    while at is not None and at < len(instructions):
        path.append(at)
        at = following[at]
    times = [1] * len(path)
    for number in path:
        target = instructions[number].target
        if target is not None and target <= instructions[number].address and _conditional(instructions[number]):
            for place, other in enumerate(path):
                if target <= instructions[other].address <= instructions[number].address:
                    times[place] = trips
    return Path(tuple(instructions[number] for number in path), tuple(times))


def _conditional(branch: Instruction) -> bool:
    # A branch on two predicates has the second one among its operands.
    return bool(branch.predicate) or not branch.operands.startswith("0x")
