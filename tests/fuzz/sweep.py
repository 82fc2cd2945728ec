"""Formats, the inputs of each, and the run of a share of them.

An input is named by three words, ``SEED:FORMAT:INDEX``, from which it can be made again.
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fuzz import evaluation, harness, hub_answers, hugging_face, journals, models, nemo, results, surroundings
from tests.fuzz.tree import CANARY

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuzz.harness import Ended
    from tests.fuzz.seeds import Seeds
    from tests.fuzz.tree import Input

FORMATS: dict[str, Callable[[random.Random, Seeds], Input]] = {
    "header": hugging_face.header,
    "json": hugging_face.json_file,
    "card": hugging_face.card,
    "family": models.family,
    "code": models.code,
    "nemo-config": nemo.config,
    "nemo-files": nemo.weights_metadata,
    "zarray": nemo.zarray,
    "chunk": nemo.chunk,
    "metadata": nemo.metadata,
    "distcp": nemo.distcp,
    "tokenizer": nemo.tokenizer,
    "archive": nemo.archive,
    "result": results.result,
    "figures": results.figures,
    "evaluation": evaluation.evaluation,
    "journal": journals.journal,
    "odd-file": surroundings.odd_file,
    "arguments": surroundings.arguments,
    "variables": surroundings.variables,
    "streams": surroundings.streams,
    "hub": hub_answers.answers,
}
"""The generator of each format."""
SHOWN = 20
"""Violations that a test reports in full."""
LINES = 6
TRACEBACK = "NEMOTRON_FP8_TRACEBACK"
"""Variable that lets the command print the traceback of an internal error."""
LARGEST = 6 << 20
"""Bytes of an input's files, above which another one takes its place."""


@dataclass
class Tally:
    """Counts of the inputs of one format.

    Attributes:
        format: its name.
        inputs: inputs that were run.
        accepted, refused: how many ended with exit code 0, and how many with an error.
        slowest, largest: most seconds and most MiB of an input, each with the input's name.
        violations: description of each violation.
        seconds: of the whole sweep.
    """

    format: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Return the counts for a line of JSON."""
        return {
            "format": self.format,
            "inputs": self.inputs,
            "accepted": self.accepted,
            "refused": self.refused,
            "violations": len(self.violations),
            "slowest_seconds": round(self.slowest[0], 2),
            "slowest": self.slowest[1],
            "largest_mib": self.largest[0],
            "largest": self.largest[1],
            "seconds": round(self.seconds, 1),
        }


SLOW = ("hub", "variables", "journal", "nemo-files")
"""Formats that get half as many inputs as the others."""


def share_of(kind: str, inputs: int) -> int:
    """Return how many inputs of all formats together are of one format."""
    parts = 2 * len(FORMATS) - len(SLOW)
    return max(1, -(-inputs * (1 if kind in SLOW else 2) // parts))


def make(name: str, seeds: Seeds) -> Input:
    """Make the input of a name."""
    kind = name.split(":")[1]
    for attempt in range(100):
        given = FORMATS[kind](random.Random(f"{name}:{attempt}" if attempt else name), seeds)
        if sum(len(node) for node in given.tree.values() if isinstance(node, bytes)) < LARGEST:
            return given
    raise ValueError(f"{name} is too large")


def one(name: str, seeds: Seeds, folder: Path, seconds: float = harness.SECONDS) -> tuple[Input, Ended, list[str]]:
    """Make and run an input; return it, how it ended, and what is wrong with that."""
    given = make(name, seeds)
    ended = harness.run(given, folder, seconds)
    wrong = harness.judge(given, folder, ended, seconds)
    if harness.INTERNAL in wrong:
        given.environment[TRACEBACK] = "1"
        harness.clean(folder)
        place = harness.last_of_traceback(harness.run(given, folder, seconds).err)
        wrong = [f"{line}: {place}" if line == harness.INTERNAL else line for line in wrong]
    return given, ended, wrong


def sweep(kind: str, seed: int, indexes: range, seeds: Seeds, base: Path) -> Tally:
    """Run inputs of one format.

    Args:
        kind: the format.
        seed: first word of the inputs' names.
        indexes: last words of their names.
        seeds: the specimens.
        base: folder for the inputs' folders, empty.
    """
    tally = Tally(kind)
    begun = time.monotonic()
    base = base / "inputs"
    base.mkdir(exist_ok=True)
    for index in indexes:
        name = f"{seed}:{kind}:{index}"
        folder = base / "input"
        given, ended, wrong = one(name, seeds, folder)
        for stray in [path for path in base.iterdir() if path.name not in (folder.name, CANARY)]:
            wrong.append(f"left beside the folder: {stray.name}")
            harness.clean(stray)
        harness.clean(folder)
        tally.inputs += 1
        tally.accepted += ended.code == 0
        tally.refused += ended.code in (1, 2)
        tally.slowest = max(tally.slowest, (ended.seconds, name))
        tally.largest = max(tally.largest, (ended.memory >> 20, name))
        if wrong:
            tally.violations.append(describe(name, given, ended, wrong))
    tally.seconds = time.monotonic() - begun
    return tally


def describe(name: str, given: Input, ended: Ended, wrong: list[str]) -> str:
    """Describe a violation: verdict, command, name, first lines of standard error."""
    command = " ".join(argument if argument.isprintable() else ascii(argument) for argument in given.command)
    lines = [f"    {line[:200]}" for line in ended.err.splitlines()[:LINES]]
    if given.streams:
        command += f" ({', '.join(f'stream {number} is {state}' for number, state in given.streams.items())})"
    return "\n".join([f"{'; '.join(wrong)}", f"  {command[:300]}", f"  {name}", *lines])


def temporary_base() -> Path:
    """Return a new folder for inputs, in memory where that is possible."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None)).resolve()


def remove_base(base: Path) -> None:
    """Remove a folder of inputs."""
    harness.clean(base)
