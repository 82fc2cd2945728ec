"""Open shards with the safetensors library and compare the tensors that it finds with those of our reader."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import safetensors

from nemotron_fp8._utils import parallel_for
from nemotron_fp8.checkpoint.dtypes import nbytes
from nemotron_fp8.checkpoint.header import LENGTH_BYTES, header_length
from nemotron_fp8.errors import SourceReadError, printable
from nemotron_fp8.sources.files import MappedFile, OpenFiles
from nemotron_fp8.verification.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nemotron_fp8.checkpoint.inventory import Shard
    from nemotron_fp8.checkpoint.tensor_view import Extent, TensorView
    from nemotron_fp8.sources.files import Opener, SourceFile


LIBRARY = f"the safetensors library {safetensors.__version__}"
FRAMEWORK = "numpy" if importlib.util.find_spec("numpy") else "pt"
"""The framework that the library imports on opening a file; torch takes ten times as long as NumPy to import."""


class LibraryTensor(NamedTuple):
    """A tensor as the safetensors library reads a header: its name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def check_shards(shards: Iterable[Shard], opener: Opener, threads: int, owner: str) -> list[Problem]:
    """Return the differences between our reading of shards and the library's.

    The library opens a local shard itself. For any other shard it opens a sparse temporary file with the same header
    and size: opening reads the header alone, so the data section takes neither disk nor transfer.

    Args:
        shards: shards as our reader understood them; shards of another format (NeMo) are skipped.
        opener: opens their files.
        threads: shards to open at a time.
        owner: name of their checkpoint in problems, "the source" or "the result".

    Raises:
        SourceReadError: a shard can no longer be read.
        SourceChangedError: a shard changed since the inventory was taken.
        HubError: a header cannot be fetched; the class names the reason.
    """
    importlib.import_module({"pt": "torch"}.get(FRAMEWORK, FRAMEWORK))  # else the library does, for the first file
    files = [shard for shard in shards if _is_file(shard)]
    opened, lock = OpenFiles(opener), Lock()
    found: dict[str, list[Problem]] = {}

    def check(shard: Shard) -> None:
        with opened.use(shard.name) as file, _on_disk(shard, file) as path:
            problems = compare_readers(shard, path, owner)
        with lock:
            found[shard.name] = problems

    try:
        parallel_for(max(1, min(threads, len(files))), files, check)
    finally:
        opened.close()
    return [problem for shard in files for problem in found[shard.name]]


def compare_readers(shard: Shard, path: Path | None, owner: str) -> list[Problem]:
    """Return the differences between our reading of a shard and the library's reading of a file.

    The library exposes no offsets, but it rejects a file whose tensors do not fill it without gap or overlap: the order
    and the sizes of the tensors imply every offset.

    Args:
        shard: the shard as our reader understood it.
        path: the file; None if it could not be created.
        owner: name of its checkpoint in problems.
    """
    where = f"{shard.name} of {owner}"
    if path is None:
        what = f"{LIBRARY} cannot check {where}: no sparse temporary file of {shard.size:,} bytes possible; set TMPDIR"
        return [Problem(shard.name, what)]
    try:
        metadata, tensors = read_with_library(path)
    except (safetensors.SafetensorError, OSError) as error:
        if isinstance(error, OSError):
            _check_limits(path)  # the library names another reason where there are too many open files
        return [Problem(shard.name, f"our reader accepts {where}, {LIBRARY} rejects it: {printable(str(error))}")]
    problems: list[Problem] = []
    if dict(shard.metadata or ()) != metadata:
        what = f"in {where}, our reader finds the metadata {dict(shard.metadata or ())}, {LIBRARY} {metadata}"
        problems.append(Problem(shard.name, what))
    ours = {view.name: view for view in shard.views}
    if [view[:3] for view in shard.views] != tensors:  # empty tensors may come in another order
        problems += _different_tensors(ours, {tensor.name: tensor for tensor in tensors}, where)
    return problems or _wrong_offsets(shard, ours, tensors, where)


