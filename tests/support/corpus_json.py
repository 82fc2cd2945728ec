"""Named malformed JSON as an index or a config could hold it, each with what its error must say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_fp8.untrusted.strict_json import load_object
from tests.support.corpus_headers import DEEP, Case

if TYPE_CHECKING:
    from collections.abc import Iterator


class BadJsonError(Exception):
    """The error that a reader of an index or a config raises, in these tests."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file}: {problem}")


def read_json_bytes(file: bytes) -> None:
    """The reading path of an index or a config."""
    load_object(file, "config.json", BadJsonError)


def json_cases() -> Iterator[Case]:
    """Every malformed index or config, as far as JSON goes."""

    def case(name: str, text: str | bytes, says: str) -> Case:
        raw = text.encode() if isinstance(text, str) else text
        return Case(f"json: {name}", lambda: raw, says)

    index = '{"metadata":{"total_size":8},"weight_map":{"a":"m.safetensors"}}'
    yield case("empty", "", "expected a value")
    yield case("blanks", " \n", "expected a value")
    for text in ("[]", '"a"', "0", "null", "false"):
        yield case(f"top level {text}", text, "the top level is")
    yield case("byte order mark", "\ufeff" + index, "byte order mark")
    yield case("UTF-16", index.encode("utf-16"), "not UTF-8")
    yield case("Latin-1", '{"é":1}'.encode("latin-1"), "not UTF-8")
    yield case("NUL after the end", index + "\0", "more text follows")
    yield case("second document", index + index, "more text follows")
    yield case("cut", index[:-1], "expected")
    yield case("cut in a string", index[:-8], "unterminated|expected")
    yield case("comment", "// config\n" + index, "expected a value")
    yield case("trailing comma", '{"a":1,}', "expected a key")
    yield case("single quotes", "{'a':1}", "expected a key")
    yield case("weight twice", '{"weight_map":{"a":"1","a":"2"}}', "duplicate key 'a'")
    yield case("weight_map twice", '{"weight_map":{},"weight_map":{}}', "duplicate key 'weight_map'")
    yield case("key twice, three levels down", '{"a":[{"b":{"c":1,"c":1}}]}', "duplicate key 'c'")
    for text in ("NaN", "Infinity", "-Infinity"):
        yield case(f"constant {text}", '{"metadata":{"total_size":' + text + "}}", "is not valid JSON")
    yield case("number past doubles", '{"eps":1e999}', "too large for a double")
    yield case("integer of 5,000 digits", '{"total_size":' + "1" * 5000 + "}", "5,000 characters")
    yield case("100k arrays", '{"a":' + "[" * DEEP + "]" * DEEP + "}", "nested deeper")
    yield case("100k objects", '{"a":' * DEEP + "1" + "}" * DEEP, "nested deeper")
    yield case("lone surrogate in a weight's name", '{"weight_map":{"\\ud800":"m"}}', "surrogate")
    yield case("lone surrogate in a shard's name", '{"weight_map":{"a":"\\udc80"}}', "surrogate")
    yield Case("json: 26 MB", lambda: b'{"a":"' + b"a" * 26_000_000 + b'"}', "the limit is 25,000,000")
    yield Case("json: 8 million arrays", lambda: b'{"a":[' + b"[]," * 8_000_000 + b"[]]}", "over the limit of")
