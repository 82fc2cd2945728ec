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
        "{source}: the amaxes are of another model: they have {_modules} that it lacks; calibrate this source"
        " (nemotron-fp8 calibrate)"
    )

    @property
    def _modules(self) -> str:
        return _modules(self.names)


class MissingAmaxError(CalibrationError):
    """Modules that need a static scale have no amax.

    Attributes:
        source: the source.
        what: what has no amax: inputs, keys or values.
        names: the modules; empty if no module has an amax.
        advice: what to do.
    """

    source: str
    what: str
    names: tuple[str, ...]
    advice: str
    message = "{source}: the amaxes have no {what} of {_modules}; {advice}"

    @property
    def _modules(self) -> str:
        return _modules(self.names) if self.names else "any module"


def _modules(names: tuple[str, ...]) -> str:
    """Return the number of modules, and the first of them."""
    return f"{len(names):,} module{'s' * (len(names) != 1)} ({', '.join(map(printable, names[:SHOWN]))})"
