"""Power loss. What was not synced may be gone, all of it or any one of it, whatever came after.

The calls of a run are read from a trace with all written bytes. A file system of inodes is played forward to
every moment; of what was done until then, whatever no later fsync covers is dropped or kept. The bytes of a file
are covered by an fsync of the file, a name by an fsync of the folder that it stands in. That is less than any
real file system promises. On every state that can come of it the same command is run again.
"""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tests.faults import fixture
from tests.faults.process import WRITES, forked
from tests.faults.row import Outcome, Row, Share
from tests.faults.tools import STRACE
from tests.faults.world import MODES, Mode, World

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_CALL = re.compile(r"^\d+\s+(\w+)\((.*)\)\s+= (-?\d+)(.*)$")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Op:
    """A change of a file system.

    Attributes:
        kind: ``name`` (folder, name and inode appear), ``drop`` (they go), ``move``, ``swap``, ``data``, ``size``
            or ``sync``.
        inode: what it is about.
        folder, name: where; of a move or swap where to.
        origin: folder and name that a move or swap begins at, and the inode that stood at the other end of a swap.
        offset, data: of written bytes.
    """

    kind: str
    inode: int
    folder: int = 0
    name: str = ""
    origin: tuple[int, str, int] = (0, "", 0)
    offset: int = 0
    data: bytes = b""


