"""The saved state of a run layer by layer: hidden states of all checkpoints after a layer, and the findings so far.

One format serves evaluations, which find errors of hidden states, and calibrations, which find amaxes.

Files are written beside their final place, synced and renamed, and the folder is synced: first the hidden states under
a new name, then the description that names them, then the old ones are removed. A run that is killed at any moment
leaves a description whose hidden states are complete. Their digest is checked before they are used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from contextlib import ExitStack, contextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._filesystem import LOCK, OUT, WORK, as_write_error, names_in, sync_folder, temporaries
from nemotron_fp8.destinations.file_sink import write_file
from nemotron_fp8.destinations.lock_record import now
from nemotron_fp8.destinations.partial_folder import PartialFolder
from nemotron_fp8.engines.base import as_bytes
from nemotron_fp8.errors import DestinationBusyError, EvaluationBusyError, EvaluationStateError, WriteError, printable
from nemotron_fp8.inference.state_file import SCHEMA, STATE, described
from nemotron_fp8.untrusted.regular_files import descriptor_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import TypeGuard

    import torch
    from typing_extensions import Self


PRIVATE = 0o600
"""Permissions of the files: hidden states show the text."""
PIECE = 16 << 20
"""Bytes that are written or read at a time."""


class Saved(NamedTuple):
    """State of an interrupted run.

    Attributes:
        layers: layers that are done.
        errors: relative errors of the hidden states after each of them, by result.
        amaxes: amaxes of each kind, by name.
        clipped: by checkpoint and by name of what was cast with a stored scale: numbers of clipped values, and of all.
    """

    layers: int
    errors: Sequence[Sequence[float]] = ()
    amaxes: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    clipped: Sequence[Mapping[str, Sequence[int]]] = ()


class SavedState:
    """Folder with the state of one run, locked until `close`. A context manager.

    Args:
        folder: the folder; it is created.
        identity: digest of everything that the figures depend on.

    Raises:
        EvaluationBusyError: another process does the same run.
        WriteError: the folder cannot be written, or holds other files.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._identity, self._first, self._begun = identity, 0, now()
        with state_errors(folder):
            _check_own(folder)
            try:
                self._folder = PartialFolder(folder)
            except DestinationBusyError as error:
                raise EvaluationBusyError(error.path, error.owner) from error
            self._out = self._folder.out
            self._folder.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._folder.discard_work()
        if not (self._out / STATE).exists():
            self._folder.discard()
        self._folder.close(error)

    @property
    def work(self) -> Path:
        """Folder for temporary files of this run."""
        return self._folder.work

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    def discard(self) -> None:
        """Remove the state: the run is finished, or starts over."""
        with state_errors(self._out):
            (self._out / STATE).unlink(missing_ok=True)
            self._remove_others("")

    def load(self, hidden: torch.Tensor) -> Saved | None:
        """Fill the hidden states of an interrupted run, and return its state; None if there is none.

        Args:
            hidden: contiguous, on the CPU.

        Raises:
            EvaluationStateError: the state is damaged, or of another run.
        """
        path = self._out / STATE
        if not path.exists():
            return None
        found = described(path)
        if found.get("identity") != self._identity:
            raise EvaluationStateError(str(path), "is of other checkpoints, another text or other options")
        layers, errors, amaxes, clipped = (found.get(key) for key in ("layers", "errors", "amaxes", "clipped"))
        if (
            type(layers) is not int
            or not _is_table(errors, layers)
            or not _is_amaxes(amaxes)
            or not _is_counts(clipped)
        ):
            raise EvaluationStateError(str(path), "not a state that this version writes")
        name = _name(layers)
        target = as_bytes(hidden)
        digest = hashlib.sha256()
        try:
            fd = descriptor_of(self._out / name, follow=False)
        except OSError as error:
            raise EvaluationStateError(str(self._out / name), error.strerror or str(error)) from error
        try:
            if os.fstat(fd).st_size != len(target):
                raise EvaluationStateError(str(self._out / name), f"has not the {len(target):,} bytes of this state")
            done = 0
            while done < len(target) and (got := os.preadv(fd, [target[done : done + PIECE]], done)):
                digest.update(target[done : done + got])
                done += got
        finally:
            os.close(fd)
        if done < len(target) or digest.hexdigest() != found.get("sha256"):
            raise EvaluationStateError(str(self._out / name), "its SHA-256 is not the recorded one")
        tables = {kind: {name: float(value) for name, value in table.items()} for kind, table in amaxes.items()}
        self._first = layers
        return Saved(layers, [[float(value) for value in row] for row in errors], tables, clipped)

    def save(self, hidden: torch.Tensor, saved: Saved, of: int | None = None) -> None:
        """Write the state after a layer.

        Args:
            hidden: hidden states of all checkpoints.
            saved: the findings.
            of: layers of the model, for `status`; None if unknown.

        Raises:
            WriteError: a file cannot be written; the state before is unchanged.
        """
        name = _name(saved.layers)
        digest = hashlib.sha256()
        data = as_bytes(hidden)

        def pieces() -> Iterator[memoryview]:
            for begin in range(0, len(data), PIECE):
                piece = data[begin : begin + PIECE]
                digest.update(piece)
                yield piece

        with state_errors(self._out):
            self._write(name, pieces())
            description = {
                "schema": SCHEMA,
                "identity": self._identity,
                "layers": saved.layers,
                "file": name,
                "sha256": digest.hexdigest(),
                "errors": list(saved.errors),
                "amaxes": {kind: dict(table) for kind, table in saved.amaxes.items()},
                "clipped": [{name: list(counts) for name, counts in table.items()} for table in saved.clipped],
                "of": of,  # from here on for `status` alone
                "first": self._first,
                "begun": self._begun,
                "time": now(),
            }
            self._write(STATE, iter([memoryview(json.dumps(description).encode("ascii"))]))
            self._remove_others(name)

    def _write(self, name: str, pieces: Iterator[memoryview]) -> None:
        write_file(self._out / name, pieces, self.work / name, PRIVATE)
        sync_folder(self._out)

    def _remove_others(self, name: str) -> None:
        """Remove the hidden states of other layers."""
        with suppress(OSError):
            for entry in os.scandir(self._out):
                if entry.name not in (STATE, name):
                    (self._out / entry.name).unlink()


