"""Blocks, code spans, links and anchors of the README and of the pages of docs/."""

from __future__ import annotations

import re
import shlex
import unicodedata
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
FENCE = re.compile(r"(`{3,})(.*)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^()\s]+)\)")
HEADING = re.compile(r"#{1,6} +(.*?) *#*")
SHELL = ("sh", "console")
WHOLE = ("bash", "yaml")
"""Languages of whole files, scripts and manifests, of which only the lines with our commands are checked."""
LANGUAGES = (*SHELL, *WHOLE, "python", "text")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is the number of its first line of content, from 1."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    """Reason in the comment on the line above, if the block is not run."""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Return the words of each command of a shell block; in a ``console`` block, the lines after a ``$``."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        if self.language in WHOLE:
            lines = [line.strip() for line in lines if line.strip().startswith("nemotron-fp8 ")]
        return [words for line in lines if (words := _without_redirection(shlex.split(line, comments=True)))]


def _without_redirection(words: list[str]) -> list[str]:
    """Return a command without the file of its output."""
    return words[: next((i for i, word in enumerate(words) if word in (">", ">>")), len(words))]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start, fence, language = 0, "", ""
    for i, line in enumerate(lines, 1):
        if fence:
            if line.rstrip() == fence:
                above = NOT_RUN.fullmatch(lines[start - 2].strip()) if start >= 2 else None
                text = "\n".join([*lines[start : i - 1], ""])
                found.append(Block(page, start + 1, language, text, above.group(1) if above else None))
                fence = ""
        elif opening := FENCE.match(line.strip()):
            start, fence, language = i, opening.group(1), opening.group(2).strip()
    assert not fence, f"{page.name}:{start} is never closed"
    return found


def prose(page: Path) -> list[tuple[int, str]]:
    """Return the lines outside of fenced blocks, with their numbers."""
    lines = page.read_text(encoding="utf-8").splitlines()
    inside = {n for block in blocks(page) for n in range(block.line - 1, block.line + block.text.count("\n") + 1)}
    return [(i, line) for i, line in enumerate(lines, 1) if i not in inside]


def spans(page: Path) -> list[tuple[int, str]]:
    """Return the inline code of a page; a ``\\|`` in a table is a ``|``."""
    return [(i, found.group(1).replace("\\|", "|")) for i, line in prose(page) for found in SPAN.finditer(line)]


def links(page: Path) -> list[tuple[int, str]]:
    """Return the links and pictures of a page, without links to other sites."""
    return [
        (i, found.group(1))
        for i, line in prose(page)
        for found in LINK.finditer(SPAN.sub("", line))
        if not re.match(r"[a-z]+:", found.group(1))
    ]


def anchors(page: Path) -> set[str]:
    """Return the anchors that headings have both on the site and on GitHub."""
    titles = [found.group(1) for _, line in prose(page) if (found := HEADING.fullmatch(line))]
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in titles]
    site, repository = [_site(title) for title in plain], [_repository(title) for title in plain]
    return {a for a, b in zip(site, repository, strict=True) if a == b and site.count(a) == 1}


def _site(title: str) -> str:
    """Return the anchor of Python-Markdown's ``toc``: `markdown.extensions.toc.slugify`."""
    ascii_only = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def _repository(title: str) -> str:
    """Return the anchor on GitHub: lower case, only letters, digits, ``_``, ``-`` and spaces."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
