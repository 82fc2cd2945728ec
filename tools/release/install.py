"""Installations of the built archives in clean environments, and a conversion with each."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.release.errors import ReleaseError

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
"""Versions of Python that a release is tried on where they are found."""
LOOK = """
import sys
from importlib import metadata
from pathlib import Path

import nemotron_fp8
import nemotron_fp8_kernels
from nemotron_fp8_kernels import native

for module in (nemotron_fp8, nemotron_fp8_kernels):
    home = Path(module.__file__).resolve()
    assert Path(sys.prefix).resolve() in home.parents, f"{module.__name__} came from {home}"
    assert (home.parent / "py.typed").is_file(), f"{module.__name__} ships no py.typed"
    assert metadata.version(module.__name__) == nemotron_fp8.__version__ == sys.argv[1], "versions differ"
assert native.load() is not None, "there are no compiled kernels for this machine"
"""


def find_python(version: str) -> str | None:
    """Return the interpreter of a version: on the PATH, or one of pyenv; None without."""
    candidates = [shutil.which(f"python{version}"), sys.executable]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
    for path in candidates:
        if path and _version_of(path) == version:
            return path
    return None


def _version_of(python: str) -> str:
    """Return the version of an interpreter; nothing if it does not start, as a shim of pyenv may not."""
    ask = "import sys; print('{}.{}'.format(*sys.version_info))"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def install(archives: list[Path], version: str, python: str) -> str:
    """Install archives in a new environment, convert there, and return a digest of the result's bytes.

    Args:
        archives: wheels, or source archives, of both packages.
        version: their version.
        python: interpreter of the environment.

    Raises:
        ReleaseError: a step fails.
    """
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        work = Path(name)
        venv, elsewhere = work / "venv", work / "elsewhere"
        elsewhere.mkdir()
        _run([python, "-m", "venv", str(venv)], elsewhere)
        inside, tool = str(venv / "bin" / "python"), str(venv / "bin" / "nemotron-fp8")
        pip = [inside, "-m", "pip", "--disable-pip-version-check"]
        _run([*pip, "install", "--quiet", "--no-compile", *(str(path.resolve()) for path in archives)], elsewhere)
        _run([*pip, "check"], elsewhere)
        _run([inside, "-c", LOOK, version], elsewhere)
        if version not in _run([tool, "--version"], elsewhere):
            raise ReleaseError(f"{tool} --version does not print {version}")
        _run([tool, "demo", "try"], elsewhere)
        _run([tool, "quantize", "try/nemotron-tiny", "DST"], elsewhere)
        _run([tool, "verify", "try/nemotron-tiny", "DST"], elsewhere)
        return _digest(elsewhere / "DST")


def try_all(archives: list[Path], version: str, wanted: list[str]) -> list[str]:
    """Install the wheels on each Python that is found, and the source archives on the first; return the others.

    Args:
        archives: wheels and source archives of both packages.
        version: their version.
        wanted: versions of Python, or interpreters.

    Raises:
        ReleaseError: no Python is found, a step fails, or the results differ.
    """
    wheels = [path for path in archives if path.suffix == ".whl"]
    found = {name: python for name in wanted if (python := find_python(name))}
    if not found:
        raise ReleaseError(f"no Python is found of {', '.join(wanted)}")
    results: dict[str, str] = {}
    tries = [(f"Python {name}, wheels", wheels, python) for name, python in found.items()]
    name, python = next(iter(found.items()))
    tries.append((f"Python {name}, source archives", [path for path in archives if path not in wheels], python))
    for title, files, interpreter in tries:
        started = time.monotonic()
        results[title] = install(files, version, interpreter)
        print(f"{title}: installed, converted, verified in {time.monotonic() - started:.0f} s", flush=True)
    if len(set(results.values())) != 1:
        raise ReleaseError(f"the results differ: {results}")
    return [name for name in wanted if name not in found]


def check_missing(archives: list[Path], python: str, tools: Path) -> None:
    """Check what can be checked for a Python that is not here: its dependencies resolve, and the types hold.

    This does not show that the package runs there.

    Args:
        archives: the archives of a release.
        python: version of Python.
        tools: folder with ``mypy``.
    """
    wheels = [str(path.resolve()) for path in archives if path.suffix == ".whl"]
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--only-binary=:all:", f"--python-version={python}", f"--target={name}"]
        _run([*command, *wheels], Path(name))
    _run([str(tools / "mypy"), f"--python-version={python}"], Path(__file__).resolve().parents[2])


def _run(command: list[str], folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "NEMOTRON_FP8_"))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(command)[:300]}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
