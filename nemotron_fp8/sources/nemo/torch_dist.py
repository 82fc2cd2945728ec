"""Locate the arrays of a torch_dist checkpoint: ``.metadata`` lists the ``.distcp`` file of every block.

Source of the format: ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py`` (every block of a tensor
is written by ``torch.save``, one after another), and ``dist_checkpointing/strategies/torch.py`` of Megatron-LM,
whose classes occur in some ``.metadata`` files.
"""

from __future__ import annotations

import re
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.errors import excerpt
from nemotron_fp8.errors.nemo import (
    ChunkSizeError,
    MalformedArrayError,
    MalformedDistError,
    MissingChunkError,
    StrayChunkError,
)
from nemotron_fp8.sources.nemo.arrays import Box, Stored
from nemotron_fp8.sources.nemo.inert_pickle import Global, Pairs, Record, read_pickle
from nemotron_fp8.sources.nemo.payload_checks import Payload
from nemotron_fp8.sources.nemo.torch_save import read_saved
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nemotron_fp8.sources.nemo.files import Files


METADATA = ".metadata"
MAX_METADATA_BYTES = 64 << 20
MAX_CELLS = 1 << 20
"""Cap on the cells into which the edges of all blocks divide an array."""
_CHECKPOINT = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
DTYPES = {
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.bool": "BOOL",
}
TENSOR, BYTES = f"{_CHECKPOINT}.metadata.TensorStorageMetadata", f"{_CHECKPOINT}.metadata.BytesStorageMetadata"
ALLOWED = frozenset(
    (
        *DTYPES,
        TENSOR,
        BYTES,
        *(
            f"{_CHECKPOINT}.metadata.{name}"
            for name in (
                "Metadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "_MEM_FORMAT_ENCODING",
                "MetadataIndex",
                "StorageMeta",
            )
        ),
        f"{_CHECKPOINT}.filesystem._StorageInfo",
        f"{_CHECKPOINT}.filesystem._StoragePrefix",
        *(
            f"{_CHECKPOINT}.planner.{name}"
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
        f"{_SHARDED}.TensorProperties",
        f"{_SHARDED}.MEM_FORMAT_ENCODING",
        f"{_MEGATRON}.MCoreMetadata",
        f"{_MEGATRON}.MCoreSavePlan",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib._local.Path",
        "pathlib._local.PosixPath",
    )
)
"""Classes and functions that occur in a ``.metadata``. Only their names are read; none is looked up or called."""
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.distcp", re.ASCII)


def is_dist(files: Files, folder: str) -> bool:
    """Return True if a folder of a checkpoint holds a torch_dist checkpoint."""
    return f"{folder}/{METADATA}" in files.places


def read_dist(files: Files, folder: str, wanted: Callable[[str], bool]) -> tuple[list[Stored], list[Payload]]:
    """Return the wanted arrays of a torch_dist checkpoint, and their payloads with a checksum.

    Raises:
        MalformedDistError: ``.metadata`` or a ``.distcp`` file breaks its format.
        ForbiddenPickleError: one of them refers to a class or function that its format does not need.
        MalformedArrayError, MissingChunkError, StrayChunkError, ChunkSizeError: the blocks of an array do not
            tile it.
    """
    name = f"{folder}/{METADATA}"
    data = files.read(name, length=MAX_METADATA_BYTES + 1)
    if len(data) > MAX_METADATA_BYTES:
        raise MalformedDistError(name, f"the file has more than {MAX_METADATA_BYTES:,} bytes, the limit")
    value = read_pickle(data, name, ALLOWED)
    with guarded(lambda problem: MalformedDistError(name, problem)):
        described, storage = _metadata(value, name)
        return _arrays(files, folder, described, dict(_storage(storage, name)), wanted)


def _arrays(
    files: Files,
    folder: str,
    described: Pairs,
    places: dict[tuple[str, tuple[int, ...]], Location],
    wanted: Callable[[str], bool],
) -> tuple[list[Stored], list[Payload]]:
    """Return the wanted arrays, and their payloads with a checksum."""
    name = f"{folder}/{METADATA}"
    arrays: list[Stored] = []
    payloads: list[Payload] = []
    for key, value in described.items:
        if type(key) is not str or not isinstance(value, Record) or value.kind not in (TENSOR, BYTES):
            raise MalformedDistError(name, f"{excerpt(key)} is described as neither tensor nor bytes")
        if value.kind == TENSOR and wanted(key):
            arrays.append(_Reader(files, folder, key, places, payloads).array(value.fields()))
    return arrays, payloads


Location = tuple[str, int, int]
"""File, first byte and bytes of a saved block."""


def _metadata(value: Any, name: str) -> tuple[Pairs, Pairs]:
    """Return the descriptions and the places of a ``Metadata``."""
    fields = value.fields() if isinstance(value, Record) else {}
    described, storage = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(described, Pairs) or not isinstance(storage, Pairs):
        raise MalformedDistError(name, "no Metadata object with state_dict_metadata and storage_data")
    return described, storage


def _storage(storage: Pairs, name: str) -> Iterator[tuple[tuple[str, tuple[int, ...]], Location]]:
    """Yield the place of every block, with its array and the index of its first element."""
    for index, info in storage.items:
        key = index.fields() if isinstance(index, Record) else {}
        at = info.fields() if isinstance(info, Record) else {}
        file, offset, length = at.get("relative_path"), at.get("offset"), at.get("length")
        array = excerpt(key.get("fqn"))
        if type(key.get("fqn")) is not str or type(file) is not str or not _FILE.fullmatch(file):
            raise MalformedDistError(name, f"{array} is placed in {excerpt(file)}, not a .distcp file")
        if type(offset) is not int or type(length) is not int or not (0 <= offset < 1 << 60 and 0 < length < 1 << 60):
            raise MalformedDistError(name, f"{array} has offset {excerpt(offset)} and length {excerpt(length)}")
        if at.get("transform_descriptors"):
            raise MalformedDistError(name, f"{array} has transforms: {excerpt(at['transform_descriptors'])}")
        first = _sides(key.get("offset")) if key.get("offset") is not None else ()
        if first is None:
            raise MalformedDistError(name, f"the block of {array} has no valid index")
        yield (key["fqn"], first), (file, offset, length)


def _sides(value: Any) -> tuple[int, ...] | None:
    """Return the numbers of a ``torch.Size``; None for anything else."""
    if isinstance(value, Record) and value.kind == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, (tuple, list)) or len(value) > 8:
        return None
    if any(type(side) is not int or not 0 <= side < 1 << 48 for side in value):
        return None
    return tuple(value)


