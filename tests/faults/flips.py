"""Bits that flip in what an unfinished run has left, and journals that are cut or altered anywhere."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.disk import at_creation
from tests.faults.fixture import SHARDS
from tests.faults.process import forked
from tests.faults.row import Outcome, Row, Share
from tests.faults.world import WORKING, Mode, World, base

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8 import Report


def convert(world: World, **options: Any) -> tuple[Report | None, list[str]]:
    """Convert by the Python call; its report, or what was raised if that is anything but an error of ours."""
    from nemotron_fp8 import NemotronFp8Error, quantize_repo

    if world.mode == "in-place":
        options["in_place"] = True
    try:
        return quantize_repo(world.src, None if world.mode == "in-place" else world.dst, threads=1, **options), []
    except NemotronFp8Error:
        return None, []
    except Exception as error:
        return None, [f"not an error of ours: {type(error).__name__}: {error}"]


@dataclass(frozen=True)
class Half:
    """A run that was killed when it began its last shard."""

    mode: Mode
    root: Path

    def world(self) -> HalfWorld:
        """A copy to break."""
        return HalfWorld(self)

    @property
    def journal(self) -> Path:
        """Its journal."""
        return self.root / ("src/" + WORKING if self.mode == "in-place" else "dst.partial") / "journal.jsonl"


class HalfWorld(World):
    """A copy of a half-done world."""

    def __init__(self, half: Half) -> None:
        super().__init__(half.mode)
        self._half = half

    def __enter__(self) -> HalfWorld:
        self.root = Path(tempfile.mkdtemp(prefix="faults-", dir=base()))
        self.root.rmdir()
        shutil.copytree(self._half.root, self.root, symlinks=True)
        self.src, self.dst, self.old = self.root / "src", self.root / "dst", {}
        return self

    @property
    def partial(self) -> Path:
        """Its working folder."""
        return self.src / WORKING if self.mode == "in-place" else self.root / "dst.partial"


_halves: dict[Mode, Half] = {}


def half(mode: Mode) -> Half:
    """The half-done world of this process, made once."""
    if mode not in _halves:
        world = World(mode)
        with world:
            last = f"model-{SHARDS:05d}-of-{SHARDS:05d}.safetensors"
            ended = forked(world.command(), prepare=lambda: at_creation(last, signal.SIGKILL))
            if ended.code != -signal.SIGKILL:
                raise RuntimeError(f"not killed: {ended.err}")
            kept = Path(tempfile.mkdtemp(prefix="faults-reference-half-", dir=base()))
            kept.rmdir()
            shutil.copytree(world.root, kept, symlinks=True)
        _halves[mode] = Half(mode, kept)
    return _halves[mode]


def flip(path: Path, chance: random.Random) -> None:
    """Flip one bit of a file, as any program would."""
    data = bytearray(path.read_bytes())
    at = chance.randrange(8 * len(data))
    data[at // 8] ^= 1 << at % 8
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    if path.stat().st_mtime_ns == before:  # a clock too coarse to tell two writes apart
        os.utime(path, ns=(before + 1, before + 1))


class Flips(Row):
    """A bit that flips in the source, a staged shard, the journal, what was saved, or the result."""

    name, title = (
        "bit-flips",
        "one bit flipped in source, staged or replaced shard, journal, saved header or amaxes, or result",
    )
    target = "1,000: all detected"

    def cases(self, share: Share) -> Iterator[object]:
        """Where, and a seed."""
        where = (
            "source",
            "staged",
            "journal",
            "result",
            "replaced",
            "saved",
            "journal in place",
            "source in place",
            "amaxes",
        )
        for mode in ("folder", "in-place"):
            half(mode)
        for seed in range(share.of(1200, ci=160)):
            yield where[seed % len(where)], seed

    def run(self, case: tuple[str, int]) -> Outcome:
        """Flip, carry on, compare."""
        where, seed = case
        chance = random.Random(seed)
        wrong = self._result(chance) if where == "result" else self._half(where, chance)
        return Outcome(wrong, {where: 1})

    def _result(self, chance: random.Random) -> list[str]:
        from nemotron_fp8 import verify_repo

        with World("folder") as world:
            _, wrong = convert(world)
            flip(chance.choice(sorted(world.dst.iterdir())), chance)
            try:
                return wrong + ["verify finds nothing"] * verify_repo(None, world.dst).ok
            except Exception as error:
                return [*wrong, f"verify raised {type(error).__name__}: {error}"]

    def _half(self, where: str, chance: random.Random) -> list[str]:
        mode: Mode = "in-place" if where in ("replaced", "saved", "amaxes") or where.endswith("in place") else "folder"
        with half(mode).world() as world:
            flip(chance.choice(self._files(where, world)), chance)
            report, wrong = convert(world)
            if wrong:
                return wrong
            if where == "staged":  # it is made again, and nothing tells it from what it was
                return ["refused"] if report is None else world.wrong_at_the_end()
            if where == "amaxes":  # measured again, unless they depend on a shard that is already replaced
                return [] if report is None else world.wrong_at_the_end()
            if where.startswith("journal"):
                return [] if report is None else world.wrong_at_the_end()
            return [] if report is None else ["carried on"]

    def _files(self, where: str, world: HalfWorld) -> list[Path]:
        if where.startswith("journal"):
            return [world.partial / "journal.jsonl"]
        if where == "staged":
            return sorted((world.partial / "out").iterdir())
        if where == "saved":
            return sorted((world.partial / "source").iterdir())
        if where == "amaxes":
            return sorted(world.partial.joinpath("amaxes").iterdir())
        if where == "replaced":
            return sorted(world.src.glob("model-0000[12]*"))
        shards = "model-00003*" if where == "source in place" else "*.safetensors"
        return sorted(world.src.glob(shards))


class JournalBytes(Row):
    """A journal that ends anywhere, or has another byte anywhere."""

    name, title = "damaged-journal", "journal cut at every byte; every byte altered"
    target = "all: safe resume or refusal"

    def cases(self, share: Share) -> Iterator[object]:
        """Every byte of the journals of a run into a folder and of one in place."""
        step = share.of(1, ci=40)
        for mode in ("folder", "in-place"):
            size = half(mode).journal.stat().st_size
            for at in range(0, size, step):
                yield mode, "cut", at
                yield mode, "altered", at

    def run(self, case: tuple[Mode, str, int]) -> Outcome:
        """Break the journal, carry on; after a refusal, start over."""
        mode, how, at = case
        with half(mode).world() as world:
            journal = world.partial / "journal.jsonl"
            data = bytearray(journal.read_bytes())
            if how == "cut":
                del data[at:]
            else:
                data[at] ^= random.Random(at).randrange(1, 256)
            journal.write_bytes(data)
            report, wrong = convert(world)
            if report is not None:
                return Outcome(wrong + world.wrong_at_the_end(), {f"{mode}, {how}: carried on": 1})
            if mode == "folder" and not wrong:
                report, wrong = convert(world, restart=True)
                wrong += ["refused to start over"] if report is None else world.wrong_at_the_end()
            return Outcome(wrong, {f"{mode}, {how}: refused": 1})
