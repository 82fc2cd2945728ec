"""State of the repository that a release demands: committed, a released version, its changes, no such tag."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.release.errors import ReleaseError

if TYPE_CHECKING:
    from pathlib import Path

VERSION_FILE = "nemotron_fp8/_version.py"
CHANGES = "CHANGELOG.md"
VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)
RELEASED = re.compile(r"(?:0|[1-9]\d*)(?:\.(?:0|[1-9]\d*)){2}(?:(?:a|b|rc)(?:0|[1-9]\d*))?")
"""Versions of releases, in the normal form of package indexes."""
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Release:
    """A release that can be made.

    Attributes:
        version: version of both packages.
        commit: full id of the commit.
        changes: text of the release in the changelog.
    """

    version: str
    commit: str
    changes: str

    @property
    def tag(self) -> str:
        """Name of the tag."""
        return f"v{self.version}"


def git(root: Path, *arguments: str) -> str:
    """Run git in a repository and return its output.

    Raises:
        ReleaseError: git fails.
    """
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"git {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout


def committed_version(root: Path) -> str:
    """Return the version of the last commit."""
    found = VERSION.search(git(root, "show", f"HEAD:{VERSION_FILE}"))
    if found is None:
        raise ReleaseError(f"{VERSION_FILE} has no line __version__ = ...")
    return found.group(1)


def check_state(root: Path, *, tagged: bool = False) -> Release:
    """Check that the last commit is a release that can be tagged.

    Args:
        root: the repository.
        tagged: True if the tag exists, and must be at the last commit (a build from the tag).

    Raises:
        ReleaseError: the state is not that of a release.
    """
    if changed := git(root, "status", "--porcelain").splitlines():
        raise ReleaseError(
            f"{len(changed)} files are not committed, the first {changed[0][3:]!r}: commit or remove them"
        )
    version = committed_version(root)
    if not RELEASED.fullmatch(version):
        raise ReleaseError(
            f"{version} is not the version of a release: set __version__ in {VERSION_FILE} to one such as 1.2.0"
        )
    release = Release(version, git(root, "rev-parse", "HEAD").strip(), changes_of(root, version))
    _check_tag(root, release, tagged=tagged)
    return release


def changes_of(root: Path, version: str) -> str:
    """Return the text about a version in the committed changelog.

    Raises:
        ReleaseError: there is none, or changes are still under Unreleased.
    """
    parts = HEADING.split(git(root, "show", f"HEAD:{CHANGES}"))
    sections = dict(zip(parts[1::2], (text.strip() for text in parts[2::2]), strict=True))
    if sections.get("Unreleased"):
        raise ReleaseError(f"{CHANGES} has changes under Unreleased: give that heading the version and date")
    for title, text in sections.items():
        if re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", title) and text:
            return text
    raise ReleaseError(f"{CHANGES} has no text under a heading '## {version} (YYYY-MM-DD)'")


def _check_tag(root: Path, release: Release, *, tagged: bool) -> None:
    known = git(root, "tag", "--list", release.tag).strip()
    if tagged:
        if not known or git(root, "rev-parse", f"{release.tag}^{{commit}}").strip() != release.commit:
            raise ReleaseError(f"{release.tag} is not the tag of this commit, {release.commit[:12]}")
        return
    if known:
        raise ReleaseError(f"{release.tag} exists: a released version is never made again; choose the next")
    if "origin" in git(root, "remote").split() and git(root, "ls-remote", "--tags", "origin", release.tag).strip():
        raise ReleaseError(f"{release.tag} exists in origin: a released version is never made again; choose the next")


def make_tag(root: Path, release: Release) -> None:
    """Create the annotated tag, with the changes as its text."""
    git(root, "tag", "--annotate", "--cleanup=verbatim", "--message", _message(release), release.tag, release.commit)


def _message(release: Release) -> str:
    return f"nemotron_fp8 {release.version}\n\n{release.changes}\n"
