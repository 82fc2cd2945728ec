"""The tests' end of ``modelopt_host.py``, and two checkpoints side by side.

Use: ``python -m tests.inference.in_modelopt OURS THEIRS`` prints the tensors of two folders, of many layers and experts
one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.inference.layouts import config_of, read_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

HOST = Path(__file__).parent / "modelopt_host.py"
SIDE_FILE = "hf_quant_config.json"
FP8, FP8_NEMOTRON_H = "FP8_DEFAULT_CFG", "MAMBA_MOE_FP8_AGGRESSIVE_CFG"
"""Configurations of Model Optimizer: FP8 of every linear layer, and that of NVIDIA for hybrids of Mamba and experts."""


@dataclass(frozen=True)
class Folder:
    """A quantized checkpoint in the layout of Model Optimizer.

    Attributes:
        tensors: its tensors, by name.
        config: ``quantization_config`` of config.json.
        beside: hf_quant_config.json.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    beside: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Folder:
        """Read a folder."""
        beside = json.loads((folder / SIDE_FILE).read_text())
        return cls(read_folder(folder), config_of(folder)["quantization_config"], beside)

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor."""
        dtypes = {name: str(each.dtype).removeprefix("torch.") for name, each in self.tensors.items()}
        return {name: (dtypes[name], tuple(each.shape)) for name, each in self.tensors.items()}

    @property
    def quantized(self) -> set[str]:
        """Modules whose weight is FP8."""
        return {n.removesuffix(".weight") for n, (dtype, _) in self.shapes.items() if dtype == "float8_e4m3fn"}

    def scales(self, last: str) -> dict[str, torch.Tensor]:
        """Return the scales with a last name, by the rest of their names."""
        return {n.removesuffix(f".{last}"): each for n, each in self.tensors.items() if n.endswith(f".{last}")}


@dataclass(frozen=True)
class Export:
    """A checkpoint quantized by Model Optimizer.

    Attributes:
        folder: its export.
        amaxes: amax of each of its quantizers, and the dtype of the amax.
    """

    folder: Folder
    amaxes: dict[str, tuple[float, str]]


class Host:
    """A running ``modelopt_host.py``.

    Attributes:
        versions: its versions of libraries.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self.versions: dict[str, str] = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"Model Optimizer ended:\n{self._log.read_text()[-4000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def quantize(
        self, source: Path, destination: Path, sequences: list[list[int]], config: str = FP8, *, kv_cache: bool = True
    ) -> Export:
        """Quantize a checkpoint.

        Args:
            source: the checkpoint.
            destination: folder for the export.
            sequences: lists of token ids of the calibration.
            config: name of a configuration of Model Optimizer.
            kv_cache: True for scales of an FP8 cache, too.
        """
        job = {
            "source": str(source),
            "destination": str(destination),
            "sequences": sequences,
            "config": config,
            "kv_cache": kv_cache,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        amaxes = self._answer()["amaxes"]
        return Export(Folder.read(destination), {name: (amax, dtype) for name, (amax, dtype) in amaxes.items()})


@contextlib.contextmanager
def host(python: Path, log: Path) -> Iterator[Host]:
    """Start a host in the environment of ``python``, which writes to ``log`` what the libraries print."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        log.open("w") as output,
        # -P: the modules beside the host are those of the tests.
        subprocess.Popen(
            [python, "-P", HOST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            env=environment,
        ) as process,
    ):
        try:
            yield Host(process, log)
        finally:
            process.kill()


def side_by_side(ours: Folder, theirs: Folder) -> str:
    """Return a table of the tensors of two checkpoints: of names that differ in numbers only, the first."""
    one, other = ours.shapes, theirs.shapes
    rows: dict[tuple[str, Any, Any], list[str]] = {}
    for name in sorted({*one, *other}):
        kind = re.sub(r"\.\d+(?=\.)", ".N", name)
        rows.setdefault((kind, one.get(name), other.get(name)), []).append(name)
    lines = [("tensors", "ours", "theirs", "")]
    for (kind, own, their), names in sorted(rows.items()):
        lines.append((f"{len(names):5} {kind}", _cell(own), _cell(their), "" if own == their else "<- differs"))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join((*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3])).rstrip()
        for line in lines
    )


def _cell(found: tuple[str, tuple[int, ...]] | None) -> str:
    return "-" if found is None else f"{found[0]} {list(found[1])}"


def main() -> None:
    """Print two checkpoints side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    given = parser.parse_args()
    print(side_by_side(Folder.read(given.ours), Folder.read(given.theirs)))


if __name__ == "__main__":
    main()
