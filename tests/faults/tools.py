"""Tools of the machine that the rows need, and those that are missing here."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

STRACE, TMPFS = "strace", "tmpfs"


def missing() -> dict[str, str]:
    """Why a tool cannot be used here, by tool; empty where all can."""
    found = {STRACE: _strace(), TMPFS: _tmpfs()}
    return {tool: why for tool, why in found.items() if why}


def _strace() -> str:
    if not shutil.which("strace"):
        return "strace is missing (Debian, Ubuntu: apt-get install strace)"
    injects = ["strace", "-qq", "-o", os.devnull, "-einject=getcwd:error=EIO", "-etrace=getcwd", "true"]
    if subprocess.run(injects, capture_output=True, check=False).returncode:
        return "strace may not trace here (it needs ptrace and -e inject, strace 4.17)"
    # Forks are traced by attaching, which a system may forbid on its own.
    sleeper = subprocess.Popen(["sleep", "60"])
    attach = ["strace", "-qq", "-o", os.devnull, "-p", str(sleeper.pid)]
    with subprocess.Popen(attach, stderr=subprocess.DEVNULL) as tracer:
        try:
            tracer.wait(0.5)
            allowed = False
        except subprocess.TimeoutExpired:
            allowed = True
            tracer.terminate()
    sleeper.kill()
    sleeper.wait()
    return "" if allowed else "strace may not attach to a process here (as root, or with kernel.yama.ptrace_scope=0)"


def _tmpfs() -> str:
    with tempfile.TemporaryDirectory() as name:
        mount = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", name], capture_output=True, text=True, check=False)
        if mount.returncode:
            return f"a tmpfs cannot be mounted here (as root, or with unshare -rm): {mount.stderr.strip()}"
        subprocess.run(["umount", name], check=True)
    return ""


def own_name_space() -> list[str]:
    """The command that gives a process a name space in which it may mount; empty where none is needed or none works."""
    command = ["unshare", "-rm"]
    if not os.geteuid() or not shutil.which(command[0]):
        return []
    works = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if works else []
