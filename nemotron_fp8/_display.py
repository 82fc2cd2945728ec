"""Public objects as one line for a prompt, and as a small table for a notebook.

A notebook shows what ``_repr_html_`` returns. Colors and background are those of the notebook, so that light and dark
themes both work, and every style is inline, because notebooks that are not trusted drop style sheets.
"""

from __future__ import annotations

import html
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from nemotron_fp8._utils import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LONGEST_NAME = 120
"""Characters of a name or an item in a line."""
LONGEST_CELL = 400
"""Characters of a cell in a table."""
MOST_ROWS = 20
"""Rows of a part of a table."""
SHORT_WORD = 10
"""Characters of the longest word that a narrow cell does not break."""
LINE = "1px solid rgba(128,128,128,.35)"
BOX = f"border:{LINE};border-radius:6px;padding:.6em .8em;margin:.3em 0;max-width:60em;overflow-wrap:anywhere"
TABLE = "border-collapse:collapse;margin:.4em 0;width:100%"
CELL = f"text-align:left;vertical-align:top;padding:.2em .5em .2em 0;border-top:{LINE};white-space:normal"
NUMBER = CELL.replace("left", "right")


class Part(NamedTuple):
    """Part of a display that is folded until it is opened.

    Attributes:
        title: title of the part.
        rows: its rows; those beyond `MOST_ROWS` are counted.
        header: titles of the columns; empty for a list.
        right: columns of numbers, counted from 0.
        opened: True to show the part unfolded.
    """

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    right: Sequence[int] = ()
    opened: bool = False


def escape(text: str) -> str:
    """Escape text from a file for HTML; control characters and marks of direction become visible."""
    return html.escape(visible(text))


def cut(text: str, most: int = LONGEST_NAME) -> str:
    """Return a text, cut in the middle if it is too long: names differ at both ends."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[: most - 3 - half]}...{text[-half:]}"


def one_line(kind: str, name: str, facts: Iterable[str]) -> str:
    """Return the repr of an object: ``<Kind of NAME: fact, fact>``.

    Args:
        kind: class of the object.
        name: what the object is about; empty to name nothing.
        facts: short facts.
    """
    subject = f" of {visible(cut(name))}" if name else ""
    return f"<{kind}{subject}: {', '.join(visible(cut(fact, LONGEST_CELL)) for fact in facts)}>"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 tensor``, ``2,000 tensors``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def display(kind: str, name: str, facts: Iterable[tuple[str, str]], parts: Iterable[Part] = ()) -> str:
    """Return an object as HTML for a notebook; all texts are escaped.

    Args:
        kind: class of the object.
        name: what the object is about; empty to name nothing.
        facts: label and value of each row; rows without a value are omitted.
        parts: further parts; parts without rows are omitted.
    """
    subject = f" of <code>{_text(name)}</code>" if name else ""
    rows = "".join(
        f'<tr><th scope="row" style="{CELL};font-weight:600;width:12em">{_text(label)}</th>'
        f'<td style="{CELL}">{_text(value)}</td></tr>'
        for label, value in facts
        if value
    )
    folded = "".join(_part(part) for part in parts if part.rows)
    return (
        f'<div style="{BOX}"><b>{_text(kind)}</b>{subject}<table style="{TABLE}"><tbody>{rows}</tbody></table>'
        f"{folded}</div>"
    )


def _part(part: Part) -> str:
    head = ""
    if part.header:
        cells = "".join(
            f'<th scope="col" style="{_style(part, number, title)}">{_text(title)}</th>'
            for number, title in enumerate(part.header)
        )
        head = f"<thead><tr>{cells}</tr></thead>"
    rows = "".join(
        "<tr>"
        + "".join(f'<td style="{_style(part, number, cell)}">{_text(cell)}</td>' for number, cell in enumerate(row))
        + "</tr>"
        for row in islice(part.rows, MOST_ROWS)
    )
    more = len(part.rows) - MOST_ROWS
    rest = f'<div style="opacity:.75">and {more:,} more</div>' if more > 0 else ""
    count = f" ({len(part.rows):,})" if len(part.rows) > 1 else ""
    return (
        f'<details{" open" * part.opened} style="margin-top:.4em"><summary>{_text(part.title)}{count}</summary>'
        f'<table style="{TABLE}">{head}<tbody>{rows}</tbody></table>{rest}</details>'
    )


def _style(part: Part, number: int, text: str) -> str:
    whole = max(map(len, text.split()), default=0) <= SHORT_WORD
    return f"{NUMBER if number in part.right else CELL}{';overflow-wrap:normal' * whole}"


def _text(text: str) -> str:
    return escape(cut(text, LONGEST_CELL))
