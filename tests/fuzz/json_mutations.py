"""Mutations of JSON texts: of the parsed tree, of the text, and of its bytes."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from tests.fuzz.values import FLOATS, INTEGERS, integer, is_big, many, mutate_bytes, pick, text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

CONFIG_KEYS = (
    "quantization_config", "compression_config", "auto_map", "architectures", "model_type", "text_config",
    "vision_config", "audio_config", "llm_config", "thinker_config", "decoder", "torch_dtype", "dtype", "num_experts",
    "n_routed_experts", "num_local_experts", "num_hidden_layers", "num_nextn_predict_layers", "hidden_size", "head_dim",
    "num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "block_configs", "hybrid_override_pattern",
    "layers_block_type", "_name_or_path", "transformers_version", "rope_scaling", "eos_token_id", "vocab_size",
    "peft_type", "base_model_name_or_path", "moe", "ffn_config", "attn_config", "mlp_only_layers", "quant_method",
)  # fmt: skip
QUANTIZATION_KEYS = (
    "quant_method", "config_groups", "group_0", "weights", "targets", "ignore", "format", "num_bits", "type",
    "strategy", "weight_block_size", "modules_to_not_convert", "activation_scheme", "input_activations",
    "ignored_layers", "bits", "kv_cache_scheme", "quantization_status", "global_compression_ratio", "block_structure",
    "dynamic", "symmetric",
)  # fmt: skip


class Raw(str):
    """Text that is written as it is."""

    __slots__ = ()


class Members(list[tuple[Any, Any]]):
    """Members of an object, in order, perhaps with equal keys."""


def parsed(data: bytes) -> Any:
    """Parse a good text into a tree of `Members` and lists."""
    return json.loads(data, object_pairs_hook=Members)


def written(value: Any) -> str:
    """Write a tree; what JSON does not allow is written all the same."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Members):
        return "{" + ",".join(f"{written(key)}:{written(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())


def hostile(chance: Random, depth: int = 0) -> Any:
    """Return a value that is rarely right."""
    kind = chance.randrange(20)
    if kind < 5:
        return text(chance)
    if kind < 8:
        return integer(chance)
    if kind < 9:
        return pick(chance, FLOATS)
    if kind < 11:
        return pick(chance, (None, True, False))
    if kind < 13:
        return Raw(pick(chance, NUMBERS)) if chance.random() < 0.7 else Raw(pick(chance, STRINGS))
    if kind < 14:
        return nested(chance)
    if depth > 2:
        return pick(chance, (Members(), []))
    count = pick(chance, (0, 1, 1, 2, 3, many(chance))) if depth == 0 else chance.randrange(3)
    if kind < 17:
        one = hostile(chance, depth + 1)
        return [one if count > 10 else hostile(chance, depth + 1) for _ in range(count)]
    keys = pick(chance, (CONFIG_KEYS, QUANTIZATION_KEYS, ("a", "")))
    if count > 10:
        return Members((f"{pick(chance, keys)}{i}", 1) for i in range(count))
    return Members((pick(chance, keys), hostile(chance, depth + 1)) for _ in range(count))


NUMBERS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "-0.0", "00", "01", "+1", ".5", "1.", "0x10",
    "1" * 300, "1" * 301, "9" * 6000, "-" + "9" * 6000, "1." + "0" * 400, "1e+00000000000000000000000000001",
    "1e" + "9" * 30, "1" * 100_000, "tru", "nul", "undefined", "None", "'a'", "",
)  # fmt: skip
STRINGS = (
    '"\\ud800"', '"\\udc00x"', '"\\ud800\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\x41"', '"\\u12"', '"\t"',
    '"\x01"', '"abc', '"\\"', '"\\u202e"', '"\\u001b[2J"', '"a" "b"', '["a",]', '{"a":1,}', "{'a':1}", '{"a":1 "b":2}',
    "[1 2]", '{"\\ud800":1}', '{"a":1,"a":2}', '{"":{"":{"":[]}}}', "{1:2}", "[,]", "/* x */ 1", "// x\n1",
)  # fmt: skip


def nested(chance: Random) -> Raw:
    """Return deep nesting, closed or not."""
    depth = pick(chance, (10, 62, 63, 64, 65, 66, 128, 1000, 100_000))
    begin, middle, end = pick(chance, (("[", "", "]"), ('{"a":', "1", "}"), ('[{"a":', "[]", "}]")))
    return Raw(begin * depth + middle + (end * depth if chance.random() < 0.9 else ""))


