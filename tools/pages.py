"""Generated parts of pages: replaced between two markers, written to files, or compared with them."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


def filled(page: Path, begin: str, end: str, body: str) -> str:
    """Return the text of a page with ``body`` between its markers.

    Raises:
        SystemExit: the page lacks the markers.
    """
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{page.name} lacks the markers {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{body}\n\n{end}", text)


def put(wanted: Mapping[Path, str], origin: str = "benchmarks/results", *, check: bool) -> None:
    """Write generated files, or compare them with the files on disk.

    Args:
        wanted: the text of each file.
        origin: what the texts are generated from, for the error message.
        check: compare only.

    Raises:
        SystemExit: with ``check``, a file is missing or differs.
    """
    for path, content in wanted.items():
        if not check:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            raise SystemExit(f"{path.name} differs from {origin}: run without --check")


def fill_page(
    page: Path, begin: str, end: str, figures: Callable[[], str], description: str | None, origin: str = ""
) -> None:
    """Run the command of a generator of one part of a page: write the part, or compare it with ``--check``.

    Args:
        page: the page.
        begin, end: markers of the part.
        figures: returns the part.
        description: text for ``--help``.
        origin: what the part is generated from, for the error message; the recorded results by default.

    Raises:
        SystemExit: the page lacks the markers, or, with ``--check``, it differs.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    put({page: filled(page, begin, end, figures())}, origin or "benchmarks/results", check=options.check)
