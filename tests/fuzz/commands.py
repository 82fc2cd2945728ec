"""Commands that read what an input holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz.tree import Input, Tree, under
from tests.fuzz.values import pick

if TYPE_CHECKING:
    from random import Random

    from tests.fuzz.seeds import Seeds

ONE = ("--threads", "1")
RECIPES: tuple[tuple[str, ...], ...] = (
    (), (), (), (), ("--stats", ), ("--nonfinite", "keep"), ("--share-scales", ), ("--format", "fp8", "--granularity",
    "tensor"), ("--format", "fp8"), ("--granularity", "block"), ("--granularity", "tensor"), ("--activations", "none"),
    ("--selection", "nvidia"), ("--numerics", "original"), ("--select", "."), ("--also-select", "embed|norm",
    "--force-select"), ("--ignore", "q_proj"), ("--no-digests", ), ("--base-model", "owner/name"), ("--json", ),
    ("--max-memory", "4MiB"), ("--quiet", ), ("--granularity", "mx"), ("--format", "mxfp8", "--stats"), ("--format",
    "modelopt"), ("--kv-cache", "fp8"), ("--format", "fp8", "--scale-dtype", "e8m0"), ("--format", "fp8",
    "--scale-rounding", "none"),
)  # fmt: skip
AGAIN: tuple[tuple[str, ...], ...] = (
    (), ("--format", "mxfp8"), ("--format", "fp8"), ("--format", "fp8", "--scale-rounding", "none"), ("--format",
    "modelopt", "--granularity", "block"), ("--granularity", "mx", "--stats"), ("--granularity", "tensor"), ("--ignore",
    "down_proj"),
)  # fmt: skip
"""Options to quantize a quantized source."""
PLANNED = tuple(recipe for recipe in RECIPES if not {"--no-digests", "--base-model", "--quiet"} & set(recipe))


def reading(chance: Random, source: Tree, seeds: Seeds, name: str = "src") -> Input:
    """Return a command that reads a checkpoint.

    Args:
        chance: the source of chance.
        source: the files of the checkpoint.
        seeds: the specimens, of which some commands need one more.
        name: folder of the checkpoint.
    """
    tree = under(name, source)
    kind = chance.randrange(20)
    if kind < 6:
        return Input(tree, ["plan", name, "--no-estimate", *ONE, *pick(chance, PLANNED)])
    if kind < 7:
        return Input(tree, ["plan", name, *ONE])
    if kind < 9:
        return Input(tree, ["inspect", name, *pick(chance, ((), ("--json",)))])
    if kind < 15:
        return Input(tree, ["quantize", name, "dst", *ONE, *pick(chance, RECIPES)], result="dst")
    if kind < 16:
        return Input(tree, ["quantize", name, "--in-place", *ONE, *pick(chance, ((), ("--stats",)))])
    if kind < 18:
        return Input({**tree, **under("dst", seeds.result)}, ["verify", name, "dst", *ONE])
    if kind < 19:
        command = ["report", "dst", "--source", name, *ONE, *pick(chance, ((), ("--html", "report.html"), ("--json",)))]
        return Input({**tree, **under("dst", seeds.result)}, command)
    return Input(tree, ["dequantize", name, "dst", *ONE], result="dst")


def reading_nemo(chance: Random, source: Tree, seeds: Seeds, name: str = "nemo") -> Input:
    """Return a command that reads a NeMo checkpoint, which is a folder or an archive."""
    tree = source if name in source else under(name, source)
    kind = chance.randrange(20)
    if kind < 8:
        return Input(tree, ["plan", name, "--no-estimate", *ONE, *pick(chance, PLANNED)])
    if kind < 13:
        return Input(tree, ["convert", name, "dst", *ONE, *pick(chance, ((), ("--shard-size", "2KB")))], result="dst")
    if kind < 17:
        return Input(tree, ["quantize", name, "dst", *ONE, *pick(chance, RECIPES)], result="dst")
    if kind < 18:
        return Input(tree, ["inspect", name])
    if kind < 19:
        return Input({**tree, **under("dst", seeds.result)}, ["verify", name, "dst", *ONE])
    return Input(tree, ["plan", name, *ONE, "--json"])


def reading_result(chance: Random, result: Tree, source: Tree, seeds: Seeds) -> Input:
    """Return a command that reads the result of a conversion, with its source at hand."""
    tree = {**under("src", source), **under("dst", result)}
    kind = chance.randrange(24)
    if kind < 4:
        return Input(tree, ["verify", "dst", *ONE, *pick(chance, ((), ("--json",)))])
    if kind < 9:
        return Input(tree, ["verify", "src", "dst", *ONE, *pick(chance, ((), ("--json",), ("--quiet",)))])
    if kind < 11:
        return Input(tree, ["report", "dst", *ONE, *pick(chance, ((), ("--json",)))])
    if kind < 14:
        return Input(tree, ["report", "--source", "src", "dst", *ONE, *pick(chance, ((), ("--json",)))])
    if kind < 15:
        command = ["report", "dst", "--html", "report.html", *ONE, *pick(chance, ((), ("--source", "src")))]
        return Input(tree, command)
    if kind < 17:
        other = pick(chance, (seeds.result, seeds.tensor_result))
        pair = pick(chance, (["dst", "other"], ["other", "dst"], ["dst", "dst"]))
        more = pick(chance, ((), ("--source", "src"), ("--json",), ("--html", "report.html")))
        return Input({**tree, **under("other", other)}, ["compare", *pair, *ONE, *more])
    if kind < 19:
        more = pick(chance, ((), ("--dtype", "float16"), ("--dtype", "float32"), ("--no-digests",)))
        return Input(tree, ["dequantize", "dst", "plain", *ONE, *more], result="plain")
    if kind < 23:
        return Input(tree, ["quantize", "dst", "again", *ONE, *pick(chance, AGAIN)], result="again")
    more = pick(chance, (("inspect", "dst"), ("plan", "dst", "--no-estimate", *pick(chance, AGAIN))))
    return Input(tree, [*more, *(ONE if more[0] != "inspect" else ())])
