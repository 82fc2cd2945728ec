"""Inputs around good files: odd files in their place, hostile arguments, hostile environments."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tests.fuzz.commands import ONE, RECIPES, reading, reading_nemo, reading_result
from tests.fuzz.tree import CANARY, Input, Link, Special, under
from tests.fuzz.values import INTEGERS, TEXTS, is_big, pick

if TYPE_CHECKING:
    from random import Random

    from tests.fuzz.seeds import Seeds
    from tests.fuzz.tree import Node

ODD: tuple[Node, ...] = (
    Special("pipe"), Special("socket"), Special("folder"), Special("unreadable"), Special("unreadable folder"), b"",
    Link("missing"), Link("."), Link(".."), Link("/dev/zero"), Link("/dev/tty"), Link("/dev/null"), Link("/dev/stdin"),
    Link("/proc/self/environ"), Link("/proc/self/mem"), Link("/proc/self/fd/1"), Link("/proc/self/fd"), Link(CANARY),
    Link(CANARY), Link("/proc/self"), Link("x" * 255), Link("/proc/kmsg"), Link("/dev/full"),
    Link("../src/config.json"), Link("a/" * 100 + "b"),
)  # fmt: skip


def odd_file(chance: Random, seeds: Seeds) -> Input:
    """Put something odd in the place of a file or folder, or at a path that a command makes."""
    given = pick(
        chance,
        (
            lambda: reading(chance, dict(seeds.source), seeds),
            lambda: reading_nemo(chance, dict(pick(chance, (seeds.zarr, seeds.dist))), seeds),
            lambda: reading_result(chance, dict(seeds.result), seeds.source, seeds),
            lambda: Input(dict(seeds.partial), ["quantize", "src", "dst", *ONE], result="dst"),
            lambda: Input(dict(seeds.in_place), ["quantize", "src", "--in-place", *ONE]),
            lambda: reading_nemo(chance, dict(seeds.archive), seeds, "it.nemo"),
        ),
    )()
    tree = given.tree
    for _ in range(pick(chance, (1, 1, 1, 2))):
        files = sorted(tree)
        folders = sorted({name.rpartition("/")[0] for name in files if "/" in name})
        made = ["dst", "dst.partial", "dst.partial/lock", "dst.partial/out", "home", "tmp", "src/x.safetensors"]
        made += [
            "src/adapter_config.json",
            "src/a.py",
            "src/x/config.json",
            "src/.nemotron_fp8",
            "dst.partial/journal.jsonl",
        ]
        place = pick(chance, pick(chance, (files, files, files, folders or files, made)))
        node = pick(chance, ODD)
        if isinstance(node, Link) and place == "src" and "--in-place" in given.command:
            continue  # the folder that a user names may be a link
        if isinstance(node, Link) and node.target.startswith("..") and "/" not in place:
            node = Link("src")  # where a link in the place of the destination leads, a command writes
        if isinstance(node, Link) and chance.random() < 0.1:
            node = Link(place.rpartition("/")[2])  # a loop
        for name in [name for name in tree if name.startswith(f"{place}/")]:
            del tree[name]
        parents = place.split("/")[:-1]
        if any(
            not isinstance(tree.get("/".join(parents[: i + 1]), Special("folder")), Special)
            for i in range(len(parents))
        ):
            continue  # below a file
        tree[place] = node
    # What a link leads to may be made by the command: `result` is then no sign of a half-made result.
    return given


ARGUMENT = 9000
"""Most characters of an argument."""
NAMES = (
    "src",
    "dst",
    "result",
    "missing",
    "src/model-00001-of-00002.safetensors",
    "it.nemo",
    "nemo",
    "src/config.json",
)
PATHS = (
    "", " ", ".", "..", "/", "//", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd", "~", "~/x", "$HOME", "-",
    "--", "-x", "a\nb", "a\rb", "a\x1b[2Jb", "\u202eabc", "\udcff\udc80", "é", "e\u0301", "\U0001f600", "x" * 255,
    "x" * 256, "x" * 5000, "a/" * 2000, "a/b/c/d/e", "src/", "src//", "./src", "src/.", "src/..", "src/../src", "src\n",
    " src", "hf:", "hf:/", "hf://", "hf:///", "hf://a", "hf://a/b", "hf://a/b/c", "hf://a/b@", "hf://a/b@c@d",
    "hf://a/b@" + "x" * 500, "hf://../..", "hf://a/..", "hf://a b/c", "hf://\udcff/b", "hf://a/b@refs/pr/1", "HF://a/b",
    "hf://a/b?x=y#z", "hf://a/%2e%2e", "hf://é/b", "hf://a/b\n", "hf://" + "x" * 300 + "/y",
    "https://huggingface.co/a/b", "s3://a/b", "file:///etc", "owner/name", "owner/name@main", "a/b/c",
    "owner/" + "x" * 200, "C:\\x", "\\\\a\\b", "*", "src*", "{a,b}", "%s", "CON", "dst.partial", "dst/", "dst/sub",
    "src/dst", "src",
)  # fmt: skip
SIZES = (
    "0", "1", "-1", "1B", "1KB", "1KiB", "4MiB", "256MiB", "1.5GB", "1e3", "1e999", "1e999GB", "nan", "inf", "-inf",
    "NaNMiB", "", " ", "MiB", "1 MiB", "1  MiB ", "\uff11MiB", "\u0663MB", "1_000", "0x10", "1,000", "1.", ".5GiB",
    "9" * 30 + "TB", "9" * 5000, "1" + "0" * 400 + "B", "1MiBMiB", "1mib", "1mb", "1PB", "1EiB", "1ZB", "+1MB", "--1",
    "1e-9GB", "0.0000001B", "\n1MB", "1MB\n", "\udcff", "\x1b[2J", "1µB",
)  # fmt: skip
DEVICES = (
    "auto", "cpu", "cuda", "cuda:0", "cuda:99", "cuda:-1", "cuda:x", "cuda:0,cuda:0", "cpu,cpu", "cpu,cuda:0", ",", "",
    " cpu", "CPU", "cuda:" + "9" * 5000, "cuda:\u0661", "mps", "meta", "xpu:0", "cuda:0," * 1000, "\x1b[2J", "\udcff",
    "privateuseone", "auto,cpu", "cpu:0",
)  # fmt: skip
COUNTS = (
    "0",
    "1",
    "2",
    "7",
    "-1",
    "1.5",
    "1e3",
    "x",
    "",
    "\uff11",
    "1000000",
    "9" * 30,
    "9" * 5000,
    "0x2",
    "1_0",
    " 1",
    "\udcff",
)
REGEXES = (
    "", ".", "^", "$", ".*", "(", ")", "[", "*", "+", "?", "a{2,1}", "a{1000}", "a{99999999999}", "(?P<a>x)(?P<a>y)",
    "(?i).", "(?x) # a", "\\", "\\1", "(?<=a+)b", "(?<=a)b", "[[:alpha:]]", "\\p{L}", "(?>a)", "a++", "(?#", "[a-",
    "[z-a]", "\\N{DIGIT ONE}", "\\Z", "\\A.", "|" * 1000, "(" * 200 + ")" * 200, "(" * 5000 + ")" * 5000, "x" * 20_000,
    "(x)" * 500, "\n", "\x1b[2J", "\udcff", "é", "\U0001f600", "q_proj", "(?!q_proj)", "weight$", "(?:a|b){50}",
    "[" + "a" * 10_000 + "]", "model\\.layers\\.\\d+", "(?s:.)", "(?L)a", "(?a)(?u)b",
)  # fmt: skip
BASES = (
    "owner/name", "name", "", "/", "a/b/c", "../..", "a b/c", "a/b\n- c", "a/b: c", "{a}", "[a]", "a/b # c",
    "'a'/\"b\"", "*a/b", "&a/b", "\x1b[2J/a", "\u202e/a", "\udcff/a", "é/é", "x" * 100 + "/" + "y" * 100, "x" * 50_000,
    "a/b@main", "hf://a/b", "-/-", "./.", "a/b|c", "a/b`c`", "<b>/x", "a/-->", "null/null", "1/2", "1:2/3",
)  # fmt: skip
OPTIONS: dict[str, tuple[str, ...]] = {
    "--max-memory": SIZES,
    "--shard-size": SIZES,
    "--max-device-memory": SIZES,
    "--threads": COUNTS,
    "--device": DEVICES,
    "--select": REGEXES,
    "--also-select": REGEXES,
    "--ignore": REGEXES,
    "--base-model": BASES,
    "--format": ("fp8", "compressed-tensors", "FP8", "", "x", "\x1b[2J", "x" * 30_000, "\udcff", "nvfp4"),
    "--granularity": ("tensor", "channel", "block", "Block", "", "blok", "128", "\u202e"),
    "--activations": ("dynamic", "none", "static", "", "None"),
    "--numerics": ("float32", "original", "bf16", ""),
    "--nonfinite": ("error", "keep", "ignore", ""),
    "--selection": ("default", "nvidia", "x", ""),
    "--dtype": ("bfloat16", "float16", "float32", "float8", "", "BF16"),
    "--revision": ("main", "", " ", "../x", "refs/pr/1", "x" * 5000, "\n", "\x1b[2J", "\udcff", "a?b#c", "%2e", "é"),
    "--token-env": ("HF_TOKEN", "", "MISSING", "=", "A=B", "é", "\udcff", "x" * 10_000, "PATH", "a\nb"),
    "--cache-dir": PATHS,
    "--html": (
        "report.html",
        "",
        ".",
        "src",
        "missing/x.html",
        "/dev/full",
        "x" * 300,
        "a\nb.html",
        "\udcff.html",
        "-",
        "dst/x.html",
    ),
    "--png": ("png", "", ".", "src/config.json", "missing/x", "x" * 300, "\udcff"),
    "--source": (*NAMES, *PATHS),
    "--recipe": (*PATHS, "src/config.json", "\udcff"),
    "--save-recipe": ("new.yaml", "", ".", "src/config.json", "missing/x", "x" * 300, "\udcff"),
    "--retry-time": ("1s", "0", "", "-1", "x", "9" * 5000, "1e3", "\uff11s"),
    "--ray": ("auto", "", "127.0.0.1:1", "ray://127.0.0.1:1", "x", ":", "::", "a:b", "ray://", "127.0.0.1:99999"),
}
FLAGS = (
    "--stats", "--share-scales", "--force-select", "--overwrite", "--in-place", "--restart", "--no-digests", "--json",
    "--quiet", "-q", "--private", "--pr", "--no-estimate", "--help", "-h", "--version", "--", "--x", "-", "--stat",
    "--json=1", "-qq", "--quiet=yes", "--verbose", "-v", "--dry-run", "--no-stats",
)  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "quantize": ("src", "new"),
    "convert": ("nemo", "new"),
    "dequantize": ("dst", "new"),
    "plan": ("src", "--no-estimate"),
    "verify": ("src", "dst"),
    "inspect": ("src",),
    "report": ("dst",),
    "compare": ("dst", "dst"),
    "demo": ("new",),
    "help": ("quantize",),
    "completion": ("zsh",),
}
"""Every command, with good arguments."""
VARIABLES: dict[str, tuple[str | None, ...]] = {
    "HF_HOME": ("", None, "relative", "src/config.json", "a\nb", "x" * 5000, "\udcff", "./home/../home", "~/x"),
    "HF_ENDPOINT": ("", "x", "http://", "http://[", "http://[::1", "http://127.0.0.1:99999", "http://127.0.0.1:x",
        "http://127.0.0.1:1/", "ftp://a", "file:///etc", "http://127.0.0.1:1\nx", "http://user:pw@127.0.0.1:1",
        "http://127.0.0.1:1/a/b/", "\udcff", "//127.0.0.1:1", ),
    "HF_TOKEN": ("", " ", "hf_x", "x" * 100_000, "a\nb", "a\r\nX: y", "é", "\udcff", "\x1b[2J", "Bearer x"),
    "HF_HUB_OFFLINE": ("1", "0", "", "x"),
    "TERM": ("", "dumb", "x" * 5000, "\x1b[2J", None),
    "COLUMNS": ("", "0", "-1", "1", "x", "9" * 5000, "9" * 18, "1e3", " 80", "\uff11"),
    "LINES": ("0", "x"),
    "PYTHONIOENCODING": ("ascii", "ascii:strict", "latin-1", "latin-1:strict", "utf-8", "utf-8:strict", "cp1252",
        "ascii:replace"),
    "LC_ALL": ("C", "C.UTF-8", "POSIX", "xx_XX", ""),
    "LANG": ("C", "de_DE.UTF-8", ""),
    "HOME": ("relative", "src/config.json", "\udcff"),
    "TMPDIR": ("src", "home", "./tmp/../tmp"),
    "NO_COLOR": ("1", ""),
    "FORCE_COLOR": ("1", ),
    "PYTHONWARNINGS": ("error", "x", "ignore", ":::::", "default"),
    "HTTP_PROXY": ("http://127.0.0.1:1", "127.0.0.1:1", "", "socks5://127.0.0.1:1", "http://["),
    "ALL_PROXY": ("http://127.0.0.1:1", "x://127.0.0.1:1"),
    "SSL_CERT_FILE": ("missing", "src/config.json"),
    "CUDA_VISIBLE_DEVICES": ("", "-1", "0", "x", "9" * 5000),
    "OMP_NUM_THREADS": ("0", "-1", "x", "9" * 30),
    "NO_PROXY": ("*", "", "\n"),
    "NEMOTRON_FP8_MAX_MEMORY": ("", "1GiB", "x", "-1", "9" * 5000, "\udcff", "\x1b[2J"),
    "NEMOTRON_FP8_IGNORE": ("q_proj k_proj", "(", " ", "\x1b[2J", "x|" * 50_000),
    "NEMOTRON_FP8_RECIPE": ("src/config.json", "missing", "\udcff", "."),
    "NEMOTRON_FP8_QUIET": ("1", "x", "\udcff"),
    "NEMOTRON_FP8_MAX_MEMROY": ("1", "\udcff"),
    "NEMOTRON_FP8_\udcff\x1b[2J": ("1", ),
}  # fmt: skip


def arguments(chance: Random, seeds: Seeds) -> Input:
    """Give hostile arguments to commands over good files."""
    tree = {**under("src", seeds.source), **under("dst", seeds.result), **under("nemo", seeds.zarr), **seeds.archive}
    command = pick(chance, tuple(COMMANDS))
    words: list[str] = [command]
    good = COMMANDS[command]
    kind = chance.random()
    if kind < 0.5:
        words += good
    elif kind < 0.9:
        at = chance.randrange(len(good))
        words += [pick(chance, PATHS) if i == at else word for i, word in enumerate(good)]
    else:
        words += [pick(chance, (*PATHS, *NAMES, *TEXTS)) for _ in range(chance.randrange(4))]
    for _ in range(pick(chance, (0, 1, 1, 2, 3)) if kind >= 0.5 else pick(chance, (1, 1, 2, 3))):
        if chance.random() < 0.25:
            flags = [flag for flag in FLAGS if flag in options_of(command)]
            words.append(pick(chance, flags if flags and chance.random() < 0.8 else FLAGS))
            continue
        known = [option for option in OPTIONS if option in options_of(command)]
        option = pick(chance, known if known and chance.random() < 0.9 else tuple(OPTIONS))
        value = pick(chance, OPTIONS[option]) if chance.random() < 0.9 else pick(chance, (*TEXTS, *map(str, INTEGERS)))
        words += [f"{option}={value}"] if chance.random() < 0.3 else [option, value]
    if "--threads" not in words and command not in ("inspect", "demo", "help", "completion") and chance.random() < 0.7:
        words += ONE
    if is_big(chance):
        words += ["--ignore", "x|" * (ARGUMENT // 2)]
    if chance.random() < 0.02:
        words = words[1:]
    # The system passes no argument with a NUL; errors repeat what a user wrote, which may be long.
    words = [word.replace("\0", "")[:ARGUMENT] for word in words]
    return Input(tree, words, environment(chance) if chance.random() < 0.1 else {}, result="new")


@functools.cache
def options_of(command: str) -> frozenset[str]:
    """Return the options of a command."""
    import click

    from nemotron_fp8.cli.main import cli

    found = cli.commands[command]
    return frozenset(name for param in found.get_params(click.Context(found)) for name in param.opts)


def environment(chance: Random) -> dict[str, str | None]:
    """Return hostile variables."""
    made: dict[str, str | None] = {}
    for _ in range(pick(chance, (1, 1, 2, 3))):
        name = pick(chance, tuple(VARIABLES))
        made[name] = pick(chance, VARIABLES[name])
    return made


def streams(chance: Random, seeds: Seeds) -> Input:
    """Run commands over good files, or missing ones, with standard streams that are closed, full or broken."""
    given = pick(
        chance,
        (
            lambda: reading(chance, dict(seeds.source), seeds),
            lambda: reading_nemo(chance, dict(seeds.zarr), seeds),
            lambda: reading_result(chance, dict(seeds.result), seeds.source, seeds),
            lambda: Input(dict(seeds.partial), ["quantize", "src", "dst", *ONE], result="dst"),
            lambda: Input({}, [pick(chance, tuple(COMMANDS)), "missing", "new"], result="new"),
            lambda: Input({}, pick(chance, (["--help"], ["--version"], ["x"], ["plan", "--help"], []))),
        ),
    )()
    states = ("closed", "full", "broken")
    for number in pick(chance, ((1,), (1,), (2,), (1, 2))):
        given.streams[number] = pick(chance, states)
    return given


def variables(chance: Random, seeds: Seeds) -> Input:
    """Run commands over good files, some with unusual names, in hostile environments."""
    source = dict(seeds.source)
    if chance.random() < 0.3:
        source[pick(chance, ("é.txt", "\udcff.json", "a\nb.json", "\x1b[2J.txt", "\u202e.json", "日本.md"))] = b"{}"
    made = {**under("src", source), **under("dst", seeds.result), **under("nemo", seeds.zarr)}
    command = pick(
        chance,
        (
            lambda: ["plan", "src", "--no-estimate", *ONE],
            lambda: ["quantize", "src", "new", *ONE, *pick(chance, RECIPES)],
            lambda: ["verify", "src", "dst", *ONE],
            lambda: ["report", "dst", *ONE, *pick(chance, ((), ("--html", "report.html")))],
            lambda: ["compare", "dst", "dst", *ONE],
            lambda: ["inspect", "src"],
            lambda: ["convert", "nemo", "new", *ONE],
            lambda: ["plan", "hf://owner/name", "--no-estimate"],
            lambda: ["quantize", "hf://owner/name", "new"],
            lambda: ["quantize", "src", "hf://owner/name", *ONE],
            lambda: ["verify", "hf://owner/name"],
            lambda: ["--help"],
            lambda: [pick(chance, tuple(COMMANDS)), "--help"],
            list,
            lambda: ["demo"],
        ),
    )()
    return Input(made, command, environment(chance), result="new")
