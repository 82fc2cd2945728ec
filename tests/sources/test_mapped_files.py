"""Mapped files: ranges that were released take no memory, whatever else a fault mapped beside them."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

from nemotron_fp8.sources.files import MappedFile

SIZE = 16 << 20
"""Bytes of the file."""


def resident(path: Path) -> int:
    """Return the resident bytes of the mappings of a file in this process."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs the lists of mappings of Linux")
@pytest.mark.parametrize("step", [1 << 16, 1 << 18])
def test_small_ranges_of_a_large_file_do_not_stay_resident(tmp_path: Path, step: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(SIZE))
    file = MappedFile(path)
    for offset in range(step // 2, SIZE, step):
        window = file.window(offset, mmap.PAGESIZE)
        assert window is not None
        assert window[0] == 0
        assert resident(path) > 0
        window.release()
        file.release(offset, mmap.PAGESIZE)
    assert resident(path) == 0
    file.close()
