"""Packages that travel with a copy of the repository: installed where they are missing, without a network."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from typing import TYPE_CHECKING

from benchmarks.packed import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

WHEELS = FOLDER / "wheels"


def missing(folder: Path = WHEELS) -> list[Path]:
    """Return the wheels whose packages this Python lacks; packages that it has are never replaced."""
    return [path for path in sorted(folder.glob("*.whl")) if not _present(path.name.partition("-")[0])]


def install(target: Path, folder: Path = WHEELS) -> Path | None:
    """Install the missing packages into a folder for ``PYTHONPATH``; return it, or None if there is nothing to do.

    pip refuses wheels for another Python. Without pip the wheels, which are archives, are unpacked.
    """
    chosen = missing(folder)
    if not chosen:
        return None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(target), *map(str, chosen)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if ran.returncode == 0:
            return target
        print(f"pip: {' '.join(ran.stderr.split())[-300:]}", flush=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"pip: {error}", flush=True)
    for path in chosen:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(target)
        except (OSError, zipfile.BadZipFile) as error:
            print(f"{path.name}: {error}", flush=True)
    return target


def _present(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
