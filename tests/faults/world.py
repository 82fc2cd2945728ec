"""A place with a source and a destination in it, the command that is run there, and what must hold at every moment."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.faults import fixture
from tests.faults.process import TaskEnded, forked

Mode = Literal["folder", "overwrite", "in-place"]
MODES: tuple[Mode, ...] = ("folder", "overwrite", "in-place")
MARKER, WORKING = "nemotron_fp8.unfinished", ".nemotron_fp8"


@dataclass(frozen=True)
class Reference:
    """The source, and the result of an undisturbed run.

    Attributes:
        template: the source, to be copied.
        source: its files.
        result: files of the result.
        sizes: bytes of those, by name.
    """

    template: Path
    source: dict[str, str]
    result: dict[str, str]
    sizes: dict[str, int]


Kind = Literal["small", "large"]
_references: dict[Kind, Reference] = {}
SHAPES: dict[Kind, tuple[int, int]] = {"small": (24, 16), "large": (640, 512)}
"""Rows and columns of the matrices; the large ones make some hundreds of KB a shard."""


_base: list[Path] = []


def base() -> Path:
    """Where worlds are made: in memory where there is a file system for it; how fast a disk is does not matter here."""
    if not _base:
        shm = Path("/dev/shm")
        there = shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
        _base.append(Path(tempfile.mkdtemp(prefix="faults-", dir=there)))
    return _base[0]


def clean_up() -> None:
    """Remove all that was made by this process and those forked from it."""
    shutil.rmtree(_base.pop(), ignore_errors=True)


def reference(kind: Kind = "small") -> Reference:
    """A reference of this process, made once."""
    if kind not in _references:
        root = Path(tempfile.mkdtemp(prefix="faults-reference-", dir=base()))
        fixture.write_source(root / "src", *SHAPES[kind])
        ended = forked(["quantize", str(root / "src"), str(root / "dst"), "--threads", "1"])
        if ended.code:
            raise RuntimeError(f"an undisturbed run failed: {ended.err}")
        sizes = {path.name: path.stat().st_size for path in (root / "dst").iterdir()}
        _references[kind] = Reference(root / "src", fixture.tree(root / "src"), fixture.tree(root / "dst"), sizes)
    return _references[kind]


class World:
    """A folder of its own with ``src`` and, by mode, ``dst``. Use it as a context manager."""

    def __init__(self, mode: Mode, folder: Path | None = None, kind: Kind = "small") -> None:
        self.mode = mode
        self.made = reference(kind)
        self._given = folder

    def __enter__(self) -> World:
        made = self.made
        self.root = self._given or Path(tempfile.mkdtemp(prefix="faults-", dir=base()))
        self.src, self.dst = self.root / "src", self.root / "dst"
        fixture.copy_tree(made.template, self.src)
        if self.mode == "overwrite":
            self.dst.mkdir()
            (self.dst / "config.json").write_text("{}")
            (self.dst / "old.txt").write_text("old")
        self.old = fixture.tree(self.dst) if self.dst.exists() else {}
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root if self._given is None else self.src, ignore_errors=True)

    def command(self, threads: int = 1) -> list[str]:
        """The command line of the conversion."""
        arguments = ["quantize", str(self.src), "--threads", str(threads)]
        if self.mode == "in-place":
            return [*arguments, "--in-place"]
        return [*arguments, str(self.dst)] + ["--overwrite"] * (self.mode == "overwrite")

    def run(self, threads: int = 1) -> TaskEnded:
        """Run the command undisturbed."""
        return forked(self.command(threads))

    def broken_now(self) -> list[str]:
        """Return the problems after any interruption: partial results that show, or a changed source."""
        made = self.made
        if self.mode == "in-place":
            return _broken_in_place(fixture.tree(self.src), made)
        wrong = []
        if self.dst.exists() or self.mode == "overwrite":
            there = fixture.tree(self.dst)
            if there not in (made.result, *([self.old] if self.mode == "overwrite" else [])):
                wrong.append(f"the destination is half-made: {sorted(there)}")
        if fixture.tree(self.src) != made.source:
            wrong.append("the source has changed")
        return wrong

    def wrong_at_the_end(self) -> list[str]:
        """Return the problems after a run has succeeded: another result, a changed source, or anything left behind."""
        made = self.made
        expected = {"src"} if self.mode == "in-place" else {"src", "dst"}
        wrong = []
        if left := {path.name for path in self.root.iterdir()} - expected - {"filler", "lost+found"}:
            wrong.append(f"left behind: {sorted(left)}")
        if self.mode != "in-place" and fixture.tree(self.src) != made.source:
            wrong.append("the source has changed")
        result = fixture.tree(self.src if self.mode == "in-place" else self.dst)
        if result != made.result:
            names = {name for name in result.keys() | made.result.keys() if result.get(name) != made.result.get(name)}
            wrong.append(f"another result: {sorted(names)}")
        return wrong

    def resume(self, threads: int = 1) -> list[str]:
        """Run the same command again, undisturbed; say what is wrong then."""
        ended = self.run(threads)
        if ended.code:
            return [f"the same command fails: {ended.code} {ended.err[-400:]}"]
        return self.wrong_at_the_end()


def _broken_in_place(there: dict[str, str], made: Reference) -> list[str]:
    wrong = []
    plain = {name: digest for name, digest in there.items() if not name.startswith(WORKING)}
    marked = plain.pop(MARKER, None) is not None
    known = {name: {made.source.get(name), made.result.get(name)} for name in made.source.keys() | made.result.keys()}
    strange = [name for name in plain.keys() | known.keys() if plain.get(name) not in known.get(name, set())]
    wrong += [f"{name} is neither the original nor what replaces it" for name in strange]
    changed = {name for name, digest in plain.items() if digest != made.source.get(name)}
    if changed and plain != made.result and not marked:
        wrong.append("half-way through, and no marker")
    if "config.json" in changed and any(plain.get(n) != d for n, d in made.result.items()):
        wrong.append("config.json is new before the rest is")
    return wrong
