"""Compile the CPU kernels beside their source: ``python tools/compile_kernels.py``.

An installation does this by `build_hook.py`. The libraries need no other library, not even libc, so that they run on
every Linux distribution.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

NATIVE = Path(__file__).resolve().parent.parent / "kernels" / "nemotron_fp8_kernels" / "native"


def load(path: Path) -> ModuleType:
    """Import a file by its path: a build must not import the package, which needs torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> list[str] | None:
    """Return the command of a C compiler: ``$CC``, cc, gcc, clang, or that of the package ``ziglang``; None without."""
    if os.environ.get("CC"):
        return os.environ["CC"].split()
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    return ziglang() if importlib.util.find_spec("ziglang") else None


def ziglang() -> list[str]:
    """Return the command of the C compiler in the package ``ziglang``, for any processor of this kind."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    system = "macos" if sys.platform == "darwin" else "linux-musl"
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-{system}"]


def compile_kernels(folder: Path = NATIVE) -> list[Path]:
    """Compile for every instruction set of this machine, and return the libraries; remove those of older sources.

    Raises:
        OSError: there is no compiler, or it cannot be run.
        subprocess.CalledProcessError: the compiler fails; ``stderr`` has its message.
    """
    libraries = load(NATIVE / "libraries.py")
    command = compiler()
    if command is None:
        raise OSError("there is no C compiler: install gcc or clang, or the Python package ziglang")
    if platform.machine().lower() in libraries.X86 and "ziglang" not in command:
        command.append("-march=x86-64")  # a compiler may be configured for newer processors
    if sys.platform != "darwin":  # every program of macOS needs its system library
        command.append("-nostdlib")
    wanted = {level: libraries.library(level, folder) for level in libraries.levels()}
    for level, path in wanted.items():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            temporary = Path(made) / path.name
            options = [*libraries.FLAGS, *libraries.levels()[level], "-o", str(temporary), str(libraries.SOURCE)]
            subprocess.run([*command, *options], check=True, capture_output=True, text=True)
            temporary.replace(path)
    for old in set(folder.glob("kernels-*.so")) - set(wanted.values()):
        old.unlink()
    return list(wanted.values())


if __name__ == "__main__":
    for library in compile_kernels():
        print(library)
