"""Errors of calibrations: files of amaxes that cannot be read, or do not fit a checkpoint."""

from __future__ import annotations

from nemotron_fp8.errors.base import NemotronFp8Error, printable

SHOWN = 3
"""Most names in a message."""


class CalibrationError(NemotronFp8Error, ValueError):
    """Amaxes of activations cannot be used."""


class AmaxesFileError(CalibrationError):
    """A file is not one that ``calibrate`` wrote, or files cannot be merged.

    Attributes:
        file: the file.
        problem: the first value that is missing or wrong.
    """

    file: str
    problem: str
    message = "{file}: no usable amaxes: {problem}"


class OtherAmaxesError(CalibrationError):
    """Amaxes are of another model than the source.

    Attributes:
        source: the source.
        names: modules with an amax that the source lacks.
    """

    source: str
    names: tuple[str, ...]
    message = (
        "{source}: the amaxes are of another model: they have {_count:,} modules that it lacks ({_shown}); calibrate"
        " this source (nemotron-fp8 calibrate)"
    )

    @property
    def _count(self) -> int:
        return len(self.names)

    @property
    def _shown(self) -> str:
        return ", ".join(map(printable, self.names[:SHOWN]))


class MissingAmaxError(CalibrationError):
    """Modules that need a static scale have no amax.

    Attributes:
        source: the source.
        what: what has no amax: inputs, keys or values.
        names: the modules.
        advice: what to do.
    """

    source: str
    what: str
    names: tuple[str, ...]
    advice: str
    message = "{source}: the amaxes have no {what} of {_count:,} modules ({_shown}); {advice}"

    @property
    def _count(self) -> int:
        return len(self.names)

    @property
    def _shown(self) -> str:
        return ", ".join(map(printable, self.names[:SHOWN]))
