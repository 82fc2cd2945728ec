"""Download what a bare GPU machine lacks, and record the commit: ``python -m benchmarks.gpu.pack``.

The wheels and the commit go into ``.gpu``, which git ignores. Copied with the repository to a machine without a
network, they let ``python3 -m benchmarks.gpu`` install what is missing there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import packed
from benchmarks.gpu.wheels import WHEELS

REQUIREMENTS = Path(__file__).with_name("wheels.txt")
GLIBC = range(39, 16, -1)
"""Second numbers of the platform tags ``manylinux_2_N``: pip matches each exactly."""

MOST_BYTES = 64 << 20
"""Largest copy: all files of the repository that git does not ignore, and ``.gpu``."""


def main(arguments: list[str] | None = None) -> int:
    """Download the wheels; return 1 if the copy would be too large."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.pack", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--python", default="3.12", help="Python of the GPU machine (default 3.12)")
    options = parser.parse_args(arguments)
    download(options.python)
    packed.write(_git("rev-parse", "--short=12", "HEAD").strip() + "+changes" * bool(_changes()))
    wheels = sorted(WHEELS.iterdir())
    repository = sum(path.stat().st_size for path in _files() if path.is_file())
    added = sum(path.stat().st_size for path in wheels)
    print("\n".join(path.name for path in wheels))
    print(f"{len(wheels)} wheels of {added / 2**20:.1f} MiB, repository of {repository / 2**20:.1f} MiB")
    print(f"commit {packed.commit()}")
    if added + repository > MOST_BYTES:
        print(f"error: more than {MOST_BYTES >> 20} MiB", file=sys.stderr)
        return 1
    return 0


def download(python: str, folder: Path = WHEELS) -> None:
    """Download the wheels of ``wheels.txt`` for one Python on x86-64, without their dependencies."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    platforms = [f"--platform=manylinux_2_{number}_x86_64" for number in GLIBC]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64", "--platform=any"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={python}", "--implementation=cp", *platforms]
    subprocess.run([*command, "--dest", str(folder), "--requirement", str(REQUIREMENTS)], check=True)


def _files() -> list[Path]:
    """Return the files that travel: tracked ones, and others that are not ignored."""
    names = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [packed.ROOT / name for name in names if name]


def _changes() -> str:
    return _git("status", "--porcelain")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=packed.ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
