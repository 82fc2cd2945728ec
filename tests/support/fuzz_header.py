"""Differential fuzzing of the header reader against the safetensors library.

``python tests/support/fuzz_header.py --cases 100000 --seed 1`` makes small valid files, changes each in up to four
places and reads it with both. A file that the library refuses and this project accepts (a false accept), one
that the two understand differently and any untyped exception is printed and makes the exit status 1. The
reverse, stricter than the library, is counted by reason. The cases follow from the seed alone.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import safetensors

from nemotron_fp8.checkpoint.dtypes import BITS
from nemotron_fp8.checkpoint.header import Header, build_header, header_length, parse_header, serialize
from nemotron_fp8.errors import MalformedHeaderError

if TYPE_CHECKING:
    from collections.abc import Callable

Pairs = list[tuple[str, Any]]
"""A JSON object as its members in order, so that one key can stand twice."""

_NAMES = [
    "a",
    "b",
    "lm_head.weight",
    "w_scale",
    "é",
    "😀",
    "[{",
    '"',
    "\\",
    "\x7f",
    "\n",
    "__metadata",
    "0",
    "shape",
]
_DTYPES = list(BITS)
_NUMBERS = [
    "0", "-0", "1", "2", "3", "7", "8", "16", "-1", "0.0", "1.0", "1e0", "4e0", "1E2", "1e400", "-1e400",
    "1e-400", "NaN", "Infinity", "-Infinity", "01", "+1", "1.", ".5", "0x1", "1_0", "true", "false",
    "null", '"1"',
    "[]", "{}", "[0]", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616", "1" + "0" * 299, "1" + "0" * 308, "1" + "0" * 400, "-1" + "0" * 310, "9" * 5000,
    "1.7976931348623157e308", "1.8e308", "0e999999999999", "1e999999999999",
]  # fmt: skip
_TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\t", b"\n", b"\r", b"\0", b"\x0b", b"\x0c",
    b"\x1f", b"\x7f", b"\x80", b"\xff", b"\xc0\x80", b"\xc3\xa9", b"\xed\xa0\x80", b"\xed\xb0\x80",
    b"\xf0\x9f\x98\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\xa0",
    b"\xef\xbc\x91", b"\\u0000",
    b"\\ud800", b"\\udc00", b"\\ud83d\\ude00", b"\\ude00\\ud83d", b"\\u00e9", b"\\uD8", b"\\x41",
    b"\\/", b"\\b", b"\\'",
    b"null", b"true", b"//", b"/**/", b"'", b"{}", b"[]", b'""', b'"x":0,', b',"x":[]', b',"x":{"x":1,"x":2}',
    b'"dtype":"U8",', b'"shape":[],', b'"data_offsets":[0,0],', b'"__metadata__":{},',
    b'"__metadata__":null,',
    b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b"[" * 61, b"[" * 130, b"]" * 61, b"]" * 130,
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e300, "", "U8", "u8", "F32", "F4", "F6_E2M3", "float32",
    "BF16 ", [], [0],
    [0, 0], [0, 1], [1, 0], [0, 0, 0], [[0], 1], {}, {"F32": None}, {"a": "b"}, "\0", "é", 2**63,
    2**64 - 1, 2**64,
    ["U8", [0], [0, 0]], [2**63, 2, 0], [0, 2**63, 2], [2**32, 2**32], [2**61], [2**64 - 1, 0],
]  # fmt: skip

_VARIABLE = re.compile(r"'.*'|\[[0-9, ]*\]|\b[A-Z]+[0-9]*[A-Z0-9_]*\b|-?[0-9][0-9,]*")
"""The parts of a message that belong to one case: quoted names, shapes, dtypes, numbers."""


def valid(rng: random.Random) -> tuple[Pairs, bytes]:
    """A valid header as pairs, in the layout's order or shuffled, and its data."""
    count = rng.choice([0, 1, 1, 2, 2, 3, 5])
    tensors = []
    for name in rng.sample(_NAMES, count):
        dtype = rng.choice(_DTYPES)
        shape = tuple(rng.choice([0, 1, 1, 2, 3]) for _ in range(rng.choice([0, 1, 1, 2, 3])))
        tensors.append((name, dtype, (*shape, 4) if BITS[dtype] < 8 else shape))
    metadata = rng.choice([None, None, {}, {"format": "pt"}, {"a": "é😀", "b": ""}])
    header = build_header(tensors, metadata)
    pairs: Pairs = []
    if header.metadata is not None:
        pairs.append(("__metadata__", list(header.metadata)))
    for entry in header.entries:
        offsets = [entry.start, entry.end]
        fields: Pairs = [("dtype", entry.dtype), ("shape", list(entry.shape)), ("data_offsets", offsets)]
        pairs.append((entry.name, fields))
    if rng.random() < 0.3:
        rng.shuffle(pairs)
    return pairs, bytes(header.data_size)


