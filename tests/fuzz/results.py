"""Inputs of a result of a conversion: manifest, figures, config, index, shards."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from tests.fuzz.commands import reading_result
from tests.fuzz.json_mutations import (
    Members,
    Raw,
    encoded,
    hostile,
    mutate_json,
    mutate_tree,
    parsed,
    places,
    put,
    written,
)
from tests.fuzz.shards import change_tensors, mutate_shard
from tests.fuzz.values import integer, is_big, many, pick, text

if TYPE_CHECKING:
    from random import Random

    from tests.fuzz.seeds import Seeds
    from tests.fuzz.tree import Input, Tree

MANIFEST, STATS, OWN = "nemotron_fp8.json", "nemotron_fp8.stats.json", "manifest_sha256"
MANIFEST_KEYS = ("schema", "made_by", "source", "recipe", "files", "stacked_experts", "transposed", OWN)
RECIPE_KEYS = (
    "format", "granularity", "activations", "share_scales", "numerics", "nonfinite", "stats", "selection", "select",
    "also_select", "force_select", "ignore", "task", "dtype",
)  # fmt: skip


def result(chance: Random, seeds: Seeds) -> Input:
    """Change a file of a result; its digests are made anew for half of the inputs."""
    channel, tensor = (seeds.result, seeds.source), (seeds.tensor_result, seeds.source)
    made, source = pick(chance, (channel, channel, tensor, (seeds.block_result, seeds.wide)))
    made = dict(made)
    kind = chance.random()
    if kind < 0.35:
        made[MANIFEST] = _manifest(chance, _file(made, MANIFEST))
        return reading_result(chance, made, source, seeds)
    shards = [name for name in made if name.endswith(".safetensors")]
    if kind < 0.65:
        name = pick(chance, shards)
        made[name] = _shard(chance, _file(made, name))
    elif kind < 0.85:
        name = "config.json"
        made[name] = _config(chance, _file(made, name))
    elif kind < 0.92:
        name = pick(chance, sorted(name for name in made if name.endswith(".json")))
        made[name] = mutate_json(chance, _file(made, name))
    elif kind < 0.96:
        name = pick(chance, sorted(made))
        del made[name]
    else:
        name = pick(chance, ("extra.safetensors", "x", "model.safetensors", "a.py"))
        made[name] = pick(chance, (b"", b"x", b"{}"))
    if MANIFEST in made and name != MANIFEST and chance.random() < 0.6:
        made[MANIFEST] = signed(made)
    return reading_result(chance, made, source, seeds)


def _file(tree: Tree, name: str) -> bytes:
    data = tree[name]
    assert isinstance(data, bytes)
    return data


def pretty(value: Any) -> bytes:
    """Write a JSON object as the manifest is written."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def signed(made: Tree) -> bytes:
    """Return the manifest of a result with sizes and digests of the files as they are now."""
    value = json.loads(_file(made, MANIFEST))
    del value[OWN]
    for name, entry in value["files"].items():
        node = made.get(name)
        if isinstance(node, bytes):
            entry.update(size=len(node), sha256=hashlib.sha256(node).hexdigest())
    return pretty({**value, OWN: hashlib.sha256(pretty(value)).hexdigest()})


def _manifest(chance: Random, data: bytes) -> bytes:
    """Return a mutation of a manifest, with its own digest for most of the inputs."""
    if chance.random() < 0.25:
        return mutate_json(chance, data, MANIFEST_KEYS)
    tree = parsed(data)
    tree[:] = [(key, value) for key, value in tree if key != OWN]
    for _ in range(pick(chance, (1, 1, 1, 2, 4))):
        target = pick(chance, [tree, *(value for _, value in tree if isinstance(value, Members))])
        keys = RECIPE_KEYS if target is dict(tree).get("recipe") else MANIFEST_KEYS
        if chance.random() < 0.2:
            target.append((pick(chance, (text(chance), *keys)), hostile(chance)))
        else:
            mutate_tree(chance, target, keys)
    try:
        value = json.loads(written(tree))
        if not isinstance(value, dict):
            return encoded(written(tree))
        return pretty({**value, OWN: hashlib.sha256(pretty(value)).hexdigest()})
    except (ValueError, RecursionError):
        return encoded(written(tree))


def _shard(chance: Random, data: bytes) -> bytes:
    return mutate_shard(chance, data) if chance.random() < 0.25 else change_tensors(chance, data)


