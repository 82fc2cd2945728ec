"""Contents of wheels and source archives: exactly the files of the commit, and what a build adds."""

from __future__ import annotations

import base64
import csv
import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from typing import TYPE_CHECKING

from tools.release.errors import ReleaseError
from tools.release.state import git

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PACKAGES = {"nemotron_fp8_kernels": "kernels", "nemotron_fp8": ""}
"""Folder of each package in the repository; the first needs no other."""
BESIDE = {
    "nemotron_fp8_kernels": ("LICENSE", "README.md", "build_hook.py", "compile_kernels.py", "pyproject.toml"),
    "nemotron_fp8": ("CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "tools/metadata_hook.py"),
}
"""Files of a source archive beside those of the package."""
MADE = ("PKG-INFO", ".gitignore")
"""Files that a build adds to a source archive."""
INFO = ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")


@dataclass(frozen=True)
class Tree:
    """The committed files.

    Attributes:
        root: the repository.
        copy: folder with the files of its last commit.
    """

    root: Path
    copy: Path

    def files(self, package: str) -> set[str]:
        """Return the committed files of a package, by their names in its wheel."""
        folder = "/".join(part for part in (PACKAGES[package], package) if part)
        names = git(self.root, "ls-tree", "-r", "-z", "--name-only", "HEAD", "--", f"{folder}/").split("\0")
        return {name.removeprefix(PACKAGES[package]).lstrip("/") for name in names if name}

    def libraries(self) -> set[str]:
        """Return the compiled kernels of this kind of machine, by their names in a wheel."""
        spec = spec_from_file_location(
            "libraries", self.copy / "kernels" / "nemotron_fp8_kernels" / "native" / "libraries.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return {f"nemotron_fp8_kernels/native/{module.library(level).name}" for level in module.levels()}


def check_contents(archives: Iterable[Path], tree: Tree, version: str) -> None:
    """Check all archives of a release.

    Raises:
        ReleaseError: an archive is missing, or has files, metadata or a tag that it should not have.
    """
    found = {path.name: path for path in archives}
    for package in PACKAGES:
        source = found.pop(f"{package}-{version}.tar.gz", None)
        wheels = [name for name in found if name.startswith(f"{package}-{version}-") and name.endswith(".whl")]
        if source is None or len(wheels) != 1:
            raise ReleaseError(f"{package} {version} has not one source archive and one wheel: {sorted(found)}")
        check_source(source, package, tree.files(package), version)
        libraries = tree.libraries() if package == "nemotron_fp8_kernels" else set()
        check_wheel(found.pop(wheels[0]), package, tree.files(package), libraries, version)
    if found:
        raise ReleaseError(f"archives of another version: {', '.join(sorted(found))}")


def check_source(path: Path, package: str, files: set[str], version: str) -> None:
    """Check the names in a source archive."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    if strange := [member.name for member in members if not member.isfile()]:
        raise ReleaseError(f"{path.name} has a link or device: {strange[0]}")
    top = f"{package}-{version}/"
    _same(path.name, {member.name.removeprefix(top) for member in members}, {*files, *BESIDE[package], *MADE})


def check_wheel(path: Path, package: str, files: set[str], libraries: set[str], version: str) -> None:
    """Check names, digests, metadata and platform of a wheel."""
    info = f"{package}-{version}.dist-info"
    wanted = {*files, *libraries, *(f"{info}/{name}" for name in INFO)}
    if package == "nemotron_fp8":
        wanted.add(f"{info}/entry_points.txt")
    with zipfile.ZipFile(path) as archive:
        _same(path.name, set(archive.namelist()), wanted)
        for name, digest, _ in csv.reader(StringIO(archive.read(f"{info}/RECORD").decode())):
            if name != f"{info}/RECORD":
                taken = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
                if digest != f"sha256={taken}":
                    raise ReleaseError(f"{path.name}: RECORD has another digest of {name}")
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
    if f"{package}/py.typed" not in files:
        raise ReleaseError(f"{path.name} has no py.typed: its types would be ignored")
    needed = f"nemotron-fp8-kernels=={version}"
    if package == "nemotron_fp8" and needed not in metadata.get_all("Requires-Dist", []):
        raise ReleaseError(f"{path.name} does not need {needed}")
    _check_platform(path, pure=not libraries)


def platform_of(path: Path) -> str:
    """Return the platform part of the name of a wheel."""
    return path.stem.rsplit("-", 1)[1]


def _check_platform(path: Path, *, pure: bool) -> None:
    """Check that the name of a wheel promises what its libraries keep."""
    platform = platform_of(path)
    if pure != (platform == "any"):
        raise ReleaseError(f"{path.name} has compiled code, or the name of a wheel that has some")
    if pure or "linux" not in platform:
        return
    command = [sys.executable, "-m", "auditwheel", "show", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = " ".join(done.stdout.split())
    # Then any tag of manylinux and musllinux is true: there is no library whose version could be too old.
    for promise in ("requires no external shared libraries", "references no external versioned symbols"):
        if promise not in told:
            raise ReleaseError(f"{path.name}: auditwheel does not find that it {promise}: {told}{done.stderr}")


def _same(archive: str, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        extra, missing = sorted(found - wanted), sorted(wanted - found)
        raise ReleaseError(f"{archive}: {len(extra)} files too many {extra[:3]}, {len(missing)} missing {missing[:3]}")