@dataclass(repr=False)
class Disk:
    """Folders and files by inode; the root is 0."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    files: dict[int, bytearray] = field(default_factory=dict)

    def apply(self, op: Op) -> None:
        """Do one change; what has nothing to do it to (for something before it was dropped) does nothing."""
        if op.kind == "name":
            self.folders[op.folder][op.name] = op.inode
        elif op.kind == "drop":
            if self.folders[op.folder].get(op.name) == op.inode:
                del self.folders[op.folder][op.name]
        elif op.kind == "move":
            origin, name, _ = op.origin
            if self.folders[origin].get(name) == op.inode:
                del self.folders[origin][name]
            self.folders[op.folder][op.name] = op.inode
        elif op.kind == "swap":
            origin, name, other = op.origin
            self.folders[op.folder][op.name], self.folders[origin][name] = op.inode, other
        elif op.kind in ("data", "size"):
            content = self.files.setdefault(op.inode, bytearray())
            if op.kind == "size" and not op.data:
                del content[op.offset :]
            end = op.offset + len(op.data)
            content.extend(bytes(max(0, end - len(content))))
            if op.kind == "data":
                content[op.offset : end] = op.data

    def write(self, root: Path) -> None:
        """Put all that can be reached into a real folder, with the modification times of a source."""
        self._write(0, root)

    def _write(self, inode: int, path: Path) -> None:
        path.mkdir(exist_ok=True)
        for name, child in self.folders[inode].items():
            if child in self.folders:
                self._write(child, path / name)
            else:
                (path / name).write_bytes(self.files.get(child, b""))

    def key(self) -> bytes:
        """A digest of all that can be reached."""
        hasher = hashlib.sha256()
        pending = [(0, "")]
        while pending:
            inode, path = pending.pop()
            for name, child in sorted(self.folders[inode].items()):
                if child in self.folders:
                    hasher.update(f"{path}/{name}/\0".encode())
                    pending.append((child, f"{path}/{name}"))
                else:
                    hasher.update(f"{path}/{name}\0".encode() + hashlib.sha256(self.files.get(child, b"")).digest())
        return hasher.digest()


class Trace:
    """The changes that a trace tells, on top of what was there before.

    Args:
        root: the folder that the trace is about; nothing outside counts.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before: list[Op] = []
        self.ops: list[Op] = []
        self.now = Disk()
        self._open: dict[int, int] = {}
        self._next = 1
        for path in sorted(root.rglob("*")):
            inode = self._new(folder=path.is_dir())
            self._do(Op("name", inode, *self._place(str(path))), self.before)
            if path.is_file():
                self._do(Op("data", inode, data=path.read_bytes()), self.before)

    def _new(self, *, folder: bool) -> int:
        inode, self._next = self._next, self._next + 1
        if folder:
            self.now.folders[inode] = {}
        else:
            self.now.files[inode] = bytearray()
        return inode

    def _do(self, op: Op, ops: list[Op] | None = None) -> None:
        self.now.apply(op)
        (self.ops if ops is None else ops).append(op)

    def _place(self, path: str) -> tuple[int, str]:
        """Inode of the folder that a path stands in, and its last name."""
        parts = PurePosixPath(path).relative_to(self.root).parts
        inode = 0
        for part in parts[:-1]:
            inode = self.now.folders[inode][part]
        return inode, parts[-1]

    def _inode(self, path: str) -> int:
        if Path(path) == self.root:
            return 0
        folder, name = self._place(path)
        return self.now.folders[folder][name]

    def read(self, lines: Iterable[str]) -> None:
        """Take the calls of a trace in."""
        for line in lines:
            match = _CALL.match(line)
            if match and int(match[3]) >= 0:
                self._call(match[1], match[2], int(match[3]))

    def _inside(self, path: str) -> bool:
        return path == str(self.root) or path.startswith(f"{self.root}/")

    def _call(self, name: str, arguments: str, result: int) -> None:
        strings = [ast.literal_eval(f'b"{text}"') for text in _STRING.findall(arguments)]
        if name == "openat":
            self._opened(strings[0].decode(), arguments, result)
            return
        if name in ("mkdir", "rename", "renameat2", "renameat", "link", "unlink", "rmdir", "unlinkat"):
            paths = self._paths(arguments, strings)
            if all(map(self._inside, paths)):
                self._names(name, paths, "RENAME_EXCHANGE" in arguments)
            return
        fd = int(arguments.split("<", 1)[0])
        if fd not in self._open:
            return
        inode = self._open[fd]
        if name == "close":
            del self._open[fd]
        elif name in ("fsync", "fdatasync"):
            self._do(Op("sync", inode))
        elif name == "pwrite64":
            self._do(Op("data", inode, offset=int(arguments.rsplit(", ", 1)[1]), data=strings[-1][:result]))
        elif name == "write":
            self._do(Op("data", inode, offset=len(self.now.files[inode]), data=strings[-1][:result]))
        elif name == "fallocate":
            self._do(Op("size", inode, data=bytes(int(arguments.rsplit(", ", 1)[1]))))
        elif name == "ftruncate":
            self._do(Op("size", inode, offset=int(arguments.rsplit(", ", 1)[1])))

    def _paths(self, arguments: str, strings: Sequence[bytes]) -> list[str]:
        """Absolute paths of a call; those of `unlinkat` are relative to a folder that strace names."""
        folders = re.findall(r"(?:AT_FDCWD|\d+)<([^>]*)>", re.sub(_STRING, '""', arguments))
        found = []
        for i, string in enumerate(strings):
            path = string.decode()
            found.append(path if path.startswith("/") else f"{folders[min(i, len(folders) - 1)]}/{path}")
        return found

    def _opened(self, path: str, arguments: str, fd: int) -> None:
        self._open.pop(fd, None)
        if not self._inside(path):
            return
        folder, name = self._place(path) if Path(path) != self.root else (0, "")
        if "O_CREAT" in arguments and name not in self.now.folders[folder]:
            self._do(Op("name", self._new(folder=False), folder, name))
        self._open[fd] = self._inode(path)

    def _names(self, call: str, paths: Sequence[str], exchange: bool) -> None:
        folder, name = self._place(paths[-1])
        if call == "mkdir":
            self._do(Op("name", self._new(folder=True), folder, name))
        elif call in ("unlink", "rmdir", "unlinkat"):
            self._do(Op("drop", self._inode(paths[0]), folder, name))
        elif call == "link":
            self._do(Op("name", self._inode(paths[0]), folder, name))
        else:
            origin = self._place(paths[0])
            other = self._inode(paths[1]) if exchange else 0
            self._do(Op("swap" if exchange else "move", self._inode(paths[0]), folder, name, (*origin, other)))