class _Reader:
    """Reads one array."""

    def __init__(
        self,
        files: Files,
        folder: str,
        name: str,
        places: dict[tuple[str, tuple[int, ...]], Location],
        payloads: list[Payload],
    ) -> None:
        self._files, self._folder, self._name, self._places = files, folder, name, places
        self._payloads = payloads

    def array(self, fields: dict[str, Any]) -> Stored:
        """Return the array that a ``TensorStorageMetadata`` describes."""
        properties, chunks = fields.get("properties"), fields.get("chunks")
        shape = _sides(fields.get("size"))
        state = properties.state if isinstance(properties, Record) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if shape is None or 0 in shape or type(chunks) is not list:
            raise MalformedArrayError(self._name, f"{METADATA} describes it without a valid size or blocks")
        if type(dtype) is not Global or dtype.name not in DTYPES:
            found = excerpt(dtype.name if type(dtype) is Global else dtype)
            raise MalformedArrayError(self._name, f"its dtype is {found}, not one of {', '.join(DTYPES)}")
        blocks = [self._block(chunk, shape) for chunk in chunks]
        self._check_tiling(blocks, shape)
        boxes = tuple(self._box(start, sides, DTYPES[dtype.name]) for start, sides in blocks)
        return Stored(self._name, DTYPES[dtype.name], shape, boxes)

    def _block(self, chunk: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return index and dimensions of a block, inside the array."""
        fields = chunk.fields() if isinstance(chunk, Record) else {}
        start, sides = _sides(fields.get("offsets")), _sides(fields.get("sizes"))
        if start is None or sides is None or not len(start) == len(sides) == len(shape) or 0 in sides:
            raise MalformedArrayError(self._name, f"{METADATA} describes a block without a valid index or size")
        if any(at + side > whole for at, side, whole in zip(start, sides, shape, strict=True)):
            raise StrayChunkError(
                self._name, str(list(start)), f"of shape {list(sides)} exceeds the array's shape {list(shape)}"
            )
        return start, sides

    def _check_tiling(self, blocks: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> None:
        """Check that every element is in exactly one block, by the cells between the edges of all blocks."""
        edges = []
        for i, whole in enumerate(shape):
            found = {0, whole}
            for start, sides in blocks:
                found |= {start[i], start[i] + sides[i]}
            edges.append({at: n for n, at in enumerate(sorted(found))})
        cells = prod(len(edge) - 1 for edge in edges)
        if cells > MAX_CELLS:
            raise MalformedArrayError(
                self._name, f"its blocks divide it into {cells:,} cells, the limit is {MAX_CELLS:,}"
            )
        seen: set[tuple[int, ...]] = set()
        for start, sides in blocks:
            spans = [range(edge[at], edge[at + side]) for edge, at, side in zip(edges, start, sides, strict=True)]
            for cell in product(*spans):
                if cell in seen:
                    raise StrayChunkError(self._name, str(list(start)), "overlaps another block")
                seen.add(cell)
        if len(seen) < cells:
            missing = next(cell for cell in product(*(range(len(edge) - 1) for edge in edges)) if cell not in seen)
            corners = [min(at for at, n in edge.items() if n == i) for edge, i in zip(edges, missing, strict=True)]
            raise MissingChunkError(self._name, str(corners), len(seen), cells)

    def _box(self, start: tuple[int, ...], sides: tuple[int, ...], dtype: str) -> Box:
        """Return the box of a block: the place of its elements in its file."""
        place = self._places.get((self._name, start))
        if place is None:
            raise MissingChunkError(self._name, str(list(start)), 0, 1)
        file, offset, length = f"{self._folder}/{place[0]}", place[1], place[2]
        if file not in self._files.places:
            raise MissingChunkError(self._name, place[0], 0, 1)
        if offset + length > self._files.places[file].size:
            raise ChunkSizeError(self._name, place[0], self._files.places[file].size, offset + length)
        saved = read_saved(self._files, file, offset, length)
        if saved.dtype != dtype:
            raise MalformedArrayError(self._name, f"{place[0]} holds {saved.dtype} at byte {offset:,}, not {dtype}")
        ones = len(sides) - len(saved.shape)
        if ones < 0 or (1,) * ones + saved.shape != sides:
            problem = f"{place[0]} holds {list(saved.shape)} at byte {offset:,}, not {list(sides)}"
            raise MalformedArrayError(self._name, problem)
        strides, item = (0,) * ones + saved.strides, BITS[dtype] // 8
        if sides and strides[-1] != item and sides[-1] > 1:
            raise MalformedArrayError(
                self._name, f"{place[0]} stores it transposed at byte {offset:,}, which is not supported"
            )
        at = self._files.places[file]  # in an archive: a part of a larger file
        if saved.storage is not None and saved.storage[1]:
            begin, size, crc = saved.storage
            self._payloads.append(Payload(at.file, at.offset + begin, size, crc))
        if not sides:
            return Box((0,), (1,), at.file, at.offset + saved.offset, (item,))
        return Box(start, sides, at.file, at.offset + saved.offset, (*strides[:-1], item))
