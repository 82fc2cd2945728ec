"""Hugging Face's library `kernels` loads the layout of `make hf-kernels`, and gets the bytes of the reference."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_fp8_kernels import reference
from tools import hf_kernels

ROOT = Path(__file__).resolve().parents[2]
PYTHON = str(Path(os.environ.get("HF_KERNELS_PYTHON", ROOT / ".venv-hf-kernels" / "bin" / "python")).absolute())
CLIENT = Path(__file__).with_name("hf_kernels_client.py")


def load(repository: Path, way: str, folder: Path) -> dict[str, Any]:
    """Run the client outside of the repository of this project, with nothing of it to import."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if way == "triton":
        environment["TRITON_INTERPRET"] = "1"
    command = [PYTHON, str(CLIENT), str(repository), way]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def expected(name: str) -> str:
    granularity, rounding = name.split(", ")
    weights = torch.randn(130, 300, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    results = reference.quantize(weights, granularity, rounding=rounding)  # type: ignore[arg-type]
    data = b"".join(bytes(tensor.flatten().view(torch.uint8).tolist()) for tensor in results)
    return hashlib.sha256(data).hexdigest()


@pytest.mark.hf_kernels
@pytest.mark.parametrize("way", ["torch", "triton"])
def test_the_library_loads_the_layout(way: str, tmp_path: Path) -> None:
    """The variant of this machine, whose digests hold; no installed package of ours takes part."""
    hf_kernels.lay_out(tmp_path / "repository")
    found = load(tmp_path / "repository", way, tmp_path)
    assert (found["variant"], found["version"], found["ours"]) == ("torch-cpu", hf_kernels.INTERFACE, [])
    assert len(found["digests"]) == 6
    assert found["digests"] == {name: expected(name) for name in found["digests"]}


@pytest.mark.hf_kernels
def test_the_library_loads_the_variant_for_cuda(tmp_path: Path) -> None:
    """By its path, since this machine may have no device; on the CPU, torch computes."""
    _, cuda = hf_kernels.lay_out(tmp_path / "repository")
    found = load(cuda, "torch", tmp_path)
    assert found["variant"] == "torch-cuda"
    assert found["digests"] == {name: expected(name) for name in found["digests"]}


def test_the_layout(tmp_path: Path) -> None:
    """Each variant is the whole package without compiled code; an older layout leaves nothing."""
    folder = tmp_path / "repository"
    (folder / "build" / "torch-old").mkdir(parents=True)
    hf_kernels.lay_out(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "README.md", "build"]
    assert sorted(path.name for path in (folder / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    package = hf_kernels.PACKAGE
    wanted = {path.relative_to(package) for path in package.rglob("*") if path.suffix in (".py", ".c", ".typed")}
    for variant in (folder / "build").iterdir():
        files = {path.relative_to(variant) for path in variant.rglob("*") if path.is_file()}
        assert files == wanted | {Path("metadata.json")}
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["id"].isidentifier()
        assert metadata["backend"] == {"type": variant.name.removeprefix("torch-")}
        assert len(metadata["digest"]["files"]) == len(wanted)
