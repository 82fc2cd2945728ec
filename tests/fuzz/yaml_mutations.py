"""Mutations of YAML texts, line by line: values, keys, lines, and constructs that cost a parser much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz.values import integer, is_big, many, mutate_bytes, pick, text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

VALUES = (
    "", "~", "null", "true", "yes", "NO", "on", "0", "-1", "0o17", "017", "0b11", "0x_f", "1_000", "190:20:30",
    "1:1:1:1:1:1:1:1:1:1", "99999999999:59:59.5", "-1:59", "1:59.", "1e5", "1.e+5", ".5", ".inf", "-.INF", ".nan",
    "1e999", "=", "<<", "2001-01-01", "2001-13-45", "0000-00-00", "9999-12-31 23:59:59.999999 +99:99",
    "2001-01-01T00:00:00Z", "2001-1-1 1:1:1 -25:00", "2001-12-14t21:59:43.10-05:00", "[]", "{}", "[,]", "[1,]", "{a}",
    "{a, b: }", "{[1]: 2}", "{{a: 1}: 2}", "[a: b]", "? a", "? [a, b]", "- - - a", "'", '"', "'a", '"\\x"', '"\\ud800"',
    '"\\U00110000"', '"\\u202e\\e[2J"', "|", ">", "|+9", "|0", "|-\n   a\n  b", ">\n\n\n", "!!str", "!!str 1",
    "!!int x", "!!int ''", "!!int 1:99", "!!float x", "!!float ''", "!!bool x", "!!bool ''", "!!null x",
    "!!timestamp x", "!!timestamp ''", "!!timestamp [1]", "!!binary x", "!!binary '='", "!!binary aGk=",
    "!!binary \xe9", "!!set {a}", "!!set [a]", "!!set x", "!!omap [a: 1]", "!!omap [a]", "!!omap {a: 1}", "!!omap x",
    "!!pairs [a: 1]", "!!pairs [[1]]", "!!map [a]", "!!seq {a: 1}", "!!merge x", "!!value x", "!!map", "!!seq",
    "!!int [1]", "!!str {a: 1}", "!!python/object:os.system x", "!!x y", "!!python/tuple [1]",
    "!<tag:yaml.org,2002:int> z", "!local x", "!", "! x", "!<> x", "!!", "!a!b c", "&a", "&a x", "*a", "&a [*a]",
    "&a {x: *a}", "&a {<<: *a}", "&a [*a, *a]", "{<<: 1}", "{<<: [1]}", "{<<: {a: 1}}", "{<<: [{a: 1}, {b: 2}]}",
    "{<<: x, <<: y}", "{=: 1}", "@x", "`x`", "%x", "# x", "--- x", "...", "a: b: c", "\ta", "a\tb", "- a", "-a", "-",
    "?", ":", ": :", "::", "${.num_layers}", "${a}", "${.}", "${..x}", "${.a.b.c}", "${env:HOME}",
    "${.encoder_seq_length}", "${", "${.max_position_embeddings}", "nan", "inf", "'1'", "\"1\"", "[1, 2]", "{a: 1}",
    "1.5", "-0", "-0.0", "+1", "!!binary |\n  R0lGODlhDAAMAIQAAP", "\x07", "\x85", "\u2028", "\ufeff", "\ufffe", "\x00",
)  # fmt: skip
HEADS = (
    "%YAML 1.1\n---\n", "%YAML 9.9\n---\n", "%YAML 1\n---\n", "%TAG ! tag:x,2000:\n---\n", "%TAG !! !x\n---\n",
    "%X\n---\n", "--- ", "--- |\n", "--- >\n", "--- &a\n", "--- !!map\n", "--- !!set\n", "--- !!omap\n", "--- !x\n",
    "---\n---\n", "...\n---\n", "\ufeff", "# \n", "- ", "? ", "'", '"', "[", "{", "|\n ", "!!str |\n ", "\t", "\0",
)  # fmt: skip


def bombs(chance: Random) -> str:
    """Return a text that costs a careless parser time, memory or stack."""
    small = pick(chance, (10, 31, 32, 33, 34, 100, 900, 1100, 3000))
    large = pick(chance, (1000, 20_000, 100_000)) if is_big(chance) else small
    return pick(
        chance,
        (
            lambda: "a: " + "[" * large + "]" * large,
            lambda: "a: " + "{" * large,
            lambda: "a: " + "[" * large,
            lambda: "a: " + "{a: " * large + "1" + "}" * large,
            lambda: "a:\n" + "".join(" " * i + "a:\n" for i in range(1, min(small, 1100))),
            lambda: "a:\n  " + "- " * large + "x",
            lambda: "a:\n  " + "? " * large + "x",
            lambda: "".join(
                f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}" if i else "x"] * 10) + "]\n"
                for i in range(pick(chance, (3, 9, 30)))
            ),
            lambda: "".join(
                f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9) if i else '{x: 1}'}]\n"
                for i in range(pick(chance, (3, 9, 20)))
            ),
            lambda: "a: &a\n  <<: *a\n",
            lambda: "a: " + "9" * pick(chance, (4299, 4300, 4301, 50_000)),
            lambda: "a: " + "1" + ":59" * pick(chance, (100, 2000, 20_000)),
            lambda: "a: 1" + "_" * 20_000 + "1",
            lambda: "a: 0x" + "f" * 50_000,
            lambda: "a: " + pick(chance, ("!!int ", "!!float ", "!!timestamp ", "!!binary ")) + "1" * 30_000,
            lambda: "? " + "x" * pick(chance, (100, 1025, 5000)) + "\n: 1\n",
            lambda: "x" * pick(chance, (1023, 1025, 5000)) + ": 1\n",
            lambda: "a: '" + "x" * (1 << 22 if is_big(chance) else 5000) + "'",
            lambda: "a: |\n" + "  x\n" * (500_000 if is_big(chance) else 500),
            lambda: "".join(f"k{i}: {i}\n" for i in range(100_000 if is_big(chance) else many(chance))),
            lambda: "a: [" + "x, " * (500_000 if is_big(chance) else many(chance)) + "]",
            lambda: "a: [" + "{b: 1}, " * (100_000 if is_big(chance) else many(chance)) + "]",
            lambda: "a: x\n" * (300_000 if is_big(chance) else many(chance)),
            lambda: "---\n" * (300_000 if is_big(chance) else many(chance)),
            lambda: "a: " + "!x " * many(chance),
            lambda: "# x\n" * (500_000 if is_big(chance) else many(chance)) + "a: 1",
            lambda: '"' + "\\\n" * many(chance) + '": 1',
            lambda: "a: b" + " " * (1 << 21 if is_big(chance) else 5000) + "c",
            lambda: "a:" + "\n" * (1 << 21 if is_big(chance) else 5000) + " c",
            lambda: "{" * 200_000,
            lambda: "[" * 200_000,
            lambda: "a: b: " * many(chance),
            lambda: "&a " * many(chance) + "x: 1",
            lambda: "%TAG !a! tag:x:\n" * many(chance) + "---\na: 1",
        ),
    )()


def mutate_yaml(chance: Random, data: str, keys: Sequence[str]) -> str:
    """Return a mutation of a good text of ``key: value`` lines.

    Args:
        chance: the source of chance.
        data: the good text.
        keys: keys that mean something in this format.
    """
    kind = chance.random()
    if kind < 0.08:
        return mutate_bytes(chance, data.encode()).decode("utf-8", "surrogateescape")
    if kind < 0.2:
        made = bombs(chance)
        return made if chance.random() < 0.5 else f"{data}\n{made}\n"
    lines = data.split("\n")
    for _ in range(pick(chance, (1, 1, 1, 2, 5))):
        _line(chance, lines, keys)
    return (pick(chance, HEADS) if chance.random() < 0.08 else "") + "\n".join(lines)


def _line(chance: Random, lines: list[str], keys: Sequence[str]) -> None:
    """Change one line, in place."""
    at = chance.randrange(len(lines))
    key, colon, old = lines[at].partition(":")
    kind = chance.randrange(10)
    if kind < 5 and colon:
        lines[at] = f"{key}: {value(chance)}"
    elif kind == 5:
        del lines[at]
        lines.append("")
    elif kind == 6:
        lines.insert(at, f"{pick(chance, keys)}: {value(chance)}")
    elif kind == 7 and colon:
        indent = key[: len(key) - len(key.lstrip())]
        lines[at] = f"{indent}{value(chance)}:{old}"
    elif kind == 8:
        lines[at] = (
            f"{key}:\n{bombs(chance)}" if chance.random() < 0.3 else pick(chance, (" ", "\t", "  ", "- ")) + lines[at]
        )
    else:
        lines.insert(
            at, pick(chance, (lines[at], "---", "...", "--- ", "---\t", "-- -", "", "\r", "  \t", value(chance)))
        )


def value(chance: Random) -> str:
    """Return the text of a value."""
    kind = chance.random()
    if kind < 0.7:
        found = pick(chance, VALUES)
    elif kind < 0.85:
        found = str(integer(chance))
    elif kind < 0.95:
        found = pick(chance, ("{}", "'{}'", '"{}"', "!!str '{}'", "[{}]", "{{a: {}}}")).replace("{}", text(chance))
    else:
        return f"[{', '.join(pick(chance, VALUES) for _ in range(3))}]"
    return f"[{found}]" if chance.random() < 0.08 else found