@contextmanager
def state_errors(path: Path) -> Iterator[None]:
    """Convert an error of the operating system into a `WriteError` that names the option of the folder."""
    try:
        with as_write_error(path):
            yield
    except WriteError as error:
        problem = error.problem.partition(";")[0]
        raise WriteError(
            error.path, f"{problem}; choose another folder for the saved state (--state-dir)", error.errno
        ) from error


def _check_own(folder: Path) -> None:
    """Raise WriteError for a folder that holds other files: it is removed when the run ends."""
    for place, is_own in ((folder, _is_own), (folder / OUT, _is_of_state)):
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in names_in(place):
                if not is_own(name):
                    problem = f"holds {printable(name)}, which is no part of a saved state"
                    raise WriteError(str(place), problem, errno.ENOTEMPTY)


@contextmanager
def private_folder(root: Path) -> Iterator[Path]:
    """Create a folder for small files of this run until the context ends; folders of killed runs are removed.

    Args:
        root: the folder of saved states, or of one.

    Raises:
        WriteError: the folder cannot be created, or holds other files.
    """
    made = [path for path in (root, *root.parents) if not os.path.lexists(path)]
    try:
        with ExitStack() as stack:
            with state_errors(root):
                folder = stack.enter_context(temporaries(root))
            yield folder
    finally:
        with suppress(OSError):  # a folder with a saved state stays
            for path in made:
                path.rmdir()


def _is_own(name: str) -> bool:
    return name in (LOCK, OUT) or name.startswith(WORK)


def _is_of_state(name: str) -> bool:
    return name == STATE or (name.startswith("hidden-") and name.endswith(".bin"))


def _name(layers: int) -> str:
    return f"hidden-{layers:06}.bin"


def _is_table(value: object, layers: int) -> TypeGuard[list[list[float]]]:
    """Return True for lists of as many numbers as layers are done."""
    return (
        isinstance(value, list)
        and layers >= 0
        and all(
            isinstance(row, list) and len(row) == layers and all(type(item) in (int, float) for item in row)
            for row in value
        )
    )


def _is_amaxes(value: object) -> TypeGuard[dict[str, dict[str, float]]]:
    """Return True for tables of finite magnitudes by name."""
    return isinstance(value, dict) and all(
        isinstance(table, dict) and all(type(item) in (int, float) and 0 <= item < math.inf for item in table.values())
        for table in value.values()
    )


def _is_counts(value: object) -> TypeGuard[list[dict[str, list[int]]]]:
    """Return True for tables of two counts by name."""
    return isinstance(value, list) and all(
        isinstance(table, dict)
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(item) is int and item >= 0 for item in pair)
            for pair in table.values()
        )
        for table in value
    )


def identity_of(parts: Sequence[object]) -> str:
    """Return a digest of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
