"""A release is refused in every state but that of a release, and with any archive that is not the commit."""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools.release import contents, install
from tools.release.__main__ import main
from tools.release.errors import ReleaseError
from tools.release.state import check_state, git, make_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).resolve().parents[2]
CHANGES = (
    "# Changelog\n\n## Unreleased\n\n## 1.2.0 (2026-11-28)\n\n- New.\n- Newer.\n\n## 1.1.0 (2026-01-01)\n\n- Old.\n"
)
GIT = ("-c", "user.name=me", "-c", "user.email=me@example.com")


def commit(root: Path) -> None:
    subprocess.run(["git", "-C", str(root), "add", "--all"], check=True)
    subprocess.run(["git", "-C", str(root), *GIT, "commit", "--quiet", "--message", "A change"], check=True)


def write_version(root: Path, version: str) -> None:
    (root / "nemotron_fp8" / "_version.py").write_text(f'__version__ = "{version}"\n')


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose last commit is a release."""
    for name, value in (("GIT_COMMITTER_NAME", "me"), ("GIT_COMMITTER_EMAIL", "me@example.com")):
        monkeypatch.setenv(name, value)
    root = tmp_path / "repository"
    (root / "nemotron_fp8").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    write_version(root, "1.2.0")
    (root / "CHANGELOG.md").write_text(CHANGES)
    commit(root)
    return root


def test_a_release_is_tagged_once_with_its_changes(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = check_state(repository)
    assert (release.version, release.changes) == ("1.2.0", "- New.\n- Newer.")
    with pytest.raises(ReleaseError, match=r"v1\.2\.0 is not the tag of this commit"):
        check_state(repository, tagged=True)
    make_tag(repository, release)
    assert git(repository, "cat-file", "-t", "v1.2.0").strip() == "tag"
    assert git(repository, "tag", "--list", "--format=%(contents)").strip() == "nemotron_fp8 1.2.0\n\n- New.\n- Newer."
    assert check_state(repository, tagged=True) == release
    assert main(["release"], repository) == 1
    assert capsys.readouterr().err == (
        "error: v1.2.0 exists: a released version is never made again; choose the next\n"
    )


def remote_tag(root: Path) -> None:
    """Tag the release in a repository that this one is a clone of, and not here."""
    origin = root.parent / "origin"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(root), str(origin)], check=True)
    subprocess.run(["git", "-C", str(origin), "tag", "v1.2.0"], check=True)
    subprocess.run(["git", "-C", str(root), "remote", "add", "origin", str(origin)], check=True)


def lost_remote(root: Path) -> None:
    subprocess.run(["git", "-C", str(root), "remote", "add", "origin", str(root.parent / "none")], check=True)


def changed(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        path.write_text(path.read_text().replace(old, new))
        commit(root)

    return change


VERSION_FILE = "nemotron_fp8/_version.py"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a changed file": (lambda root: write_version(root, "1.3.0"), "1 files are not committed, the first 'nemotron_fp8"),
    "a new file": (lambda root: (root / "new").touch(), "1 files are not committed, the first 'new'"),
    "a version between releases": (changed(VERSION_FILE, "1.2.0", "1.3.0.dev0"), "1.3.0.dev0 is not the version of a"),
    "a local version": (changed(VERSION_FILE, "1.2.0", "1.2.0+cpu"), "set __version__ in nemotron_fp8/_version.py"),
    "a version in another form": (changed(VERSION_FILE, "1.2.0", "1.2.0-rc1"), "1.2.0-rc1 is not the version of a"),
    "no version": (changed(VERSION_FILE, "__version__", "version"), "has no line __version__"),
    "a version without changes": (changed(VERSION_FILE, "1.2.0", "1.2.1"), r"heading '## 1.2.1 \(YYYY-MM-DD\)'"),
    "an empty section": (changed("CHANGELOG.md", "- New.\n- Newer.\n\n", ""), "CHANGELOG.md has no text"),
    "no date": (changed("CHANGELOG.md", " (2026-11-28)", ""), "CHANGELOG.md has no text"),
    "changes under Unreleased": (
        changed("CHANGELOG.md", "Unreleased\n", "Unreleased\n\n- More.\n"),
        "under Unreleased",
    ),
    "a tag": (lambda root: make_tag(root, check_state(root)), "v1.2.0 exists: "),
    "a tag in the remote repository": (remote_tag, "v1.2.0 exists in origin"),
    "a remote repository that does not answer": (lost_remote, "git ls-remote --tags: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_states_are_refused(name: str, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One error line, before anything is built."""
    change, message = REFUSED[name]
    change(repository)
    tags = git(repository, "tag")
    with pytest.raises(ReleaseError, match=message):
        check_state(repository)
    assert main(["release", "--tag", "--out", str(repository.parent / "dist")], repository) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert git(repository, "tag") == tags
    assert not (repository.parent / "dist").exists()


FILES = {"nemotron_fp8/__init__.py": b"1", "nemotron_fp8/py.typed": b""}
INFO = "nemotron_fp8-1.2.0.dist-info"
METADATA = b"Metadata-Version: 2.4\nName: nemotron_fp8\nRequires-Dist: nemotron-fp8-kernels==1.2.0\n\ntext\n"


