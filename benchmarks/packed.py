"""Commit of a copy of the repository on a machine without git, written by ``python -m benchmarks.gpu.pack``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".gpu"
"""Ignored folder that travels with the copy: wheels, and the commit."""

RECORD = FOLDER / "commit.json"
SOURCES = ("benchmarks", "kernels", "nemotron_fp8", "tests")
"""Folders whose Python files decide about the figures."""


def digest() -> str:
    """Return the SHA-256 digest of the names and contents of all sources."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            total.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def write(commit: str) -> None:
    """Record the commit of the present sources."""
    FOLDER.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps({"commit": commit, "digest": digest()}) + "\n", encoding="utf-8")


def commit() -> str:
    """Return the recorded commit, with ``+changes`` if the sources differ from those that were packed."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        found, expected = str(record["commit"]), record["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
    return found if digest() == expected or found.endswith("+changes") else f"{found}+changes"
