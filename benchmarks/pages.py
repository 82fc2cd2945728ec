"""What the ``draw_*`` scripts make: parts of documents between two marks, and plots; written, or compared."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def filled(document: Path, begin: str, end: str, body: str) -> str:
    """The text of a document with ``body`` between its marks.

    Raises:
        SystemExit: it lacks the marks.
    """
    found = document.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(found):
        raise SystemExit(f"{document.name} lacks the marks {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{body}\n\n{end}", found)


def put(wanted: Mapping[Path, str], *, check: bool) -> None:
    """Write files, or compare them with what is there.

    Raises:
        SystemExit: with ``check``, one is not there or differs.
    """
    for path, content in wanted.items():
        if not check:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            raise SystemExit(f"{path.name} is not what benchmarks/results give: run without --check")
