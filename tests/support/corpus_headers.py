"""Named malformed safetensors files, each with what its error must say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nemotron_fp8.checkpoint.header import header_length, parse_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEEP = 100_000


@dataclass(frozen=True)
class Case:
    """A malformed file.

    Attributes:
        name: what is wrong.
        make: its bytes, built when asked for as some take 25 MB.
        says: a regular expression that the error's message matches.
        stricter: the safetensors library accepts it and this project does not.
    """

    name: str
    make: Callable[[], bytes]
    says: str
    stricter: bool = False


def shard(text: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header and its data; ``length`` where the stated one is not the real one."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensor(
    name: str = '"a"',
    dtype: str = '"U8"',
    shape: str = "[1]",
    offsets: str = "[0,1]",
    extra: str = "",
) -> str:
    """One member of a header, every part as JSON text."""
    return f'{name}:{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{extra}}}'


GOOD = "{" + tensor() + "}"
OTHER = tensor('"b"', offsets="[1,2]")


def read_header_bytes(file: bytes) -> None:
    """The reading path of a shard."""
    length = header_length(file[:8], len(file), "m.safetensors")
    parse_header(file[8 : 8 + length], len(file), "m.safetensors")


def header_cases() -> Iterator[Case]:
    """Every malformed shard."""
    yield from _lengths()
    yield from _texts()
    yield from _bombs()
    yield from _numbers()
    yield from _strings()
    yield from _structures()
    yield from _layouts()


def _case(name: str, text: str | bytes, says: str, data: bytes = b"x", *, stricter: bool = False) -> Case:
    return Case(name, lambda: shard(text, data), says, stricter)


def _lengths() -> Iterator[Case]:
    good = GOOD.encode()
    size = len(good)
    for count in (0, 1, 7):
        yield Case(f"file of {count} bytes", partial(bytes, count), f"^m.safetensors: {count} bytes")
    stated = {
        "length 0": (0, "expected a value"),
        "length one short": (size - 1, "expected ',' or '}'"),
        "length one long, into the data": (size + 1, "more text follows"),
        "length one past the file": (size + 2, "ends at byte .* the file at"),
        "length 100,000,001": (100_000_001, "the format allows 100,000,000"),
        "length over the limit": (25_000_001, "the limit is 25,000,000"),
        "length 2**63": (2**63, "the format allows"),
        "length 2**64-1": (2**64 - 1, "the format allows"),
        "length big-endian": (size << 56, "the format allows"),
    }
    for name, (length, says) in stated.items():
        yield Case(name, partial(shard, good, b"x", length), says)
    yield Case("only a length", lambda: (64).to_bytes(8, "little"), "ends at byte 72, the file at 8")
    yield Case("cut inside the header", lambda: shard(good)[:-5], "ends at byte")
    yield Case(
        "a header of blanks up to 25 MB",
        lambda: shard(good + b" " * 25_000_000, b"x"),
        "the limit is",
        stricter=True,
    )
    yield Case("a pickle", lambda: b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u." * 4, "not a safetensors file")
    yield Case("a zip of torch", lambda: b"PK\x03\x04" + bytes(64), "not a safetensors file|ends at byte|limit is")
    yield Case("an LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file")


def _texts() -> Iterator[Case]:
    good = GOOD.encode()
    name = '"a"'
    bad_utf8 = {
        "byte 0xff": b"\xff",
        "Latin-1 e-acute": b"\xe9",
        "overlong NUL": b"\xc0\x80",
        "encoded surrogate": b"\xed\xa0\x80",
        "beyond U+10FFFF": b"\xf4\x90\x80\x80",
        "cut character": b"\xe2\x82",
    }
    for label, raw in bad_utf8.items():
        yield _case(f"not UTF-8: {label}", good.replace(b"a", raw, 1), "not UTF-8")
    yield _case("not UTF-8: UTF-16", GOOD.encode("utf-16"), "not UTF-8")
    yield _case("not UTF-8: UTF-16 without mark", GOOD.encode("utf-16-le"), "not JSON")
    yield _case("byte order mark", "\ufeff" + GOOD, "byte order mark")
    yield _case("byte order mark at the end", GOOD + "\ufeff", "more text follows")
    tops = {
        "[]": "an array",
        '"a"': "a string",
        "1": "an integer",
        "1.5": "a number",
        "null": "null",
        "true": "a bool",
    }
    for text, says in tops.items():
        yield _case(f"top level {text}", text, f"top level is {says}", b"")
    yield _case("array of entries", f"[{GOOD}]", "top level is an array")
    yield _case("blanks only", "        ", "expected a value", b"")
    broken = {
        "trailing NUL": (GOOD + "\0", "more text follows"),
        "leading NUL": ("\0" + GOOD, "expected a value"),
        "leading form feed": ("\x0c" + GOOD, "expected a value"),
        "leading no-break space": ("\u00a0" + GOOD, "expected a value"),
        "second document": (GOOD + "{}", "more text follows"),
        "trailing text": (GOOD + " x", "more text follows"),
        "trailing comma": (GOOD[:-1] + ",}", "expected a key"),
        "leading comma": ("{," + GOOD[1:], "expected a key"),
        "trailing comma in an entry": ("{" + tensor(extra=",") + "}", "not JSON"),
        "trailing comma in a shape": ("{" + tensor(shape="[1,]") + "}", "not JSON"),
        "no comma between entries": ("{" + tensor() + " " + OTHER + "}", "expected ',' or '}'"),
        "no colon": (GOOD.replace(":", "", 1), "expected ':'"),
        "two colons": (GOOD.replace(":", "::", 1), "expected a value"),
        "no closing brace": (GOOD[:-1], "expected ',' or '}'"),
        "wrong closing": (GOOD[:-1] + "]", "expected ',' or '}'"),
        "single quotes": (GOOD.replace('"', "'"), "expected a key"),
        "key without quotes": (GOOD.replace(name, "a", 1), "expected a key"),
        "key a number": (GOOD.replace(name, "1", 1), "expected a key"),
        "key null": (GOOD.replace(name, "null", 1), "expected a key"),
        "comment": (GOOD[:-1] + "/* */}", "not JSON"),
        "open string": ('{"a', "unterminated"),
        "open brace only": ("{", "expected ',' or '}'|expected a key"),
        "Python's None": (GOOD[:-1] + ',"b":None}', "expected a value"),
        "cut null": (GOOD[:-1] + ',"b":nul}', "expected a value"),
        "raw newline in a name": (GOOD.replace(name, '"a\n"'), "control character"),
        "raw tab in a name": (GOOD.replace(name, '"a\t"'), "control character"),
        "raw NUL in a name": (GOOD.replace(name, '"a\0"'), "control character"),
        "escape \\x": (GOOD.replace(name, '"\\x61"'), "escape"),
        "escape \\u of two digits": (GOOD.replace(name, '"\\u61"'), "escape"),
        "escape \\u with a sign": (GOOD.replace(name, '"\\u+061"'), "escape"),
    }
    for label, (text, says) in broken.items():
        yield _case(label, text, f"(?i)not JSON.*({says})" if says != "not JSON" else says)


def _bombs() -> Iterator[Case]:
    def extra(text: str) -> str:
        return "{" + tensor(extra=f',"x":{text}') + "}"

    deep = "nested deeper than 64 levels"
    yield _case("63 arrays in an extra field", extra("[" * 63 + "]" * 63), deep, stricter=True)
    yield _case("128 arrays in an extra field", extra("[" * 128 + "]" * 128), deep)
    yield _case("100k arrays in an extra field", extra("[" * DEEP + "]" * DEEP), deep)
    yield _case("100k objects in an extra field", extra('{"x":' * DEEP + "1" + "}" * DEEP), deep)
    yield _case("100k open arrays", "[" * DEEP, deep)
    yield _case("100k open objects", '{"a":' * DEEP, deep)
    yield _case("100k arrays as metadata", '{"__metadata__":' + "[" * DEEP + "]" * DEEP + "}", deep)
    yield _case("100k arrays as a shape", "{" + tensor(shape="[" * DEEP + "]" * DEEP) + "}", deep)
    hidden = '{"\\"]]\\\\":' + '["]","\\\\",' * DEEP
    yield _case("100k arrays whose strings hold closing brackets", hidden, deep)
    many = "over the limit of"
    yield _case("4 million empty arrays", extra("[" + "[]," * 4_000_000 + "0]"), many, stricter=True)
    yield _case("12 million numbers", extra("[" + "0," * 12_000_000 + "0]"), many, stricter=True)
    yield _case("24 million quotes", '"' * 24_000_000, many)
    dimensions = "[" + "1," * 500_000 + "-1]"
    yield _case("a shape of 500,001 dimensions", "{" + tensor(shape=dimensions) + "}", "negative")
    yield _case("10 MB of open escapes", '{"' + '\\"' * 5_000_000, "unterminated")


def _numbers() -> Iterator[Case]:
    shapes = {
        "-1": "negative",
        "-0": "-0",
        "1.0": "fraction",
        "1e0": "exponent",
        "4e0": "exponent",
        "true": "a boolean",
        "null": "null",
        '"1"': "a string",
        "[1]": "an array",
        "{}": "an object",
        "18446744073709551616": "exceeds 64 bits",
        "1" * 299: "299 digits.* exceeds 64 bits",
        "1" * 5000: "5,000 characters",
        "NaN": "NaN is not valid JSON",
        "Infinity": "Infinity is not valid JSON",
        "-Infinity": "-Infinity is not valid JSON",
        "1e400": "too large for a double",
        "01": "not JSON",
        "+1": "not JSON",
        "1.": "not JSON",
        ".5": "not JSON",
        "0x1": "not JSON",
        "1_0": "not JSON",
        "\uff11": "not JSON",
    }
    for text, says in shapes.items():
        short = text if len(text) < 40 else f"{len(text)} digits"
        yield _case(f"dimension {short}", "{" + tensor(shape=f"[{text}]") + "}", says)
        yield _case(f"offset {short}", "{" + tensor(offsets=f"[0,{text}]") + "}", says)
    extras = {
        "NaN": "NaN is not valid JSON",
        "-Infinity": "-Infinity is not valid JSON",
        "1e400": "too large",
        "-1e400": "too large",
        "1" * 400: "400 characters",
        "9" * 5000: "5,000 characters",
        "1." + "0" * 5000 + "e400": "characters",
    }
    for text, says in extras.items():
        short = text if len(text) < 40 else f"{len(text)} characters"
        yield _case(f"extra field of {short}", "{" + tensor(extra=f',"x":{text}') + "}", says)


def _strings() -> Iterator[Case]:
    half = "half of a surrogate pair"
    lone = {"high": "\\ud800", "low": "\\udc00", "reversed": "\\ude00\\ud83d", "high before text": "\\ud83dx"}
    for label, text in lone.items():
        yield _case(f"name with a lone surrogate, {label}", "{" + tensor(f'"{text}"') + "}", f"{half}|escape")
    yield _case("dtype with a lone surrogate", "{" + tensor(dtype='"\\ud800"') + "}", half)
    yield _case("metadata key with a lone surrogate", '{"__metadata__":{"\\ud800":""}}', half, b"")
    yield _case("metadata value with a lone surrogate", '{"__metadata__":{"a":"\\udfff"}}', half, b"")
    yield _case("extra key with a lone surrogate", "{" + tensor(extra=',"\\ud800":1') + "}", half)
    yield _case("extra value with a lone surrogate", "{" + tensor(extra=',"x":[{"y":"\\ud800"}]') + "}", half)
    yield _case("empty name", "{" + tensor('""') + "}", "name is empty", stricter=True)
    yield _case("name of a NUL", "{" + tensor('"\\u0000"') + "}", "NUL", stricter=True)
    yield _case("name with a NUL", "{" + tensor('"a\\u0000b"') + "}", "NUL", stricter=True)
    twice = "duplicate key"
    second = tensor(shape="[0]", offsets="[1,1]")
    escaped = tensor('"\\u0061"', shape="[0]", offsets="[1,1]")
    yield _case("tensor twice", "{" + tensor() + "," + tensor() + "}", twice, stricter=True)
    yield _case("tensor twice, two ranges", "{" + second + "," + tensor() + "}", twice, stricter=True)
    yield _case("tensor twice, one escaped", "{" + escaped + "," + tensor() + "}", twice, stricter=True)
    yield _case("metadata key twice", '{"__metadata__":{"a":"1","a":"2"}}', twice, b"", stricter=True)
    yield _case(
        "metadata key twice, one escaped",
        '{"__metadata__":{"a":"1","\\u0061":"1"}}',
        twice,
        b"",
        stricter=True,
    )
    yield _case("metadata twice", '{"__metadata__":{},"__metadata__":{}}', twice, b"")
    yield _case("metadata twice, null first", '{"__metadata__":null,"__metadata__":{}}', twice, b"")
    yield _case("metadata twice, one escaped", '{"__metadata__":{},"__m\\u0065tadata__":{}}', twice, b"")
    for field, value in {"dtype": '"U8"', "shape": "[1]", "data_offsets": "[0,1]"}.items():
        yield _case(f"{field} twice", "{" + tensor(extra=f',"{field}":{value}') + "}", twice)
    yield _case("extra field twice", "{" + tensor(extra=',"x":1,"x":1') + "}", twice, stricter=True)


def _structures() -> Iterator[Case]:
    entries = {"null": "null", '"U8"': "a string", "1": "an integer", "true": "a boolean", "[]": "an array"}
    for text, says in entries.items():
        yield _case(f"tensor {text}", '{"a":' + text + "}", f"tensor 'a': its entry is {says}", b"")
    yield _case("tensor as an array of its fields", '{"a":["U8",[1],[0,1]]}', "is an array", stricter=True)
    fields = {"dtype": '"dtype":"U8"', "shape": '"shape":[1]', "data_offsets": '"data_offsets":[0,1]'}
    for field, text in fields.items():
        rest = ",".join(kept for other, kept in fields.items() if other != field)
        yield _case(f"no {field}", '{"a":{' + rest + "}}", f"tensor 'a': field '{field}' is missing")
        title = GOOD.replace(f'"{field}"', f'"{field.title()}"')
        yield _case(f"{field} in capitals", title, f"field '{field}' is missing")
        yield _case(f"{field} null", GOOD.replace(text, f'"{field}":null'), f"{field} is null")
    yield _case("tensor of no fields", '{"a":{}}', "is missing", b"")
    unknown = [
        "u8", "f32", "float32", "F8", "", " U8", "U8 ", "BFLOAT16", "F8_E4M3FN", "F128", "U4",
        "\\uff35\\uff18", "U8\\u0000",
    ]  # fmt: skip
    for text in unknown:
        yield _case(f"dtype {text!r}", "{" + tensor(dtype=f'"{text}"') + "}", "tensor 'a': unknown dtype")
    for text, says in {"8": "an integer", "[]": "an array", "false": "a boolean"}.items():
        yield _case(f"dtype {text}", "{" + tensor(dtype=text) + "}", f"dtype is {says}")
    yield _case("dtype as a variant", "{" + tensor(dtype='{"U8":null}') + "}", "dtype is an object", stricter=True)
    for text, says in {'"1"': "a string", "1": "an integer", '{"0":1}': "an object"}.items():
        yield _case(f"shape {text}", "{" + tensor(shape=text) + "}", f"shape is {says}")
    for text, says in {'"01"': "a string", "1": "an integer", '{"0":0,"1":1}': "an object"}.items():
        yield _case(f"offsets {text}", "{" + tensor(offsets=text) + "}", f"data_offsets is {says}")
    for text in ("[]", "[0]", "[0,1,1]", "[[0,1]]"):
        yield _case(f"offsets {text}", "{" + tensor(offsets=text) + "}", "data_offsets is an array of length [013]")
    for text in ("[]", '"a"', "1", "true"):
        yield _case(f"metadata {text}", '{"__metadata__":' + text + "}", "__metadata__ is an? ", b"")
    for text in ("1", "null", "true", "{}", "[]", "1.5"):
        says = r"__metadata__\['k'\] is .* not a string"
        yield _case(f"metadata value {text}", '{"__metadata__":{"k":' + text + "}}", says, b"")
    yield _case("a tensor named __metadata__", "{" + tensor('"__metadata__"') + "}", "not a string")


def _layouts() -> Iterator[Case]:
    def one(dtype: str, shape: str, end: int, start: int = 0) -> str:
        return "{" + tensor(dtype=f'"{dtype}"', shape=shape, offsets=f"[{start},{end}]") + "}"

    def two(first: tuple[int, int], second: tuple[int, int]) -> str:
        parts = [
            tensor(f'"{name}"', shape=f"[{end - start}]", offsets=f"[{start},{end}]")
            for name, (start, end) in zip("ab", (first, second), strict=True)
        ]
        return "{" + ",".join(parts) + "}"

    size = "takes .* bytes; data_offsets"
    yield _case("offsets too few for the shape", one("F32", "[2]", 7), size, bytes(7))
    yield _case("offsets too many for the shape", one("F32", "[2]", 9), size, bytes(9))
    yield _case("scalar of no bytes", one("F32", "[]", 0), size, b"")
    yield _case("bytes for an empty tensor", one("F32", "[0]", 4), size, bytes(4))
    yield _case("end before begin", one("U8", "[1]", 0, 1), "an end before the start")
    yield _case("three F4 values", one("F4", "[3]", 1), "12 bits, not a whole number of bytes", b"x")
    yield _case("three F6 values", one("F6_E2M3", "[3]", 2), "18 bits, not a whole number of bytes", b"xy")
    overflow = "overflow 64 bits"
    yield _case("elements overflow", one("U8", "[9223372036854775808,2]", 0), overflow, b"")
    yield _case("elements overflow to 0", one("U8", "[4294967296,4294967296]", 0), overflow, b"")
    yield _case("elements overflow before a 0", one("U8", "[4294967296,4294967296,0]", 0), overflow, b"")
    yield _case("elements overflow, 0 last of four", one("I8", "[9223372036854775808,3,1,0]", 0), overflow, b"")
    yield _case("bits overflow to 0", one("F64", "[2305843009213693952]", 0), overflow, b"")
    yield _case("bits overflow in U8", one("U8", "[2305843009213693952]", 0), overflow, b"")
    yield _case("largest shape", one("F32", "[18446744073709551615]", 0), overflow, b"")
    yield _case("gap at the start", one("U8", "[1]", 2, 1), "a gap after the start", b"xy")
    yield _case("offsets from the start of the file", one("U8", "[1]", 81, 80), "a gap after the start", b"x")
    yield _case("gap in the middle", two((0, 1), (2, 3)), "a gap after tensor 'a'", b"xyz")
    yield _case("overlap", two((0, 2), (1, 3)), "an overlap with tensor 'a'", b"xyz")
    yield _case("one inside the other", two((0, 4), (1, 2)), "an overlap with", b"wxyz")
    yield _case("one range twice", two((0, 2), (0, 2)), "an overlap with", b"xy")
    yield _case("empty tensor inside another", two((0, 4), (2, 2)), "an overlap with", b"wxyz")
    yield _case("empty tensor past the end", two((0, 1), (5, 5)), "a gap after", b"x")
    yield _case("past the end of the file", one("U8", "[4]", 4), "bytes are missing", b"xyz")
    yield _case("no data at all", one("U8", "[4]", 4), "bytes are missing", b"")
    yield _case("trailing byte", one("U8", "[4]", 4), "belong to no tensor", b"wxyz!")
    yield _case("data without tensors", "{}", "belong to no tensor", b"x")
