"""Mutations of archives: tar headers with a right checksum, zip directories and headers; fields of protocol buffers."""

from __future__ import annotations

import io
import re
import struct
import tarfile
import zipfile
from typing import TYPE_CHECKING

from tests.fuzz.values import integer, is_big, many, mutate_bytes, pick, text

if TYPE_CHECKING:
    from random import Random

BLOCK = 512
FIELDS = {
    "name": (0, 100),
    "mode": (100, 108),
    "uid": (108, 116),
    "size": (124, 136),
    "mtime": (136, 148),
    "kind": (156, 157),
    "link": (157, 257),
    "magic": (257, 265),
    "prefix": (345, 500),
}  # fmt: skip
KINDS = b"01234567LKxgSDMNVX\0AZ\xff"
SIGNATURES = re.compile(rb"PK(?:\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07|\x07\x08)")


def with_checksum(header: bytes) -> bytes:
    """Return a tar header with the right checksum."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:512])
    return header[:148] + f"{total:06o}\0 ".encode() + header[156:]


def header_of(name: bytes, size: bytes, kind: bytes, link: bytes = b"") -> bytes:
    """Return a tar header of any content."""
    made = bytearray(BLOCK)
    made[: min(len(name), 100)] = name[:100]
    made[100:124] = b"0000644\0" * 3
    made[124:136] = size[:12].ljust(12, b"\0")
    made[136:148] = b"00000000000\0"
    made[156:157] = kind
    made[157 : 157 + min(len(link), 100)] = link[:100]
    made[257:265] = b"ustar\x0000"
    return with_checksum(bytes(made))


def padded(data: bytes) -> bytes:
    """Return data filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def size_field(chance: Random) -> bytes:
    """Return the text of a size."""
    value = integer(chance)
    return pick(
        chance,
        (
            f"{abs(value) & 0o77777777777:011o}\0".encode(),
            b"\x80" + (abs(value) & ((1 << 88) - 1)).to_bytes(11, "big"),
            b"\xff" * 12,
            b"\xff" + bytes(11),
            b"-0000000001\0",
            b"99999999999\0",
            b"           \0",
            bytes(12),
            b"0x10\0\0\0\0\0\0\0\0",
            "\u0661".encode() * 6,
            b"77777777777 ",
        ),
    )


def record(key: str, value: str) -> bytes:
    """Return a record of an extended header."""
    body = f" {key}={value}\n".encode("utf-8", "surrogatepass")
    size = len(body) + 1
    while len(str(size)) + len(body) != size:
        size += 1
    return str(size).encode() + body


def extended(chance: Random) -> bytes:
    """Return the data of an extended header."""
    if chance.random() < 0.2:
        count = many(chance) if not is_big(chance) else 100_000
        made = (
            pick(chance, (record("path", "a"), record("size", "1"), record("x", "y"), b"0 a=b\n", b"6 a=b\n")) * count
        )
    else:
        keys = (
            "path",
            "size",
            "linkpath",
            "mtime",
            "GNU.sparse.major",
            "GNU.sparse.size",
            "hdrcharset",
            "",
            "a=b",
            "SCHILY.x",
        )
        made = b"".join(
            record(pick(chance, keys), text(chance)[:70_000] if chance.random() < 0.6 else str(integer(chance)))
            for _ in range(pick(chance, (1, 2, 3)))
        )
    return mutate_bytes(chance, made) if chance.random() < 0.3 else made


def mutate_tar(chance: Random, data: bytes) -> bytes:
    """Return a mutation of a good archive."""
    kind = chance.random()
    if kind < 0.06:
        return mutate_bytes(chance, data)
    if kind < 0.1:
        import gzip

        return pick(
            chance, (b"", bytes(BLOCK), bytes(10240), gzip.compress(data, 1), data[:700], data[:-1024], b"PK\x03\x04")
        )
    headers = offsets(data)
    made = bytearray(data)
    for _ in range(pick(chance, (1, 1, 1, 2, 3))):
        at = pick(chance, headers)
        start, end = FIELDS[pick(chance, ("name", "name", "size", "size", "kind", "kind", *FIELDS))]
        size = end - start
        values = (
            size_field(chance),
            text(chance)[:size].encode("utf-8", "surrogatepass"),
            bytes([pick(chance, KINDS)]),
            bytes([0xFF]) * size,
            mutate_bytes(chance, bytes(made[at + start : at + end])),
            b"./" + b"../" * 5 + b"x",
            b"model_weights/" * 7,
        )
        value = pick(chance, values)
        if chance.random() < 0.5:
            made[at + start : at + end] = value[:size].ljust(size, b"\0")
        else:
            name = pick(chance, (bytes(made[at : at + 100]), b"x", text(chance).encode("utf-8", "surrogatepass")))
            where = pick(chance, headers)
            new = _members(chance, name)
            made[where:where] = new
            headers = [h + len(new) if h >= where else h for h in headers]
    for at in headers:
        if chance.random() < 0.98:
            made[at : at + BLOCK] = with_checksum(bytes(made[at : at + BLOCK]))
    return bytes(made)


