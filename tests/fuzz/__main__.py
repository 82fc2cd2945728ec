"""Run one input again and keep its folder: ``python -m tests.fuzz SEED:FORMAT:INDEX``."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from tests.fuzz import harness, sweep
from tests.fuzz.seeds import Seeds


def main() -> None:
    """Run the input, print what it was, how it ended, and what is wrong."""
    parser = argparse.ArgumentParser(description="Run one input of the fuzz suite again, and keep its folder.")
    parser.add_argument("name", metavar="SEED:FORMAT:INDEX")
    parser.add_argument("--folder", type=Path, help="where to put the input's files; a temporary folder otherwise")
    parser.add_argument("--seconds", type=float, default=harness.SECONDS, help="limit of elapsed time")
    parser.add_argument("--write-only", action="store_true", help="write the files, and do not run the command")
    arguments = parser.parse_args()
    harness.preload()
    base = (arguments.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))).resolve()
    folder = base / "input"
    if folder.exists():
        harness.clean(folder)
    _show(arguments, Seeds(base), folder)


def _show(arguments: argparse.Namespace, seeds: Seeds, folder: Path) -> None:
    if arguments.write_only:
        given = sweep.make(arguments.name, seeds)
        harness.write_tree(folder, given.tree)
        print(f"folder   {folder}\ncommand  {shlex.join(['nemotron-fp8', *given.command])}")
        return
    given, ended, wrong = sweep.one(arguments.name, seeds, folder, arguments.seconds)
    print(f"folder   {folder}")
    print(f"command  {shlex.join(['nemotron-fp8', *map(ascii_or_plain, given.command)])}")
    for key, value in given.environment.items():
        print(f"variable {key}={value!a}")
    for number, state in given.streams.items():
        print(f"stream   {number} is {state}")
    print(f"ended    exit code {ended.code}, {ended.seconds:.2f} s, {ended.memory >> 20:,} MiB")
    for name, text in (("stdout", ended.out), ("stderr", ended.err), ("stacks", ended.where)):
        print(f"--- {name}")
        print(ascii_or_plain(text[:20_000]))
    print("--- verdict")
    print("\n".join(wrong) or "nothing is wrong")
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    sys.exit(bool(wrong))


def ascii_or_plain(text: str) -> str:
    """Return text that is safe to print."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


if __name__ == "__main__":
    main()
