"""Files, names and links from strangers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8.checkpoint import header
from tests.faults import fixture
from tests.faults.process import forked
from tests.faults.row import Outcome, Row, Share
from tests.faults.scale import measured
from tests.faults.world import World
from tests.support import corpus_headers, corpus_json, fuzz_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INDEX, CONFIG, FIRST = "model.safetensors.index.json", "config.json", "model-00001-of-00003.safetensors"
MEMORY, SECONDS = 256 << 20, 1.0


def _index(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The index of the source with a change."""
    from tests.faults.world import reference

    index = json.loads((reference().template / INDEX).read_bytes())
    made = change(index)
    return json.dumps(index if made is None else made).encode()


def _set(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].__setitem__(key, value)


INDEXES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no weight_map": lambda index: index.pop("weight_map") and None,
    "weight_map is a list": lambda index: index.__setitem__("weight_map", []),
    "weight_map is empty": lambda index: index.__setitem__("weight_map", {}),
    "weight_map is null": lambda index: index.__setitem__("weight_map", None),
    "metadata is a list": lambda index: index.__setitem__("metadata", []),
    "a shard is a number": _set("x", 1),
    "a shard is null": _set("x", None),
    "a shard is a list": _set("x", ["model-00001-of-00003.safetensors"]),
    "a shard is missing": _set("x", "model-00009-of-00003.safetensors"),
    "a tensor is in no shard": _set("x", FIRST),
    "a tensor is in another shard": _set("model.layers.0.self_attn.q_proj.weight", "model-00002-of-00003.safetensors"),
    "a tensor is not listed": lambda index: index["weight_map"].pop("model.layers.0.self_attn.q_proj.weight") and None,
    "two shards but for case": _set("x", "MODEL-00001-of-00003.safetensors"),
    "a shard is a pickle": _set("x", "pytorch_model.bin"),
    "a shard is the config": _set("x", "config.json"),
    "a shard is the folder": _set("x", "."),
    "a shard is empty": _set("x", ""),
}


class Malformed(Row):
    """Every malformed file, given to the command as a checkpoint."""

    name, title = "malformed-files", "malformed headers, indexes and configs given to the command"
    target = "120 files: no untyped exception; under 256 MB, under 1 s each"

    def cases(self, share: Share) -> Iterator[object]:
        """All of them, or every second."""
        yield from list(self._every())[:: share.of(1, ci=2)]

    def _every(self) -> Iterator[object]:
        for i, case in enumerate(corpus_headers.header_cases()):
            yield "header", i, case.name
        for i, case in enumerate(corpus_json.json_cases()):
            yield "index", i, case.name
            yield "config", i, case.name
        for name in INDEXES:
            yield "weight_map", 0, name

    def run(self, case: tuple[str, int, str]) -> Outcome:
        """Put it into a checkpoint, read that."""
        kind, number, name = case
        with World("folder") as world:
            if kind == "header":
                (world.src / FIRST).write_bytes(list(corpus_headers.header_cases())[number].make())
            elif kind == "weight_map":
                (world.src / INDEX).write_bytes(_index(INDEXES[name]))
            else:
                data = list(corpus_json.json_cases())[number].make()
                (world.src / (INDEX if kind == "index" else CONFIG)).write_bytes(data)
            seen = measured(lambda: _read(world))
            wrong = list(seen["wrong"])
            if seen.get("bytes", 0) > MEMORY:
                wrong.append(f"took {seen['bytes']:,} bytes")
            if seen.get("seconds", 0) > SECONDS:
                wrong.append(f"took {seen['seconds']:.2f} s")
            if {path.name for path in world.root.iterdir()} != {"src"}:
                wrong.append("something was left behind")
        return Outcome(wrong, {f"{kind} files": 1})


def _read(world: World) -> dict[str, Any]:
    """Convert; what was raised, how long it took, by how much memory grew at most."""
    from nemotron_fp8 import NemotronFp8Error, quantize_repo

    Path("/proc/self/clear_refs").write_text("5")  # the mark of the most memory begins anew
    before, started, wrong = peak(), time.process_time(), ["not refused"]
    try:
        quantize_repo(world.src, world.dst, threads=1)
    except NemotronFp8Error as error:
        wrong = ["an error of more than one line"] if "\n" in str(error) else []
    except Exception as error:
        wrong = [f"not an error of ours: {type(error).__name__}: {error}"]
    return {"wrong": wrong, "seconds": time.process_time() - started, "bytes": peak() - before}


