"""State of a conversion as a destination records it: what is done, how fast, what is left, and by which process.

Every kind of destination fills the same record, `Status`. Reading takes no lock and writes nothing.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from nemotron_fp8._display import Part, display, one_line
from nemotron_fp8._process import RESTART
from nemotron_fp8._utils import format_bytes, plain_path, shell_word

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from nemotron_fp8.destinations.lock_record import LockRecord
    from nemotron_fp8.documents.manifest import Manifest

State = Literal["none", "running", "stopped", "unknown", "complete"]
Kind = Literal["", "folder", "in-place", "hub", "store", "evaluation"]
RECENT = 8
"""Shards whose times decide the recent speed."""
SKEW = 60.0
"""Most seconds between the clocks of two systems that share a disk."""
_NUMBERED = re.compile(r"-(\d{1,6})-of-(\d{1,6})\.safetensors")
AGAIN = "run the same command again to resume"


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard that a run has finished.

    Attributes:
        name: file name.
        size: bytes.
        at: time of the record, in seconds since 1970; None if it was not recorded.
    """

    name: str
    size: int
    at: float | None = None


@dataclass(frozen=True, slots=True)
class RunProcess:
    """The process of the newest run.

    Attributes:
        pid: its number.
        host: name of its host.
        since: time at which it began the run, in seconds since 1970; None if it was not recorded.
        suspended: True if a signal has suspended it (SIGSTOP, Ctrl-Z).
    """

    pid: int
    host: str
    since: float | None = None
    suspended: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Status:
    """State of a conversion, or of an evaluation or a calibration.

    Attributes:
        destination: the destination as it was named.
        kind: ``folder``, ``in-place``, ``hub``, ``store``, ``evaluation``; empty if nothing is there.
        state: ``none``; ``running``; ``stopped``, to be resumed; ``unknown``, if the run is unfinished and this machine
            cannot know whether its process is alive; ``complete``.
        process: process of the newest run; None if it was not recorded.
        shards_done: finished shards; layers of an evaluation.
        shards_total: shards of the result, or layers; None if unknown.
        bytes_done: bytes of the finished shards.
        bytes_total: bytes of all shards of the result; None if unknown.
        measured: shards whose amaxes a conversion in place has saved before it replaces the first; else 0.
        active: names of the shards in progress, where that is known.
        seconds: wall time of the newest run until its last record; None if unknown.
        bytes_per_second: bytes of the result a second over the newest run.
        recent_bytes_per_second: the same over the last shards.
        seconds_left: estimated time left, while it runs or once it is resumed; None without an estimate.
        last: time of the last record, in seconds since 1970; None without one.
        read: time of this reading, in seconds since 1970.
        source: name of the source; empty if it was not recorded.
        recipe: fields of the recipe, or name and options of another task.
        plan: digest that identifies the plan; empty if unknown.
        version: version of the library that made the record.
        command: command of the newest run; empty if it was not recorded.
        advice: what to do next; empty if nothing.
        error: error that ended the newest run; empty if none was recorded.
        notices: further findings.
    """

    destination: str
    kind: Kind = ""
    state: State = "none"
    process: RunProcess | None = None
    shards_done: int = 0
    shards_total: int | None = None
    bytes_done: int = 0
    bytes_total: int | None = None
    measured: int = 0
    active: tuple[str, ...] = ()
    seconds: float | None = None
    bytes_per_second: float | None = None
    recent_bytes_per_second: float | None = None
    seconds_left: float | None = None
    last: float | None = None
    read: float = field(default_factory=time.time)
    source: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    plan: str = ""
    version: str = ""
    command: str = ""
    advice: str = ""
    error: str = ""
    notices: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return one_line("Status", self.destination, [self.state, *([self._shards, self._bytes] if self.kind else [])])

    def _repr_html_(self) -> str:
        process, speed = self.process, self.recent_bytes_per_second or self.bytes_per_second
        facts = [
            ("state", self.state),
            ("process", f"{process.pid} on {process.host}" if process else ""),
            ("layers" if self.kind == "evaluation" else "shards", self._shards if self.kind else ""),
            ("bytes", self._bytes if self.bytes_done or self.bytes_total else ""),
            ("speed", "" if speed is None else f"{format_bytes(speed)}/s"),
            ("time left", "" if self.seconds_left is None else f"about {self.seconds_left:,.0f} s"),
            ("last entry", "" if self.idle_seconds is None else f"{self.idle_seconds:,.0f} s ago"),
            ("source", self.source),
            ("error", self.error),
            ("next", self.advice),
        ]
        recipe = [(name, str(value)) for name, value in self.recipe.items() if value]
        parts = [
            Part("In progress", [(name,) for name in self.active]),
            Part("Recipe", recipe),
            Part("Notices", [(notice,) for notice in self.notices]),
        ]
        return display("Status", self.destination, facts, parts)

    @property
    def _shards(self) -> str:
        total = "" if self.shards_total is None else f" of {self.shards_total:,}"
        return f"{self.shards_done:,}{total} done"

    @property
    def _bytes(self) -> str:
        total = "" if self.bytes_total is None else f" of {format_bytes(self.bytes_total)}"
        return f"{format_bytes(self.bytes_done)}{total}"

    @property
    def shards_left(self) -> int | None:
        """Shards that are not finished; None if unknown."""
        return None if self.shards_total is None else max(0, self.shards_total - self.shards_done)

    @property
    def bytes_left(self) -> int | None:
        """Bytes of the shards that are not finished; None if unknown."""
        return None if self.bytes_total is None else max(0, self.bytes_total - self.bytes_done)

    @property
    def idle_seconds(self) -> float | None:
        """Seconds since the last record; None without one."""
        return None if self.last is None else max(0.0, self.read - self.last)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and properties as JSON values."""
        more = {name: getattr(self, name) for name in ("shards_left", "bytes_left", "idle_seconds")}
        return {**asdict(self), "recipe": dict(self.recipe), **more}


@dataclass(frozen=True, slots=True)
class Pace:
    """Speed of a run, from the times of its records.

    Attributes:
        seconds: time from the start of the run to its last shard.
        bytes_per_second: over the run.
        recent: over the last `RECENT` shards.
        shards_per_second: over the last `RECENT` shards, for results whose sizes are unknown.
    """

    seconds: float | None = None
    bytes_per_second: float | None = None
    recent: float | None = None
    shards_per_second: float | None = None

    @classmethod
    def of(cls, start: float | None, finished: Sequence[Finished]) -> Pace:
        """Return the speed of one run.

        Args:
            start: time of its start; None if unknown.
            finished: its shards, in the order of their records.
        """
        times = [start, *(shard.at for shard in finished)]
        known = [at for at in times if at is not None]
        # A clock that was set back, or is wrong, tells nothing.
        if len(known) < len(times) or len(known) < 2 or known != sorted(known) or in_future(known[-1]):
            return cls()
        seconds = known[-1] - known[0]
        recent = finished[-RECENT:]
        span = known[-1] - known[-1 - len(recent)]
        total, last = (sum(shard.size for shard in part) for part in (finished, recent))
        if seconds <= 0 or span <= 0:
            return cls(seconds)
        return cls(seconds, total / seconds, last / span, len(recent) / span)

    def left(self, shards: int | None, nbytes: int | None, idle: float | None) -> float | None:
        """Return the estimated time left in seconds.

        Args:
            shards, nbytes: what is left; None if unknown.
            idle: seconds since the last record, in which a live run has worked on; None for a run that stopped.
        """
        if nbytes is not None and self.recent:
            seconds = nbytes / self.recent
        elif shards is not None and self.shards_per_second:
            seconds = shards / self.shards_per_second
        else:
            return None
        return max(0.0, seconds - (idle or 0.0))


def in_future(at: float | None) -> bool:
    """Return True for a time that no clock can have recorded yet, but for a small difference between two clocks."""
    return at is not None and at > time.time() + SKEW


def complete_status(named: str, kind: Kind, manifest: Manifest, size_of: Callable[[str], int | None]) -> Status:
    """Return the state of a complete result.

    Args:
        named: the destination as it was named.
        kind: kind of the destination.
        manifest: the result's manifest.
        size_of: returns the bytes of a file of the result; None if it is missing.
    """
    shards = {name: file.size for name, file in manifest.files.items() if name.endswith(".safetensors")}
    wrong = [name for name, file in manifest.files.items() if size_of(name) != file.size]
    notices: tuple[str, ...] = ()
    if wrong:
        notices = (f"{len(wrong):,} files are missing or have another size than the manifest: verify lists them",)
    return Status(
        named,
        kind,
        "complete",
        shards_done=len(shards),
        shards_total=len(shards),
        bytes_done=sum(shards.values()),
        bytes_total=sum(shards.values()),
        recipe=dict(manifest.recipe),
        version=manifest.version,
        advice=f"check it: nemotron-fp8 verify {shell_word(plain_path(named))}",
        notices=notices,
    )


def total_of(names: Iterable[str]) -> int | None:
    """Return the number of shards that some of their names state (``-00001-of-00008``); None if they state none."""
    found = {int(match.group(2)) for name in names if (match := _NUMBERED.search(name))}
    return found.pop() if len(found) == 1 else None


def life_of(record: LockRecord | None) -> tuple[State, RunProcess | None]:
    """Return the state of a run, and its process, from the record in its lock file."""
    if record is None:
        return "unknown", None
    process = RunProcess(record.process.pid, record.process.host, record.since)
    if record.ended is not None:
        return "stopped", process
    life = record.process.life()
    if life == "unknown":
        return "unknown", process
    if life == "ended":
        return "stopped", process
    return "running", replace(process, suspended=life == "suspended")


def advice_for(status: Status, record: LockRecord | None = None) -> str:
    """Return what to do next, in words, with the command of a record that resumes."""
    if status.state == "running":
        process = status.process
        if process is not None and process.suspended:
            return f"its process is suspended: kill -CONT {process.pid} lets it go on"
        return ""
    if status.state == "unknown":
        if status.process is None:
            return f"its process is not recorded: if it has ended, {AGAIN}"
        return (
            f"whether process {status.process.pid} on {status.process.host} is alive cannot be known here: ask there,"
            f" and if it has ended, {AGAIN}"
        )
    line = record.again() if record is not None else ""
    if not line:
        return AGAIN
    dropped = f", without {RESTART}," if RESTART in status.command.split() else ""
    return f"run the same command again{dropped} to resume: {line}"
