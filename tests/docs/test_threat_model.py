"""Every attack of the threat model names tests, and each exists."""

from __future__ import annotations

import ast
import re

from tests.docs.pages import ROOT, spans

PAGE = ROOT / "docs" / "threat-model.md"
TEST = re.compile(r"(tests/\S+\.py)::(test_\w+)")


def test_every_named_test_exists() -> None:
    named = [(line, found.groups()) for line, span in spans(PAGE) if (found := TEST.fullmatch(span))]
    assert len(named) > 30
    for line, (path, name) in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{PAGE.name}:{line}: {path} has no {name}"


def test_every_attack_has_a_defense_and_a_test() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| ") and row.count("|") == 4][1:]
    attacks = [row for row in rows if row != "| attack | resisted by | test |"]
    assert len(attacks) > 25
    assert [row for row in attacks if not TEST.search(row)] == []