def dump(value: Any, rng: random.Random) -> str:
    """JSON text of pairs and plain values, spaced and escaped at random."""
    space = rng.choice(["", "", "", " ", "\t\r\n "])
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        members = [
            f"{json.dumps(key, ensure_ascii=rng.random() < 0.2)}{space}:{dump(item, rng)}" for key, item in value
        ]
        return "{" + f"{space},".join(members) + space + "}"
    if isinstance(value, list):
        return "[" + ("," + space).join(dump(item, rng) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _mutate_tree(pairs: Pairs, rng: random.Random) -> None:
    """Change one thing of the structure, in place."""
    if not pairs:
        pairs.append((rng.choice(_NAMES), rng.choice(_VALUES)))
        return
    at = rng.randrange(len(pairs))
    name, fields = pairs[at]
    inner: Pairs = fields if isinstance(fields, list) and all(isinstance(field, tuple) for field in fields) else []
    choice = rng.randrange(9)
    if choice == 0:
        pairs.append((name, fields))
    elif choice == 1:
        pairs[at] = (rng.choice(["", "\0", "a\0", "__metadata__", *_NAMES]), fields)
    elif choice == 2:
        pairs[at] = (name, rng.choice(_VALUES))
    elif choice == 3 or not inner:
        pairs.insert(at, (rng.choice(["__metadata__", *_NAMES]), rng.choice(_VALUES)))
    else:
        spot = rng.randrange(len(inner))
        key, value = inner[spot]
        if choice == 4:
            del inner[spot]
        elif choice == 5:
            inner.append((key, rng.choice([value, rng.choice(_VALUES)])))
        elif choice == 6:
            inner.insert(spot, (rng.choice(["x", "Dtype", "dtype", "shape", "data_offsets"]), rng.choice(_VALUES)))
        elif choice == 7 and isinstance(value, list) and value and type(value[0]) is int:
            which = rng.randrange(len(value))
            value[which] += rng.choice([-8, -4, -1, 1, 2, 4, 8, 2**32, 2**63])
        else:
            inner[spot] = (key, rng.choice(_VALUES))


def _mutate_text(text: bytes, rng: random.Random) -> bytes:
    """Change some bytes of the JSON."""
    choice = rng.randrange(6)
    at = rng.randrange(len(text) + 1)
    if choice == 0:
        return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    if choice == 1:
        return text[:at] + text[at + rng.choice([1, 1, 2, 8]) :]
    if choice == 2:
        stop = at + rng.choice([1, 4, 20, 60])
        return text[:stop] + text[at:]
    if choice in (3, 4):
        numbers = list(re.finditer(rb"(?<=[\[,:])[0-9]+", text))
        if numbers:
            found = rng.choice(numbers)
            return text[: found.start()] + rng.choice(_NUMBERS).encode() + text[found.end() :]
    return text[:at] + rng.choice(_TOKENS) + text[at:]


def mutant(rng: random.Random) -> bytes:
    """One file: valid, then changed in up to four places (some changes break nothing)."""
    pairs, data = valid(rng)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        _mutate_tree(pairs, rng)
    text = (dump(pairs, rng) if pairs else "{}").encode("utf-8")
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        text = _mutate_text(text, rng)
    text = rng.choice([b"", b"", b" ", b"\n"]) + text + b" " * rng.choice([0, 0, 1, 7])
    length = len(text)
    if rng.random() < 0.05:
        length = rng.choice([length - 1, length + 1, length + 8, 0, 1, 2**63, 2**64 - 1, 10**8 + 1]) % 2**64
    if rng.random() < 0.05:
        data = rng.choice([data[1:], data + b"\0", b"", data * 2])
    file = length.to_bytes(8, "little") + text + data
    return file if rng.random() > 0.02 else file[: rng.randrange(len(file) + 1)]


def read(file: bytes) -> Header:
    """The whole reading path over a file in memory."""
    length = header_length(file[:8], len(file), "fuzz")
    return parse_header(file[8 : 8 + length], len(file), "fuzz")


def reference(file: bytes) -> dict[str, tuple[str, tuple[int, ...], int]] | None:
    """Return dtype, shape and bytes by name as the library reads a file, or ``None`` where it rejects the file."""
    try:
        tensors = safetensors.deserialize(file)  # type: ignore[no-untyped-call]  # a Rust extension
    except safetensors.SafetensorError:
        return None
    return {name: (str(info["dtype"]), tuple(info["shape"]), len(info["data"])) for name, info in tensors}


def compare(file: bytes) -> str:
    """``both``, ``neither``, ``stricter: <reason>``, or a verdict starting with ``FAULT``."""
    theirs = reference(file)
    try:
        header = read(file)
    except MalformedHeaderError as error:
        return "neither" if theirs is None else f"stricter: {_VARIABLE.sub('_', error.problem)}"
    except Exception as error:  # an untyped one is what this looks for
        return f"FAULT untyped {type(error).__name__}"
    if theirs is None:
        return "FAULT false accept"
    ours = {entry.name: (entry.dtype, entry.shape, entry.nbytes) for entry in header.entries}
    if ours != theirs:
        return "FAULT understood differently"
    again = serialize(header)
    if parse_header(again[8:], len(again) + header.data_size, "again").entries != header.entries:
        return "FAULT round trip"
    return "both"


def run(cases: int, seed: int, say: Callable[[str], object] = print) -> Counter[str]:
    """Compare ``cases`` mutants; the verdicts counted."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    for _ in range(cases):
        file = mutant(rng)
        verdict = compare(file)
        counts[verdict] += 1
        if verdict.startswith("FAULT"):
            say(f"{verdict}: {file!r}")
    return counts


def main() -> int:
    """Run from the command line; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    started = time.perf_counter()
    counts = run(arguments.cases, arguments.seed)
    for verdict, count in counts.most_common():
        print(f"{count:>10,}  {verdict}")
    faults = sum(count for verdict, count in counts.items() if verdict.startswith("FAULT"))
    seconds = time.perf_counter() - started
    print(
        f"safetensors {safetensors.__version__}, seed {arguments.seed}: {arguments.cases:,} cases, "
        f"{faults} faults, {seconds:.0f} s"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
