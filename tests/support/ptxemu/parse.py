"""PTX text to basic blocks with post-dominators."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import UnsupportedError

EXIT = -1
"""Successor of a block at which lanes end."""

STATEMENT = re.compile(r"\s*(?:(\$?[\w$]+:)(?!:)|(\.(?:loc|file|section|pragma)\b[^\n]*)|([{}])|([^;]+;))", re.S)
"""A label, a directive without effect, a brace of a scope, or a statement."""

SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d*\]")


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        op: name with all modifiers.
        operands: operands as text.
        predicate: register and True if negated; None without a predicate.
        text: the whole statement.
    """

    op: str
    operands: list[str]
    predicate: tuple[str, bool] | None
    text: str

    @property
    def parts(self) -> list[str]:
        """Name and modifiers."""
        return self.op.split(".")


@dataclass
class Block:
    """Instructions with one entry and one end.

    Attributes:
        label: label of the source, or a made-up one.
        instructions: all of them, the branch last.
        following: numbers of successors, `EXIT` included.
        joins: number of the immediate post-dominator, or `EXIT`.
    """

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    following: list[int] = field(default_factory=list)
    joins: int = EXIT


@dataclass
class Kernel:
    """One entry point.

    Attributes:
        name: its name.
        parameters: name and bytes of each parameter, in order.
        registers: class of each register: ``pred``, ``b16``, ``b32`` or ``b64``.
        threads: threads of a CTA.
        blocks: basic blocks; the first is the entry.
        shared: symbols of the dynamic shared memory; all stand for its start.
    """

    name: str
    parameters: dict[str, int]
    registers: dict[str, str]
    threads: int
    blocks: list[Block]
    shared: set[str]


def parse(source: str) -> Kernel:
    """Parse a module with one entry point."""
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", " ", source, flags=re.S))
    entries = re.findall(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, flags=re.S)
    if len(entries) != 1:
        raise UnsupportedError(f"{len(entries)} entries")
    name, parameters, attributes = entries[0]
    before = text[: text.index(".entry")]
    if re.search(r"\.(func|global|const|local)\b\s", before):
        raise UnsupportedError("functions, or data of the module other than shared memory")
    if any(not extern for extern, _ in SHARED.findall(before + attributes)):
        raise UnsupportedError("static shared memory")
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?", attributes)
    if not threads or threads[2] not in (None, "1"):
        raise UnsupportedError("no .reqntid, or one of two dimensions")
    registers, blocks = _statements(_body(text, name))
    return Kernel(
        name,
        _parameters(parameters),
        registers,
        int(threads[1]),
        blocks,
        {symbol for _, symbol in SHARED.findall(before + attributes)},
    )


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]


def _parameters(text: str) -> dict[str, int]:
    parameters = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.fullmatch(r"\.param\s+\.[a-z](\d+)\s+.*?([\w$]+)", piece, flags=re.S)
        if not match:
            raise UnsupportedError(f"parameter {piece}")
        parameters[match[2]] = int(match[1]) // 8
    return parameters


def _body(text: str, name: str) -> str:
    """Return the text between the outer braces of the entry."""
    start = text.index("{", text.index(")", text.index(name, text.index(".entry")))) + 1
    depth, at = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return text[start : at - 1]


def _statements(body: str) -> tuple[dict[str, str], list[Block]]:
    registers: dict[str, str] = {}
    blocks = [Block("entry")]
    labels: dict[str, int] = {}
    position = 0
    while body[position:].strip():
        match = STATEMENT.match(body, position)
        if not match:
            raise UnsupportedError(f"cannot parse {body[position : position + 80]}")
        position = match.end()
        label, _, _, statement = match.groups()
        if label:
            labels[label[:-1]] = len(blocks)
            blocks.append(Block(label[:-1]))
        elif statement:
            statement = " ".join(statement[:-1].split())
            if statement.startswith(".reg"):
                registers |= _declared(statement)
                continue
            instruction = _instruction(statement)
            blocks[-1].instructions.append(instruction)
            if instruction.parts[0] in ("bra", "ret", "exit"):
                blocks.append(Block(f"after{len(blocks)}"))
    _connect(blocks, labels)
    _find_joins(blocks)
    return registers, blocks


def _declared(statement: str) -> dict[str, str]:
    """Return the registers of ``.reg .b32 %r<9>, %x``."""
    match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement)
    if not match:
        raise UnsupportedError(statement)
    kind = "pred" if match[1] == "pred" else "b" + re.sub(r"\D", "", match[1])
    registers = {}
    for item in match[2].split(","):
        several = re.fullmatch(r"(%?[\w$]+)<(\d+)>", item.strip())
        names = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [item.strip()]
        registers |= dict.fromkeys(names, kind)
    return registers


def _instruction(statement: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    if not match:
        raise UnsupportedError(f"statement {statement}")
    predicate = (match[2], bool(match[1])) if match[2] else None
    return Instruction(match[3], split_operands(match[4]), predicate, statement)


def _connect(blocks: list[Block], labels: dict[str, int]) -> None:
    for number, block in enumerate(blocks):
        following = number + 1 if number + 1 < len(blocks) else EXIT
        last = block.instructions[-1] if block.instructions else None
        kind = last.parts[0] if last else ""
        if last and kind == "bra":
            if last.operands[0] not in labels:
                raise UnsupportedError(f"branch to {last.operands[0]}")
            block.following = [labels[last.operands[0]]] + ([following] if last.predicate else [])
        elif last and kind in ("ret", "exit"):
            block.following = [EXIT] + ([following] if last.predicate else [])
        else:
            block.following = [following]


def _find_joins(blocks: list[Block]) -> None:
    """Find immediate post-dominators by iteration over sets of blocks; bit ``len(blocks)`` is the exit."""
    count = len(blocks)
    sets = [(1 << (count + 1)) - 1] * count
    changed = True
    while changed:
        changed = False
        for number in reversed(range(count)):
            meet = (1 << (count + 1)) - 1
            for following in blocks[number].following:
                meet &= 1 << count if following == EXIT else sets[following]
            new = meet | (1 << number)
            if new != sets[number]:
                sets[number], changed = new, True
    for number, block in enumerate(blocks):
        others = sets[number] & ~(1 << number)
        # The immediate one is the one whose own set is that of all others.
        found = [other for other in range(count) if others >> other & 1 and sets[other] == others]
        block.joins = found[0] if found else EXIT