def big(chance: Random) -> Raw:
    """Return a value of up to four megabytes."""
    size = pick(chance, (1 << 20, 1 << 21, 1 << 22))
    item = pick(chance, ("0", "[]", "{}", '""', "1.5", "null", '"ab"', "[0]", '"\\u0041"', "1e5", "-0", "1" * 250))
    return pick(
        chance,
        (
            lambda: Raw("[" + ",".join([item] * (size // (len(item) + 1))) + "]"),
            lambda: Raw("{" + ",".join(f'"{i}":{item}' for i in range(size // (9 + len(item)))) + "}"),
            lambda: Raw('"' + pick(chance, ("a", "\\n", "\\ud83d\\ude00", "é", "\\\\", '\\"')) * (size // 8) + '"'),
            lambda: Raw(" " * size + "1"),
        ),
    )()


Place = tuple[Any, int]
"""A list or `Members`, and the number of a member."""


def places(tree: Any) -> list[Place]:
    """Return every place of a tree."""
    found: list[Place] = []
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            for i, item in enumerate(value):
                found.append((value, i))
                waiting.append(item[1] if isinstance(value, Members) else item)
    return found


def get(place: Place) -> Any:
    """Return the value at a place."""
    parent, at = place
    return parent[at][1] if isinstance(parent, Members) else parent[at]


def put(place: Place, value: Any) -> None:
    """Replace the value at a place."""
    parent, at = place
    parent[at] = (parent[at][0], value) if isinstance(parent, Members) else value


def mutate_tree(chance: Random, tree: Any, keys: Sequence[str]) -> None:
    """Change one thing in a tree, in place.

    Args:
        chance: the source of chance.
        tree: the tree.
        keys: keys that mean something in this format, to add.
    """
    found = places(tree)
    if not found:
        return
    place = pick(chance, found)
    parent, at = place
    kind = chance.randrange(12)
    if kind < 5:
        put(place, big(chance) if is_big(chance) else _near(chance, get(place)))
    elif kind == 5:
        del parent[at]
    elif kind == 6 and isinstance(parent, Members):
        parent[at] = (
            pick(chance, (text(chance), Raw(pick(chance, STRINGS)), pick(chance, keys or [""]))),
            parent[at][1],
        )
    elif kind == 7:
        parent.insert(at, deepcopy(parent[at]))
    elif kind == 8:
        put(place, pick(chance, ([get(place)], Members([("a", get(place))]), str(get(place))[:100])))
    elif kind == 9:
        other = pick(chance, found)
        put(place, deepcopy(get(other)))  # a copy: a tree that holds itself has no text
    elif isinstance(tree, Members) and keys:
        target = (
            tree if chance.random() < 0.6 else pick(chance, [tree, *(p for p, _ in found if isinstance(p, Members))])
        )
        value = hostile(chance) if chance.random() < 0.7 else _quantization(chance)
        target.insert(chance.randrange(len(target) + 1), (pick(chance, keys), value))


def _near(chance: Random, value: Any) -> Any:
    """Return another value: of the same type for half of the places."""
    if chance.random() < 0.5:
        return hostile(chance)
    if isinstance(value, bool) or value is None:
        return pick(chance, (None, True, False, 0, 1, "true"))
    if isinstance(value, int):
        return pick(chance, (value + 1, value - 1, -value, value * 2, float(value), str(value), pick(chance, INTEGERS)))
    if isinstance(value, str):
        return pick(chance, (value + "x", value[:-1], value.upper(), value + "\0", value + "/..", text(chance)))
    if isinstance(value, Members):
        return Members(value[::-1]) if chance.random() < 0.3 else Members(value[: len(value) // 2])
    if isinstance(value, list):
        return pick(chance, (value[::-1], value * 2, value[:-1], [*value, 1], [*value, *value, None]))
    return hostile(chance)


def _quantization(chance: Random) -> Members:
    """Return a quantization config as other tools write it, with hostile values."""
    made = Members([("quant_method", pick(chance, ("fp8", "compressed-tensors", "modelopt", "gptq", "awq", 7, None)))])
    for _ in range(chance.randrange(5)):
        made.append((pick(chance, QUANTIZATION_KEYS), hostile(chance)))
    return made


def mutate_json(
    chance: Random, data: bytes, keys: Sequence[str] = CONFIG_KEYS, change: Callable[[Any], Any] | None = None
) -> bytes:
    """Return a mutation of a good text.

    Args:
        chance: the source of chance.
        data: the good text.
        keys: keys that mean something in this format.
        change: a change of the tree that only this format has, made for a third of the inputs.
    """
    kind = chance.random()
    if kind < 0.12:
        return mutate_bytes(chance, data)
    if kind < 0.2:
        return _whole(chance, data)
    try:
        tree = parsed(data)
    except (ValueError, RecursionError):  # it is a mutation already
        return mutate_bytes(chance, data)
    if change is not None and chance.random() < 0.33:
        change(tree)
    else:
        for _ in range(pick(chance, (1, 1, 1, 2, 4))):
            mutate_tree(chance, tree, keys)
    return encoded(written(tree))


def encoded(value: str) -> bytes:
    """Encode a text; halves of surrogate pairs become bytes that are not UTF-8."""
    return value.encode("utf-8", "surrogatepass")


def _whole(chance: Random, data: bytes) -> bytes:
    """Return a text that is wrong as a whole."""
    return pick(
        chance,
        (
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.decode().encode("utf-16"),
            lambda: data.decode().encode("utf-32"),
            lambda: data + data,
            lambda: data + b"\0",
            lambda: data + b"\n" * many(chance),
            lambda: b"[" + data + b"]",
            lambda: b"",
            lambda: b" ",
            lambda: b"null",
            lambda: b"\xff\xfe",
            lambda: encoded(nested(chance)),
            lambda: encoded(big(chance)) if is_big(chance) else b"{}",
            lambda: encoded(written(hostile(chance))),
            lambda: data.replace(b'"', b"'"),
            lambda: data[: len(data) // 2],
            lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        ),
    )()
