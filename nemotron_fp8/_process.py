"""Identity and state of processes: a run that is recorded on a disk is alive, has ended, or is of another system."""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Life = Literal["alive", "suspended", "ended", "unknown"]
"""State of a process: suspended by a signal (SIGSTOP, Ctrl-Z), or unknown because it runs on another system."""
_TICKS = {"T": "suspended", "t": "suspended", "Z": "ended", "X": "ended", "x": "ended"}
"""Letters of ``/proc/PID/stat``; every other one is that of a live process. Source: proc(5)."""


def boot() -> str:
    """Return a digest that differs between two boots of any machines; empty if the system does not report one."""
    try:
        return _short(Path("/proc/sys/kernel/random/boot_id").read_bytes())
    except OSError:
        return ""


def machine() -> str:
    """Return a digest that differs between machines, and that a boot does not change; empty if there is none."""
    for name in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with suppress(OSError):
            if found := Path(name).read_bytes().strip():
                return _short(found)
    return ""


def booted() -> int | None:
    """Return the time of the boot in seconds since 1970; None if the system does not report it."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/stat").read_bytes().splitlines():
            if line.startswith(b"btime "):
                return int(line[6:26])
    return None


def system() -> str:
    """Return a digest that differs between systems, boots and process namespaces."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        space = os.fsencode(Path("/proc/self/ns/pid").readlink())
    except OSError:
        started, space = socket.gethostname().encode(), b""
    return _short(started + space)


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def start_of(pid: int) -> int | None:
    """Return the start time of a process in clock ticks; None if it has ended or the system does not report it."""
    try:
        return int(_fields(pid)[19])
    except (OSError, ValueError, IndexError):
        return None


def _fields(pid: int) -> list[bytes]:
    """Return the fields of ``/proc/PID/stat`` from the state on, after the name in parentheses."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def is_alive(pid: int) -> bool:
    """Return True if a process of this number exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process as it is recorded on a disk that other systems may read, too.

    Attributes:
        pid: its number.
        host: name of its host.
        system: digest of its boot and its process namespace; empty if it was not recorded.
        boot: digest of its boot; empty if it was not recorded.
        start: its start time in clock ticks since the boot; None if it was not recorded.
        machine: digest of its machine; empty if it was not recorded.
        booted: time of its boot in seconds since 1970; None if it was not recorded.
    """

    pid: int
    host: str
    system: str = ""
    boot: str = ""
    start: int | None = None
    machine: str = ""
    booted: int | None = None

    @classmethod
    def own(cls) -> ProcessRecord:
        """Return the record of this process."""
        pid = os.getpid()
        return cls(pid, socket.gethostname(), system(), boot(), start_of(pid), machine(), booted())

    def entry(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self)

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> ProcessRecord:
        """Parse `entry`; the fields after ``host`` may be missing.

        Raises:
            TypeError, LookupError: the record is malformed.
        """
        pid, host, start, booted = entry["pid"], entry["host"], entry.get("start"), entry.get("booted")
        names = [entry.get(key, "") for key in ("system", "boot", "machine")]
        if type(pid) is not int or type(host) is not str or any(type(name) is not str for name in names):
            raise TypeError("not a process")
        if any(time is not None and type(time) is not int for time in (start, booted)):
            raise TypeError("not a start time")
        return cls(pid, host, names[0], names[1], start, names[2], booted)

    def life(self) -> Life:
        """Return the state of the process as far as this system can know it.

        A number is given to another process later, so that the start times are compared. Without them, and on another
        system, nothing is known of a process whose number exists.
        """
        if self.host != socket.gethostname():
            return "unknown"
        if self.system != system():
            # Another namespace of this boot cannot be seen, and other machines may have the same host name.
            return "ended" if self._of_earlier_boot() else "unknown"
        if not 0 < self.pid < 1 << 31 or not is_alive(self.pid):
            return "ended"
        now = start_of(self.pid)
        if self.start is None or now is None:
            return "unknown"
        if now != self.start:
            return "ended"
        try:
            letter = _fields(self.pid)[0].decode("ascii", "replace")
        except (OSError, IndexError):
            return "ended"
        return _TICKS.get(letter, "alive")  # type: ignore[return-value]  # its values are of this type

    def _of_earlier_boot(self) -> bool:
        """Return True if the process ran in an earlier boot of this very machine, which has ended all processes."""
        now = booted()
        return (
            self.boot != boot()
            and self.machine != ""
            and self.machine == machine()
            and self.booted is not None
            and now is not None
            and self.booted < now
        )


stopping = Event()
"""Set when a signal has told the command to end: threads stop, and waits for servers are cut short.

A program that uses the library handles its signals itself; the library never sets the event."""


RESTART = "--restart"
"""Option that discards what is finished: a command that is to resume must not have it."""
PREFIX = "NEMOTRON_FP8_"
"""Start of the names of all variables of the environment that set options."""


class _Command:
    """The command that this process runs, for the records of its runs.

    Attributes:
        line: the command as a shell takes it, without what may be a credential; empty in a program that uses the
            library.
        folder: the current folder at its start.
        variables: variables of the environment that set its options, without what may be a credential.
    """

    line: str = ""
    folder: str = ""
    variables: Mapping[str, str] = {}  # replaced, not changed


command = _Command()
