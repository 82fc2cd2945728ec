"""Amaxes of activations: the largest absolute inputs of linear layers, keys and values, as ``calibrate`` measured them.

They are a small JSON file. Static scales are derived from it without the model: ``amax * factor / 448`` in float32.

===========  =============================================================================================
key          value
===========  =============================================================================================
``inputs``   amax of the inputs of a module, by its name in a quantized checkpoint, without ``.weight``
``k``        amax of the keys that an engine caches, after rotary embedding, by attention module
``v``        amax of the values that an engine caches, by attention module
``runs``     the calibrations: checkpoint, text and versions of each
===========  =============================================================================================

An expert that no token reached has no entry. Two calibrations of the same checkpoint, text and versions write the same
bytes: the file contains no times, folders or host names.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._display import Part, counted, display, one_line
from nemotron_fp8.checkpoint.json_text import pretty_json
from nemotron_fp8.checkpoint.local_files import read_small
from nemotron_fp8.errors import AmaxesFileError, RecipeError, excerpt, printable
from nemotron_fp8.untrusted import strict_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


SCHEMA = 1
LARGEST = 3.5e38
"""Magnitude that no amax exceeds: a little more than the largest float32."""
MOST = 1 << 53
"""Largest count in a file."""
FACTORS = (0.01, 100.0)
"""Smallest and largest factor."""
LONGEST = 1 << 12
"""Most characters of a name."""
_SHA256 = re.compile("[0-9a-f]{64}")
ADVICE = "write it by nemotron-fp8 calibrate"


class CalibrationRun(NamedTuple):
    """A calibration.

    Attributes:
        source: name of the checkpoint, without its folder.
        text: name of the text or of the file of tokens, without its folder.
        sha256: digest of the text, or of the file of tokens.
        sequences: sequences that were run.
        length: tokens of a sequence.
        version: version of this library.
        torch, transformers: versions of these libraries.
    """

    source: str
    text: str
    sha256: str
    sequences: int
    length: int
    version: str
    torch: str
    transformers: str

    @property
    def tokens(self) -> int:
        """Tokens that were run."""
        return self.sequences * self.length


@dataclass(frozen=True, slots=True, repr=False)
class Amaxes:
    """Largest absolute activations of a model.

    Attributes:
        inputs: amax of the inputs of each module, by its name in a quantized checkpoint.
        k: amax of the cached keys of each attention module.
        v: amax of the cached values of each attention module.
        runs: the calibrations, sorted.
        percentile: percentage of the values that are at most the amax; None for all of them.
        factor: number that every amax is multiplied by for a scale.
    """

    inputs: Mapping[str, float]
    k: Mapping[str, float]
    v: Mapping[str, float]
    runs: tuple[CalibrationRun, ...]
    percentile: float | None = None
    factor: float = 1.0

    def __repr__(self) -> str:
        return one_line("Amaxes", self._source, [self._counts, self._tokens])

    def _repr_html_(self) -> str:
        facts = [
            ("amaxes", self._counts),
            ("each", self.kind),
            ("text", self._tokens),
        ]
        runs = [
            (run.source, run.text, f"{run.sequences:,} of {run.length:,}", run.version, run.torch, run.transformers)
            for run in self.runs
        ]
        header = ("checkpoint", "text", "sequences and their tokens", "nemotron_fp8", "torch", "transformers")
        tables = (("inputs", "Inputs of modules"), ("k", "Keys"), ("v", "Values"))
        parts = [Part("Calibrations", runs, header)]
        for table, title in tables:
            largest = sorted(getattr(self, table).items(), key=lambda item: (-item[1], item[0]))
            rows = [(name, f"{amax:.4g}") for name, amax in largest]
            parts.append(Part(f"{title}, the largest first", rows, ("module", "amax"), (1,)))
        return display("Amaxes", self._source, facts, parts)

    @property
    def _source(self) -> str:
        sources = sorted({run.source for run in self.runs})
        return sources[0] if len(sources) == 1 else ""

    @property
    def _counts(self) -> str:
        cached = f", keys and values of {counted(len(self.k), 'attention module')}" if self.k else ""
        return f"inputs of {counted(len(self.inputs), 'module')}{cached}"

    @property
    def _tokens(self) -> str:
        return f"{sum(run.tokens for run in self.runs):,} tokens in {counted(len(self.runs), 'calibration')}"

    @property
    def kind(self) -> str:
        """Description of an amax: the largest value or a percentile, and the factor of its scale."""
        kind = "the largest value" if self.percentile is None else f"percentile {self.percentile:g}"
        return kind if self.factor == 1 else f"{kind}, times {self.factor:g}"

    def render(self) -> bytes:
        """Return the file: sorted, and the same bytes for equal amaxes."""
        value = {
            "schema": SCHEMA,
            "runs": [run._asdict() for run in sorted(set(self.runs))],
            "percentile": self.percentile,
            "factor": self.factor,
            **{name: dict(sorted(getattr(self, name).items())) for name in TABLES},
        }
        return pretty_json(value)

    @property
    def sha256(self) -> str:
        """Digest of the file."""
        return hashlib.sha256(self.render()).hexdigest()

    def times(self, factor: float) -> Amaxes:
        """Return the same amaxes with another factor.

        Raises:
            AmaxesFileError: the factor is not a number of the range `FACTORS`.
        """
        _check_factor("factor (--factor)", factor)
        return replace(self, factor=float(factor))


TABLES = ("inputs", "k", "v")
"""Names of the tables of amaxes."""


def parse_amaxes(data: bytes, file: str) -> Amaxes:
    """Return the amaxes in a file.

    Args:
        data: the text of the file.
        file: its name in messages.

    Raises:
        AmaxesFileError: the text is not such a file.
    """
    found = strict_json.load_object(data, file, AmaxesFileError)
    wanted = {"schema", "runs", "percentile", "factor", *TABLES}
    for key in sorted(found.keys() ^ wanted):
        what = "is missing" if key in wanted else "is no key of such a file"
        raise AmaxesFileError(file, f"{printable(key)} {what}; {ADVICE}")
    if type(found["schema"]) is not int or found["schema"] != SCHEMA:
        raise AmaxesFileError(file, f"schema {excerpt(found['schema'])}, but this version reads schema {SCHEMA}")
    runs = found["runs"]
    if type(runs) is not list or not runs:
        raise AmaxesFileError(file, f"runs is {excerpt(runs)}, not a list of calibrations; {ADVICE}")
    percentile = found["percentile"]
    if percentile is not None:
        check_percentile(file, percentile)
    _check_factor(file, found["factor"])
    inputs, k, v = (_table(file, name, found[name]) for name in TABLES)
    calibrations = tuple(sorted({_run(file, run) for run in runs}))
    return Amaxes(inputs, k, v, calibrations, None if percentile is None else float(percentile), float(found["factor"]))


def check_percentile(file: str, percentile: object) -> None:
    """Raise AmaxesFileError for a percentile that is not between 50 and 100."""
    if not isinstance(percentile, (int, float)) or isinstance(percentile, bool) or not 50 <= percentile <= 100:
        raise AmaxesFileError(file, f"percentile is {excerpt(percentile)}, not a number from 50 to 100")


def _check_factor(file: str, factor: object) -> None:
    least, most = FACTORS
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not least <= factor <= most:
        raise AmaxesFileError(file, f"factor is {excerpt(factor)}, not a number from {least:g} to {most:g}")


def _run(file: str, value: object) -> CalibrationRun:
    """Return the record of a calibration."""
    if type(value) is not dict or value.keys() != set(CalibrationRun._fields):
        raise AmaxesFileError(file, f"runs: {excerpt(value)} is no calibration; {ADVICE}")
    run = CalibrationRun(**value)
    for name, item in run._asdict().items():
        if name in ("sequences", "length"):
            is_right = type(item) is int and 0 < item < MOST
        else:
            is_right = isinstance(item, str) and len(item) <= LONGEST and item.isprintable()
        if not is_right:
            raise AmaxesFileError(file, f"runs: {name} is {excerpt(item)}; {ADVICE}")
    if not _SHA256.fullmatch(run.sha256):
        raise AmaxesFileError(file, f"runs: sha256 is {excerpt(run.sha256)}, not 64 hexadecimal digits; {ADVICE}")
    return run


def _table(file: str, table: str, value: object) -> dict[str, float]:
    """Return a table of amaxes."""
    if type(value) is not dict:
        raise AmaxesFileError(file, f"{table} is {excerpt(value)}, not amaxes by module; {ADVICE}")
    for name, amax in value.items():
        if not name or len(name) > LONGEST:
            raise AmaxesFileError(file, f"{table}: {printable(name)} is not the name of a module; {ADVICE}")
        if type(amax) not in (int, float) or not 0 <= amax < LARGEST:
            raise AmaxesFileError(file, f"{table}: the amax of {printable(name)} is {excerpt(amax)}; {ADVICE}")
    return {name: float(amax) for name, amax in sorted(value.items())}


def read_amaxes(file: str | os.PathLike[str]) -> Amaxes:
    """Return the amaxes in a file that ``calibrate`` wrote.

    Raises:
        SourceReadError: the file cannot be read.
        AmaxesFileError: the file is not such a file.
    """
    return parse_amaxes(read_small(Path(file)), os.fspath(file))


def as_amaxes(value: Amaxes | str | os.PathLike[str] | None) -> Amaxes | None:
    """Return the amaxes that a caller passed, or those in the file that it named; None for None.

    Raises:
        RecipeError: the value is none of these.
        SourceReadError, AmaxesFileError: the file cannot be read, or holds no amaxes.
    """
    if value is None or isinstance(value, Amaxes):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise RecipeError(f"amaxes is {excerpt(value)}, neither amaxes nor the name of a file of them", ("amaxes",))
    return read_amaxes(value)


def merge_amaxes(parts: Iterable[tuple[str, Amaxes]]) -> Amaxes:
    """Return the amaxes of several calibrations of a model: the largest of each module.

    The order of the calibrations does not count, and a calibration that occurs twice counts once.

    Args:
        parts: amaxes, each with the name of its file in messages.

    Raises:
        AmaxesFileError: percentiles or factors differ, or there are no parts.
    """
    merged: Amaxes | None = None
    for file, part in parts:
        if merged is None:
            merged = part
            continue
        for name in ("percentile", "factor"):
            one, other = getattr(merged, name), getattr(part, name)
            if one != other:
                raise AmaxesFileError(file, f"its {name} is {other}, that of the others {one}; merge equal ones only")
        merged = replace(
            merged,
            inputs=_merged(merged.inputs, part.inputs),
            k=_merged(merged.k, part.k),
            v=_merged(merged.v, part.v),
            runs=tuple(sorted({*merged.runs, *part.runs})),
        )
    if merged is None:
        raise AmaxesFileError("amaxes", "no files to merge")
    return merged


def _merged(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in sorted({*one, *other})}
