"""Quantization error of each tensor, and ``nemotron_fp8.stats.json``, the file that records it.

A result with `Recipe.stats` has the file beside its shards. Like the manifest, the file is the same for every run.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.inventory import STATS
from nemotron_fp8.errors import MalformedManifestError, excerpt
from nemotron_fp8.planning.receipt import TensorStats, parse_nonfinite, parse_stats
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.planning.receipt import NonFinite, ShardReceipt


SCHEMA = 1
COLUMNS = ["name", "sqnr_db", "max_abs_error", "clamped", "flushed_to_zero"]
"""Figures of a row, in order."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of the tensors of a result.

    Attributes:
        tensors: quantization error of every FP8 tensor, in the order of the source.
        nonfinite: NaN and Inf in the source; their tensors are left unquantized.
    """

    tensors: tuple[TensorStats, ...]
    nonfinite: tuple[NonFinite, ...]

    @property
    def typical(self) -> float | None:
        """Median SQNR in dB over the tensors with a finite SQNR; None without any."""
        finite = sorted(t.sqnr_db for t in self.tensors if math.isfinite(t.sqnr_db))
        return finite[(len(finite) - 1) // 2] if finite else None

    def worst(self, count: int) -> list[TensorStats]:
        """Return the tensors with the lowest SQNR; tensors of zeros only have no SQNR and are omitted."""
        known = [t for t in self.tensors if not math.isnan(t.sqnr_db)]
        return sorted(known, key=lambda t: (t.sqnr_db, t.name))[:count]


def render_figures(tensors: Iterable[TensorStats], nonfinite: Iterable[NonFinite]) -> bytes:
    """Return the file: its columns, and a line for each tensor."""
    rows = [json.dumps(t.row(), ensure_ascii=False) for t in tensors]
    found = [json.dumps([f.tensor, f.count, list(f.position), f.value], ensure_ascii=False) for f in nonfinite]
    columns = json.dumps(COLUMNS)
    text = (
        f'{{\n"schema": {SCHEMA},\n"columns": {columns},\n"tensors": [\n{_lines(rows)}],'
        f'\n"nonfinite": [\n{_lines(found)}]\n}}\n'
    )
    return text.encode("utf-8", "surrogatepass")


def _lines(rows: list[str]) -> str:
    return ",\n".join(rows) + "\n" * bool(rows)


def parse_figures(data: bytes) -> Figures:
    """Parse a file that `render_figures` wrote.

    Raises:
        MalformedManifestError: the bytes are not such a file.
    """
    value = strict_json.load_object(data, STATS, MalformedManifestError)
    with guarded(_malformed):
        schema, tensors, nonfinite = (value.get(key) for key in ("schema", "tensors", "nonfinite"))
        if type(schema) is not int or schema != SCHEMA:
            raise _malformed(f"schema {excerpt(schema)}, but this version reads schema {SCHEMA}")
        if value.keys() != {"schema", "columns", "tensors", "nonfinite"} or value["columns"] != COLUMNS:
            raise _malformed("its keys or columns are not those of a file of statistics")
        if type(tensors) is not list or type(nonfinite) is not list:
            raise _malformed("tensors or nonfinite is missing, or is not a list")
        return Figures(tuple([parse_stats(row) for row in tensors]), tuple([parse_nonfinite(row) for row in nonfinite]))


def _malformed(problem: str) -> MalformedManifestError:
    return MalformedManifestError(STATS, problem)


def figures_of(receipts: Mapping[str, ShardReceipt]) -> Figures:
    """Return the figures of all shards; a non-finite tensor in the receipts of several shards counts once."""
    tensors = tuple(tensor for receipt in receipts.values() for tensor in receipt.stats)
    return Figures(tensors, tuple({f.tensor: f for r in receipts.values() for f in r.nonfinite}.values()))
