"""Where checkpoints come from: a name as a person gives it to an inventory and a way to open its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8.source import read_folder

if TYPE_CHECKING:
    import os

    from nemotron_fp8.read import Opener
    from nemotron_fp8.source import Inventory


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that can be read.

    Attributes:
        inventory: what it holds.
        opener: opens the files that the inventory's views are made of; picklable.
        root: the local folder that it lies in; None where it is not local.
    """

    inventory: Inventory
    opener: Opener
    root: Path | None


def open_source(source: str | os.PathLike[str]) -> Source:
    """Take the inventory of a source and say how to open its files. No tensor is read.

    Args:
        source: a checkpoint folder.

    Raises:
        SourceError: it is no checkpoint that can be read; the class says why.
    """
    from nemotron_fp8.read import FolderOpener

    root = Path(source)
    return Source(read_folder(root), FolderOpener(root), root)
