"""Inputs of a file of figures: JSON of an evaluation, and a card with a section that may be a stranger's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.fuzz.commands import ONE
from tests.fuzz.json_mutations import mutate_json
from tests.fuzz.tree import Input, under
from tests.fuzz.values import mutate_bytes, pick
from tests.support.evaluations import evaluation_of, figures_of

if TYPE_CHECKING:
    from random import Random

    from tests.fuzz.seeds import Seeds

CARD, MARK, END = "README.md", b"<!-- nemotron_fp8: evaluation -->", b"<!-- nemotron_fp8: end -->"
FILE = "figures.json"
KEYS = (
    "source", "results", "sample", "libraries", "name", "layers", "sequence_kl", "sequence_nll", "position_kl", "kl",
    "perplexity", "top1", "notices", "indices", "excerpts", "sequences", "length", "available", "seconds",
)  # fmt: skip


def evaluation(chance: Random, seeds: Seeds) -> Input:
    """Change the figures of a result, or the section in its card."""
    made = evaluation_of(figures_of("out/dst", 0.02, 4, 3), figures_of("b", 0.03, 4, 3), sequences=4, layers=3)
    data = json.dumps(made.to_json()).encode()
    tree = {**under("dst", seeds.result), **under("src", seeds.source)}
    if chance.random() < 0.8:
        more = pick(chance, ((), ("--result", "b"), ("--json",)))
        command = pick(chance, (["card", "dst"], ["report", "dst", *ONE], ["report", "dst", "--html", "r.html", *ONE]))
        return Input({**tree, FILE: mutate_json(chance, data, KEYS)}, [*command, "--evaluation", FILE, *more])
    card = tree[f"dst/{CARD}"]
    assert isinstance(card, bytes)
    before, _, after = card.partition(END)
    section = (
        MARK + b"\n## Evaluation\n\n| | perplexity |\n| this result | 15.1 | +1% | 0.1 | 90% |\n\nVerdict: none.\n"
    )
    tree[f"dst/{CARD}"] = before + b"\n" + mutate_bytes(chance, section) + END + after
    command = pick(chance, (["card", "dst", "--remove"], ["verify", "src", "dst", *ONE], ["verify", "dst", *ONE]))
    return Input(tree, command)
