"""Metadata hook of hatchling: kernels of the same version, addresses, and the README for a package index.

A source archive has these fields in its PKG-INFO.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:|#)([^()\s]+)\)")
"""Links and pictures of a page whose targets are files of the repository."""


class Metadata(MetadataHookInterface):
    """Fills in the fields that follow from the version and the address of the repository."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set ``dependencies``, ``urls`` and ``readme``."""
        version, repository = metadata["version"], _address(Path(self.root, "nemotron_fp8/_version.py"))
        metadata["dependencies"] = [f"nemotron_fp8_kernels=={version}", *self.config["dependencies"]]
        metadata["urls"] = addresses(repository, version)
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": page(readme, repository, version)}


def addresses(repository: str, version: str) -> dict[str, str]:
    """Return the addresses that an index shows; none without a public repository."""
    if not repository:
        return {}
    changes = f"{repository}/blob/v{version}/CHANGELOG.md"
    return {"Repository": repository, "Changelog": changes, "Issues": f"{repository}/issues"}


def page(readme: str, repository: str, version: str) -> str:
    """Return the README with absolute links into the repository, or without links where there is none."""

    def target(found: re.Match[str]) -> str:
        picture, text, path = found.groups()
        if not repository:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/v{version}/{path})"

    return LINK.sub(target, readme)


def _address(path: Path) -> str:
    """Return the address in ``_version.py``, which imports nothing."""
    spec = importlib.util.spec_from_file_location("_version", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.REPOSITORY)
