"""Split a model card into its front matter and the author's text."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

from nemotron_fp8.untrusted import yaml_text
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from nemotron_fp8.untrusted.yaml_text import Tree


BEGIN, END = "<!-- nemotron_fp8: begin -->", "<!-- nemotron_fp8: end -->"
"""Marks around the text of this library; the author wrote the rest of a card."""
MARK = "---"
_SPACE = "\N{ZERO WIDTH NO-BREAK SPACE}"
_FIRST = re.compile(r"\s*---[ \t]*\r?\n")


def front_matter(text: str) -> tuple[str, int] | None:
    """Return the text between the marks of a front matter, and the position after it; None without one."""
    first = _FIRST.match(text)
    if first is None:
        return None
    start = at = first.end()
    while at < len(text):
        end = text.find("\n", at)
        after = len(text) if end < 0 else end + 1
        if text.startswith(MARK, at) and not text[at + len(MARK) : after].strip(" \t\r\n"):
            return text[start:at], after
        if at - start > yaml_text.MAX_BYTES:
            return None
        at = after
    return None


def split_card(data: bytes) -> tuple[dict[str, Tree], str]:
    """Return the front matter of a card, and its text without the parts that this library wrote.

    A front matter that cannot be parsed, or exceeds the limits of `nemotron_fp8.untrusted.yaml_text`, stays in the
    text: the author's words are never lost.
    """
    text = data.decode("utf-8", "surrogateescape").removeprefix(_SPACE)
    metadata: dict[str, Tree] | None = None
    found = front_matter(text)
    if found is not None:
        with suppress(_UnreadableError), guarded(_UnreadableError):
            loaded = yaml_text.load_mapping(found[0], _UnreadableError)
            if all(map(yaml_text.is_text, loaded)):  # the Hub needs texts as keys
                metadata, text = loaded, text[found[1] :]
    return metadata or {}, _author_text(text).lstrip("\r\n")


class _UnreadableError(Exception):
    """The front matter cannot be parsed."""


def _author_text(text: str) -> str:
    """Return the text of a card without the parts between the marks of this library."""
    parts: list[str] = []
    at = 0
    while (begin := text.find(BEGIN, at)) >= 0 and (end := text.find(END, begin)) >= 0:
        parts.append(text[at:begin])
        at = end + len(END)
        while text.startswith("\n", at):
            at += 1
    return "".join([*parts, text[at:]])
