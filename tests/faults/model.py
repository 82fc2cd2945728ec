"""Random sequences of conversions, kills, tampering and other recipes, checked against what must hold.

The kill is a real SIGKILL that a process gives itself at a random one of its changes to the file system.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.core
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.faults import fixture
from tests.faults.flips import flip
from tests.faults.process import forked
from tests.faults.row import Outcome, Row, Share
from tests.faults.world import base, reference
from tests.support.stops import die_at

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPES = ("", "--ignore=down_proj")
STEPS = 12
_results: dict[tuple[str, int], dict[str, str]] = {}
_counts: Counter[str] = Counter()


def source(folder: Path, version: int) -> None:
    """Write one of two versions of the source: they differ in one value."""
    fixture.copy_tree(reference().template, folder)
    if version:
        shard = folder / "model-00002-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        data[-20] ^= 0x40
        shard.write_bytes(data)
        os.utime(shard, ns=(fixture.MTIME_NS + 1, fixture.MTIME_NS + 1))


def result(recipe: str, version: int) -> dict[str, str]:
    """Return the files of an undisturbed run's result."""
    if (recipe, version) not in _results:
        with tempfile.TemporaryDirectory(dir=base()) as name:
            source(Path(name) / "src", version)
            command = ["quantize", f"{name}/src", f"{name}/dst", "--threads", "1", *recipe.split()]
            ended = forked(command)
            if ended.code:
                raise RuntimeError(ended.err)
            _results[recipe, version] = fixture.tree(Path(name) / "dst")
    return _results[recipe, version]


class Conversions(RuleBasedStateMachine):
    """A source, a destination, and whatever happens to them."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="model-", dir=base()))
        self.src, self.dst, self.partial = (self.root / name for name in ("src", "dst", "dst.partial"))
        self.version = 0
        self.foreign = False
        self.untouched = True  # whether the partial folder holds only what runs of ours have left

    @initialize()
    def begin(self) -> None:
        """A source."""
        source(self.src, 0)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One of the things that happen; conversions and kills the most, or little else would mean anything."""
        what = data.draw(st.sampled_from(("convert", "die", "die", "convert", "tamper", "source", "destination")))
        if what in ("convert", "die"):
            self.convert(
                data.draw(st.sampled_from(RECIPES)),
                data.draw(st.sampled_from((1, 2))),
                data.draw(st.booleans()),
                data.draw(st.sampled_from((False, False, True))),
                data.draw(st.integers(1, 60)) if what == "die" else None,
            )
        elif what == "tamper":
            kinds = ("flip", "cut", "remove", "add", "link")
            self.tamper(data.draw(st.integers(0, 1 << 30)), data.draw(st.sampled_from(kinds)))
        elif what == "source":
            self.change_source(data.draw(st.sampled_from((0, 1))))
        else:
            self.change_destination(data.draw(st.booleans()))

    def convert(self, recipe: str, threads: int, overwrite: bool, restart: bool, dies: int | None) -> None:
        """Run the command, perhaps until it is killed."""
        clear = not self.partial.exists() and not self.dst.exists()
        if dies:
            command = ["quantize", str(self.src), str(self.dst), "--threads", str(threads), *recipe.split()]
            command += ["--overwrite"] * overwrite + ["--restart"] * restart
            ended = forked(command, prepare=lambda: die_at(dies))
            if ended.code == -signal.SIGKILL:
                _counts["kills"] += 1
                return
            assert ended.code == 0 or ended.typed, f"{ended.code} {ended.err}"
            done, said = ended.code == 0, ended.err
        else:  # in this process, as that is quicker
            done, said = self._here(recipe, threads=threads, overwrite=overwrite, restart=restart)
        if clear or (restart and overwrite):
            assert done, f"nothing stood in the way: {said}"
        if done:
            _counts["successes"] += 1
            assert fixture.tree(self.dst) == result(recipe, self.version)
            if self.untouched:
                assert not self.partial.exists() or self._of_others(), sorted(fixture.tree(self.partial))
            self.foreign = False
        else:
            _counts["refusals"] += 1

    def _here(self, recipe: str, **options: Any) -> tuple[bool, str]:
        from nemotron_fp8 import NemotronFp8Error, Recipe, quantize_repo

        ignore = (recipe.removeprefix("--ignore="),) if recipe else ()
        try:
            quantize_repo(self.src, self.dst, Recipe(ignore=ignore), **options)
        except NemotronFp8Error as error:
            return False, str(error)
        return True, ""

    def _of_others(self) -> bool:
        """Return True if the partial folder is left there by an unfinished run of another recipe or source."""
        return (self.partial / "journal.jsonl").exists()

    def tamper(self, seed: int, what: str) -> None:
        """Change something in the partial folder."""
        # No links: a change of one would be a change of the source.
        files = [path for path in self.partial.rglob("*") if path.is_file() and not path.is_symlink()]
        files = sorted(path for path in files if path.name != "lock")
        if not files:
            return
        self.untouched = False
        _counts["tamperings"] += 1
        chance = random.Random(seed)
        path = chance.choice(files)
        if what == "flip" and path.stat().st_size:
            flip(path, chance)
        elif what == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif what == "remove":
            path.unlink()
        elif what == "add" and (self.partial / "out").is_dir():
            (self.partial / "out" / "extra.safetensors").write_text("extra")
        elif what == "link":
            path.unlink()
            path.symlink_to(self.src / "config.json")

    def change_source(self, version: int) -> None:
        """Put another version of the source in place of it."""
        shutil.rmtree(self.src)
        source(self.src, version)
        self.version = version

    def change_destination(self, foreign: bool) -> None:
        """Remove the destination, or put something else there."""
        shutil.rmtree(self.dst, ignore_errors=True)
        self.foreign = foreign
        if foreign:
            self.dst.mkdir()
            (self.dst / "something.txt").write_text("else")

    @invariant()
    def whole_or_not_there(self) -> None:
        """The destination is never half-made, and the source is never touched."""
        if self.dst.exists():
            there = fixture.tree(self.dst)
            known = [result(recipe, version) for recipe in RECIPES for version in (0, 1)]
            assert there in known or (self.foreign and set(there) == {"something.txt"}), sorted(there)
        assert not self.src.exists() or len(fixture.tree(self.src)) == len(reference().source)

    def teardown(self) -> None:
        """One sequence more."""
        _counts["sequences"] += 1
        shutil.rmtree(self.root, ignore_errors=True)


class Sequences(Row):
    """Hypothesis draws the sequences."""

    name, title = (
        "random-sequences",
        "random sequences of convert, kill, resume, tamper, other recipe, changed source, restart",
    )
    target = "2,000 sequences"

    def cases(self, share: Share) -> Iterator[object]:
        """Seeds."""
        for seed in range(share.of(42, ci=4)):
            yield seed, share.of(50, ci=25)

    def run(self, case: tuple[int, int]) -> Outcome:
        """Draw and check so many sequences."""
        seed, examples = case
        hypothesis.core.global_force_seed = seed
        _counts.clear()
        wrong = []
        try:
            run_state_machine_as_test(
                Conversions,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=STEPS,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        except BaseException as error:
            notes = " ".join(getattr(error, "__notes__", []))
            wrong.append(f"seed {seed}: {type(error).__name__}: {error} {notes}")
        sequences = _counts.pop("sequences", 0)
        return Outcome(wrong, {"cases": sequences, **_counts})
