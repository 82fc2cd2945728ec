"""Build hook of hatchling: compiles the CPU kernels into a wheel, or beside their source for an editable installation.

Without a C compiler, ``ziglang`` of the package index compiles. ``NEMOTRON_FP8_NATIVE=0`` builds without compiled
kernels; the package then uses torch on CPUs.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from types import ModuleType


class CompiledKernels(BuildHookInterface):  # type: ignore[type-arg]  # its parameter is the configuration of a builder
    """Compiles the kernels before a wheel is built."""

    def dependencies(self) -> list[str]:
        """Return the packages that the build needs."""
        return [] if not self._wanted() or self._tool().compiler() else ["ziglang"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and add the libraries to the wheel, which is then one of this platform."""
        if not self._wanted():
            return
        try:
            made = self._tool().compile_kernels()
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            message = (
                f"the CPU kernels do not compile: {reason}\nNEMOTRON_FP8_NATIVE=0 installs without them, for torch"
            )
            raise RuntimeError(message) from error
        build_data["artifacts"] += [path.relative_to(self.root).as_posix() for path in made]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"

    def _wanted(self) -> bool:
        return self.target_name == "wheel" and os.environ.get("NEMOTRON_FP8_NATIVE") != "0"

    def _tool(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("compile_kernels", Path(self.root, "compile_kernels.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _platform() -> str:
    """Return the platform of a wheel whose libraries need no other library."""
    if sys.platform == "linux":
        return f"manylinux_2_17_{platform.machine()}.musllinux_1_1_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