def _check_limits(path: Path) -> None:
    """Open a file, to see whether the system lets this process open one.

    Raises:
        SourceReadError: it does not, which is no verdict on the file.
    """
    try:
        with ExitStack() as opened:  # as many as the library may need
            for _ in range(3):
                opened.enter_context(path.open("rb"))
    except OSError as error:
        raise SourceReadError(str(path), f"{error.strerror}; raise the limit of open files (ulimit -n)") from error


def read_with_library(path: Path) -> tuple[dict[str, str], list[LibraryTensor]]:
    """Return the metadata of a file and its tensors in the order of their data.

    Raises:
        safetensors.SafetensorError: the library rejects the file.
        OSError: the file cannot be opened.
    """
    with safetensors.safe_open(path, FRAMEWORK) as file:
        slices = ((name, file.get_slice(name)) for name in file.offset_keys())
        tensors = [LibraryTensor(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
        return file.metadata() or {}, tensors


def _different_tensors(ours: dict[str, TensorView], theirs: dict[str, LibraryTensor], where: str) -> Iterator[Problem]:
    """Yield a problem for each tensor that is missing in one reading or differs in dtype or shape."""
    for name in theirs | ours:
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one[:3] != other:
            yield Problem(name, f"in {where}, our reader finds {_text(one)}, {LIBRARY} {_text(other)}")


def _wrong_offsets(
    shard: Shard, ours: dict[str, TensorView], tensors: list[LibraryTensor], where: str
) -> list[Problem]:
    """Return a problem for each tensor with different offsets; names, dtypes and shapes agree."""
    problems: list[Problem] = []
    size_of = cache(nbytes)  # a shard has a few kinds of tensors
    end = shard.size - sum(size_of(tensor.dtype, tensor.shape) for tensor in tensors)
    for tensor in tensors:
        begin, end = end, end + size_of(tensor.dtype, tensor.shape)
        extents = ours[tensor.name].extents
        if begin == end and not extents:
            continue
        if len(extents) != 1 or not _is_dense(extents[0], begin, end):
            placed = ", ".join(f"[{e.offset:,}, {e.offset + (e.runs - 1) * e.stride + e.length:,})" for e in extents)
            what = f"in {where}, our reader finds bytes {placed or 'nowhere'}, {LIBRARY} [{begin:,}, {end:,})"
            problems.append(Problem(tensor.name, what))
    return problems


def _is_dense(extent: Extent, begin: int, end: int) -> bool:
    """Return True if an extent is the bytes ``[begin, end)`` of its file, each once and in order."""
    dense = extent.length == extent.stride and not extent.item
    return dense and extent.offset == begin and extent.runs * extent.length == end - begin


def _text(tensor: TensorView | LibraryTensor | None) -> str:
    return "no such tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _is_file(shard: Shard) -> bool:
    """Return True if a shard is a safetensors file of that name, False if a conversion makes it of other files."""
    return all(extent.file == shard.name for view in shard.views for extent in view.extents)


@contextmanager
def _on_disk(shard: Shard, file: SourceFile) -> Iterator[Path | None]:
    """Yield a local file with the header and the size of a shard; None if the system rejects a file of that size."""
    if isinstance(file, MappedFile):
        yield file.path
        return
    start = _read(file, 0, LENGTH_BYTES)
    start += _read(file, LENGTH_BYTES, header_length(start, shard.size, shard.name))
    with tempfile.TemporaryDirectory(prefix="nemotron-fp8-header-") as folder:
        path = Path(folder) / "header.safetensors"
        try:
            with path.open("wb") as copy:
                copy.write(start)
                os.ftruncate(copy.fileno(), shard.size)
        except OSError:
            yield None
        else:
            yield path


def _read(file: SourceFile, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    file.read_into(offset, memoryview(buffer))
    return bytes(buffer)
