"""Build, try and tag a release: ``python -m tools.release {dist,install,release}``; called by the Makefile.

dist builds and checks the archives of the last commit, of any version. install tries archives out in clean
environments. release does both for a commit that is a release, and with ``--tag`` creates its tag.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.release.build import build
from tools.release.contents import platform_of
from tools.release.errors import ReleaseError
from tools.release.install import VERSIONS, check_missing, try_all
from tools.release.state import check_state, committed_version, git, make_tag

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run a command of the release; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["dist", "install", "release"])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder of the archives")
    parser.add_argument("--python", action="append", help="version of Python to install on; may be repeated")
    parser.add_argument("--tools", type=Path, default=Path(".venv/bin"), help="folder with mypy")
    parser.add_argument("--tag", action="store_true", help="create the tag after all checks")
    parser.add_argument("--tagged", action="store_true", help="the tag exists, and must be at this commit")
    options = parser.parse_args(arguments)
    try:
        return _run(options, root)
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace, root: Path) -> int:
    wanted = options.python or list(VERSIONS)
    release = check_state(root, tagged=options.tagged) if options.command == "release" else None
    version = release.version if release else committed_version(root)
    if options.command == "install":
        archives = sorted(path for path in options.out.iterdir() if path.name.startswith("nemotron_fp8"))
    else:
        if not release and git(root, "status", "--porcelain"):
            print("note: changes that are not committed are not in the archives")
        archives = build(root, options.out)
        print("two builds are the same; contents, metadata and platform are as they should be:")
        for path in archives:
            platform = f", {platform_of(path)}" if path.suffix == ".whl" else ""
            print(f"  {path.name}: {path.stat().st_size:,} bytes{platform}")
        if not release:
            return 0
    missing = try_all(archives, version, wanted)
    for name in missing:
        check_missing(archives, name, options.tools)
        print(f"Python {name}: not found here; dependencies resolve, types hold; that it runs there is not shown")
    if release and options.tag:
        make_tag(root, release)
        print(f"tagged {release.tag}; publish it: git push origin {release.tag}")
    elif release:
        print(f"{release.tag} can be tagged: make release CONFIRM=1")
    return 0


if __name__ == "__main__":
    sys.exit(main())
