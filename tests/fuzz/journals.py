"""Inputs of an unfinished conversion: its journal, lock, finished shards, saved files and amaxes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from tests.fuzz.commands import ONE
from tests.fuzz.json_mutations import (
    Members,
    Raw,
    encoded,
    get,
    hostile,
    mutate_json,
    mutate_tree,
    parsed,
    places,
    put,
    written,
)
from tests.fuzz.shards import change_tensors, mutate_shard
from tests.fuzz.tree import Input, Link, Special
from tests.fuzz.values import integer, is_big, many, mutate_bytes, pick, text

if TYPE_CHECKING:
    from random import Random

    from tests.fuzz.seeds import Seeds
    from tests.fuzz.tree import Tree

KEYS = (
    "kind", "schema", "version", "mode", "plan", "recipe", "source", "saved", "name", "size", "sha256", "kept",
    "nonfinite", "small_scales", "stats", "shared", "manifest", "amaxes", "digest",
)  # fmt: skip
KINDS = ("terms", "shard", "publish", "begin", "amaxes", "replaced", "x", 1, None, [])
HEAD, MIDDLE, TAIL = b'{"sum":"', b'","entry":', b"}\n"
DIGITS = 32


def journal(chance: Random, seeds: Seeds) -> Input:
    """Change the folder of an interrupted run, most often its journal; the sums are right for most of the inputs."""
    in_place = chance.random() < 0.35
    tree = dict(seeds.in_place if in_place else pick(chance, (seeds.partial, seeds.partial, seeds.published)))
    path = "src/.nemotron_fp8/journal.jsonl" if in_place else "dst.partial/journal.jsonl"
    folder = path.rpartition("/")[0]
    kind = chance.random()
    old = tree[path]
    assert isinstance(old, bytes)
    if kind < 0.7:
        tree[path] = _journal(chance, old)
    else:
        before = dict(tree)
        _other_file(chance, tree, folder, path)
        if chance.random() < 0.6:
            _believe(tree, before, path)
    more = pick(chance, ((), (), (), (), ("--restart",), ("--overwrite",), ("--stats",), ("--json",)))
    if in_place:
        command = ["quantize", "src", "--in-place", *ONE, *(() if "--overwrite" in more else more)]
        other = (["plan", "src", "--no-estimate"], ["inspect", "src"], ["verify", "src"], ["quantize", "src", "new"])
        command = command if chance.random() < 0.85 else list(pick(chance, other))
        return Input(tree, command, result="new")
    return Input(tree, ["quantize", "src", "dst", *ONE, *more], result="dst")


def _other_file(chance: Random, tree: Tree, folder: str, path: str) -> None:
    """Change another file of the folder, or put something odd there."""
    names = [name for name in tree if name.startswith(f"{folder}/") and name != path and isinstance(tree[name], bytes)]
    kind = chance.random()
    name = pick(chance, names)
    old = tree[name]
    assert isinstance(old, bytes)
    if kind < 0.3:
        tree[name] = mutate_bytes(chance, old)
    elif kind < 0.5 and name.endswith(".safetensors") and old[8:9] == b"{":
        tree[name] = mutate_shard(chance, old) if chance.random() < 0.5 else change_tensors(chance, old)
    elif kind < 0.6:
        del tree[name]
    elif kind < 0.7:
        record = {"pid": hostile(chance), "host": text(chance)}
        tree[f"{folder}/lock"] = encoded(written(Members(record.items()))) if chance.random() < 0.7 else b"x" * 10_000
    elif kind < 0.8:
        odd = pick(
            chance,
            (Special("pipe"), Special("folder"), Special("socket"), Link("../src"), Link("/dev/zero"), Link("x")),
        )
        place = pick(chance, (name, path, f"{folder}/lock", f"{folder}/out"))
        for below in [other for other in tree if other.startswith(f"{place}/")]:
            del tree[below]
        tree[place] = odd
    elif kind < 0.9:
        new = pick(
            chance, ("out/extra", "x", "old", "work-0-0-0-0/x", "out/sub/x", f"out/{'y' * 200}", "work-x/y", "out/é\n")
        )
        tree[f"{folder}/{new}"] = pick(chance, (b"", b"x"))
    else:
        tree[name] = b""


def _believe(tree: Tree, before: Tree, path: str) -> None:
    """Let the journal state the digests and sizes of the changed files."""
    data = tree.get(path)
    if not isinstance(data, bytes) or data != before[path]:
        return
    entries = entries_of(data)
    for name, old in before.items():
        new = tree.get(name, old)
        if not isinstance(old, bytes) or not isinstance(new, bytes) or new == old:
            continue
        digests = {hashlib.sha256(old).hexdigest(): hashlib.sha256(new).hexdigest()}
        for entry in entries:
            _replace(entry, digests, len(old), len(new))
    tree[path] = chained([encoded(written(entry)) for entry in entries])


def _replace(entry: Any, digests: dict[str, str], old: int, new: int) -> None:
    """Replace a digest wherever it stands, and the size beside it."""
    for parent, at in places(entry):
        value = get((parent, at))
        if isinstance(value, str) and value in digests:
            put((parent, at), digests[value])
            for i in range(len(parent)):
                if get((parent, i)) == old:
                    put((parent, i), new)


def entries_of(data: bytes) -> list[Any]:
    """Return the entries of a good journal."""
    return [parsed(line[len(HEAD) + DIGITS + len(MIDDLE) : -len(TAIL) + 1]) for line in data.splitlines()]


def chained(payloads: list[bytes]) -> bytes:
    """Return a journal of these entries, with right sums."""
    total, made = b"", []
    for payload in payloads:
        total = hashlib.sha256(total + payload).hexdigest()[:DIGITS].encode()
        made.append(HEAD + total + MIDDLE + payload + TAIL)
    return b"".join(made)


def _journal(chance: Random, data: bytes) -> bytes:
    if chance.random() < 0.12:
        return mutate_bytes(chance, data)
    entries = entries_of(data)
    kind = chance.random()
    if kind < 0.6:
        for _ in range(pick(chance, (1, 1, 2))):
            entry = pick(chance, entries)
            found = places(entry)
            if chance.random() < 0.6 and found:
                put(pick(chance, found), _value(chance))
            else:
                mutate_tree(chance, entry, KEYS)
    elif kind < 0.7:
        del entries[chance.randrange(len(entries))]
    elif kind < 0.8:
        at = chance.randrange(len(entries))
        entries[at:at] = [entries[at]] * (many(chance) if not is_big(chance) else 4000)
    elif kind < 0.9:
        entries.insert(
            chance.randrange(len(entries) + 1),
            Members([("kind", pick(chance, KINDS)), (pick(chance, KEYS), _value(chance))]),
        )
    else:
        entries.reverse()
    payloads = [encoded(written(entry)) for entry in entries]
    if chance.random() < 0.1:
        at = chance.randrange(len(payloads))
        payloads[at] = mutate_json(chance, json.dumps({"kind": "shard"}).encode()) if chance.random() < 0.5 else b"x"
    payloads = [payload.replace(b"\n", b" ") if chance.random() < 0.9 else payload for payload in payloads]
    made = chained(payloads)
    if chance.random() < 0.1:
        return made[: chance.randrange(len(made) + 1)]
    return made


def _value(chance: Random) -> Any:
    """Return a value that a receipt or an identity may hold, or nearly so."""
    rows: tuple[Any, ...] = (
        [], [["t", 1, [0, 1], "nan"]], [["t", "1e400", "inf", 1, 2]], [["t", Raw("1e300"), "nan", 1.5, "2"]], [["t"]],
        ["t"], "abc", [["t", integer(chance), [integer(chance)], text(chance)]], [[text(chance), 1.0, 2.0, "9" * 5000,
        4]], [["t", "nan", "nan", "inf", 0]], [["g", "kept"]], [["g", "x"], ["g", "y"]], "0" * 64, "f" * 64,
        Raw("1e400"), Raw("1.5"), Raw("9" * 250), True, None, "model-00001-of-00002.safetensors", "../x", "/etc/passwd",
        ".", "", "config.json", "1 2", 2, 3,
    )  # fmt: skip
    return pick(chance, rows) if chance.random() < 0.6 else hostile(chance)