def write_wheel(folder: Path, entries: Mapping[str, bytes], *, recorded: Mapping[str, bytes] | None = None) -> Path:
    """Write a wheel; ``recorded`` are the contents that RECORD has the digests of."""
    path = folder / "nemotron_fp8-1.2.0-py3-none-any.whl"
    lines = []
    for name, data in {**entries, **(recorded or {})}.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        archive.writestr(f"{INFO}/RECORD", "".join([*lines, f"{INFO}/RECORD,,\n"]))
    return path


WHEEL = {
    **FILES,
    f"{INFO}/METADATA": METADATA,
    f"{INFO}/WHEEL": b"",
    f"{INFO}/entry_points.txt": b"",
    f"{INFO}/licenses/LICENSE": b"",
}


def test_a_wheel_is_exactly_the_commit(tmp_path: Path) -> None:
    def check(entries: Mapping[str, bytes], **how: Mapping[str, bytes]) -> None:
        contents.check_wheel(write_wheel(tmp_path, entries, **how), "nemotron_fp8", set(FILES), set(), "1.2.0")

    check(WHEEL)
    for name in ("tests/test_a.py", "nemotron_fp8/kernels.so", "nemotron_fp8/notes.txt", "build_hook.py"):
        with pytest.raises(ReleaseError, match=rf"1 files too many \['{name}'\], 0 missing"):
            check({**WHEEL, name: b""})
    for name in WHEEL:
        with pytest.raises(ReleaseError, match=r"0 files too many \[\], 1 missing"):
            check({key: data for key, data in WHEEL.items() if key != name})
    with pytest.raises(ReleaseError, match="RECORD has another digest of nemotron_fp8/__init__"):
        check(WHEEL, recorded={"nemotron_fp8/__init__.py": b"2"})
    with pytest.raises(ReleaseError, match=r"does not need nemotron-fp8-kernels==1\.2\.0"):
        check({**WHEEL, f"{INFO}/METADATA": METADATA.replace(b"1.2.0", b"1.1.0")})


def test_a_wheel_without_types_or_with_another_platform_is_refused(tmp_path: Path) -> None:
    untyped = {name: data for name, data in WHEEL.items() if "py.typed" not in name}
    with pytest.raises(ReleaseError, match=r"has no py\.typed"):
        contents.check_wheel(
            write_wheel(tmp_path, untyped), "nemotron_fp8", set(FILES) - {"nemotron_fp8/py.typed"}, set(), "1.2.0"
        )
    library = "nemotron_fp8/kernels.so"
    with pytest.raises(ReleaseError, match="has compiled code, or the name"):  # a library in a wheel for every platform
        contents.check_wheel(
            write_wheel(tmp_path, {**WHEEL, library: b""}), "nemotron_fp8", set(FILES), {library}, "1.2.0"
        )


def test_a_source_archive_is_exactly_the_commit(tmp_path: Path) -> None:
    path = tmp_path / "nemotron_fp8-1.2.0.tar.gz"

    def check(names: set[str], link: str = "") -> None:
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(f"nemotron_fp8-1.2.0/{name}"), io.BytesIO())
            if link:
                member = tarfile.TarInfo(f"nemotron_fp8-1.2.0/{link}")
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)
        contents.check_source(path, "nemotron_fp8", set(FILES), "1.2.0")

    whole = {*FILES, *contents.BESIDE["nemotron_fp8"], *contents.MADE}
    check(whole)
    with pytest.raises(ReleaseError, match=r"1 files too many \['\.env'\], 0 missing"):
        check({*whole, ".env"})
    with pytest.raises(ReleaseError, match=r"0 files too many \[\], 1 missing \['LICENSE'\]"):
        check(whole - {"LICENSE"})
    with pytest.raises(ReleaseError, match="has a link or device"):
        check(whole - {"LICENSE"}, link="LICENSE")


def test_archives_of_other_versions_are_refused(tmp_path: Path) -> None:
    tree = contents.Tree(ROOT, ROOT)
    assert "nemotron_fp8/py.typed" in tree.files("nemotron_fp8")
    assert "nemotron_fp8_kernels/py.typed" in tree.files("nemotron_fp8_kernels")
    with pytest.raises(ReleaseError, match=r"nemotron_fp8_kernels 1\.2\.0 has not one source archive and one wheel"):
        contents.check_contents([write_wheel(tmp_path, WHEEL)], tree, "1.2.0")


def test_pythons_are_found_by_what_they_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shim of pyenv has the name of a version that it may not start."""
    shims, versions = tmp_path / "shims", tmp_path / "versions" / "3.97.1" / "bin"
    for folder in (shims, versions):
        folder.mkdir(parents=True)
    for path, text in (
        (shims / "python3.97", "exit 127"),
        (shims / "python3.98", "echo 3.98"),
        (versions / "python3.97", "echo 3.97"),
    ):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(shims))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert install.find_python("3.98") == str(shims / "python3.98")
    assert install.find_python("3.97") == str(versions / "python3.97")
    assert install.find_python("3.99") is None
    with pytest.raises(ReleaseError, match=r"no Python is found of 3\.99"):
        install.try_all([], "1.2.0", ["3.99"])


def test_both_packages_have_one_license_text() -> None:
    assert (ROOT / "kernels" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