def peak() -> int:
    """The most memory that this process has had resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class Fuzz(Row):
    """Mutants of headers, read by this reader and by the safetensors library."""

    name, title = "header-fuzz", "differential fuzzing of headers against safetensors"
    target = "10 M inputs a release, 100 k in CI: 0 false accepts"
    CHUNK = 50_000

    def cases(self, share: Share) -> Iterator[object]:
        """Seeds."""
        yield from range(1, 1 + share.of(200, ci=2))

    def run(self, case: int) -> Outcome:
        """A chunk of mutants."""
        wrong: list[str] = []
        counts = fuzz_header.run(self.CHUNK, case, lambda text: wrong.append(str(text)))
        kinds = {"both accept": counts["both"], "neither accepts": counts["neither"]}
        return Outcome(wrong, {"cases": self.CHUNK, **kinds})


LONG = "x" * 300 + ".safetensors"
NAMES = (
    "../escape.safetensors", "../../escape.safetensors", "a/../../escape.safetensors", "./model.safetensors",
    "/tmp/escape.safetensors", "//tmp/escape.safetensors", "sub/model.safetensors", "sub\\model.safetensors",
    "..\\escape.safetensors", "..\\..\\escape.safetensors", "C:escape.safetensors", "C:\\escape.safetensors",
    "\\\\host\\share\\x.safetensors", "\\\\?\\C:\\x.safetensors", "file:///tmp/x.safetensors", "~/x.safetensors",
    "~root.safetensors", "$HOME.safetensors", "%2e%2e%2fescape.safetensors", "..%2fescape.safetensors",
    "....//escape.safetensors", "..;/escape.safetensors", ".hidden.safetensors", "..safetensors", "...safetensors",
    ".safetensors", " lead.safetensors", "trail.safetensors ", "dot.safetensors.", "nul.safetensors",
    "CON.safetensors", "aux.safetensors", "com1.safetensors", "LPT9.safetensors", "prn.x.safetensors",
    "a\0b.safetensors", "a\nb.safetensors", "a\rb.safetensors", "a\x1b[2Jb.safetensors", "a\x7fb.safetensors",
    "a\u202eb.safetensors", "a\u2028b.safetensors", "\u2024\u2024/x.safetensors", "\uff0e\uff0e\uff0fx.safetensors",
    "a:b.safetensors", "a*b.safetensors", "a?b.safetensors", 'a"b.safetensors', "a<b>.safetensors", "a|b.safetensors",
    "-rf.safetensors", "--restart.safetensors", "$(touch escape).safetensors", "`touch escape`.safetensors",
    "; touch escape; .safetensors", LONG, "config.json", "nemotron_fp8.json", "nemotron_fp8.unfinished", "lock",
    "journal.jsonl", "out", "work-0-0-0-0", "tokenizer.json", "model-00001-of-00003.safetensors/", "..",
)  # fmt: skip
LINKS = (
    "shard outside", "shard in the folder", "shard in a Hub cache", "config outside", "index outside",
    "side file outside", "dangling shard", "partial folder", "lock", "journal", "out", "staged shard",
    "folder as a side file", "marker in place", "working folder in place", "shard in place",
)  # fmt: skip
CANARY = "this must never be copied or changed"


class Names(Row):
    """Names and links that lead elsewhere."""

    name, title = (
        "hostile-names",
        "traversal names as shard, side file and tensor; links in source, destination, partial folder",
    )
    target = "60 names: 0 escapes"

    def cases(self, share: Share) -> Iterator[object]:
        """All of them."""
        for i in range(len(NAMES)):
            for place in ("weight_map", "file", "tensor"):
                yield place, i
        for i in range(len(LINKS)):
            yield "link", i

    def run(self, case: tuple[str, int]) -> Outcome:
        """Plant it, run the command, see that nothing outside was read or written."""
        place, number = case
        with World("in-place" if place == "link" and "in place" in LINKS[number] else "folder") as world:
            outside = world.root / "outside"
            outside.mkdir()
            (outside / "canary.json").write_text(json.dumps({"canary": CANARY}))
            fixture.copy_tree(world.made.template, outside / "copy")
            expected_to_work = self._plant(place, number, world, outside)
            before = fixture.tree(outside), {path.name for path in world.root.iterdir()}
            ended = forked(world.command())
            wrong = [] if ended.code == 0 or ended.typed else [f"not a typed error: {ended.code} {ended.err[-400:]}"]
            if expected_to_work is not None and (ended.code == 0) != expected_to_work:
                wrong.append(f"ended with {ended.code}: {ended.err[-300:]}")
            if fixture.tree(outside) != before[0]:
                wrong.append("something outside has changed")
            if new := {path.name for path in world.root.iterdir()} - before[1] - {"dst", "dst.partial"}:
                wrong.append(f"written elsewhere: {new}")
            for path in world.dst.rglob("*") if world.dst.is_dir() else ():
                if path.is_file() and CANARY.encode() in path.read_bytes():
                    wrong.append(f"{path.name} holds what is not the source's")
                if path.is_symlink():
                    wrong.append(f"{path.name} is a link")
            return Outcome(wrong, {f"{place}s, {'accepted' if ended.code == 0 else 'refused'}": 1})

    def _plant(self, place: str, number: int, world: World, outside: Path) -> bool | None:
        """Put a name or link in its place; whether the command must then work (None: either)."""
        if place == "link":
            return _link(LINKS[number], world, outside)
        name = NAMES[number]
        if place == "weight_map":
            index = json.loads((world.src / INDEX).read_bytes())
            index["weight_map"]["model.layers.0.self_attn.q_proj.weight"] = name
            (world.src / INDEX).write_text(json.dumps(index))
            return False
        if place == "file":
            if "/" in name or "\0" in name or name in (".", "..") or len(name.encode()) > 255:
                return True  # no file of a folder can have this name
            if name not in world.made.source:
                (world.src / name).write_text("{}")
            return name != "nemotron_fp8.unfinished"
        return _tensor(name, world)


def _tensor(name: str, world: World) -> bool:
    """Give a tensor a name; any that the format allows must do."""
    path = world.src / FIRST
    with path.open("rb") as file:
        read = header.read_header(file.fileno(), FIRST)
    data = path.read_bytes()[read.data_start :]
    old = read.entries[0].name
    entries = json.loads(header.serialize(read)[8:])
    entries[name] = entries.pop(old)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    index = json.loads((world.src / INDEX).read_bytes())
    index["weight_map"][name] = index["weight_map"].pop(old)
    (world.src / INDEX).write_text(json.dumps(index))
    return "\0" not in name


def _link(what: str, world: World, outside: Path) -> bool | None:
    """Plant a link; whether the command must then work."""
    src, partial = world.src, world.root / "dst.partial"

    def instead(name: str, target: Path) -> None:
        (src / name).unlink(missing_ok=True)
        (src / name).symlink_to(target)

    if what in ("shard outside", "config outside", "index outside"):
        name = {"shard": FIRST, "config": CONFIG, "index": INDEX}[what.split(" ", 1)[0]]
        instead(name, outside / "copy" / name)
        return False
    if what in ("shard in the folder", "shard in place"):
        (src / FIRST).rename(src / "blob")
        instead(FIRST, Path("blob"))
        return what == "shard in the folder"
    if what == "shard in a Hub cache":
        cache = world.root / "hub" / "models--a--b"
        (cache / "snapshots").mkdir(parents=True)
        (cache / "blobs").mkdir()
        world.src = cache / "snapshots" / "0123"
        src.rename(world.src)
        for path in sorted(world.src.iterdir()):
            path.rename(cache / "blobs" / path.name)
            path.symlink_to(Path("../../blobs") / path.name)
        return True
    if what == "side file outside":
        instead("extra.json", outside / "canary.json")
        return True
    if what == "dangling shard":
        instead(FIRST, outside / "nothing")
        return False
    if what == "folder as a side file":
        (src / "folder.json").mkdir()
        return True
    if what == "marker in place":
        (src / "nemotron_fp8.unfinished").symlink_to(outside / "canary.json")
        return False
    if what == "working folder in place":
        (src / ".nemotron_fp8").symlink_to(outside)
        return False
    if what == "partial folder":
        partial.symlink_to(outside)
        return False
    partial.mkdir()
    if what in ("lock", "journal"):
        (partial / {"lock": "lock", "journal": "journal.jsonl"}[what]).symlink_to(outside / "canary.json")
        return False
    if what == "out":
        (partial / "out").symlink_to(outside / "copy")
    else:
        (partial / "out").mkdir()
        (partial / "out" / FIRST).symlink_to(outside / "copy" / FIRST)
    return True
