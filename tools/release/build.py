"""Wheels and source archives of the last commit, built twice and compared."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.release.contents import PACKAGES, Tree, check_contents
from tools.release.errors import ReleaseError
from tools.release.state import committed_version, git

SUMS = "SHA256SUMS"


def build(root: Path, out: Path) -> list[Path]:
    """Build both packages of the last commit, check them, and write them to a folder that replaces an older one.

    Args:
        root: the repository.
        out: folder of the archives and of their digests, in ``SHA256SUMS``.

    Returns:
        The archives: a wheel and a source archive of each package.

    Raises:
        ReleaseError: a build fails, two builds differ, or an archive has other contents than the commit.
    """
    version, epoch = committed_version(root), git(root, "log", "-1", "--format=%ct").strip()
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        work = Path(name)
        first = _build_once(root, work / "one", epoch)
        second = _build_once(root, work / "another" / "folder", epoch)
        if digests(first) != digests(second):
            different = sorted(set(digests(first).items()) ^ set(digests(second).items()))
            raise ReleaseError(f"two builds of one commit differ: {', '.join(sorted({name for name, _ in different}))}")
        check_contents(first, Tree(root, work / "one" / "tree"), version)
        _twine(first)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        made = [Path(shutil.copy2(path, out)) for path in first]
    sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests(made).items()))
    (out / SUMS).write_text(sums, encoding="utf-8")
    return made


def digests(archives: list[Path]) -> dict[str, str]:
    """Return the SHA-256 of each archive by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in archives}


def _build_once(root: Path, work: Path, epoch: str) -> list[Path]:
    """Build in a copy of the commit that holds no other file; each wheel is built from its source archive."""
    tree, out = work / "tree", work / "dist"
    tree.mkdir(parents=True)
    archive = work / "tree.tar"
    git(root, "archive", "--format=tar", f"--output={archive}", "HEAD")
    subprocess.run(["tar", "-xf", str(archive), "-C", str(tree)], check=True)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch, "PYTHONHASHSEED": "0"}
    environment.pop("NEMOTRON_FP8_NATIVE", None)
    for folder in PACKAGES.values():
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree / folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ReleaseError(f"the build of {folder or 'the repository'} fails:\n{done.stdout}{done.stderr}")
    return sorted(out.iterdir())


def _twine(archives: list[Path]) -> None:
    """Check the metadata as the upload does."""
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *map(str, archives)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"twine check --strict:\n{done.stdout}{done.stderr}")