def _members(chance: Random, name: bytes) -> bytes:
    """Return members of unusual kinds, before another member."""
    link = pick(chance, (b"/etc/passwd", b"../../x", b"model_config.yaml", name, b"/dev/zero"))

    def special() -> bytes:
        return header_of(name, b"00000000000", bytes([pick(chance, KINDS)]), link)

    def headed() -> bytes:
        data = extended(chance)
        return header_of(b"pax", f"{len(data):011o}".encode(), pick(chance, (b"x", b"x", b"g"))) + padded(data)

    def long_name() -> bytes:
        data = pick(
            chance, (b"a/" * 20_000, name * 3, text(chance).encode("utf-8", "surrogatepass")[:200_000], bytes(70_000))
        )
        return header_of(b"././@LongLink", f"{len(data):011o}".encode(), pick(chance, (b"L", b"L", b"K"))) + padded(
            data
        )

    def empty() -> bytes:
        count = many(chance) if not is_big(chance) else 8000
        return b"".join(header_of(b"%d" % i + name[:80], b"00000000000", b"0") for i in range(count))

    made = pick(chance, (special, headed, headed, long_name, empty))()
    return made * pick(chance, (1, 1, 1, 2, 50 if len(made) < 20_000 else 1))


def offsets(data: bytes) -> list[int]:
    """Return the offset of every header of a good archive."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [member.offset for member in archive.getmembers()]


def mutate_zip(chance: Random, data: bytes) -> bytes:
    """Change fields of the headers and directories in zip archives, of which a file may hold several."""
    made = bytearray(data)
    found = [match.start() for match in SIGNATURES.finditer(data)]
    if not found:
        return mutate_bytes(chance, data)
    for _ in range(pick(chance, (1, 1, 2, 4))):
        at = pick(chance, found)
        field = at + chance.randrange(0, 60)
        width, form = pick(chance, ((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
        kind = chance.random()
        if kind < 0.6:
            made[field : field + width] = struct.pack(f"<{form}", integer(chance) & ((1 << 8 * width) - 1))
        elif kind < 0.75:
            made[field : field + width] = bytes(pick(chance, b"\0\xff/.x\x1b\n") for _ in range(width))
        elif kind < 0.85:
            other = pick(chance, found)
            made[at : at + 46] = made[other : other + 46]
        elif kind < 0.95:
            made[at + 3] = pick(chance, b"\x02\x04\x06\x08\0")
        else:
            made = bytearray(mutate_bytes(chance, bytes(made)))
            break
    return bytes(made)


def saved_tensor(chance: Random, entries: dict[str, bytes]) -> bytes:
    """Return a zip archive as ``torch.save`` writes it, of other entries."""
    made = io.BytesIO()
    stored = zipfile.ZIP_STORED if chance.random() < 0.9 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(made, "w", stored) as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
        for i in range(pick(chance, (0,) * 8 + (1, 63, 64, 70))):
            archive.writestr(f"archive/extra/{i}", b"x" * pick(chance, (0, 1, 100)))
        if chance.random() < 0.1:
            archive.comment = pick(chance, (b"x" * 65_535, b"PK\x05\x06" * 100, b"\x1b[2J"))
    return made.getvalue()


def entries_of(data: bytes) -> dict[str, bytes]:
    """Return the entries of a good archive, without their folder."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


Field = tuple[int, int, int | bytes]
"""Number, wire type, value."""


def varint(value: int) -> bytes:
    """Return the bytes of a number."""
    value &= (1 << 70) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def fields_of(data: bytes) -> list[Field]:
    """Return the fields of a good message."""
    found: list[Field] = []
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = number()
        wire = tag & 7
        size = {1: 8, 5: 4}.get(wire, 0)
        if wire == 0:
            found.append((tag >> 3, 0, number()))
            continue
        size = number() if wire == 2 else size
        found.append((tag >> 3, wire, data[at : at + size]))
        at += size
    return found


def message(fields: list[Field]) -> bytes:
    """Return the bytes of a message."""
    made = []
    for number, wire, value in fields:
        made.append(varint(number << 3 | wire))
        if isinstance(value, bytes):
            made += [varint(len(value))] * (wire == 2) + [value]
        else:
            made.append(varint(value))
    return b"".join(made)


def mutate_message(chance: Random, data: bytes, depth: int = 0) -> bytes:
    """Return a mutation of a SentencePiece model, or of a message in it."""
    if chance.random() < (0.1 if depth else 0.06):
        return mutate_bytes(chance, data)
    try:
        fields = fields_of(data)
    except IndexError:  # it is a mutation already
        return mutate_bytes(chance, data)
    for _ in range(pick(chance, (1, 1, 2))):
        if not fields:
            break
        at = chance.randrange(len(fields))
        number, wire, value = fields[at]
        kind = chance.random()
        if kind < 0.5 and isinstance(value, bytes):
            if depth == 0:
                fields[at] = (number, wire, mutate_message(chance, value, 1))
            else:
                fields[at] = (number, wire, text(chance).encode("utf-8", "surrogatepass"))
        elif kind < 0.5:
            fields[at] = (number, wire, integer(chance))
        elif kind < 0.6:
            del fields[at]
        elif kind < 0.7:
            fields[at:at] = [fields[at]] * (many(chance) if not is_big(chance) else 100_000)
        elif kind < 0.8:
            fields[at] = (abs(integer(chance)), wire, value)
        elif kind < 0.88:
            fields[at] = (number, pick(chance, (0, 1, 2, 3, 4, 5, 6, 7)), value)
        elif depth == 1:
            new = pick(chance, (1, 2, 3, 4, 40, 41, 42, 43, 44))
            fields.append(
                (new, 0, integer(chance))
                if chance.random() < 0.6
                else (new, 2, text(chance).encode("utf-8", "surrogatepass"))
            )
        else:
            piece = message(
                [(1, 2, text(chance).encode("utf-8", "surrogatepass")), (3, 0, pick(chance, (1, 2, 3, 4, 5, 6, 99)))]
            )
            fields[at:at] = [(pick(chance, (1, 1, 1, 2, 3, 4, 5)), 2, piece)] * pick(chance, (1, 1, many(chance)))
    return message(fields)
