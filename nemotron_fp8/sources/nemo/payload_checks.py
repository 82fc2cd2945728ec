"""Compare the payload of ``torch.save`` archives with the CRC-32 in their directories, before it is converted.

A tensor is read in slices, in the order of the result, so its checksum cannot be computed on the way. Each storage of
a shard is therefore read once more, just before the shard: the conversion then finds it in the page cache.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import defaultdict
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import parallel_for, usable_cores
from nemotron_fp8.errors.nemo import MalformedDistError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.sources.files import Opener, SourceFile


STEP = 4 << 20
"""Bytes read at a time."""


class Payload(NamedTuple):
    """Bytes of one storage.

    Attributes:
        file: key of the file.
        offset: first byte in the file.
        size: bytes.
        crc: CRC-32 by the directory of the archive.
    """

    file: str
    offset: int
    size: int
    crc: int


class CheckedOpener:
    """Opens files of another opener, whose payloads `check` compares with their checksums.

    Args:
        opener: opens the files.
        payloads: all payloads with a checksum.
    """

    def __init__(self, opener: Opener, payloads: tuple[Payload, ...]) -> None:
        self._opener, self._payloads = opener, payloads
        self._checked: set[Payload] = set()
        self._lock = Lock()
        self._by_file: defaultdict[str, list[Payload]] = defaultdict(list)
        for payload in sorted(payloads, key=lambda payload: payload.offset):
            self._by_file[payload.file].append(payload)

    def __getstate__(self) -> tuple[Opener, tuple[Payload, ...]]:
        return self._opener, self._payloads

    def __setstate__(self, state: tuple[Opener, tuple[Payload, ...]]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # what other processes have checked is not known

    def open(self, file: str) -> SourceFile:
        """Open a file of the other opener."""
        return self._opener.open(file)

    def check(self, views: Iterable[TensorView]) -> None:
        """Compare the payloads of some tensors with their checksums, each payload once in a process.

        Raises:
            MalformedDistError: a payload differs.
            SourceReadError: a file cannot be read.
        """
        with self._lock:
            left = sorted(self._of(views) - self._checked)
            self._checked.update(left)
        parallel_for(max(1, min(usable_cores(), len(left))), left, self._compare)

    def _of(self, views: Iterable[TensorView]) -> set[Payload]:
        found: set[Payload] = set()
        for extent in (extent for view in views for stored in view.stored for extent in stored.extents):
            inside = self._by_file.get(extent.file, [])
            at = bisect_right(inside, extent.offset, key=lambda payload: payload.offset) - 1
            if at >= 0 and extent.offset < inside[at].offset + inside[at].size:
                found.add(inside[at])
        return found

    def _compare(self, payload: Payload) -> None:
        found = 0
        file = self._opener.open(payload.file)
        try:
            for begin in range(0, payload.size, STEP):
                offset, length = payload.offset + begin, min(STEP, payload.size - begin)
                window = file.window(offset, length)
                if window is None:
                    window = memoryview(bytearray(length))
                    file.read_into(offset, window)
                found = zlib.crc32(window, found)
                del window
                file.release(offset, length)
        finally:
            file.close()
        if found != payload.crc:
            raise MalformedDistError(
                payload.file,
                f"the {payload.size:,} bytes of a tensor at byte {payload.offset:,} have the CRC-32 {found:08x} instead"
                f" of {payload.crc:08x}: damaged or changed; fetch the file again",
            )
