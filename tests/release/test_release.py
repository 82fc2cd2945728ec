"""A release of a version of its own: built, installed, used and tagged, in a copy of the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.release

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(Path(os.environ.get("RELEASE_PYTHON", ROOT / ".venv-release" / "bin" / "python")).absolute())
IDENTITY = {"GIT_AUTHOR_NAME": "me", "GIT_AUTHOR_EMAIL": "me@example.com"}
IDENTITY |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in IDENTITY.items()}
VERSION = "7.8.9"


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **IDENTITY}).stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone without a remote repository, whose last commit is a release."""
    root = tmp_path_factory.mktemp("release") / "copy"
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(ROOT), str(root)], check=True)
    git(root, "remote", "remove", "origin")
    for name, pattern, text in (
        ("nemotron_fp8/_version.py", r'(?m)^__version__ = ".*"$', f'__version__ = "{VERSION}"'),
        ("CHANGELOG.md", r"(?m)^## Unreleased$", f"## {VERSION} (2026-11-28)"),
    ):
        path = root / name
        changed, count = re.subn(pattern, text, path.read_text(encoding="utf-8"), count=1)
        assert count == 1, f"{name} has no {pattern}"
        path.write_text(changed, encoding="utf-8")
    git(root, "commit", "--all", "--quiet", "--message", "Release")
    return root


def release(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    version = "{}.{}".format(*sys.version_info)
    command = [TOOL, "-m", "tools.release", "release", "--python", version, *options]
    environment = {**os.environ, **IDENTITY}
    environment.pop("PYTHONPATH", None)
    # The tested versions: torch's build for CPUs where the index has it, and not 3 GB for CUDA.
    environment["PIP_CONSTRAINT"] = str(root / "constraints.txt")
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_a_release_is_built_installed_used_and_tagged(copy: Path) -> None:
    done = release(copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"v{VERSION} can be tagged: make release CONFIRM=1\n")
    assert git(copy, "tag") == ""
    names = {path.name for path in (copy / "dist").iterdir()}
    kernels = [name for name in names if name.startswith("nemotron_fp8_kernels-") and name.endswith(".whl")]
    assert names == {
        "SHA256SUMS",
        f"nemotron_fp8-{VERSION}-py3-none-any.whl",
        f"nemotron_fp8-{VERSION}.tar.gz",
        f"nemotron_fp8_kernels-{VERSION}.tar.gz",
        *kernels,
    }
    first = (copy / "dist" / "SHA256SUMS").read_bytes()
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=copy / "dist", check=True)

    tagged = release(copy, "--tag")
    assert tagged.returncode == 0, tagged.stderr
    assert tagged.stdout.endswith(f"tagged v{VERSION}; publish it: git push origin v{VERSION}\n")
    assert git(copy, "cat-file", "-t", f"v{VERSION}") == "tag\n"
    assert (copy / "dist" / "SHA256SUMS").read_bytes() == first

    again = release(copy, "--tag")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"error: v{VERSION} exists: a released version is never made again; choose the next\n"


def test_the_card_of_a_released_version_names_it(copy: Path, tmp_path: Path) -> None:
    script = f"""
from nemotron_fp8.cli.main import cli

cli(["demo", {str(tmp_path / "try")!r}], standalone_mode=False)
cli(["quantize", {str(tmp_path / "try" / "nemotron-tiny")!r}, {str(tmp_path / "DST")!r}], standalone_mode=False)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "kernels")])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path, capture_output=True)
    card = (tmp_path / "DST" / "README.md").read_text(encoding="utf-8")
    assert f"\npip install nemotron_fp8=={VERSION}\nnemotron-fp8 quantize SRC DST\n" in card
