"""A parsed kernel to steps: compiled segments of pure instructions, and single effects."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import formats, integers
from .effects import Effect, Effects
from .errors import UnsupportedError
from .parse import EXIT, Instruction, Kernel
from .pure import Pure

if TYPE_CHECKING:
    from collections.abc import Callable

Predicate: TypeAlias = "tuple[int, bool] | None"


class Segment:
    """Adjacent pure instructions, compiled at the first run: one version for all lanes, one for some.

    Args:
        lines: register, expression and predicate of each assignment.
        constants: values of ``C``.
        name: name in tracebacks.
    """

    def __init__(self, lines: list[tuple[int, str, Predicate]], constants: list[object], name: str) -> None:
        self.lines, self.constants, self.name = lines, constants, name
        self.versions: dict[bool, Callable[..., None]] = {}

    def version(self, some: bool) -> Callable[..., None]:
        """Return the function of unit, registers and mask; with ``some`` it respects the mask."""
        if some not in self.versions:
            self.versions[some] = self._compile(some)
        return self.versions[some]

    def _compile(self, some: bool) -> Callable[..., None]:
        text = ["def run(u, R, M):", "    pass"]
        for register, expression, predicate in self.lines:
            conditions = ["M"] if some else []
            if predicate:
                conditions.append(f"{'~' if predicate[1] else ''}R[{predicate[0]}]")
            chosen = f"np.where({' & '.join(conditions)}, {expression}, R[{register}])" if conditions else expression
            text.append(f"    R[{register}] = {chosen}")
        space: dict[str, Any] = {"np": np, "C": self.constants, "formats": formats, "integers": integers}
        exec(compile("\n".join(text), f"<{self.name}>", "exec"), space)
        run: Callable[..., None] = space["run"]
        return run


@dataclass(frozen=True)
class Code:
    """Steps of a block and its end.

    Attributes:
        steps: in order.
        end: ``branch``, ``return`` or ``fall``.
        predicate: of a branch or a return.
        target: block of a branch.
        following: block after this one, or `EXIT`.
        joins: block at which the sides of a branch meet again, or `EXIT`.
    """

    steps: list[Segment | Effect]
    end: str
    predicate: Predicate
    target: int
    following: int
    joins: int


class Program(Pure, Effects):
    """A lowered kernel.

    Attributes:
        blocks: code of the blocks of `kernel`.
        signals: the kernel lets dependent launches start before it ends.
        synchronizes: CTAs wait for each other, or order their accesses.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.registers_read = self._registers_read()
        self.blocks = [self._block(number) for number in range(len(kernel.blocks))]
        effects = [step for block in self.blocks for step in block.steps if isinstance(step, Effect)]
        kinds = {effect.kind for effect in effects}
        orders = {effect.order for effect in effects if effect.kind in ("load_global", "store_global", "atomic")}
        self.signals = "dependents" in kinds
        self.synchronizes = bool(orders & {"acquire", "release", "acq_rel", "volatile"}) or "fence" in kinds

    def _registers_read(self) -> set[int]:
        found: set[int] = set()
        for block in self.kernel.blocks:
            for instruction in block.instructions:
                all_read = instruction.parts[0] in ("st", "red", "bra", "stmatrix")
                text = " ".join(instruction.operands[0 if all_read else 1 :])
                names = re.findall(r"%[A-Za-z_$][\w$]*", text)
                if instruction.predicate:
                    names.append(instruction.predicate[0])
                found |= {self.index[name] for name in names if name in self.index}
        return found

    def _block(self, number: int) -> Code:
        block = self.kernel.blocks[number]
        following = number + 1 if number + 1 < len(self.kernel.blocks) else EXIT
        steps: list[Segment | Effect] = []
        lines: list[tuple[int, str, Predicate]] = []
        end: tuple[str, Predicate, int] = ("fall", None, EXIT)

        def finish() -> None:
            if lines:
                steps.append(Segment(list(lines), self.constants, self.kernel.name))
                lines.clear()

        for instruction in block.instructions:
            predicate = self._predicate(instruction)
            head, *mods = instruction.parts
            if head in ("bra", "ret", "exit"):
                if set(mods) - {"uni"}:
                    raise UnsupportedError(instruction.text)
                end = ("branch" if head == "bra" else "return", predicate, block.following[0])
                continue
            effect = self.effect(instruction, predicate, self.registers_read)
            if effect is None:
                lines += [(*assignment, predicate) for assignment in self.pure(instruction)]
            else:
                finish()
                steps.append(effect)
        finish()
        return Code(steps, *end, following, block.joins)

    def _predicate(self, instruction: Instruction) -> Predicate:
        if instruction.predicate is None:
            return None
        return self.index[instruction.predicate[0]], instruction.predicate[1]
