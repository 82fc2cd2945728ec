"""Links between pages work on the site and in the repository; every page is in the site's contents."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, anchors, links

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """The file exists, and the anchor, if any, is that of one heading on the site and on GitHub."""
    for line, target in links(page):
        path, _, anchor = unquote(target).partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}:{line}: {target}: no such file"
        assert found.is_relative_to(ROOT), f"{page.name}:{line}: {target} leads out of the repository"
        if page.parent == DOCS:
            assert found.is_relative_to(DOCS), f"{page.name}:{line}: {target} is not on the site"
        if anchor:
            assert anchor in anchors(found), f"{page.name}:{line}: {target}: no such heading"


def test_pages_that_the_site_takes_in_have_no_links_of_their_own() -> None:
    """These pages are shown in two folders, so a relative link would be wrong in one."""
    assert [links(ROOT / name) for name in ("CONTRIBUTING.md", "CHANGELOG.md")] == [[], []]


def test_every_page_is_in_the_contents_and_every_picture_on_a_page() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(_pages(settings["nav"])) == sorted(path.name for path in DOCS.glob("*.md"))
    shown = {(page.parent / target).resolve() for page in PAGES for _, target in links(page)}
    styles = {DOCS / name for name in settings["extra_css"]}
    assert {path for path in DOCS.iterdir() if path.suffix != ".md"} <= shown | styles


def _pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    assert not isinstance(values, (int, float, type(None)))
    return [page for value in values for page in _pages(value)]  # type: ignore[attr-defined]


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three\n\n[a](b.md#c) `[no](link)` ![d](e.svg)\n\n```text\n[no](link)\n# no\n```\n")
    assert links(page) == [(3, "b.md#c"), (3, "e.svg")]
    assert anchors(page) == {"one-two-three"}
