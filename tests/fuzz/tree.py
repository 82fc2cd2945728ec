"""Trees of files in memory: what a format's generator changes, and what an input's folder is written from."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CANARY = "canary"
"""Name of the file beside an input's folder, to which links lead that leave the folder; its text is its name."""
MTIME_NS = 1_700_000_000_000_000_000
"""Modification time of every file: a journal records those of the source."""


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Special:
    """A folder, a pipe, a socket, or a regular file without permissions."""

    kind: str


Node = bytes | Link | Special
Tree = dict[str, Node]


@dataclass
class Input:
    """One input of the command.

    Attributes:
        tree: the files of its folder, by relative path.
        command: the arguments; the working directory is the folder.
        environment: variables to set; None unsets one.
        result: path of what the command makes all at once, if it makes anything.
        streams: by number 1 or 2, the state of standard output or error: closed, full (a device without space) or
            broken (a pipe that nobody reads).
        serve: called before the command runs; returns what to call after it.
    """

    tree: Tree
    command: list[str]
    environment: dict[str, str | None] = field(default_factory=dict)
    result: str | None = None
    streams: dict[int, str] = field(default_factory=dict)
    serve: Callable[[], Callable[[], object]] | None = None


def write_tree(folder: Path, tree: Mapping[str, Node]) -> None:
    """Write a tree into a new folder."""
    folder.mkdir(parents=True)
    made = {folder}
    later: list[tuple[Path, int]] = []
    for name, node in tree.items():
        path = folder / name
        if path.parent not in made:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):  # a mutation is below a file
                continue
            made.add(path.parent)
        if isinstance(node, bytes):
            path.write_bytes(node)
            os.utime(path, ns=(MTIME_NS, MTIME_NS))
        elif isinstance(node, Link):
            path.symlink_to(folder.with_name(CANARY) if node.target == CANARY else node.target)
        elif node.kind == "folder":
            path.mkdir(exist_ok=True)
        elif node.kind == "pipe":
            os.mkfifo(path)
        elif node.kind == "socket":
            make_socket(path)
        elif node.kind == "unreadable":
            path.write_bytes(b"{}")
            later.append((path, 0))
        elif node.kind == "unreadable folder":
            path.mkdir(exist_ok=True)
            later.append((path, 0))
        else:
            raise ValueError(node.kind)
    for path, mode in later:
        path.chmod(mode)


def make_socket(path: Path) -> None:
    """Create a socket; its address is relative, because addresses are short."""
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as made:
        try:
            os.chdir(path.parent)
            made.bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)


def read_tree(folder: Path, prefix: str = "") -> Tree:
    """Read a folder of regular files; an empty folder stays one."""
    tree: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = prefix + str(path.relative_to(folder))
        if path.is_dir():
            if not any(path.iterdir()):
                tree[name] = Special("folder")
        else:
            tree[name] = path.read_bytes()
    return tree


def under(prefix: str, tree: Mapping[str, Node]) -> Tree:
    """Move a tree into a folder."""
    return {f"{prefix}/{name}": node for name, node in tree.items()}