def covered(op: Op, sync: Op) -> bool:
    """Return True if a sync makes a change durable: of a file its bytes, of a folder the names in it."""
    if op.kind in ("data", "size"):
        return sync.inode == op.inode
    return sync.inode == op.folder


def states(trace: Trace) -> Iterator[tuple[int, int, Disk]]:
    """Every state that a loss of power may leave: after how many changes, how many dropped, and the disk."""
    for moment in range(len(trace.ops) + 1):
        done = trace.ops[:moment]
        if done and done[-1].kind == "sync":
            continue  # nothing can be lost that the moment before could not lose, and less
        loose = [
            i
            for i, op in enumerate(done)
            if op.kind != "sync" and not any(later.kind == "sync" and covered(op, later) for later in done[i + 1 :])
        ]
        for dropped in [set[int](), set(loose), *({i} for i in loose)]:
            disk = Disk()
            disk.folders.update({inode: {} for inode in trace.now.folders})
            for op in trace.before:
                disk.apply(op)
            for i, op in enumerate(done):
                if i not in dropped:
                    disk.apply(op)
            yield moment, len(dropped), disk


class PowerLoss(Row):
    """Every state that a loss of power may leave."""

    name, title = "power-loss", "power loss after every call: un-synced changes dropped"
    target = "every prefix x {none, all, each single drop}"
    needs = (STRACE,)

    def cases(self, share: Share) -> Iterator[object]:
        """States, each kind of content once; in a share every seventh."""
        for mode in MODES:
            yield from list(self.of_mode(mode))[:: share.of(1, ci=7)]

    def of_mode(self, mode: Mode) -> Iterator[tuple[Mode, int, Disk, int]]:
        """The states of one mode: after how many changes, the disk, and how many ways lead to it."""
        with World(mode) as world:
            trace = Trace(world.root)
            ended = forked(world.command(), (), f"{WRITES},close", ("-xx", "-s", "1000000"))
            if ended.code:
                raise RuntimeError(ended.err)
            trace.read(plain_paths(ended.log))
            self._check(trace, world)
        ways: Counter[bytes] = Counter()
        chosen: dict[bytes, tuple[int, Disk]] = {}
        for moment, _, disk in states(trace):
            key = disk.key()
            ways[key] += 1
            chosen.setdefault(key, (moment, disk))
        for key, (moment, disk) in chosen.items():
            yield mode, moment, disk, ways[key]

    def _check(self, trace: Trace, world: World) -> None:
        """The model with nothing dropped must be what the run has really made."""
        *_, (_, dropped, disk) = (state for state in states(trace) if state[1] == 0)
        copy = world.root.with_name(world.root.name + "-model")
        disk.write(copy)
        made = fixture.tree(copy)
        shutil.rmtree(copy)
        if dropped or made != fixture.tree(world.root):
            raise RuntimeError("the model of the file system disagrees with it")

    def run(self, case: tuple[Mode, int, Disk, int]) -> Outcome:
        """Make the state, look at it, run the command."""
        mode, _, disk, times = case
        with World(mode) as world:
            shutil.rmtree(world.root)
            disk.write(world.root)
            fixture.settle_times(world.src)
            wrong = world.broken_now() + world.resume()
            return Outcome(wrong, {"cases": times, f"different states, {mode}": 1})


def plain_paths(lines: Iterable[str]) -> Iterator[str]:
    """Lines of a trace with the hexadecimal paths of ``-xx`` as text; written bytes stay as they are."""
    for line in lines:
        yield re.sub(r"<((?:\\x[0-9a-f]{2})+)>", lambda m: "<" + _text(m[1]) + ">", line)


def _text(escaped: str) -> str:
    return bytes.fromhex(escaped.replace("\\x", "")).decode()
