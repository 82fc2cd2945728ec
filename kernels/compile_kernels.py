"""Compile the CPU kernels beside their source: ``python kernels/compile_kernels.py``.

An installation does this by `build_hook.py`. The libraries need no other library, not even libc, so that they run on
every Linux distribution.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

NATIVE = Path(__file__).resolve().parent / "nemotron_fp8_kernels" / "native"


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
    if chosen := shlex.split(os.environ.get("CC", "")):
        return [*chosen, *_target()] if _is_zig(chosen) and "-target" not in chosen else chosen
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    return ziglang() if importlib.util.find_spec("ziglang") else None


def ziglang() -> list[str]:
    """Return the command of the C compiler in the package ``ziglang``, for any processor of this kind."""
    return [sys.executable, "-m", "ziglang", "cc", *_target()]


def _is_zig(command: list[str]) -> bool:
    return any("zig" in Path(part).name for part in command)


def _target() -> list[str]:
    """Return the option of zig for any processor of this kind; it compiles for this processor otherwise."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return ["-target", f"{machine}-{'macos' if sys.platform == 'darwin' else 'linux-musl'}"]


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
    if platform.machine().lower() in libraries.X86 and not _is_zig(command):
        command.append("-march=x86-64")  # a compiler may be configured for newer processors
    if sys.platform != "darwin":  # every program of macOS needs its system library
        command.append("-nostdlib")
    wanted = {level: libraries.library(level, folder) for level in libraries.levels()}
    for level, path in wanted.items():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            temporary = Path(made) / path.name
            options = [*libraries.FLAGS, *libraries.levels()[level], "-o", str(temporary), str(libraries.SOURCE)]
            subprocess.run([*command, *options], check=True, capture_output=True, text=True)
            if not temporary.is_file():
                raise OSError(f"the compiler made no library: {shlex.join(command)}")
            temporary.replace(path)
    for old in set(folder.glob("kernels-*.so")) - set(wanted.values()):
        old.unlink(missing_ok=True)  # another compilation may have removed it
    return list(wanted.values())


if __name__ == "__main__":
    try:
        print("\n".join(str(library) for library in compile_kernels()))
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: the CPU kernels do not compile: {getattr(error, 'stderr', None) or error}")
