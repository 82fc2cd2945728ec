"""Index a tar archive without `tarfile`, which reads an extended header of any size into memory.

Format: POSIX.1-2017 ``pax`` (ustar and extended headers) and the GNU tar manual (long names, sizes in base 256). The
index is stricter than a tar program: archives are untrusted, and only regular files matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.errors import printable
from nemotron_fp8.errors.nemo import MalformedArchiveError
from nemotron_fp8.sources.files import identify
from nemotron_fp8.sources.nemo.files import Files, Place, PooledOpener
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.sources.files import SourceFile


BLOCK = 512
MAX_MEMBERS = 1_000_000
MAX_NAME_BYTES = 1 << 16
"""Cap on a long name or a set of extended headers; a path has some hundred bytes."""
REGULAR = frozenset((b"0", b"\0", b"7"))
FOLDER, LONG_NAME, LONG_LINK, EXTENDED, EXTENDED_ALL = b"5", b"L", b"K", b"x", b"g"
KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
"""Kinds of members that are rejected."""


def files_of_archive(path: Path) -> tuple[Files, PooledOpener]:
    """List the members of an uncompressed tar archive, and create its opener.

    Raises:
        MalformedArchiveError: the archive is compressed, cut off or no tar archive; or a member is a link or a device,
            has a path that leaves the archive, occurs twice, or ends beyond the archive.
        SourceReadError: the archive cannot be read.
    """
    identity = identify(path.parent)[path.name]
    size, opener = identity[0], PooledOpener(path.parent, {path.name: identity})
    file = opener.open(path.name)
    try:
        with guarded(lambda problem: MalformedArchiveError(str(path), problem)):
            places = _Directory(file, path, size).read()
    finally:
        file.close()
    return Files(str(path), places, opener), opener


class _Directory:
    """Directory of an archive, read from header to header."""

    def __init__(self, file: SourceFile, path: Path, size: int) -> None:
        self._file, self._path, self._size = file, path, size

    def _refuse(self, problem: str) -> MalformedArchiveError:
        return MalformedArchiveError(str(self._path), problem)

    def _read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._file.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read(self) -> dict[str, Place]:
        """Return the place of every member, by name."""
        if self._size > 1 and self._read(0, 2) == b"\x1f\x8b":
            raise self._refuse(
                "compressed with gzip, so its members cannot be read in place; decompress it first (gunzip)"
            )
        places: dict[str, Place] = {}
        at, members = 0, 0
        name, size = None, None  # from extended headers, for the member that follows them
        while True:
            if at + BLOCK > self._size:
                raise self._refuse(f"truncated: no end mark in its {self._size:,} bytes; fetch the archive again")
            header = self._read(at, BLOCK)
            if not any(header):
                return places
            self._check(header, at)
            kind, length = header[156:157], self._number(header[124:136], at)
            if kind in REGULAR and size is not None:
                length = size
            data = at + BLOCK
            if data + length > self._size:
                raise self._refuse(
                    f"truncated: the member at byte {at:,} has {length:,} bytes, but the archive has {self._size:,};"
                    " fetch the archive again"
                )
            members += 1
            if members > MAX_MEMBERS:
                raise self._refuse(f"more than {MAX_MEMBERS:,} members, the limit")
            if kind in (LONG_NAME, EXTENDED):
                if length > MAX_NAME_BYTES:
                    raise self._refuse(
                        f"the long name at byte {at:,} has {length:,} bytes, the limit is {MAX_NAME_BYTES:,}"
                    )
                text = self._read(data, length)
                if kind == LONG_NAME:
                    name = self._text(text.rstrip(b"\0"))
                else:
                    name, size = self._extended(text, name, size)
            elif kind in REGULAR or kind == FOLDER:
                member = self._name(name if name is not None else self._short_name(header))
                if kind in REGULAR:
                    if member in places:
                        raise self._refuse(f"member {printable(member)} occurs twice")
                    places[member] = Place(self._path.name, data, length)
                name, size = None, None
            elif kind not in (LONG_LINK, EXTENDED_ALL):
                what = KINDS.get(kind, f"of unknown kind {kind!r}")
                shown = printable(name if name is not None else self._short_name(header))
                raise self._refuse(f"member {shown} is {what}; only files and folders are supported")
            at = data + -(-length // BLOCK) * BLOCK

    def _check(self, header: bytes, at: int) -> None:
        """Compare the checksum, in which the checksum itself counts as spaces."""
        try:
            stated = int(header[148:156].strip(b" \0") or b"x", 8)
        except ValueError:
            stated = -1
        if stated != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
            what = "not a tar archive" if at == 0 else "damaged; fetch the archive again"
            raise self._refuse(f"the checksum of the header at byte {at:,} is wrong: {what}")

    def _number(self, text: bytes, at: int) -> int:
        """Return a size from octal digits, or base 256 if the first bit is set."""
        if text[0] == 0x80:
            return int.from_bytes(text[1:], "big")
        try:
            digits = text.strip(b" \0")
            if not digits.isdigit():
                raise ValueError
            return int(digits, 8)
        except ValueError:
            raise self._refuse(f"the size of the member at byte {at:,} is not a number") from None

    def _text(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self._refuse(f"the member name {data[:40]!r} is not UTF-8") from None

    def _short_name(self, header: bytes) -> str:
        """Return the name in a header, with the prefix that ustar stores separately."""
        name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and prefix:
            name = prefix + b"/" + name
        return self._text(name)

    def _extended(self, text: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
        """Return name and size from records like ``18 path=some/name\\n``, whose number counts the whole record."""
        while text:
            number, space, _ = text.partition(b" ")
            length = int(number) if space and number.isdigit() and len(number) < 8 else 0
            record = text[len(number) + 1 : length]
            key, equals, value = record.partition(b"=")
            if length > len(text) or not equals or not record.endswith(b"\n"):
                raise self._refuse("an extended header does not consist of records")
            if key == b"path":
                name = self._text(value[:-1])
            elif key == b"size":
                if not value[:-1].isdigit() or len(value) > 20:
                    raise self._refuse("the size in an extended header is not a number")
                size = int(value[:-1])
            elif key.startswith(b"GNU.sparse"):
                raise self._refuse("a member is a sparse file; only files and folders are supported")
            text = text[length:]
        return name, size

    def _name(self, name: str) -> str:
        """Return a member's name without a leading ``./``; reject a name that leaves the archive."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
            raise self._refuse(f"member {printable(name)} has a path that leaves the archive")
        return "/".join(parts)