def _config(chance: Random, data: bytes) -> bytes:
    """Change the quantization config of a result."""
    tree = parsed(data)
    found = [value for key, value in tree if key == "quantization_config"]
    if not found or chance.random() < 0.1:
        return mutate_json(chance, data)
    if chance.random() < 0.3:
        key = pick(chance, ("ignore", "ignore", "modules_to_not_convert", "ignored_layers"))
        found[0][:] = [(known, value) for known, value in found[0] if known != key] + [(key, _modules(chance))]
        return encoded(written(tree))
    inner = places(found[0])
    for _ in range(pick(chance, (1, 1, 2))):
        if inner and chance.random() < 0.6:
            put(pick(chance, inner), hostile(chance) if chance.random() < 0.7 else _modules(chance))
        else:
            mutate_tree(
                chance, found[0], ("quant_method", "config_groups", "ignore", "format", "targets", "weights", "group_1")
            )
    return encoded(written(tree))


def _modules(chance: Random) -> list[str]:
    """Return names and patterns of modules, as lists of modules hold them."""
    patterns = (
        "lm_head", "re:.*", "re:.*lm_head", "re:(", "re:", "re:((a|.)+)+$", "re:(.*.*)*.*x$", "re:(\\w+\\.?)+!",
        "re:" + "(" * 1000, "re:a{1,65535}{1,65535}", "re:.*?" * 50 + "x", "Linear", "model.layers.0.self_attn.q_proj",
        "re:^$", "*", "model.*", "", "re:(?:(?:(?:(?:.*)*)*)*)*x", "re:.*\\d+.*", "re:[", "class:Linear", "re:\\Z",
        "re:" + "(.*)" * 30 + "x",
    )  # fmt: skip
    costly = tuple(pattern for pattern in patterns if "*)" in pattern or "+)" in pattern)
    found = [pick(chance, patterns + costly) for _ in range(pick(chance, (1, 1, 2, 5, many(chance))))]
    # In the other layout, an entry is a pattern without a prefix.
    return found if chance.random() < 0.7 else [pattern.removeprefix("re:") for pattern in found]


def figures(chance: Random, seeds: Seeds) -> Input:
    """Change the figures of a result, up to megabytes of them; the manifest knows of it for most of the inputs."""
    made = dict(seeds.result)
    old = _file(made, STATS)
    made[STATS] = (
        _figures(chance, old) if chance.random() < 0.6 else mutate_json(chance, old, ("schema", "tensors", "nonfinite"))
    )
    if chance.random() < 0.8:
        made[MANIFEST] = signed(made)
    return reading_result(chance, made, seeds.source, seeds)


def _figures(chance: Random, data: bytes) -> bytes:
    """Change rows, or write many of them."""
    tree = parsed(data)
    rows = dict(tree)["tensors"]
    found = dict(tree)["nonfinite"]
    numbers = (
        Raw("1e400"),
        Raw("-1e400"),
        "nan",
        "inf",
        "-inf",
        "NaN",
        "1e5",
        "",
        "x",
        "9" * 100,
        None,
        True,
        [],
        1e308,
        -1e308,
    )

    def number() -> Any:
        return pick(chance, numbers) if chance.random() < 0.6 else integer(chance)

    def row() -> list[Any]:
        name = pick(chance, (rows[0][0], rows[-1][0], text(chance)))
        return [name, number(), number(), number(), number()]

    kind = chance.randrange(6)
    if kind == 0:
        few = [row() for _ in range(20)]
        rows[:] = few * pick(chance, (1, 2, 10, 50))
        if is_big(chance):
            rows[:] = [[f"{few[0][0][:20]}{i}", *few[i % 20][1:]] for i in range(40_000)]
    elif kind == 1:
        rows[chance.randrange(len(rows))] = pick(
            chance, (row(), row()[:4], [*row(), 1], hostile(chance), "abcde", Members([("a", 1)]))
        )
    elif kind == 2:
        rows[:] = rows * (5000 if is_big(chance) else pick(chance, (2, 10, 100)))
    elif kind == 3:
        position = pick(chance, ([], [1], [1] * 50, "12", hostile(chance), [integer(chance)]))
        found.append([text(chance), number(), position, pick(chance, ("nan", "inf", text(chance), 1))])
    elif kind == 4:
        rows[:] = []
    else:
        at = chance.randrange(len(rows))
        rows[at][chance.randrange(len(rows[at]))] = pick(chance, (number(), text(chance), hostile(chance)))
    return encoded(written(tree))
