"""Tensors of a checkpoint as its headers list them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron_fp8._display import Part, counted, display, one_line
from nemotron_fp8._utils import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nemotron_fp8.checkpoint.inventory import Shard

DTYPES = 4
"""Most dtypes that a repr names."""


class InspectedTensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        name: name of the tensor.
        shard: the file that holds it.
        dtype: safetensors name of its dtype.
        shape: dimensions; ``()`` for a scalar.
        bytes: bytes of the tensor.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class InspectedFile(NamedTuple):
    """A weight file of a checkpoint.

    Attributes:
        name: name of the file.
        bytes: bytes of the file.
        metadata: ``__metadata__`` of its header; empty without metadata.
    """

    name: str
    bytes: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, repr=False)
class Inspection:
    """Weight files and tensors of a checkpoint, from headers alone.

    Attributes:
        path: the checkpoint, as it was named in the call.
        files: weight files, in the order of their names.
        tensors: tensors, in the order of the files.
    """

    path: str
    files: tuple[InspectedFile, ...]
    tensors: tuple[InspectedTensor, ...]

    def __repr__(self) -> str:
        dtypes = [f"{count:,} {dtype}" for dtype, (count, _) in self.dtypes.items()]
        if len(dtypes) > DTYPES:
            dtypes[DTYPES:] = [f"{len(dtypes) - DTYPES:,} more dtypes"]
        found = [counted(len(self.files), "file"), format_bytes(self.bytes), counted(len(self.tensors), "tensor")]
        return one_line("Inspection", self.path, [*found, *dtypes])

    def _repr_html_(self) -> str:
        facts = [
            ("files", f"{len(self.files):,}, {format_bytes(self.bytes)}"),
            ("tensors", f"{len(self.tensors):,}"),
        ]
        dtypes = [(dtype, f"{count:,}", format_bytes(size)) for dtype, (count, size) in self.dtypes.items()]
        files = [(file.name, format_bytes(file.bytes)) for file in self.files]
        tensors = [(t.name, t.dtype, str(list(t.shape)), format_bytes(t.bytes)) for t in self.tensors]
        parts = [
            Part("Dtypes", dtypes, ("dtype", "tensors", "bytes"), (1, 2), opened=True),
            Part("Files", files, ("file", "bytes"), (1,)),
            Part("Tensors", tensors, ("tensor", "dtype", "shape", "bytes"), (3,)),
        ]
        return display("Inspection", self.path, facts, parts)

    @property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.bytes for file in self.files)

    @property
    def dtypes(self) -> Mapping[str, tuple[int, int]]:
        """Number and bytes of the tensors of each dtype, the most bytes first."""
        found: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for t in self.tensors:
            count, size = found[t.dtype]
            found[t.dtype] = count + 1, size + t.bytes
        return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))

    def to_json(self) -> dict[str, Any]:
        """Return files and tensors as JSON values."""
        files = [{"name": file.name, "bytes": file.bytes, "metadata": dict(file.metadata)} for file in self.files]
        return {"files": files, "tensors": [{**t._asdict(), "shape": list(t.shape)} for t in self.tensors]}


def inspection_of(path: str, shards: Iterable[Shard]) -> Inspection:
    """Return the files and the tensors of shards."""
    found = tuple(shards)
    files = tuple(InspectedFile(shard.name, shard.size, dict(shard.metadata or ())) for shard in found)
    tensors = tuple(
        InspectedTensor(view.name, shard.name, view.dtype, view.shape, view.nbytes)
        for shard in found
        for view in shard.views
    )
    return Inspection(path, files, tensors)
