"""Check the language of code and pages: ``python -m tools.check_language [FOLDER]``.

Two rules: no docstring begins with What, Whether or How, and no word has a British spelling.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".md", ".toml", ".sh", ".yml", ".txt", ".css", ".svg"}
SCRIPTS = {"Makefile", ".ci/run"}
DOCSTRINGS = ("nemotron_fp8", "kernels", "tools", "benchmarks", "tests")
"""Folders whose docstrings are checked: all folders of Python code. The spelling is checked everywhere."""
WORD_LIST = ("tools/check_language.py", "tests/tools/test_check_language.py")
"""Files that contain British spellings, because they list or plant them."""
QUESTION = re.compile(r"\s*(What|Whether|How)\b")

IZE = (
    "analog|anonym|apolog|author|canon|capital|categor|central|character|container|critic|custom|dequant|discret|emphas"
    "|equal|external|factor|familiar|final|formal|general|harmon|hypothes|initial|internal|item|jeopard|legal|linear"
    "|local|material|maxim|memor|minim|mobil|modern|neutral|normal|optim|organ|parallel|penal|plural|polar|priorit"
    "|public|quant|random|rational|real|recogn|regular|sanit|scrutin|serial|special|stabil|standard|summar|symbol"
    "|synchron|tempor|token|util|vector|virtual|visual"
)
OUR = "arm|behavi|col|endeav|fav|flav|harb|hon|hum|lab|neighb|od|rig|rum|sav|vap|vig"
LED = "cancel|channel|counsel|dial|equal|fuel|journal|label|level|marshal|model|panel|signal|total|travel|unravel"
BRITISH = re.compile(
    "|".join(
        [
            rf"(?:{IZE})is(?:e|ing|able|ation)",
            r"(?:anal|paral|catal)ys(?:e(?!s)|ing)",
            rf"\b(?:mis|dis)?(?:{OUR})our",
            rf"\b(?:re|un)?(?:{LED})l(?:ed|ing|er)",
            r"\b(?:kilo|centi|milli)?(?:cent|met|lit|fib|theat|calib)re[sd]?\b",
            r"\b(?:lic|def|off|pret)ence",
            r"catalogue|analogue|artefact|\bgrey|manoeuv|draught|sceptic|enquir|focuss|biass|benefitt",
            r"\b(?:programmes?|whilst|amongst|learnt|spelt|spoilt|burnt|practis(?:e|ing)|ageing|maths)\b",
            r"\b(?:fulfil|instal|enrol|skilful|wilful|plough|mould|tyre|cheque|storey|kerb|cosy)s?\b",
        ]
    )
)
"""British spellings in lower case."""
WORD_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])|_")
"""Between the words of an identifier."""
NAMES_OF_OTHERS = re.compile(r"CancelledError|\.cancelled\(|aria-labelledby")
"""Names of the standard library and of SVG."""


def problems_in(text: str, *, docstrings: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and the description of each problem of a file.

    Args:
        text: content of the file.
        docstrings: check docstrings, too; the text is Python.
    """
    for number, line in enumerate(text.splitlines(), 1):
        words = WORD_BOUNDARY.sub(" ", NAMES_OF_OTHERS.sub("", line)).lower()
        for found in BRITISH.finditer(words):
            yield number, f"British spelling: {found.group()}"
    if not docstrings:
        return
    for node in ast.walk(ast.parse(text)):
        # A string on its own documents the module, class, function or constant above it.
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        if isinstance(node.value.value, str) and (found_word := QUESTION.match(node.value.value)):
            yield node.lineno, f"docstring begins with {found_word.group(1)}"


def files(root: Path) -> Iterator[Path]:
    """Yield the text files of the project; hidden folders hold environments and caches."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") or part in ("site", "dist", "build") for part in name.split("/"))
        if path.is_file() and (name in SCRIPTS or (path.suffix in SUFFIXES and not hidden)):
            yield path


def check(root: Path) -> list[str]:
    """Return a line for each problem below a folder: file, line number, description."""
    found = []
    for path in files(root):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        python = path.suffix == ".py" and name.startswith(DOCSTRINGS)
        found += [
            f"{name}:{line}: {problem}"
            for line, problem in sorted(problems_in(text, docstrings=python))
            if not (name in WORD_LIST and problem.startswith("British"))
        ]
    return found


def main() -> None:
    """Print the problems; exit with 1 if there are any."""
    found = check(Path(sys.argv[1]) if sys.argv[1:] else ROOT)
    print("\n".join([*found, f"language: {len(found)} problems"]))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
