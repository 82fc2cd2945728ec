"""Quantize every specimen of a zoo, and have an engine judge every result.

An engine is a module ``in_ENGINE`` beside this one with ``check(source: Path, result: Path) -> dict``: at least
``verdict`` (right, wrong, refused, source, ...) and ``detail`` (one line).

Use: ``python -m tests.families.sweep --engine transformers --zoo FOLDER --record FILE.jsonl``
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8 import Recipe, quantize_repo
from tests.families.by_hand import fp8_share
from tests.families.forks import forked

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 60


def quantize(source: Path, result: Path, recipe: Recipe) -> dict[str, Any]:
    """Quantize one specimen."""
    quantize_repo(source, result, recipe=recipe, device="cpu", threads=1)
    return {"fp8_share": fp8_share(result)}


def judge(
    source: Path, recipe: Recipe, check: Callable[[Path, Path], dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Quantize one specimen and judge the result, each in its own process."""
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        result = Path(folder, source.name)
        made = forked(lambda: quantize(source, result, recipe), SECONDS)
        if "raised" in made:
            return {"verdict": "not quantized", "detail": made["raised"]}
        answer = forked(lambda: check(source, result), seconds)
        if "raised" in answer:
            return {"verdict": "crashed", "detail": answer["raised"], "trace": answer["trace"], **made}
        return {**answer, **made}


def main() -> None:
    """Sweep over a zoo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--granularity", default="channel")
    parser.add_argument("--activations", default="dynamic")
    parser.add_argument("--only", default="", help="names of specimens, with commas")
    parser.add_argument("--seconds", type=float, default=60, help="longest check of one specimen")
    parser.add_argument("--record", type=Path, required=True, help="one JSON line a specimen is appended")
    given = parser.parse_args()
    check: Any = import_module(f"tests.families.in_{given.engine}").check
    recipe = Recipe(format=given.format, granularity=given.granularity, activations=given.activations)
    layout = f"{given.format}-{given.granularity}-{given.activations}"
    only = set(given.only.split(",")) - {""}
    counted: Counter[str] = Counter()
    for record in sorted(given.zoo.glob("*.specimen.json")):
        specimen = json.loads(record.read_text())
        if not specimen["ok"] or (only and specimen["name"] not in only):
            continue
        begun = time.monotonic()
        answer = judge(given.zoo / specimen["name"], recipe, check, given.seconds)
        line = {
            "specimen": specimen["name"],
            "model_type": specimen["model_type"],
            "class": specimen["class_name"],
            "engine": given.engine,
            "layout": layout,
            **answer,
            "seconds": round(time.monotonic() - begun, 1),
        }
        with given.record.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        counted[answer["verdict"]] += 1
        print(
            f"{answer['verdict']:14} {specimen['name']} {answer.get('fp8_share', '')} {answer['detail'][:300]}",
            flush=True,
        )
    print(dict(counted))


if __name__ == "__main__":
    main()
